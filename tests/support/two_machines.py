"""Two machines with addresses of their own, made of network namespaces: a switch, and a cable to each of them.

In: nothing; root and `ip` of iproute2. Out: `Machines`: programs run on either of them, the cable of one is pulled at
the switch, so that it sees no more of it than of a broken switch, or its power goes: the others hear nothing, not even
that connections are closed. Nothing leaves these namespaces, and they are gone afterwards. The disk is the same, as
with a shared file system.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.support.tiny import ROOT

ADDRESSES = ("10.98.76.1", "10.98.76.2")


@dataclass(frozen=True)
class Machines:
    """`name`: what the namespaces begin with."""

    name: str

    def run(self, machine: int, *arguments: str, output: IO) -> subprocess.Popen:
        """Start this Python with arguments on a machine."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        command = ["ip", "netns", "exec", f"{self.name}-{machine}", sys.executable, *arguments]
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=ROOT)

    def cable(self, machine: int, state: str) -> None:
        """Pull the cable of a machine (`down`) or put it back (`up`)."""
        ip("-n", f"{self.name}-switch", "link", "set", f"port{machine}", state)

    def power_off(self, machine: int) -> None:
        """End everything on a machine without a word to the other one."""
        self.cable(machine, "down")
        for pid in self.processes(machine):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self, machine: int) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", f"{self.name}-{machine}").split()]


@contextlib.contextmanager
def two_machines() -> Iterator[Machines]:
    machines = Machines(f"panda{os.getpid()}")
    try:
        for part in ("switch", 0, 1):
            ip("netns", "add", f"{machines.name}-{part}")
        switch = ("-n", f"{machines.name}-switch")
        ip(*switch, "link", "add", "bridge", "type", "bridge")
        ip(*switch, "link", "set", "bridge", "up")
        for number, address in enumerate(ADDRESSES):
            there = f"{machines.name}-{number}"
            ip(*switch, "link", "add", f"port{number}", "type", "veth", "peer", "name", "cable", "netns", there)
            ip(*switch, "link", "set", f"port{number}", "master", "bridge", "up")
            ip("-n", there, "link", "set", "lo", "up")
            ip("-n", there, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", there, "link", "set", "cable", "up")
        yield machines
    finally:
        for part in (0, 1, "switch"):
            if Path("/run/netns", f"{machines.name}-{part}").exists():
                for pid in machines.processes(part) if part != "switch" else ():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                ip("netns", "del", f"{machines.name}-{part}")


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
