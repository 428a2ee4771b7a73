"""Who listens at an address of this machine. In: a URL. Out: its process, user, project. Cost: 10 ms.

Two clones of a user would otherwise take each other's servers for their own, and a string meant for ours would go to
whoever listens in its place.
"""

import contextlib
import os
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from training.launch import processes
from training.launch.processes import LOOPBACK

OWNER = "PANDA_STACK"  # in the environment of everything a service starts: state directory and service


def is_local(url: str) -> bool:
    """Whether an address is on this machine's loopback: only there do we start servers."""
    return urlsplit(url).hostname in LOOPBACK


def listener(url: str) -> psutil.Process | None:
    """The process, as far as this user may see it."""
    with contextlib.suppress(psutil.Error):
        return next((psutil.Process(pid) for pid in _pids(url) if pid), None)
    return None


def belongs_to_somebody_else(url: str) -> bool:
    """Whether another user listens there; where the system does not tell (macOS), nobody is suspected."""
    with contextlib.suppress(psutil.Error):
        return any(pid is None or psutil.Process(pid).uids().real != os.getuid() for pid in _pids(url))
    return False


def project_of(url: str) -> Path | None:
    """The directory of the project whose server it is."""
    with contextlib.suppress(psutil.Error):
        process = listener(url)
        return Path(process.cwd()) if process and OWNER in process.environ() else None
    return None


def is_orphan(url: str) -> bool:
    """Whether it is a server whose process manager is gone: about to end, not one to rely on."""
    with contextlib.suppress(psutil.Error):
        process = listener(url)
        return bool(process and OWNER in process.environ() and processes.is_orphan(process))
    return False


def port_of(url: str) -> int:
    """4200 where none is named, as Prefect has it."""
    return urlsplit(url).port or 4200


def _pids(url: str) -> list[int | None]:
    port = port_of(url)
    found = psutil.net_connections("tcp")
    return [one.pid for one in found if one.status == psutil.CONN_LISTEN and one.laddr.port == port]
