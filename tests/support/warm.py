"""Processes that begin where imports end: forked from one that has imported torch, transformers and the engines once.

In: what `python -m` would be given: a module, its arguments, an environment, a log. Out: a `Process`, used as one of
`subprocess`. It has a pid, dies and is waited for like any other; only its parent is the nursery, which each process of
the tests starts when it first needs one and which ends with it, and with it all it has forked. Cost: 0.3 s a process
instead of 6. What is tested of starting itself (the launcher, torchrun, imports, signals before them) starts for real.

Programs that tests start (`train.py`, a worker of Prefect) get their ranks so as well, where they are given
`environment()`: the supervisor is forked here, and forks its ranks. Two things differ: marks in the environment of a
rank are not seen in /proc, and the supervisor is no child of the program.

Commands (`train.py`, `panda`, `prefect`) are run by `run`, as `subprocess.run` would: forked from a process that has
imported the large libraries and nothing of this project; Prefect reads its settings when they are first asked for.
"""

import contextlib
import gc
import importlib
import json
import logging
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from training import lean_imports

ROOT = Path(__file__).parents[2]
CLIENT = Path(__file__).parent / "warm_path"
OF_RANKS = (
    "training.trainer.run", "training.evaluate", "training.compare", "training.registry.loaded_back",
    "training.engines.deepspeed", "training.engines.fsdp", "training.engines.inference",
    "transformers.models.llama.modeling_llama", "peft", "bitsandbytes",
)  # fmt: skip
OF_COMMANDS = (
    "prefect.engine", "prefect.cli", "prefect.client.orchestration", "mlflow", "mlflow.pyfunc", "sqlalchemy", "pandas",
    "matplotlib.pyplot", "pyarrow.compute", "scipy.stats", "torch", "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto", "peft", "safetensors.torch", "hydra", "rich.progress",
)  # fmt: skip
PROJECT = {"configs", "data_prep", "flows", "tasks", "training"}


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

    def __init__(self, *preloaded: str, without: Sequence[str] = ()) -> None:
        self.ended: dict[int, int] = {}
        self.socket = str(Path(tempfile.mkdtemp(prefix="nursery")) / "socket")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.warm", self.socket, ",".join(without), *preloaded],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DO_NOT_TRACK": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._read() == {"ready": True}

    def start(self, module: str, arguments: list[str], env: dict[str, str], log: Path, **files: str) -> Process:
        """`python -m MODULE ARGUMENTS` in the project's directory, its output appended to the log.

        :param files: `cwd`, another directory; `stdin`, a file to read; `errors`, another file for stderr
        """
        job = {"module": module, "arguments": arguments, "env": env, "log": str(log), **files}
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
    return Nursery(*OF_RANKS, without=lean_imports.UNUSED)


@cache
def commands() -> Nursery:
    """For `run`."""
    return Nursery(*OF_COMMANDS)


def run(
    command: list[str], cwd: Path, env: dict[str, str] | None = None, timeout: float | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run(command, ..., capture_output=True, text=True)` of `[sys.executable, "-m", MODULE, ...]` or of a
    script: `[sys.executable, PATH, ...]`.
    """
    assert command[0] == sys.executable
    module, arguments = (command[2], command[3:]) if command[1] == "-m" else (command[1], command[2:])
    with tempfile.TemporaryDirectory() as folder:
        given, said, errors = (Path(folder, name) for name in ("stdin", "stdout", "stderr"))
        given.write_text(stdin)
        env = dict(os.environ if env is None else env)
        process = commands().start(module, arguments, env, said, errors=str(errors), stdin=str(given), cwd=str(cwd))
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(command, code, said.read_text(), errors.read_text())


def environment() -> dict[str, str]:
    """For a program of this project: its ranks are forked."""
    return {"PANDA_NURSERY": ranks().socket, "PYTHONPATH": f"{CLIENT}:{ROOT}"}


class Become(Exception):  # how a forked process leaves the stack of its parent
    """This process is to be another: what to do, with which files."""

    def __init__(self, job: dict[str, Any], files: list[int] | None = None) -> None:
        super().__init__()
        self.job, self.files = job, files


def main() -> None:
    """The nursery: import, then fork whenever asked. Its stdout is for what it tells, not for its children."""
    told = os.dup(1)
    os.dup2(2, 1)
    hidden, *preloaded = sys.argv[2:]
    with lean_imports.without(*filter(None, hidden.split(","))):
        for name in preloaded:
            importlib.import_module(name)
    gc.freeze()  # what is there is never garbage; children need not look
    try:
        House(told, sys.argv[1]).serve()
    except Become as new:
        if new.files is None:
            become(new.job)
        else:
            become_supervisor(new.job, new.files)


class House:
    """The side of the nursery."""

    def __init__(self, told: int, address: str) -> None:
        self.told = told
        self.door = socket.socket(socket.AF_UNIX)
        self.door.bind(address)
        self.door.listen()
        self.woken, self.wake = os.pipe()
        os.set_blocking(self.wake, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.wake)
        self.living: dict[int, socket.socket | None] = {}

    def tell(self, **what: Any) -> None:
        os.write(self.told, json.dumps(what).encode() + b"\n")

    def serve(self) -> None:
        """Until the tests have ended. :raises Become: in every child."""
        self.tell(ready=True)
        while True:
            ready, _, _ = select.select([0, self.woken, self.door], [], [])
            if self.woken in ready:
                os.read(self.woken, 4096)
                self.bury()
            if self.door in ready:
                self.fork_supervisor(self.door.accept()[0])
            if 0 in ready:
                line = sys.stdin.readline()
                if not line:
                    break
                self.tell(started=self.fork(None, json.loads(line)))
        for pid in self.living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def bury(self) -> None:
        """Tell of the children that have ended."""
        for pid in list(self.living):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                asker = self.living.pop(pid)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                if asker:
                    asker.close()
                else:
                    self.tell(pid=pid, code=code)

    def fork_supervisor(self, asker: socket.socket) -> None:
        data, files, _, _ = socket.recv_fds(asker, 1 << 16, 16)
        while not data.endswith(b"\n"):
            data += asker.recv(1 << 16)
        self.fork(asker, json.loads(data), files)
        for file in files:
            os.close(file)

    def fork(self, asker: socket.socket | None, job: dict[str, Any], files: list[int] | None = None) -> int:
        pid = os.fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for other in (self.door, asker, *self.living.values()):
                if other:
                    other.close()
            for descriptor in (self.woken, self.wake, self.told):
                os.close(descriptor)
            raise Become(job, files)
        self.living[pid] = asker
        return pid


def become_supervisor(job: dict[str, Any], files: list[int]) -> None:
    """What `python -m training.launch.supervisor` would be, but that its ranks are forked."""
    from training.launch import supervisor

    os.setsid()
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    for place, descriptor in enumerate(files[:3]):
        os.dup2(descriptor, place)
        os.close(descriptor)

    def start(command: dict[str, Any]) -> Any:
        Path(command["log"]).parent.mkdir(parents=True, exist_ok=True)
        module, *arguments = command["argv"][2:]
        pid = os.fork()
        if not pid:
            os.setsid()
            supervisor.die_with_parent()
            for held in files[3:]:
                os.close(held)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            env = {**os.environ, **command["env"]}
            raise Become({"module": module, "arguments": arguments, "env": env, "log": command["log"]})
        return SimpleNamespace(pid=pid)

    supervisor.start = start
    try:
        supervisor.main()
    except Become as rank:
        become(rank.job)


def become(job: dict[str, Any]) -> None:
    """What `python` would be."""
    os.environ.clear()
    os.environ.update(job["env"])
    if "cwd" in job:
        os.chdir(job["cwd"])
    appended = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    nothing, log = os.open(job.get("stdin", os.devnull), os.O_RDONLY), os.open(job["log"], appended)
    errors = os.open(job["errors"], appended) if "errors" in job else log
    for descriptor, place in ((nothing, 0), (log, 1), (errors, 2)):
        os.dup2(descriptor, place)
    sys.argv = [job["module"], *job["arguments"]]
    sys.path[:0] = [os.getcwd(), *job["env"].get("PYTHONPATH", "").split(":")]
    if "errors" in job:
        begin_command()
    if job["module"].endswith(".py"):
        runpy.run_path(job["module"], run_name="__main__")
        return
    sys.modules.pop(job["module"], None)  # it is run, not imported
    runpy.run_module(job["module"], run_name="__main__", alter_sys=True)


def begin_command() -> None:
    """As if nothing of this project and no Prefect had been imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] in PROJECT]:
        del sys.modules[name]
    if "PANDA_NURSERY" in os.environ:
        runpy.run_path(str(CLIENT / "sitecustomize.py"))
    logging.root.handlers.clear()
    from prefect import context
    from prefect.logging.configuration import setup_logging

    get = context.SettingsContext.get

    def read_when_first_asked() -> Any:
        context.SettingsContext.get = get
        del context.GLOBAL_SETTINGS_CONTEXT
        context.refresh_global_settings_context()
        setup_logging()
        return get()

    context.SettingsContext.get = read_when_first_asked


if __name__ == "__main__":
    main()
