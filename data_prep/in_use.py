"""Who uses a cache directory: whoever prepares holds a shared lock on it, and nothing is swept while anybody does.

A preparation reuses directories that no plan names yet, so what is reachable is known only when none is at work. The
lock is CACHE/.in_use (flock); on a shared disk whose locks do not reach other machines, the age that `keep_days` asks
for protects what they make. CACHE/used_by.txt has a line for each output directory whose runs have used the cache: what
their runs and versions need stays as well. In: a cache directory. Out: nothing. Cost: one system call, one small file.
"""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from data_prep import store

LOCK, USERS = ".in_use", "used_by.txt"

logger = logging.getLogger(__name__)
_until_exit: list[int] = []


@contextlib.contextmanager
def using(cache_dir: Path) -> Iterator[None]:
    """Nothing is swept here meanwhile; waits for a sweep that is under way."""
    descriptor = _open(cache_dir)
    try:
        if descriptor is not None:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def use_until_exit(cache_dir: Path) -> None:
    """The same for a command that looks at the data until it ends."""
    descriptor = _open(cache_dir)
    if descriptor is not None:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        _until_exit.append(descriptor)


@contextlib.contextmanager
def alone(cache_dir: Path) -> Iterator[bool]:
    """Whether nobody uses it; then nobody begins to until this ends."""
    descriptor = _open(cache_dir)
    try:
        yield descriptor is not None and store.try_lock(descriptor)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def note_user(cache_dir: Path, output_dir: Path) -> None:
    """Runs below this directory need what is in the cache."""
    line = str(output_dir.absolute())
    if line in users(cache_dir):
        return
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        store.append(cache_dir / USERS, line + "\n")
    except OSError as error:  # a cache that can only be read is none of ours to sweep
        logger.info("%s: %s", cache_dir / USERS, error)


def users(cache_dir: Path) -> list[str]:
    """The output directories that have used it."""
    try:
        return list(dict.fromkeys((cache_dir / USERS).read_text(encoding="utf-8").splitlines()))
    except OSError:
        return []


def _open(cache_dir: Path) -> int | None:
    """None: a cache that can only be read, so that nobody here sweeps it."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        return os.open(cache_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        logger.debug("%s: %s", cache_dir / LOCK, error)
        return None
