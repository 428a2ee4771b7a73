"""What an older version of this program has left is read, gone on with and reproduced by this one.

``assets/run-of-version-0.1.tar.xz`` holds what commit c37a824 wrote for a tiny model on 262 records: the prepared data,
a finished run that became version 1 and champion, a run killed with kill -9 after its checkpoint of step 4, the MLflow
database, and the losses of the killed run had it not been killed. It was made in /tmp/kept; its files are moved by
rewriting that path.
"""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.support import warm
from tests.support.kept import MADE_IN, unpack
from tests.support.prefect_database import new_home

ROOT = Path(__file__).parents[2]
VERSION = "models:/panda-panda-tiny/1"

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.usefixtures("use_prefect_server")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("older")
    unpack(path)
    for file in path.rglob("*"):
        if file.name == "MLmodel" or file.suffix in (".json", ".yaml"):
            file.write_text(file.read_text().replace(MADE_IN, str(path)))
    with closing(sqlite3.connect(path / "outputs" / "mlflow.db")) as database, database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            for column in [row[1] for row in database.execute(f"PRAGMA table_info({table})")]:
                database.execute(
                    f"UPDATE {table} SET {column} = replace({column}, ?, ?) WHERE {column} LIKE ?",
                    (MADE_IN, str(path), f"%{MADE_IN}%"),
                )
    return path


def run(folder: Path, *command: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **warm.environment(), "PREFECT_HOME": str(new_home(folder / "prefect"))}
    done = warm.run([sys.executable, *command], folder, env, 1500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def answer(folder: Path, *command: str) -> dict:
    return json.loads(run(folder, *command, "--json").stdout.splitlines()[-1])


def test_prepared_data_is_whole_and_tells_its_story(folder):
    run(folder, "-m", "flows.cli.main", "verify")
    story = run(folder, "-m", "flows.cli.main", "why", "a.jsonl:6", "--conf_path", "outputs/done/config.yaml").stdout
    assert "rejected" in story and "missing_field" in story


def test_lineage_of_a_version(folder):
    told = answer(folder, "-m", "flows.cli.main", "lineage", VERSION)
    assert told["run_dir"] == str(folder / "outputs" / "done") and told["aliases"] == ["champion"]
    assert {file["now"] for file in told["corpus"]["files"]} == {"unchanged"}


def test_a_killed_run_is_gone_on_with_from_its_checkpoint(folder):
    """Nothing is prepared again, the losses are those of a run that was not killed, one more version is registered."""
    before = sorted(path.name for path in (folder / "cache").glob("*/*"))
    summary = answer(folder, str(ROOT / "train.py"), "--resume", "--run_name", "killed")
    assert sorted(path.name for path in (folder / "cache").glob("*/*")) == before
    lines = (folder / "outputs" / "killed" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    expected = json.loads((folder / "losses-of-the-uninterrupted-run.json").read_text())
    assert losses == pytest.approx(expected, rel=1e-4) and len(losses) == 60
    assert summary["model"]["uri"] == "models:/panda-panda-tiny/2"
    assert summary["gate"]["champion"] == VERSION  # the older version was loaded and asked


def test_a_version_is_reproduced(folder):
    shutil.rmtree(folder / "cache")
    told = answer(folder, "-m", "flows.cli.main", "reproduce", VERSION)
    assert told["agrees"], told
