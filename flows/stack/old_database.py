"""Runs of the time when all projects of a user shared one Prefect database, `~/.prefect/prefect.db`.

In: that database, if it speaks of this directory and the project has none of its own yet. Out: a copy of it as the
project's own, made beside and renamed; the old one stays as it is. It is copied whole: runs, schedules, automations and
blocks hang together, and which runs were another project's is not written anywhere. Cost: one pass over it, once.
"""

import contextlib
import logging
import os
import sqlite3
from pathlib import Path

from flows.stack.prefect_home import HOME, home, set_by_user

OLD = Path("~/.prefect/prefect.db")
DATABASE_SETTINGS = ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL")
NAMES_DIRECTORY = (
    "SELECT 1 FROM deployment WHERE instr(pull_steps, :quoted) OR path = :directory LIMIT 1",
    "SELECT 1 FROM artifact WHERE instr(data, :inside) LIMIT 1",
    "SELECT 1 FROM log WHERE instr(message, :inside) LIMIT 1",
)

logger = logging.getLogger(__name__)


def adopt() -> None:
    """Call it before a server of ours starts."""
    new, old = home() / "prefect.db", OLD.expanduser()
    elsewhere = home() != Path(HOME).absolute() or any(set_by_user(name) for name in DATABASE_SETTINGS)
    if elsewhere or new.exists() or not old.exists():
        return
    home().mkdir(mode=0o700, exist_ok=True)
    temporary = new.with_suffix(f".{os.getpid()}.new")
    try:
        with contextlib.closing(sqlite3.connect(f"{old.as_uri()}?mode=ro", uri=True)) as shared:
            if not _names(shared, Path.cwd()):
                return
            with contextlib.closing(sqlite3.connect(temporary)) as copy:
                shared.backup(copy)
        temporary.chmod(0o600)
        temporary.replace(new)
    except sqlite3.Error as error:
        logger.warning("%s cannot be read (%s): earlier runs of this project stay there", old, error)
        return
    finally:
        temporary.unlink(missing_ok=True)
    logger.info("each project has a Prefect database of its own now: %s copied to %s, nothing removed", old, new)


def _names(database: sqlite3.Connection, directory: Path) -> bool:
    """Whether a deployment, an artifact or a line of a log speaks of this directory."""
    words = {"directory": str(directory), "quoted": f'"{directory}"', "inside": f"{directory}/"}
    return any(database.execute(question, words).fetchone() for question in NAMES_DIRECTORY)
