"""Tracking against real MLflow databases and a real server: true statuses, nothing lost in an outage, no secrets."""

import getpass
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.mlflow_fixtures import server
from training.errors import MlflowAway
from training.launch.exits import ExitReason
from training.launch.launcher import ExitReport
from training.launch.processes import free_port
from training.registry.versions import Registry
from training.run_files import DATA_REPORT
from training.settings import TrackingSettings
from training.tracking import run as tracking
from training.tracking import run_record
from training.tracking.redact import public_link, redact
from training.tracking.run import Dataset, RunMetadata, open_run
from training.tracking.sync import connect
from training.tracking.tags import KIND_TAG

SETTINGS = TrackingSettings()
FACTS = RunMetadata(
    params={"learning_rate": 0.001, "model": "panda-tiny", "mixture": {"a": 2}, "ckpt_path": None},
    datasets=[Dataset("corpus", "0123456789abcdef" * 2, "/data", profile={"records": 12})],
    reports={DATA_REPORT: {"accepted": 12}},
    tags={"panda.plan_fingerprint": "f" * 32},
)


def write_steps(run_dir: Path, first: int, last: int) -> None:
    """Lines of metrics as the worker writes them."""
    with open(run_dir / "metrics.jsonl", "a") as file:
        for step in range(first, last + 1):
            line = {"step": step, "loss": 1 / step, "learning_rate": 1e-3, "target_tokens_per_second": 100.0}
            file.write(json.dumps({**line, "time": 1_700_000_000 + step}) + "\n")


def history(client, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]


def test_a_run_has_params_metrics_data_and_artifacts(run_dir):
    (run_dir / "config.yaml").write_text("mlflow_tracking_uri: postgresql://me:hunter2@db/mlflow\n")
    with open_run(SETTINGS, run_dir, FACTS) as tracked:
        write_steps(run_dir, 1, 12)
        (run_dir / "evaluations.jsonl").write_text(
            json.dumps({"step": 12, "eval_loss": 0.5, "sources": {"instruction": {"loss": 0.4}}}) + "\n"
        )
        client = connect(tracked.uri)
        run_id = tracked.wait_for_run_id()
        assert client.get_run(run_id).info.status == "RUNNING"
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "run-1" and run.info.end_time
    assert run.data.params == {
        "learning_rate": "0.001", "model": "panda-tiny", "mixture": '{"a": 2}', "ckpt_path": "null"
    }  # fmt: skip
    assert history(client, run_id, "loss") == [(step, 1 / step) for step in range(1, 13)]
    assert history(client, run_id, "eval/sources/instruction/loss") == [(12, 0.4)]
    assert run.data.metrics["system/system_memory_usage_percentage"] > 0
    assert run.data.tags["mlflow.user"] == run.info.user_id == getpass.getuser()
    (data,) = run.inputs.dataset_inputs
    assert data.dataset.digest == "0123456789abcdef" * 2 and data.tags[0].value == "training"
    assert len(run.data.tags["mlflow.source.git.commit"]) == 40
    names = {file.path for file in client.list_artifacts(run_id)}
    assert {"config.yaml", "metrics.jsonl", "evaluations.jsonl", "report"} <= names
    reports = {file.path for file in client.list_artifacts(run_id, "report")}
    assert {"report/data.json", "report/environment.json", "report/loss.png"} <= reports
    config = Path(client.download_artifacts(run_id, "config.yaml")).read_text()
    assert "hunter2" not in config and "postgresql://me:***@db/mlflow" in config


def test_the_training_view_opens_unless_somebody_chose_another(run_dir):
    with open_run(SETTINGS, run_dir, FACTS) as tracked:
        run_id = tracked.wait_for_run_id()
    client = connect(tracked.uri)
    experiment = client.get_run(run_id).info.experiment_id
    assert client.get_experiment(experiment).tags[KIND_TAG] == "custom_model_development"
    client.set_experiment_tag(experiment, KIND_TAG, "genai_development")
    again = run_dir.with_name("run-2")
    again.mkdir()
    with open_run(SETTINGS, again, FACTS) as tracked:
        tracked.wait_for_run_id()
    assert client.get_experiment(experiment).tags[KIND_TAG] == "genai_development"


def test_a_description_arrives_without_passwords(run_dir):
    with open_run(SETTINGS, run_dir, FACTS) as tracked:
        run_id = tracked.wait_for_run_id()
        tracked.describe("**better**, see postgresql://me:hunter2@db/mlflow")
    assert connect(tracked.uri).get_run(run_id).data.tags["mlflow.note.content"] == (
        "**better**, see postgresql://me:***@db/mlflow"
    )


HELD_OUT_FACTS = RunMetadata({}, [Dataset("held-out", "a" * 32, "/plan", "validation")])


def keep(run_dir: Path, step: int) -> None:
    """What marks a whole checkpoint, and an evaluation after it."""
    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "complete.json").write_text(json.dumps({"progress": {"step": step}, "files": {}}))
    with open(run_dir / "evaluations.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "eval_loss": abs(step - 6) + 0.5, "time": 1_700_000_000 + step}) + "\n")


def ranked(client, run_id: str) -> list[tuple[str, float]]:
    """(Step, held-out loss) of the run's models, best first, by MLflow's own search."""
    experiment = client.get_run(run_id).info.experiment_id
    order = {"field_name": "metrics.eval/eval_loss", "dataset_name": "held-out", "dataset_digest": "a" * 32}
    models = client.search_logged_models([experiment], order_by=[order])
    losses = [{metric.key: metric.value for metric in model.metrics} for model in models]
    return [(model.params["step"], loss["eval/eval_loss"]) for model, loss in zip(models, losses, strict=True)]


def test_kept_checkpoints_are_ranked_by_their_held_out_loss(run_dir):
    with open_run(SETTINGS, run_dir, HELD_OUT_FACTS) as tracked:
        run_id = tracked.wait_for_run_id()
        write_steps(run_dir, 1, 12)
        for step in (3, 6, 12):
            keep(run_dir, step)
    client = connect(tracked.uri)
    assert ranked(client, run_id) == [("6", 0.5), ("3", 3.5), ("12", 6.5)]
    assert history(client, run_id, "eval/eval_loss") == [(3, 3.5), (6, 0.5), (12, 6.5)]  # none of them twice
    outputs = client.get_run(run_id).outputs.model_outputs
    assert sorted(output.step for output in outputs) == [3, 6, 12]
    models = client.search_logged_models([client.get_run(run_id).info.experiment_id])
    assert {str(model.status) for model in models} == {"READY"} and len({m.name for m in models}) == 3
    assert client.list_logged_model_artifacts(models[0].model_id)[0].path == "complete.json"


def test_a_resumed_run_that_ends_before_anything_is_sent_ends_in_mlflow_too(run_dir, monkeypatch):
    with open_run(SETTINGS, run_dir, HELD_OUT_FACTS) as tracked:
        run_id = tracked.wait_for_run_id()
    monkeypatch.setattr(tracking, "_follow", lambda *_: None)  # as when it is done at once, or the server is away
    with open_run(SETTINGS, run_dir, HELD_OUT_FACTS) as tracked:
        keep(run_dir, 9)
    assert ranked(connect(tracked.uri), run_id) == [("9", 3.5)]


def test_a_resumed_run_takes_back_checkpoints_it_no_longer_keeps(run_dir):
    with open_run(SETTINGS, run_dir, HELD_OUT_FACTS) as tracked:
        run_id = tracked.wait_for_run_id()
        keep(run_dir, 3)
        keep(run_dir, 6)
    with open_run(SETTINGS, run_dir, HELD_OUT_FACTS) as tracked:
        shutil.rmtree(run_dir / "checkpoints" / "step-000003")
        keep(run_dir, 9)
    assert ranked(connect(tracked.uri), run_id) == [("6", 0.5), ("9", 3.5)]


def test_a_run_that_may_go_on_has_no_models_yet(run_dir):
    with pytest.raises(RuntimeError), open_run(SETTINGS, run_dir, HELD_OUT_FACTS) as tracked:
        run_id = tracked.wait_for_run_id()
        keep(run_dir, 3)
        raise RuntimeError
    assert ranked(connect(tracked.uri), run_id) == []


class TrainingFailed(Exception):
    def __init__(self, reason: ExitReason):
        self.report = ExitReport(reason)


class Cancelled(BaseException):
    """What Prefect raises on a cancelled run is no Exception."""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("x"), "FAILED"),
        (TrainingFailed(ExitReason.lost_rank), "FAILED"),
        (TrainingFailed(ExitReason.cancelled), "KILLED"),
        (Cancelled(), "KILLED"),
    ],
)
def test_the_status_is_what_happened(run_dir, error, status):
    with pytest.raises(type(error)), open_run(SETTINGS, run_dir, FACTS) as tracked:
        raise error
    assert connect(tracked.uri).get_run(tracked.run_id).info.status == status


KILLED_RUN = """
import sys, time
from pathlib import Path
from tests.training.tracking.test_run import FACTS, SETTINGS, write_steps
from training.tracking.run import open_run
run_dir = Path(sys.argv[1])
with open_run(SETTINGS, run_dir, FACTS) as tracked:
    write_steps(run_dir, 1, 3)
    tracked.wait_for_run_id()
    write_steps(run_dir, 4, 5)
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_killed_run_is_closed_by_the_next_one(run_dir):
    process = subprocess.Popen([sys.executable, "-c", KILLED_RUN, str(run_dir)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)  # alive: left alone
    next_dir = run_dir.with_name("run-2")
    next_dir.mkdir()
    uri = tracking.tracking_uri(SETTINGS, run_dir.parent)
    assert tracking.reconcile(run_dir.parent, uri) == []
    process.kill()
    process.wait()
    process.stdout.close()
    with open_run(SETTINGS, next_dir, FACTS) as tracked:
        tracked.wait_for_run_id()
    client = connect(uri)
    killed = run_record.read(run_dir).run_id
    assert client.get_run(killed).info.status == "KILLED" and killed != tracked.run_id
    assert [step for step, _ in history(client, killed, "loss")] == [1, 2, 3, 4, 5]
    assert client.get_run(tracked.run_id).info.status == "FINISHED"


def test_a_resumed_run_is_the_same_mlflow_run(run_dir):
    with pytest.raises(RuntimeError), open_run(SETTINGS, run_dir, FACTS) as first:
        write_steps(run_dir, 1, 8)
        raise RuntimeError("a rank was lost")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(lines[:5]))  # resumed from the checkpoint of step 5
    changed = RunMetadata({**FACTS.params, "learning_rate": 5.0}, FACTS.datasets)
    with open_run(SETTINGS, run_dir, changed) as second:
        client = connect(second.uri)
        assert client.get_run(second.wait_for_run_id()).info.status == "RUNNING"
        write_steps(run_dir, 6, 12)
    assert first.run_id == second.run_id
    run = client.get_run(second.run_id)
    assert run.info.status == "FINISHED" and run.data.params["learning_rate"] == "0.001"
    assert history(client, second.run_id, "loss") == [(step, 1 / step) for step in range(1, 13)]
    assert len(run.inputs.dataset_inputs) == 1


def test_a_lost_answer_to_create_run_makes_no_second_run(run_dir):
    with open_run(SETTINGS, run_dir, FACTS) as tracked:
        tracked.wait_for_run_id()
    record = run_record.read(run_dir)
    record.run_id, record.sent_facts, record.sent_offsets = None, False, {}
    run_record.write(run_dir, record)
    assert tracked.sync()
    client = connect(tracked.uri)
    experiment = client.get_experiment_by_name(SETTINGS.experiment_name)
    assert len(client.search_runs([experiment.experiment_id])) == 1


def test_an_outage_loses_nothing_and_stops_nothing(run_dir, caplog, monkeypatch):
    port = free_port()
    settings = TrackingSettings(mlflow_tracking_uri=f"http://me:hunter2@127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    started = time.monotonic()
    with open_run(settings, run_dir, FACTS) as tracked:
        write_steps(run_dir, 1, 12)
        assert time.monotonic() - started < 5  # opening waits for nothing
        with pytest.raises(MlflowAway, match="no run could be opened"):
            tracked.wait_for_run_id()
    assert tracked.run_id is None and "sent later" in caplog.text and "hunter2" not in caplog.text
    assert "hunter2" not in (run_dir / "tracking.json").read_text()
    with server(run_dir.parent, port):
        assert tracking.reconcile(run_dir.parent, tracked.uri) == [run_dir]
        client = connect(tracked.uri)
        assert client.get_run(tracked.run_id).info.status == "FINISHED"
        assert history(client, tracked.run_id, "loss") == [(step, 1 / step) for step in range(1, 13)]
        assert {"metrics.jsonl", "report"} <= {file.path for file in client.list_artifacts(tracked.run_id)}
        assert tracking.reconcile(run_dir.parent, tracked.uri) == []


def test_two_registries_in_one_process_and_nothing_in_the_environment(run_dir, tmp_path, monkeypatch):
    """MLflow would write the URI, with its password, into the environment of the ranks and of the next run."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    other = tmp_path / "others" / "run-1"
    other.mkdir(parents=True)
    for directory in (run_dir, other):
        with open_run(SETTINGS, directory, FACTS) as tracked:
            assert tracked.wait_for_run_id() and tracked.uri == f"sqlite:///{directory.parent}/mlflow.db"
    assert not {"MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"} & os.environ.keys()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:hunter2@db/mlflow")
    assert tracking.tracking_uri(SETTINGS, other.parent) == "postgresql://me:hunter2@db/mlflow"
    connect(f"sqlite:///{run_dir.parent}/mlflow.db")
    assert os.environ["MLFLOW_TRACKING_URI"] == "postgresql://me:hunter2@db/mlflow"


def test_what_people_are_shown_of_a_server_or_database():
    assert public_link("https://me:hunter2@host:5000/x") == "https://host:5000/x"
    assert public_link("postgresql://me:hunter2@host/mlflow") is None
    assert Registry("postgresql://me:hunter2@host/mlflow").shown_uri == "postgresql://me:***@host/mlflow"


def test_secrets_are_hidden():
    values = {"hf_token": "x", "uri": "http://me:pw@host/x", "max_tokens": 5, "token": None, "deep": [{"api_key": 1}]}
    assert redact(values) == {
        "hf_token": "***", "uri": "http://me:***@host/x", "max_tokens": 5, "token": None, "deep": [{"api_key": "***"}]
    }  # fmt: skip


def test_mlflows_own_variable_is_heard_where_nothing_is_set(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking.tracking_uri(TrackingSettings(), tmp_path) == "http://127.0.0.1:5000"
    assert tracking.tracking_uri(TrackingSettings(mlflow_tracking_uri="sqlite:///x.db"), tmp_path) == "sqlite:///x.db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking.tracking_uri(TrackingSettings(), tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"


def test_two_threads_import_mlflow_at_once():
    """The one that sends and the one that registers: Python would give the second a half imported package."""
    code = (
        "import sys, threading, time\n"
        "from training.tracking.sync import connect\n"
        "from training.registry.register import with_retries\n"
        "thread = threading.Thread(target=connect, args=(sys.argv[1],))\n"
        "thread.start()\n"
        "time.sleep(0.02)\n"
        "with_retries(lambda: None)\n"
        "thread.join()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "http://127.0.0.1:9"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
