"""Signs of life of what takes long and is no step: evaluations, checkpoints, long accumulation.

In: what is done, and how far it is. Out: an event every ten seconds at most, from rank 0. Without them the launcher
would take ten minutes of silence (`stall_seconds`) for a hang: a large validation split and a checkpoint on a slow disk
take longer. Cost: a look at the clock.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from training.launch.events import emit

SECONDS = 10.0


class Heartbeat:
    """Call it often, with how much is done."""

    def __init__(self, doing: str, total: int, unit: str):
        self.doing, self.total, self.unit = doing, total, unit
        self.last = time.monotonic() if os.environ.get("RANK", "0") == "0" else float("inf")

    def __call__(self, done: int) -> None:
        """`done` of `total`."""
        if time.monotonic() - self.last > SECONDS:
            self.last = time.monotonic()
            emit({"event": "alive", "doing": self.doing, "total": self.total, "unit": self.unit, "done": done})


@contextmanager
def beating(doing: str) -> Iterator[None]:
    """Signs of life of what cannot say how far it is, from a thread: a library's own loop."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(SECONDS):
            emit({"event": "alive", "doing": doing, "total": 1, "unit": "tasks", "done": 0})

    thread = threading.Thread(target=beat, daemon=True)
    if os.environ.get("RANK", "0") == "0":
        thread.start()
    try:
        yield
    finally:
        done.set()
