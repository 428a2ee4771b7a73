"""Signs of life of what takes long and is no step: evaluations, checkpoints, long accumulation.

In: what is done, and how far it is. Out: an event every ten seconds at most, from rank 0. Without them the launcher
would take ten minutes of silence (`stall_seconds`) for a hang: a large validation split and a checkpoint on a slow disk
take longer. Cost: a look at the clock.
"""

import os
import time

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
