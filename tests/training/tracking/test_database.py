"""MLflow's database is whole or is not there, whatever happens while it is made."""

import resource
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from tests.support.tiny import ROOT
from training.tracking import sync
from training.tracking.database import make_database

PROGRAM = "import sys; from training.tracking import sync; sync.connect(sys.argv[1]).search_experiments()"


def start(uri):
    return subprocess.Popen([sys.executable, "-c", PROGRAM, uri], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def num_tables(path):
    return sqlite3.connect(path).execute("select count(*) from sqlite_master where type = 'table'").fetchone()[0]


def until_begun(folder, process):
    while not any(file.stat().st_size > 50_000 for file in folder.glob(".building-*/mlflow.db")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)


def test_killed_while_it_is_made(tmp_path):
    path = tmp_path / "mlflow.db"
    process = start(f"sqlite:///{path}")
    until_begun(tmp_path, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not path.exists()
    again = start(f"sqlite:///{path}")
    assert again.wait() == 0, again.stderr.read()
    assert num_tables(path) > 50 and [file.name for file in tmp_path.iterdir()] == ["mlflow.db"]


def test_two_at_once(tmp_path):
    path = tmp_path / "mlflow.db"
    both = [start(f"sqlite:///{path}") for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0], [process.stderr.read() for process in both]
    assert [file.name for file in tmp_path.iterdir()] == ["mlflow.db"]


def test_on_a_disk_that_is_full(tmp_path):
    path = tmp_path / "mlflow.db"
    sync.import_mlflow()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(sync.away_errors()):
            make_database(f"sqlite:///{path}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
    make_database(f"sqlite:///{path}")
    assert num_tables(path) > 50


def test_what_is_there_and_what_is_no_file_stays_as_it_is(tmp_path):
    path = tmp_path / "mlflow.db"
    path.write_bytes(b"")
    make_database(f"sqlite:///{path}")
    make_database("http://127.0.0.1:9")
    assert path.read_bytes() == b""
