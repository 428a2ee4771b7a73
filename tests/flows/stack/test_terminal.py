"""What runs in a terminal and is ended by Ctrl-C: a direct run, and deployments that are served."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from data_prep.sample import write_sample
from flows.stack.prefect_server import answers, http_status
from tests.support.stack import Stack, listening, new_stack, num_steps, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture
def stack(tmp_path) -> Stack:
    write_sample(tmp_path / "dataset")
    return new_stack(tmp_path)


def start(stack: Stack, *arguments: str) -> subprocess.Popen:
    """A command of Python, its output in a file."""
    with open(stack.folder / "terminal.log", "wb") as log:
        return subprocess.Popen([sys.executable, *arguments], cwd=stack.project, env=stack.env, stdout=log, stderr=log)


def press_ctrl_c(stack: Stack, process: subprocess.Popen, seconds: float) -> int:
    """The exit code; nothing it has started is left then."""
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    process.send_signal(signal.SIGINT)
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"still there after {seconds} s\n{log_of(stack)}")
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
    return code


def log_of(stack: Stack) -> str:
    return Path(stack.folder / "terminal.log").read_text()


def test_direct_run(stack):
    conf = stack.config("direct", max_steps=100_000, save_steps=1000, num_processes=2)
    process = start(stack, "train.py", "--conf_path", conf)
    wait_for(lambda: num_steps(stack.newest_run("direct")) >= 2 or process.poll() is not None, 180, "two steps")
    assert press_ctrl_c(stack, process, 40) == 130, log_of(stack)
    assert list(stack.newest_run("direct").glob("checkpoints/step-*"))


def test_ctrl_c_twice_waits_for_nobody(stack):
    """The ranks are stopped, so that they would take all of `stop_deadline_seconds`."""
    conf = stack.config("twice", max_steps=100_000, save_steps=1000, num_processes=2, stop_deadline_seconds=600)
    process = start(stack, "train.py", "--conf_path", conf)
    wait_for(lambda: num_steps(stack.newest_run("twice")) >= 2 or process.poll() is not None, 180, "two steps")
    started = psutil.Process(process.pid).children(recursive=True)
    ranks = [one for one in started if "training.worker" in one.cmdline()]
    assert len(ranks) == 2
    for rank in ranks:
        rank.suspend()
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "Ctrl-C again ends them at once" in log_of(stack), 20, "what a second one does")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=3)
    assert press_ctrl_c(stack, process, 20) == 130, log_of(stack)


def test_served_deployments(stack):
    process = start(stack, "-m", "flows.cli.main", "serve-flow", "--state_dir", str(stack.folder / "state"))
    url = stack.env["PREFECT_API_URL"]
    wait_for(lambda: process.poll() is not None or "are being served" in log_of(stack), 120, "deployments")
    state = stack.end_of(stack.start(stack.config("served"), until_stage="plan"))
    assert (state.type.value, state.name) == ("COMPLETED", "Prepared"), log_of(stack)
    state = stack.end_of(stack.start(stack.config("served"), output_dir="/etc/panda"))
    assert state.name == "UserError" and "outside of the directories" in state.message
    assert {address for address, _ in listening(process.pid)} == {"127.0.0.1"}
    assert http_status(url, "") == 401
    press_ctrl_c(stack, process, 60)
    assert not answers(url)
