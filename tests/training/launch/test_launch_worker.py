"""The launcher with the real worker on two gloo ranks: memory, stalls, lost ranks, a killed parent."""

import ipaddress
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.support import tiny
from tests.support.listeners import listeners
from training.launch.exits import ExitReason
from training.launch.launcher import ExitReport, launch
from training.launch.run_config import read_config

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("launch")


@pytest.fixture(autouse=True)
def callbacks_of_a_user(monkeypatch):
    """On the path of the ranks."""
    monkeypatch.setenv("PYTHONPATH", str(tiny.USERS_PROJECT))


@pytest.fixture(scope="module")
def plan(root) -> Path:
    return tiny.write_counting_plan(root / "cache")


@pytest.fixture(scope="module")
def expected(root, plan) -> list[float]:
    """Losses of a run that nothing happens to."""
    run_dir = tiny.write_run(root, "plain", plan_dir=plan, save_steps=2, num_processes=2)
    report, events = start(run_dir)
    assert report.reason is ExitReason.completed, report.details
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    return tiny.losses(tiny.metrics(run_dir))


def start(run_dir: Path, resume: bool = False) -> tuple[ExitReport, list[dict[str, Any]]]:
    """Launch RUN; (report, events)."""
    events: list[dict[str, Any]] = []
    settings = read_config(run_dir / "config.yaml").settings
    return launch(run_dir, settings, events.append, lambda line: None, resume), events


def with_hook(root: Path, plan: Path, name: str, **settings: Any) -> Path:
    """A run directory whose callback is one of `users_hooks`; `hook` holds its name and arguments."""
    hook = settings.pop("hook")
    hook["_target_"] = f"users_hooks.{hook['_target_']}"
    run_dir = tiny.write_run(root, name, plan_dir=plan, save_steps=2, num_processes=2, callbacks=[hook], **settings)
    if "config" in hook:
        config = yaml.safe_load((run_dir / "config.yaml").read_text())
        config["callbacks"][0]["config"] = str(run_dir / "config.yaml")
        (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    return run_dir


def test_all_listeners_of_a_training_are_on_loopback(root, plan):
    run_dir = tiny.write_run(root, "listening", plan_dir=plan, max_steps=2, num_processes=2)
    found: list[str] = []
    settings = read_config(run_dir / "config.yaml").settings
    report = launch(run_dir, settings, lambda event: found.extend(listeners()), lambda line: None)
    assert report.reason is ExitReason.completed, report.details
    assert found and {ipaddress.ip_address(address).is_loopback for address in found} == {True}, set(found)


def test_out_of_memory_goes_on_from_the_checkpoint_with_the_same_losses(root, plan, expected):
    hook = {"_target_": "out_of_memory_above", "config": "", "step": 3, "rows": 1}
    run_dir = with_hook(root, plan, "memory", hook=hook)
    report, events = start(run_dir)
    assert report.reason is ExitReason.completed and report.micro_batch_halvings == 1, report.details
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3, 3, 4, 5, 6]
    config = read_config(run_dir / "config.yaml").settings
    assert (config.per_gpu_train_batch_size, config.gradient_accumulation_steps) == (1, 4)
    assert tiny.losses(tiny.metrics(run_dir)) == pytest.approx(expected, rel=1e-5)


def test_a_lost_rank_is_told_and_the_run_goes_on(root, plan, expected):
    checkpoint = root / "lost" / "checkpoints" / "step-000002" / "complete.json"
    run_dir = with_hook(root, plan, "lost", hook={"_target_": "be_killed", "step": 3, "after": str(checkpoint)})
    report, _ = start(run_dir)
    assert report.reason is ExitReason.lost_rank and report.retry_helps
    assert report.message == "rank-0 was killed by SIGKILL" and report.source == "rank-0"
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    (run_dir / "config.yaml").write_text(yaml.safe_dump({**config, "callbacks": None}))
    report, events = start(run_dir, resume=True)
    assert report.reason is ExitReason.completed
    assert [event["step"] for event in events if event["event"] == "step"] == [3, 4, 5, 6]
    assert tiny.losses(tiny.metrics(run_dir)) == expected


def test_a_stall_shows_where_every_rank_hangs(root, plan):
    run_dir = with_hook(root, plan, "stall", hook={"_target_": "hang", "step": 2}, stall_seconds=12)
    report, _ = start(run_dir)
    assert report.reason is ExitReason.lost_rank and "no sign of progress" in report.message
    assert "users_hooks.py" in report.details and "in hang" in report.details  # rank 0 waits in the callback
    assert "[rank-1]" in report.details and "all_reduce" in report.details  # and rank 1 for rank 0
    assert report.seconds < 90


PARENT = """
import sys
from pathlib import Path
from training.launch.run_config import read_config
from training.launch.launcher import launch
run_dir = Path(sys.argv[1])
launch(run_dir, read_config(run_dir / "config.yaml").settings, lambda event: print(event["event"], flush=True), print)
"""


def test_no_rank_survives_a_killed_parent(root, plan):
    run_dir = with_hook(root, plan, "orphans", hook={"_target_": "hang", "step": 2}, stop_deadline_seconds=5)
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(run_dir)], stdout=subprocess.PIPE, text=True)
    for line in parent.stdout:
        if line.strip() == "step":
            break
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) >= 3  # supervisor and two ranks
    killed = time.monotonic()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    print(f"all {len(family)} processes gone after {time.monotonic() - killed:.1f} s")
