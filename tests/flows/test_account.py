"""Time and cost of whole runs: one that its hours end, beside what Prefect has measured, and one that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter

from configs.settings import PandaSettings
from flows.cli.run import call_flow
from flows.cli.run import show as print_summary
from tests.flows.test_end_to_end import ROOT, SMALL
from tests.flows.test_every_run_is_registered import (  # noqa: F401  # fixtures
    INSTRUCTIONS,
    SETTINGS,
    flow_in_this_process,
    ranks_in_this_process,
    save_base,
)
from tests.support import warm
from tests.support.prefect_database import new_home
from training import run_files
from training.registry.versions import Registry
from training.tracking.sync import connect
from training.tracking.tags import STOPPED_TAG

pytestmark = pytest.mark.slow
PREPARE = ("validate and shard", "tokenize and mask", "plan packing")


@pytest.fixture
def stopped(tmp_path, flow_in_this_process, ranks_in_this_process):  # noqa: F811  # fixtures
    """A run whose hours are over after its first step; its settings and summary."""
    corpus = tmp_path / "instructions"
    corpus.mkdir()
    (corpus / "records.json").write_text(json.dumps(INSTRUCTIONS))
    save_base(tmp_path / "base", bos=True)
    values = {
        **SETTINGS, "max_steps": 50, "save_steps": 20, "ckpt_path": str(tmp_path / "base"), "validation_fraction": 0.6,
        "instruction_tuning_data_dir": str(corpus), "pretraining_data_dir": None, "output_dir": str(tmp_path / "out"),
        "overrides": ["pretraining_data_dir=null"], "cache_dir": str(tmp_path / "cache"),
        "max_gpu_hours": 1e-6, "price_per_gpu_hour": 1e6, "currency": "CHF", "run_name": "short",
    }  # fmt: skip
    return values, call_flow(values)


def test_a_run_whose_hours_are_over_is_registered_and_tells_its_cost(stopped, tmp_path, prefect_client, capsys):
    values, summary = stopped
    says = "max_gpu_hours=1e-06 ended training after step 1 of 50"
    assert (summary["training"]["steps"], summary["training"]["stopped"]) == (1, says)
    assert summary["gate"]["candidate"] == summary["model"]["uri"] and summary["losses"]["after"]
    account, run_dir = summary["account"], Path(summary["run_dir"])
    wall, seconds = account["wall_seconds"], account["part_seconds"]

    assert sum(seconds.values()) == pytest.approx(wall, rel=1e-9)
    run = prefect_client.read_flow_run(summary["prefect_flow_run_id"])
    of_run = FlowRunFilter.model_validate({"id": {"any_": [run.id]}})
    tasks = {task.name: task for task in prefect_client.read_task_runs(flow_run_filter=of_run)}
    measured = (tasks["promote"].end_time - run.expected_start_time).total_seconds()
    assert wall == pytest.approx(measured, rel=0.01, abs=0.5), "as Prefect has measured it"
    took = {name: task.total_run_time.total_seconds() for name, task in tasks.items()}
    assert seconds["prepare"] >= sum(took[name] for name in PREPARE) - 0.1
    assert seconds["evaluate"] >= took["evaluate"] + took["gate"] - 0.1
    assert 0 < account["rank_hours"] * 3600 <= wall - seconds["prepare"]
    assert account["price"] == pytest.approx(account["rank_hours"] * 1e6)

    uri = f"sqlite:///{tmp_path}/out/mlflow.db"
    tracked = connect(uri).get_run(summary["mlflow_run_id"]).data
    assert tracked.tags[STOPPED_TAG] == says == Registry(uri).resolve(summary["model"]["uri"]).tags[STOPPED_TAG]
    for name in ("goodput", "rank_hours", "price"):
        assert tracked.metrics[name] == pytest.approx(account[name])
    assert tracked.metrics["part_seconds/prepare"] == pytest.approx(seconds["prepare"])

    price = f"{account['price']:,.2f} CHF"
    shown = prefect_client.read_artifacts(
        artifact_filter=ArtifactFilter.model_validate(
            {"flow_run_id": {"any_": [run.id]}, "key": {"any_": ["overview"]}}
        )
    )[0].data
    page = (run_dir / run_files.PAGE).read_text()
    assert all(price in text and says in text and "goodput" in text for text in (shown, page))
    print_summary(summary, PandaSettings(output_dir=values["output_dir"]))
    assert capsys.readouterr().out.rstrip().splitlines()[-1].endswith(f"price {price}")

    again = call_flow({**values, "resume": True})
    assert again["training"] == summary["training"] and again["model"]["version"] == summary["model"]["version"]
    more = call_flow({**values, "resume": True, "max_gpu_hours": 100.0, "max_steps": 3})
    assert (more["training"]["steps"], more["training"]["stopped"]) == (3, "")
    assert int(more["model"]["version"]) == int(summary["model"]["version"]) + 1
    assert more["account"]["rank_hours"] > again["account"]["rank_hours"] >= account["rank_hours"]
    assert connect(uri).get_run(summary["mlflow_run_id"]).data.tags[STOPPED_TAG] == ""


@pytest.mark.distributed
@pytest.mark.usefixtures("use_prefect_server")
def test_what_a_kill_has_cost_is_named(tmp_path):
    """The process of the flow is killed; its ranks have no time for a checkpoint."""
    command = [
        sys.executable, str(ROOT / "train.py"), "--json", "--model", "panda-tiny", "--run_name", "killed",
        "--max_steps", "40", "--save_steps", "4", "--stop_deadline_seconds", "0.01", *SMALL,
    ]  # fmt: skip
    home = new_home(tmp_path / "prefect")
    where = {"cwd": tmp_path, "env": {**os.environ, **warm.environment(), "PREFECT_HOME": str(home)}}
    steps = tmp_path / "outputs" / "killed" / run_files.METRICS
    with subprocess.Popen(command, **where, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(run_files.read_lines(steps)) < 7:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    killed = time.time()
    time.sleep(2)
    done = warm.run([*command, "--resume"], where["cwd"], where["env"], 1500)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    lines = run_files.read_lines(steps.with_name(run_files.TIME))
    resumed = next(line for line in lines if "resumed_from" in line)
    seconds = summary["account"]["part_seconds"]
    assert 0 < resumed["resumed_from"] < 40 and seconds["repeated"] > 0
    assert 1.5 <= seconds["down"] <= resumed["time"] - killed + 1
    assert sum(seconds.values()) == pytest.approx(summary["account"]["wall_seconds"], rel=1e-9)
