"""A Prefect database as a new server makes it, copied into the homes of tests: making one takes longer than a start.

In: a directory that becomes a PREFECT_HOME. Out: `prefect.db` in it. Cost: 5 s of a processor once for all processes of
a test run, and for later ones with the same Prefect. That servers make their own is tested where one does.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from data_prep import store

ROOT = Path(__file__).parents[2]


def new_home(home: Path) -> Path:
    """The directory, with a database in it; one that is there stays."""
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "prefect.db").exists():
        for file in _made().glob("prefect.db*"):
            shutil.copy(file, home / file.name)
    return home


def _made() -> Path:
    kept = Path(tempfile.gettempdir(), f"panda-tests-{os.getuid()}")
    return store.build(kept, f"prefect-{version('prefect')}", _make).path


def _make(home: Path) -> dict[str, str]:
    environment = {**os.environ, "PREFECT_HOME": str(home), "PREFECT_PROFILES_PATH": str(home / "profiles.toml")}
    command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return {"prefect": version("prefect")}
