"""Real processes to be killed, started for the price of a fork: their imports are done once, in a clean server process.

In: a function of a module, its arguments, a log file. Out: a process that leads its own session, marked, so that
whatever it leaves behind is found. Cost: the imports once (10 s), then 20 ms a process.
"""

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil

from training.launch.processes import free_port, is_alive, kill_all, marked

MARK = "PANDA_CHAOS"
FORK_SERVER = multiprocessing.get_context("forkserver")
PRELOADED = [
    "training.worker", "training.trainer.run", "training.engines.deepspeed", "training.engines.fsdp", "peft",
    "bitsandbytes", "flows.cli.main", "flows.panda_train", "mlflow",
]  # fmt: skip
QUIET = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
GONE_SECONDS = 60
"""The promise is 30 s; on a machine that does other work as well a process may take longer to notice."""


@contextlib.contextmanager
def hatchery() -> Iterator[None]:
    """Inside it victims can be started."""
    os.environ.update(QUIET)
    FORK_SERVER.set_forkserver_preload(PRELOADED)
    yield


def start(
    function: Callable[..., None], *arguments: Any, log: Path, mark: str, **environment: str
) -> ForkServerProcess:
    """Call a function in a process of its own."""
    process = FORK_SERVER.Process(
        target=_run, args=(function, arguments, log, {MARK: mark, **environment}), daemon=False
    )
    process.start()
    return process


def _run(function: Callable[..., None], arguments: tuple[Any, ...], log: Path, environment: dict[str, str]) -> None:
    os.setsid()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    function(*arguments)


def train_rank(config: Path, resume: bool) -> None:
    """What `python -m training.worker` does."""
    from training import worker
    from training.launch.exits import run_rank

    sys.argv = ["training.worker", "--config", str(config), *(["--resume"] if resume else [])]
    run_rank(worker.main)


def start_ranks(run_dir: Path, world_size: int, resume: bool, mark: str) -> list[ForkServerProcess]:
    """The ranks of a run, as the launcher starts them."""
    port = str(free_port())
    return [
        start(
            train_rank, run_dir / "config.yaml", resume, log=run_dir / f"rank-{rank}.log", mark=mark, RANK=str(rank),
            LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )
        for rank in range(world_size)
    ]  # fmt: skip


def train_flow(arguments: list[str], folder: Path) -> None:
    """What `python train.py` does."""
    from flows.cli.main import train_main

    os.chdir(folder)
    os._exit(train_main(arguments))


def wait_until(happened: Callable[[], Any], processes: list[ForkServerProcess], seconds: float = 300) -> bool:
    """Whether it happened before one of the processes ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if happened():
            return True
        if any(process.exitcode is not None for process in processes):
            return bool(happened())
        time.sleep(0.002)
    return False


def kill(processes: list[ForkServerProcess]) -> bool:
    """SIGKILL; whether there was something to kill."""
    alive = [process for process in processes if process.exitcode is None]
    for process in alive:
        process.kill()
    for process in processes:
        process.join()
    return bool(alive)


def end(processes: list[ForkServerProcess], seconds: float = 600) -> list[int | None]:
    """Exit codes; None for what had to be killed."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    kill(processes)
    return codes


def left_over(mark: str, seconds: float = GONE_SECONDS) -> list[str]:
    """Processes of a victim that outlive it; they are ended here."""

    def living() -> list[psutil.Process]:
        return [process for process in marked(MARK, mark) if is_alive(process.pid)]

    deadline = time.monotonic() + seconds
    while (found := living()) and time.monotonic() < deadline:
        time.sleep(0.2)
    names = []
    for process in found:
        with contextlib.suppress(psutil.Error):
            names.append(" ".join(process.cmdline())[:200])
    kill_all(living)
    return names
