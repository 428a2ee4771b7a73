"""Processes that begin where imports end: forked from one that has imported torch, transformers and the engines once.

In: what `python -m` would be given: a module, its arguments, an environment, a log. Out: a `Process`, used as one of
`subprocess`. It has a pid, dies and is waited for like any other; only its parent is the nursery, which each process of
the tests starts when it first needs one and which ends with it, and with it all it has forked. Cost: 0.3 s a process
instead of 6. What is tested of starting itself (the launcher, torchrun, imports, signals before them) starts for real.
"""

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OF_RANKS = (
    "training.trainer.run", "training.comparison.heldout", "training.engines.deepspeed", "training.engines.fsdp",
    "training.engines.inference", "transformers.models.llama.modeling_llama", "peft", "bitsandbytes",
)  # fmt: skip


class Process:
    """A child of the nursery."""

    def __init__(self, pid: int, nursery: "Nursery") -> None:
        self.pid, self.nursery = pid, nursery

    @property
    def returncode(self) -> int | None:
        return self.nursery.ended.get(self.pid)

    def poll(self) -> int | None:
        self.nursery.listen(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.nursery.listen(0.5)
        return code

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Nursery:
    """The side of the tests: asks for processes, and hears of their end."""

    def __init__(self, *preloaded: str) -> None:
        self.ended: dict[int, int] = {}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.warm", *preloaded],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._read() == {"ready": True}

    def start(self, module: str, arguments: list[str], env: dict[str, str], log: Path) -> Process:
        """`python -m MODULE ARGUMENTS` in the project's directory, its output appended to the log."""
        job = {"module": module, "arguments": arguments, "env": env, "log": str(log)}
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.process.stdin.flush()
        while "started" not in (told := self._read()):
            self.ended[told["pid"]] = told["code"]
        return Process(told["started"], self)

    def listen(self, seconds: float) -> None:
        """Note whose end is told within this time."""
        while select.select([self.process.stdout], [], [], seconds)[0]:
            told = self._read()
            self.ended[told["pid"]] = told["code"]
            seconds = 0

    def _read(self) -> dict[str, Any]:
        line = b""
        while not line.endswith(b"\n"):  # byte by byte: `select` knows nothing of what a buffer holds
            byte = os.read(self.process.stdout.fileno(), 1)
            assert byte, "the nursery has ended"
            line += byte
        return json.loads(line)


@cache
def ranks() -> Nursery:
    """For all that train, evaluate and compare."""
    return Nursery(*OF_RANKS)


def main() -> None:
    """The nursery: import, then fork whenever asked. Its stdout is for what it tells, not for its children."""
    from training.lean_imports import UNUSED, without

    told = os.dup(1)
    os.dup2(2, 1)
    with without(*UNUSED):
        for name in sys.argv[1:]:
            importlib.import_module(name)
    job = serve(told)
    if job:
        become(job, told)


def serve(told: int) -> dict[str, Any] | None:
    """Returns in every child, with its job, and at last in the nursery."""

    def tell(**what: Any) -> None:
        os.write(told, json.dumps(what).encode() + b"\n")

    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    living: set[int] = set()
    tell(ready=True)
    while True:
        ready, _, _ = select.select([0, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            for pid in list(living):
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    living.remove(pid)
                    tell(pid=pid, code=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        if 0 in ready:
            line = sys.stdin.readline()
            if not line:
                break
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.close(woken)
                os.close(wake)
                return json.loads(line)
            living.add(pid)
            tell(started=pid)
    for pid in living:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return None


def become(job: dict[str, Any], told: int) -> None:
    """What `python -m` would be."""
    os.close(told)
    os.environ.clear()
    os.environ.update(job["env"])
    nothing, log = os.open(os.devnull, os.O_RDONLY), os.open(job["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for descriptor, place in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, place)
    sys.argv = [job["module"], *job["arguments"]]
    runpy.run_module(job["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
