"""Preparation on a Dask cluster of two real worker processes: the same bytes as here, whoever of it is killed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.sorting import FlowRunSort
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from data_prep import store
from tests.support import warm
from tests.support.dask_cluster import Cluster, cluster
from tests.support.stack import ROOT, wait_for
from training.launch.processes import free_port

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.usefixtures("use_prefect_server")]

NUM_FILES = 1000
SLOW_READER = """
import json, time

def read(path):
    time.sleep(0.15)
    return [json.loads(line) for line in open(path)]
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """So many files that a Prefect task for each would be felt, and one that is cut into parts."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(NUM_FILES):
        write_records(folder / f"{number:04}.jsonl", number, 60)
    write_records(folder / "large.jsonl", NUM_FILES, 260_000)
    return folder


def write_records(path: Path, number: int, count: int) -> None:
    records = ({"input": f"question {number} {i}", "target": f"answer {i} " * 9} for i in range(count))
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def train_up_to_the_plan(folder: Path, corpus: Path, **settings: str) -> tuple[list[str], dict[str, str]]:
    """A command that makes everything below the folder, which is made; its environment."""
    folder.mkdir(exist_ok=True)
    places = {"instruction_tuning_data_dir": corpus, "cache_dir": folder / "cache", "output_dir": folder / "outputs"}
    chosen = {"model": "panda-tiny", "until_stage": "plan", **places, **settings}
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "--json",
        *(word for key, value in chosen.items() for word in flag(key, value)),
    ]
    return command, {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}"}


def flag(name: str, value: object) -> list[str]:
    return [f"--{name}", str(value)]


def prepared(folder: Path, corpus: Path, **settings: str) -> dict:
    """The summary of a run that has to succeed."""
    command, env = train_up_to_the_plan(folder, corpus, **settings)
    done = warm.run(command, folder, env, 900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def contents(cache: Path) -> dict[str, str]:
    return {
        str(path.relative_to(cache)): store.hash_file(path) for path in sorted(cache.glob("*/*/*")) if path.is_file()
    }


def test_same_bytes_and_few_tasks(corpus, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    prepared(here, corpus)
    with cluster(tmp_path) as dask:
        summary = prepared(there, corpus, prepare_cluster=dask.address)
    assert summary["data"]["records_in"] == 60 * NUM_FILES + 260_000
    assert contents(there / "cache") == contents(here / "cache")
    batches = {f"tokenize: batch {number} of 8" for number in range(1, 9)}
    wait_for(lambda: batches <= tasks_of_newest_run().keys(), 60, "the server to have recorded the tasks")
    assert len(tasks_of_newest_run()) <= 2 * 8 + 4


def tasks_of_newest_run() -> dict[str, bool]:
    """Name of each task -> whether it is completed; runs that other tests have scheduled have not started."""
    there = (PREFECT_API_URL, PREFECT_API_AUTH_STRING)
    api = temporary_settings({setting: os.environ[setting.name] for setting in there})
    with api, get_client(sync_client=True) as client:
        started = FlowRunFilter(start_time={"is_null_": False})
        run = client.read_flow_runs(flow_run_filter=started, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=1)[0]
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [run.id]}))
    return {task.name: task.state.is_completed() for task in tasks}


@dataclass
class Slow:
    """A preparation of 40 files that takes six seconds, and what it makes here."""

    folder: Path
    corpus: Path
    reader = '{"_target_": "slow_reader.read"}'

    def place(self, name: str) -> Path:
        there = self.folder / name
        there.mkdir()
        (there / "slow_reader.py").symlink_to(self.folder / "slow_reader.py")
        (there / "panda.toml").write_text('allowed_targets = ["slow_reader"]')  # workers find it by PYTHONPATH
        return there

    def disturbed(self, name: str, disturb: Callable[[Cluster], None]) -> str:
        """What a run on a cluster has logged to which something is done when it has made a few units."""
        there, log = self.place(name), self.folder / f"{name}.log"
        with cluster(self.folder) as dask:
            command, env = train_up_to_the_plan(there, self.corpus, reader=self.reader, prepare_cluster=dask.address)
            with log.open("w") as file:
                run = subprocess.Popen(command, cwd=there, env=env, stdout=file, stderr=file)
            wait_for(lambda: len(units(there)) >= 6, 120, "some units")
            before = units(there)
            disturb(dask)
            assert run.wait(timeout=900) == 0, log.read_text()
        assert len(before) < 40
        assert before.items() <= units(there).items()
        assert contents(there / "cache") == contents(self.folder / "here" / "cache")
        return log.read_text()


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> Slow:
    folder = tmp_path_factory.mktemp("slow")
    slow = Slow(folder, folder / "corpus")
    slow.corpus.mkdir()
    for number in range(40):
        write_records(slow.corpus / f"{number:02}.jsonl", number, 50)
    (folder / "slow_reader.py").write_text(SLOW_READER)
    prepared(slow.place("here"), slow.corpus, reader=slow.reader)
    return slow


def test_killed_worker_loses_nothing(slow):
    """One of two is killed with -9 in the middle of a batch; what it had finished is kept, the other goes on."""
    slow.disturbed("there", lambda dask: dask.workers[0].kill())
    wait_for(lambda: all(tasks_of_newest_run().values()), 30, "the killed task to be told completed by its successor")


def test_lost_scheduler_is_waited_for(slow):
    """All of the cluster is killed and started again; the run goes on there with what is not done."""

    def kill_and_start(dask: Cluster) -> None:
        dask.kill()
        dask.start()

    assert "went away; trying again" in slow.disturbed("lost", kill_and_start)


def units(folder: Path) -> dict[str, int]:
    """Finished units of records, and when their manifests were written."""
    manifests = (folder / "cache" / "records").glob("[!.]*/manifest.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in manifests}


def test_no_scheduler_is_said(corpus, tmp_path):
    command, env = train_up_to_the_plan(tmp_path, corpus, prepare_cluster=f"tcp://127.0.0.1:{free_port()}")
    started = time.monotonic()
    done = warm.run(command, tmp_path, env, 120)
    assert done.returncode == 2
    assert "no Dask scheduler answers there" in done.stderr
    assert time.monotonic() - started < 60
