"""Who may write in a run directory: one run of the flow, also when another one has been declared dead but lives.

RUN/.lock is held (flock) by the process of the flow and the supervisor of its ranks, so it is free only when nothing
of that run is left on this machine. RUN/owner.json says who has it; its token is in the environment of all that belong
to the owner. Who is about to publish something (a checkpoint, a model, a version, the champion) looks whether the token
still is its own: where locks do not reach, on another machine with a shared disk, a run that was taken over is stopped
there. In: a run directory. Out: nothing, or `NotOwner`. Cost: one small file; a look at it costs 20 us.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict, cast

from data_prep.errors import PandaError
from data_prep.store import try_lock, write_atomically
from training.launch.processes import is_alive

OWNER, LOCK = "owner.json", ".lock"
TOKEN = "PANDA_RUN_OWNER"
PATIENCE_SECONDS = 60.0  # the ranks of a flow that was killed may still write a checkpoint
LOOK_SECONDS = 0.1

logger = logging.getLogger(__name__)
_held: list[int] = []


class NotOwner(PandaError):
    """The run directory belongs to somebody else."""


class Owner(TypedDict, total=False):
    """owner.json; a run of an earlier version has none."""

    token: str
    flow_run: str  # Prefect's id
    host: str
    pid: int
    since: float


@contextlib.contextmanager
def owning(run_dir: Path, flow_run: str = "") -> Iterator[None]:
    """Be the one that writes in a run directory.

    :param flow_run: Prefect's id; a run that is started again finds its directory by it.
    :raises NotOwner: another process is at work there.
    """
    descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    before = os.environ.get(TOKEN)
    try:
        _lock(descriptor, run_dir)
        os.environ[TOKEN] = secrets.token_hex(8)
        owner = Owner(
            token=os.environ[TOKEN], flow_run=flow_run, host=socket.gethostname(), pid=os.getpid(), since=time.time()
        )
        write_atomically(run_dir / OWNER, json.dumps(owner, indent=1), 0o600)
        _held.append(descriptor)
        yield
    finally:
        os.environ.pop(TOKEN, None)
        if before is not None:
            os.environ[TOKEN] = before
        if descriptor in _held:
            _held.remove(descriptor)
        os.close(descriptor)


def held() -> tuple[int, ...]:
    """The locks of this process, for the supervisor of its ranks: they are free when both have ended."""
    return tuple(_held)


def check(run_dir: Path) -> None:
    """Before something is published: whether this run still has the directory. By hand, without an owner, all may."""
    token, owner = os.environ.get(TOKEN), owner_of(run_dir)
    if token and owner.get("token") != token:
        raise NotOwner(
            f"{run_dir}: taken over by {_who(owner)}, because this run was taken for dead; nothing more is written here"
        )


def owner_of(run_dir: Path) -> Owner:
    """What owner.json says; empty for a run of an earlier version, or a damaged file."""
    try:
        content = json.loads((run_dir / OWNER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast(Owner, content) if isinstance(content, dict) else {}


def is_here(owner: Owner) -> bool:
    """Whether the owner is of this machine, whose locks and processes are seen."""
    return owner.get("host") == socket.gethostname()


def is_free(run_dir: Path) -> bool:
    """Whether no process of this machine holds the lock."""
    try:
        descriptor = os.open(run_dir / LOCK, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        return try_lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, run_dir: Path) -> None:
    """Take the lock; what a killed flow has left gets the time to end, a living one is no reason to wait."""
    until, said = time.monotonic() + PATIENCE_SECONDS, False
    while not try_lock(descriptor):
        owner = owner_of(run_dir)
        if not is_here(owner) or is_alive(int(owner.get("pid", 0))) or time.monotonic() > until:
            raise NotOwner(f"{run_dir}: {_who(owner)} is at work there; wait for its end, or end it first")
        if not said:
            logger.info("%s: waiting for the end of what a killed run has left there", run_dir.name)
            said = True
        time.sleep(LOOK_SECONDS)


def _who(owner: Owner) -> str:
    flow_run = f" (flow run {owner['flow_run']})" if owner.get("flow_run") else ""
    return f"process {owner['pid']} on {owner['host']}{flow_run}" if "pid" in owner else "another process"
