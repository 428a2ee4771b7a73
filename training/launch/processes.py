"""Care for processes: to end with a parent, who lives, who is whose, ending all of them; and ports for them to meet at.

In: pids, marks in environments. Out: signals, facts. Only Linux tells a process that its parent is gone. Shared by the
supervisor of the ranks and the services of `panda up`. Cost: 10 ms for a look at all processes of the machine.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable

import psutil

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
PORTS_TRIED = 100


def die_with_parent(number: int = signal.SIGKILL, parent: int = 0) -> None:
    """Have the kernel send this process a signal when its parent dies.

    :param parent: its pid; where it has died before the kernel was asked, the signal comes at once.
    """
    _prctl(PR_SET_PDEATHSIG, number)
    if parent and sys.platform == "linux" and os.getppid() != parent:
        os.kill(os.getpid(), number)


def adopt_orphans() -> None:
    """Stay the ancestor of whatever our children start, also when it is daemonised."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value)


def is_alive(pid: int) -> bool:
    """False for zombies and for processes that are gone."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def descendants(pid: int | None = None) -> list[psutil.Process]:
    """Everything that a process (this one when not given) has started, in whatever session it is now."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def marked(variable: str, value: str) -> list[psutil.Process]:
    """The processes that carry this value in their environment, as far as this user may see them."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(variable) == value:
                found.append(process)
    return found


def is_orphan(process: psutil.Process) -> bool:
    """Whether the parent is gone: init has adopted the process, or the systemd of a user's session."""
    parent = process.parent()
    return parent is None or parent.pid == 1 or parent.name() == "systemd"


def signal_all(pids: Iterable[int], number: int) -> None:
    """Send a signal to processes, some of which may be gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_all(find: Callable[[], list[psutil.Process]], timeout_seconds: float = 5) -> None:
    """SIGKILL until `find` names nothing but zombies; processes that fork meanwhile are met in the next round."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        alive = [process.pid for process in find() if is_alive(process.pid)]
        if not alive:
            return
        signal_all(alive, signal.SIGKILL)
        time.sleep(0.01)


def free_port(first: int = 0) -> int:
    """A port of the loopback device that nobody listens on now, the next one from `first` on where that is given."""
    for port in range(first, first + PORTS_TRIED) if first else (0,):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((LOOPBACK[0], port))
            return probe.getsockname()[1]
    return first
