"""The background process that owns the stack: starts the services, starts again what dies, ends all of it on SIGTERM.

In: the state directory and a spec of services. Out: `state.json` there, rewritten whenever something changes, and a log
per service. A lock on `lock` is held while it lives, so that "is it up" cannot be answered wrongly by a stale
pid file, not even after a power cut. No Prefect here: 20 MB, one wake-up a second.

Ending: flow runs get SIGTERM first and 28 s for a checkpoint, then the worker, then the servers.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypedDict

from data_prep.store import write_atomically
from flows.stack.prefect_server import answers
from flows.stack.services import WATCH, Service, private, start, stop, stop_engines
from training.launch.commands import python_path

POLL_SECONDS = 1.0
RUN_GRACE_SECONDS = 28.0  # cancelled ranks have stop_deadline_seconds (25) to write a checkpoint
SERVICE_GRACE_SECONDS = 10.0
LONGEST_BACKOFF_SECONDS = 60.0
WORKER = "worker"
LOG = "keeper.log"  # its name before: an earlier version may have started it


class ServiceState(TypedDict):
    """A service in state.json."""

    name: str
    address: str
    base: str | None  # what answers over HTTP
    pid: int | None
    started: float
    num_exits: int
    last_exit_code: int | None
    log: str


class StackState(TypedDict):
    """state.json; an earlier version may have started what is there."""

    keeper: int  # the pid of the process manager
    services: list[ServiceState]


@dataclass
class Managed:
    """One service and what became of it."""

    spec: Service
    log: Path
    process: subprocess.Popen | None = None
    started: float = 0.0  # seconds since the epoch
    num_exits: int = 0
    last_exit_code: int | None = None
    next_start: float = 0.0  # of a clock that nobody sets

    def as_dict(self) -> ServiceState:
        """What `panda status` shows."""
        return {
            "name": self.spec.name,
            "address": self.spec.address,
            "base": self.spec.base,
            "pid": self.process.pid if self.process else None,
            "started": self.started,
            "num_exits": self.num_exits,
            "last_exit_code": self.last_exit_code,
            "log": str(self.log),
        }


@dataclass
class ProcessManager:
    """The stack, in the order in which it starts."""

    state_dir: Path
    services: list[Managed]
    stopping: bool = False
    written: str = field(default="", repr=False)

    def run(self) -> None:
        """Until SIGTERM or SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: setattr(self, "stopping", True))
        try:
            while not self.stopping:
                self.look_after()
                time.sleep(POLL_SECONDS)
        finally:
            self.end()

    def look_after(self) -> None:
        """Note who has died; start who is due and whose predecessors answer."""
        for service in self.services:
            if service.process and service.process.poll() is not None:
                service.num_exits += 1
                service.last_exit_code = service.process.returncode
                service.process = None
                service.next_start = time.monotonic() + min(2.0 ** (service.num_exits - 1), LONGEST_BACKOFF_SECONDS)
            if service.process is None and time.monotonic() >= service.next_start and self._may_start(service):
                service.process = start(service.spec, service.log)
                service.started = time.time()
        self.write_state()

    def _may_start(self, service: Managed) -> bool:
        """Worker and watch wait for the servers; they wait for nobody."""
        others = [other.spec.base for other in self.services if other.spec.base]
        return service.spec.name not in (WORKER, WATCH) or all(answers(base) for base in others)

    def end(self) -> None:
        """End everything, last started first."""
        for service in reversed(self.services):
            if service.process:
                if service.spec.name == WORKER:
                    stop_engines(service.process.pid, RUN_GRACE_SECONDS)
                stop(service.process, SERVICE_GRACE_SECONDS)
                service.process = None
        (self.state_dir / "state.json").unlink(missing_ok=True)

    def write_state(self) -> None:
        """Rewrite state.json when it would change."""
        state: StackState = {"keeper": os.getpid(), "services": [service.as_dict() for service in self.services]}
        text = json.dumps(state, indent=2)
        if text != self.written:
            write_atomically(self.state_dir / "state.json", text, 0o600)
            self.written = text


def spawn(state_dir: Path, services: list[Service]) -> None:
    """Start a process manager in the background, in a session of its own: it outlives us and our terminal."""
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(state_dir / "spec.json", json.dumps([asdict(service) for service in services]), 0o600)
    with open(state_dir / LOG, "ab", opener=private) as log:
        subprocess.Popen(
            [sys.executable, "-m", "flows.stack.process_manager", str(state_dir)],
            env={**os.environ, "PYTHONPATH": python_path()},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def is_up(state_dir: Path) -> bool:
    """Whether a process manager lives: it holds the lock."""
    if not (state_dir / "lock").exists():
        return False
    with contextlib.suppress(BlockingIOError), _lock(state_dir):
        return False
    return True


def read_state(state_dir: Path) -> StackState | None:
    """What the living process manager has written; None while there is none."""
    with contextlib.suppress(FileNotFoundError):
        if is_up(state_dir):
            return json.loads((state_dir / "state.json").read_text(encoding="utf-8"))
    return None


def services_of(state_dir: Path) -> list[ServiceState]:
    """The services of a living process manager; none while there is none."""
    state = read_state(state_dir)
    return state["services"] if state else []


@contextlib.contextmanager
def _lock(state_dir: Path) -> Iterator[None]:
    """Held as long as the process lives; BlockingIOError when another one holds it."""
    with open(state_dir / "lock", "a", encoding="utf-8", opener=private) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def main(state_dir: Path) -> None:
    """The process manager's own process. A second one finds the lock taken and leaves."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell job has it ignored, for all children
    spec = json.loads((state_dir / "spec.json").read_text(encoding="utf-8"))
    services = [Service(**service) for service in spec]
    logs = [state_dir / f"{service.name.replace(' ', '-')}.log" for service in services]
    with contextlib.suppress(BlockingIOError), _lock(state_dir):
        ProcessManager(state_dir, [Managed(*pair) for pair in zip(services, logs, strict=True)]).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
