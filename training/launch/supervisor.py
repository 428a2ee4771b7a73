"""The small parent of the ranks: however a run ends, no process of it is left (no torch, ~15 MB, starts in 0.1 s).

    launcher --stdin: spec line, then "stacks" | "stop" | "kill" lines; end of file means stop--> supervisor --> ranks
             <--stdout: one JSON line per fact: started, exited--

In: one JSON line `{"commands": [{"name", "argv", "env", "log"}], "grace_seconds"}`. Every command runs in a session of
its own, its output appended to its log file: a full pipe or a dead reader never blocks training. Out: the facts.

What ends the run: all commands exit; one fails (the rest are killed at once: they only wait in a collective for it);
"stop", SIGTERM, SIGINT, SIGHUP, end of stdin or a dead parent (SIGTERM to the commands, `grace_seconds` to write a
checkpoint, then SIGKILL). As a child subreaper the supervisor stays the ancestor of whatever the ranks start, also when
it is daemonised, and kills all of it at the end. Should the supervisor itself be killed -9, the kernel kills the ranks
(PR_SET_PDEATHSIG). Cost: one wake-up every 50 ms.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from training.launch.events import Exited, Started
from training.launch.exits import ExitReason
from training.launch.processes import adopt_orphans, descendants, die_with_parent, kill_all, signal_all

POLL_SECONDS = 0.05
ECHO_SECONDS = 1.0  # a rank that lost a peer may be seen before the peer itself: give the cause time to end


@dataclass
class Control:
    """What the launcher, a signal or a dead parent has asked for."""

    parent: int = field(default_factory=os.getppid)
    stop: bool = False
    kill: bool = False
    stacks: bool = False
    open: bool = True
    pending: bytes = b""

    def wait(self) -> None:
        """Sleep one poll interval, or less when the launcher says something."""
        readable = select.select([0] if self.open else [], [], [], POLL_SECONDS)[0]
        if readable:
            self._take(os.read(0, 65536))
        if os.getppid() != self.parent:
            self.stop = True

    def _take(self, data: bytes) -> None:
        self.open = bool(data)
        self.stop |= not data
        *lines, self.pending = (self.pending + data).split(b"\n")
        self.stop |= b"stop" in lines
        self.kill |= b"kill" in lines
        self.stacks |= b"stacks" in lines


def main() -> None:
    """Read the spec from stdin, run its commands, return when no process is left."""
    adopt_orphans()
    control = Control()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: setattr(control, "stop", True))
    spec = _read_spec(control)
    if spec:
        supervise(spec["commands"], spec["grace_seconds"], control)


def _read_spec(control: Control) -> dict | None:
    """The first line of stdin; None when the launcher died before it was written."""
    data = b""
    while not data.endswith(b"\n"):
        chunk = os.read(0, 1 << 16)
        if not chunk:
            return None
        data += chunk
    first, _, rest = data.partition(b"\n")
    if rest:
        control._take(rest)
    return json.loads(first)


def supervise(commands: list[dict], grace_seconds: float, control: Control) -> None:
    """Start every command and wait until all have ended, one has failed, or an end was asked for."""
    running: dict[int, str] = {}
    processes = []  # one that is forgotten takes its own exit code, as soon as it has one, and `reap` never hears of it
    deadline = float("inf")
    ending = False  # from here on, exits are ours and say nothing about the cause
    try:
        for command in commands:
            processes.append(process := start(command))
            running[process.pid] = command["name"]
            report({"event": "started", "name": command["name"], "pid": process.pid})
        while running:
            ended = [(running.pop(pid), code) for pid, code in reap() if pid in running]
            for name, code in ended:
                report({"event": "exited", "name": name, "code": code, "ended_by_us": ending})
            control.stop |= any(code == ExitReason.cancelled.code for _, code in ended)
            if any(code for _, code in ended) and not control.stop:
                only_echo = {code for _, code in ended if code} == {ExitReason.lost_rank.code}
                deadline = min(deadline, time.monotonic() + (ECHO_SECONDS if only_echo else 0))
            if control.stop and deadline == float("inf"):
                deadline = time.monotonic() + grace_seconds
                signal_all(running, signal.SIGTERM)
            if control.kill or time.monotonic() >= deadline:
                ending = True
                kill_all(descendants)
            if control.stacks:
                control.stacks = False
                dump_stacks()
            control.wait()
    finally:
        kill_all(descendants)


def start(command: dict) -> subprocess.Popen:
    """Start one command in its own session, output to its log; it dies with this process."""
    Path(command["log"]).parent.mkdir(parents=True, exist_ok=True)
    end_with_us = partial(die_with_parent, signal.SIGKILL, os.getpid())
    with open(command["log"], "ab") as log:
        return subprocess.Popen(
            command["argv"],
            env={**os.environ, **command["env"]},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=end_with_us,  # safe: this process has one thread  # noqa: PLW1509
        )


def reap() -> list[tuple[int, int]]:
    """(pid, exit code) of every child that has ended, adopted orphans included; code -9 means killed by signal 9."""
    ended = []
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended.append((pid, os.waitstatus_to_exitcode(status)))
    return ended


def dump_stacks() -> None:
    """SIGUSR1 to every descendant that handles it (faulthandler writes its stacks); it would kill the others."""
    signal_all([child.pid for child in descendants() if handles(child.pid, signal.SIGUSR1)], signal.SIGUSR1)


def handles(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal, from the caught-signals mask in /proc."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    mask = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(mask, 16) >> (number - 1) & 1)


def report(fact: Started | Exited) -> None:
    """One JSON line to the launcher; a launcher that is gone is no reason to fail."""
    with contextlib.suppress(BrokenPipeError):
        os.write(1, (json.dumps({**fact, "time": time.time()}) + "\n").encode())


if __name__ == "__main__":
    main()
