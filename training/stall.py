"""Notice a run that makes no progress. In: the events of the ranks. Out: how long it has been silent, if too long.

Any event is a sign of life (steps, evaluation, checkpoints). The allowance is `floor_seconds`, or ten median steps
where that is longer; before the first event (imports, loading weights) three times the floor. Cost: a few floats.
"""

import statistics
import time
from collections import deque

MEDIAN_STEPS = 10
START_FACTOR = 3


class StallWatch:
    """Remembers the last sign of life and the recent step times; `clock` is replaceable for tests of the arithmetic."""

    def __init__(self, floor_seconds: float, clock=time.monotonic):
        self.floor_seconds = floor_seconds
        self.clock = clock
        self.last = clock()
        self.last_step: float | None = None
        self.seen = False
        self.step_seconds: deque[float] = deque(maxlen=50)

    def progress(self, event: dict) -> None:
        """Take note of an event of a rank."""
        now = self.clock()
        self.last = now
        self.seen = True
        if "step" in event:
            if self.last_step is not None:
                self.step_seconds.append(now - self.last_step)
            self.last_step = now

    @property
    def allowance(self) -> float:
        """Seconds of silence that are still normal."""
        if not self.seen:
            return START_FACTOR * self.floor_seconds
        median = statistics.median(self.step_seconds) if self.step_seconds else 0.0
        return max(self.floor_seconds, MEDIAN_STEPS * median)

    def overdue(self) -> float:
        """Seconds of silence when they are too many, else 0.0."""
        silence = self.clock() - self.last
        return silence if self.floor_seconds and silence > self.allowance else 0.0
