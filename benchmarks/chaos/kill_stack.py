"""A stack left alone with a schedule: any process of it is killed at ten drawn moments, and nobody types a command.

In: a seed. Out: a `Round`: in the end there is one version, with the losses, gradient norms and weights of the same
training undisturbed, schedules are still obeyed, and after `panda down` no process is left. What a machine does by
itself stands beside it: cron, with the line of docs/operations.md. Cost: 15 to 30 minutes, most of them waiting for
servers to notice that somebody is gone.
"""

import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.chaos.findings import Round
from benchmarks.chaos.kill_ranks import model_of, of_steps
from tests.support.stack import ROOT, Stack, running_stack
from training.launch.processes import is_alive, marked
from training.registry.versions import Registry

KILLS = 10
PAUSE_SECONDS = (15, 75)  # between two kills
CRON_SECONDS = 120
HEALED_SECONDS = 1200  # after the last kill
VICTIMS = ("engine", "supervisor", "rank", "worker", "prefect server", "mlflow server", "watch", "keeper")
MODEL = "panda-panda-tiny"
PAUSE = "import time\n\n\ndef pause(record, seconds):\n    time.sleep(seconds)\n"
TRAINING = {"max_steps": 250, "save_steps": 10, "keep_last": 2, "num_processes": 2, "zero_stage": 2, "max_restarts": 3}


class Cron:
    """The line of the crontab that looks whether the stack is up."""

    def __init__(self, stack: Stack):
        self.stack, self.ended = stack, threading.Event()
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self.ended.wait(CRON_SECONDS):
            self.stack.panda("up", "--output_dir", str(self.stack.outputs("short")))

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


def kill_stack(seed: int, ground: Path) -> Round:
    """Ten kills, then the schedule has to bring it to its end."""
    draw, found = random.Random(seed), Round()
    with left_alone(ground / f"stack-{seed}", found) as stack:
        began = time.monotonic()
        while found.tried < KILLS and time.monotonic() < began + KILLS * 300:
            time.sleep(draw.uniform(*PAUSE_SECONDS))
            victim = draw.choice(VICTIMS)
            if killed := _kill(stack, victim):
                found.tried += 1
                print(f"    {time.monotonic() - began:5.0f} s: {victim} {killed} killed", file=sys.stderr, flush=True)
    return found


@contextmanager
def left_alone(folder: Path, found: Round, **environment: str) -> Iterator[Stack]:
    """A stack with a schedule, of which nothing that is done inside must show in the end."""
    folder.mkdir()
    with running_stack(folder, PYTHONPATH=f"{ROOT}:{folder / 'project'}", **environment) as stack:
        (stack.project / "slow.py").write_text(PAUSE)
        whole = _undisturbed(stack)
        conf = _configuration(stack, "short")
        stack.schedule_verb("add", "minutely", "--cron", "* * * * *", "--conf_path", conf)
        with Cron(stack):
            yield stack
            _wait_for_the_end(stack, found)
            for run in stack.scheduled_runs():
                print(f"    {run.name}: {run.state.name}: {run.state.message}", file=sys.stderr, flush=True)
        _compare(stack, whole, found)
    left = [
        process.cmdline()[:4] for process in marked("PREFECT_HOME", str(folder / "prefect")) if is_alive(process.pid)
    ]
    found.expect(not left, "orphaned", f"after panda down: {left}")


def _configuration(stack: Stack, name: str) -> str:
    pause: list[dict[str, Any]] = [{"_target_": "slow.pause", "seconds": 0.4}]
    return stack.config(name, callbacks=pause, **TRAINING)


def _undisturbed(stack: Stack) -> Path:
    """The same training by `train.py`."""
    command = [sys.executable, "train.py", "--conf_path", _configuration(stack, "whole")]
    done = subprocess.run(command, cwd=stack.project, env=stack.env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return _run_of(stack, "whole")


def _run_of(stack: Stack, name: str) -> Path:
    run = stack.newest_run(name)
    assert run, f"no run of {name}"
    return run


def _kill(stack: Stack, victim: str) -> list[int]:
    """SIGKILL; the process ids, none where it is not there just now."""
    pids = [process.pid for process in processes_of(stack, victim)]
    for pid in pids:
        psutil.Process(pid).kill()
    return pids


def processes_of(stack: Stack, victim: str) -> list[psutil.Process]:
    state = stack.state()
    if victim == "keeper":
        return [psutil.Process(state["keeper"])] if is_alive(state["keeper"]) else []
    services = {service["name"]: service["pid"] for service in state["services"]}
    if victim in services:
        return [psutil.Process(services[victim])] if is_alive(services[victim] or 0) else []
    of_runs = [process for process in psutil.process_iter() if _belongs(process, stack)]
    words = {"engine": "prefect.engine", "supervisor": "training.launch.supervisor", "rank": "training.worker"}
    return [process for process in of_runs if words[victim] in process.cmdline()][:1]


def _belongs(process: psutil.Process, stack: Stack) -> bool:
    try:
        alive = process.status() != psutil.STATUS_ZOMBIE
        return alive and process.environ().get("PREFECT_HOME") == stack.env["PREFECT_HOME"]
    except psutil.Error:
        return False


def _wait_for_the_end(stack: Stack, found: Round) -> None:
    """Until a scheduled run finds that there is nothing new to learn."""
    until = time.monotonic() + HEALED_SECONDS
    while time.monotonic() < until:
        time.sleep(10)
        try:
            names = [run.state.name for run in stack.scheduled_runs()]
        except Exception as error:  # the server may just be coming up again
            print(f"    {type(error).__name__}", file=sys.stderr, flush=True)
            continue
        if "SkippedNoNewData" in names:
            return
    found.found("lost", f"{HEALED_SECONDS} s after the last kill the schedule has not come to an end")


def _compare(stack: Stack, whole: Path, found: Round) -> None:
    registry = stack.env.get("MLFLOW_BACKEND_STORE_URI", f"sqlite:///{stack.outputs('short')}/mlflow.db")
    versions = Registry(registry).versions(MODEL)
    found.expect(len(versions) == 1, "wrong" if versions else "lost", f"{len(versions)} versions")
    found.expect(versions and "champion" in versions[0].aliases, "wrong", "version 1 is not the champion")
    run = _run_of(stack, "short")
    found.expect(of_steps(run) == of_steps(whole), "wrong", "losses differ from those of the training undisturbed")
    found.expect(model_of(run) == model_of(whole), "wrong", "the model has other bytes")
