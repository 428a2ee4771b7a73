"""MLflow's database in a file, made whole or not at all.

In: its address. Out: where there was no such file, one with all tables. MLflow by itself makes it in its place, by some
fifty migrations that are no transaction: killed among them, or on a disk that fills, it leaves a file that no later run
can use ("table _alembic_tmp_params already exists"). Here it is made beside its place and linked there when it is
complete; of two that do so at once the first wins. Cost: two seconds of CPU, once.
"""

import contextlib
import os
from pathlib import Path

from data_prep import store

PREFIX = "sqlite:///"


def file_of(uri: str) -> Path | None:
    """The file of an SQLite address; None where it is another one."""
    return Path(uri.removeprefix(PREFIX)).absolute() if uri.startswith(PREFIX) else None


def is_missing(uri: str) -> bool:
    """Whether it is a database that would have to be made."""
    path = file_of(uri)
    return path is not None and not path.is_file()


def make_database(uri: str) -> None:
    """Make the file of an SQLite address, unless it is there; other addresses are left to whoever serves them.

    :raises sqlalchemy.exc.OperationalError: it cannot be written.
    """
    path = file_of(uri)
    if path is None or path.is_file():
        return
    from mlflow.store.db.utils import _initialize_tables
    from sqlalchemy import create_engine

    with store.building(path.parent, path.name) as directory:
        engine = create_engine(PREFIX + str(directory / path.name))
        try:
            _initialize_tables(engine)
        finally:
            engine.dispose()
        store.fsync(directory / path.name)
        with contextlib.suppress(FileExistsError):
            os.link(directory / path.name, path)
        store.fsync(path.parent)
