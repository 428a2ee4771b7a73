"""`panda` alone, in a project that has runs of every kind, a champion, and a run that waits for its time."""

import json
import os
import re
import shutil
from datetime import UTC, datetime, timedelta

import psutil
import pytest

from flows.cli.main import main
from tests.support.mlflow_fixtures import empty_database
from training import run_files
from training.launch.processes import free_port
from training.tracking import run_record
from training.tracking.sync import connect

__all__ = ["empty_database"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty working directory, and no Prefect server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port()}/api")
    return tmp_path


def standing(capsys, *argv: str) -> str:
    assert main([*argv]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def add_run(project, name: str, **files: object) -> None:
    """A run directory with these JSON files beside its configuration; a list is a file of lines."""
    run = project / "outputs" / name
    run.mkdir(parents=True)
    (run / run_files.CONFIG).touch()
    os.utime(run / run_files.CONFIG, (len(name), len(name)))
    for file, content in files.items():
        lines = content if isinstance(content, list) else [content]
        (run / getattr(run_files, file)).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_which_release_it_is(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"panda-train \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_nothing_yet(project, capsys):
    """Each line names the command that changes that, and nothing has been made."""
    said = standing(capsys)
    assert [line.split()[0] for line in said.splitlines()] == ["runs", "champions", "servers", "next", "panda"]
    assert "make demo" in said and "panda up" in said and "panda schedule" in said
    assert not (project / "outputs").exists() and not (project / ".panda").exists()


def test_the_last_runs_and_what_became_of_them(project, capsys):
    me = {"host": os.uname().nodename, "pid": os.getpid(), "started": psutil.Process().create_time()}
    running = {"status": run_record.RUNNING, "owner": me, "experiment": "panda", "run_name": "eeeee", "uri": ""}
    running |= {"params": {}, "tags": {}, "datasets": []}
    steps = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]
    add_run(project, "a", SUMMARY={"outcome": {"name": "Completed", "message": "too old to be shown"}})
    add_run(project, "bb", SUMMARY={"outcome": {"name": "Completed", "message": "panda version 1\nand more"}})
    add_run(project, "ccc", METRICS=steps, OUTCOME={"reason": "non_finite", "message": "the loss is nan " * 20})
    add_run(project, "dddd", METRICS=steps)
    assert json.loads(standing(capsys, "--json").splitlines()[-1])["runs"] == [
        "dddd  was interrupted (step 2, loss 2.5000): python train.py --resume --run_name dddd",
        f"ccc  non_finite: {('the loss is nan ' * 20)[:100]}... (step 2, loss 2.5000)",
        "bb  Completed: panda version 1",
    ]
    add_run(project, "eeeee", METRICS=steps, TRACKING=running)  # by this process
    stopped = {**running, "status": run_record.FINISHED}
    add_run(project, "eeeeee", METRICS=steps, TRACKING=stopped)
    assert json.loads(standing(capsys, "--json").splitlines()[-1])["runs"][0] == (
        "eeeeee  ended where until_stage said (step 2, loss 2.5000); it goes on with --resume --run_name eeeeee"
    )
    add_run(project, "fffffff", SUMMARY=[])
    first, _, second = json.loads(standing(capsys, "--json").splitlines()[-1])["runs"]
    assert first.startswith("fffffff  cannot be read (") and second == "eeeee  runs: step 2, loss 2.5000"


def test_a_corpus_that_has_changed(project, capsys):
    add_run(project, "a", SUMMARY={"outcome": {"name": "Completed", "message": "panda version 2"}})
    (project / "outputs" / "a" / "report").mkdir()
    alarm = {"compared_with": "models:/panda/1", "note": "", "findings": [{"measure": "duplicates"}]}
    (project / "outputs" / "a" / run_files.CORPUS_ALARM).write_text(json.dumps(alarm))
    (run,) = json.loads(standing(capsys, "--json").splitlines()[-1])["runs"]
    assert run == "a  Completed: panda version 2; the corpus has changed: duplicates"


def test_a_champion(project, capsys, empty_database):
    (project / "outputs").mkdir()
    shutil.copyfile(empty_database, project / "outputs" / "mlflow.db")
    client = connect(f"sqlite:///{project}/outputs/mlflow.db")
    client.create_registered_model("panda")
    for number in ("1", "2"):
        client.create_model_version("panda", f"{project}/model", run_id=None)
        client.set_registered_model_alias("panda", "champion", number)
    assert "champions  models:/panda/2" in " ".join(standing(capsys).split(" ")).replace("   ", "  ")


def test_the_next_run_of_a_schedule(project, capsys, prefect_server, use_prefect_server, prefect_client):
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.states import Scheduled

    of_other_tests = FlowRunFilter(state={"type": {"any_": ["SCHEDULED"]}})
    for run in prefect_client.read_flow_runs(flow_run_filter=of_other_tests):
        prefect_client.delete_flow_run(run.id)
    flow = prefect_client.create_flow_from_name("waits")
    deployment = prefect_client.create_deployment(flow, "standing")
    soon = datetime.now(UTC) + timedelta(hours=1)
    for when in (soon + timedelta(days=1), soon):
        prefect_client.create_flow_run_from_deployment(deployment, state=Scheduled(scheduled_time=when))
    said = json.loads(standing(capsys, "--json").splitlines()[-1])["next"]
    assert said == [f"{soon.astimezone():%Y-%m-%d %H:%M %Z}  waits/standing"]
