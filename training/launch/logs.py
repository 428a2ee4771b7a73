"""The log files of the ranks: follow them, tell events from text, find what explains a failure.

In: RUN/logs/*.log, appended to by the ranks. Out: lines. Cost: reads only what is new, at most 1 MiB at a time.

Notice a run that makes no progress. In: the events of the ranks. Out: how long it has been silent, if too long.

Any event is a sign of life (steps, evaluation, checkpoints). The allowance is `floor_seconds`, or ten median steps
where that is longer; before the first event (imports, loading weights) three times the floor. Cost: a few floats.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from training.launch.events import Event, event_of

READ_BYTES = 1 << 20
DETAIL_LINES = 60
TRACEBACK = "Traceback (most recent call last):"


class LogTail:
    """A log file from where it ended when this object was made; `path` need not exist yet."""

    def __init__(self, path: Path):
        self.path = path
        self.start = path.stat().st_size if path.exists() else 0
        self.offset = self.start
        self.rest = b""

    def new_lines(self) -> list[str]:
        """Complete lines written since the last call (the first READ_BYTES of them), without the empty ones."""
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(READ_BYTES)
        self.offset += len(data)
        *lines, self.rest = (self.rest + data).split(b"\n")
        decoded = (line.decode("utf-8", "replace").rstrip("\r") for line in lines)
        return [line for line in decoded if line]

    def text(self, since: int | None = None) -> str:
        """What the log says from an offset (default: of this start) on, without events; the last READ_BYTES of it."""
        if not self.path.exists():
            return ""
        first = self.start if since is None else since
        with open(self.path, "rb") as file:
            file.seek(max(first, self.path.stat().st_size - READ_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
        return "\n".join(line for line in lines if line and event_of(line) is None)


def traceback_of(text: str) -> str:
    """What explains a failure: from the last traceback on (chained ones included), else the last lines."""
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if line.endswith(TRACEBACK)]
    if not starts:
        return "\n".join(lines[-20:])
    first = starts[-1]
    while (before := _cause_before(lines, first, starts)) is not None:
        first = before
    return "\n".join(lines[first:][-DETAIL_LINES:])


def _cause_before(lines: list[str], first: int, starts: list[int]) -> int | None:
    """Start of the traceback that the one at `first` was chained to ("direct cause", "during handling"), or None."""
    chained = any("exception" in line and line.endswith(":") for line in lines[max(0, first - 3) : first])
    earlier = [start for start in starts if start < first]
    return earlier[-1] if chained and earlier else None


class RateLimit:
    """Passes on at most `per_second` lines a second (and a first burst); says how many lines were left out."""

    def __init__(self, sink: Callable[[str], None], per_second: float = 10, burst: int = 100):
        self.sink = sink
        self.per_second = per_second
        self.burst = burst
        self.allowance = float(burst)
        self.last = time.monotonic()
        self.num_left_out = 0

    def __call__(self, line: str) -> None:
        """Pass the line on, or count it as left out."""
        now = time.monotonic()
        self.allowance = min(self.burst, self.allowance + (now - self.last) * self.per_second)
        self.last = now
        if self.allowance < 1:
            self.num_left_out += 1
            return
        self.allowance -= 1
        self.account()
        self.sink(line)

    def account(self) -> None:
        """Say how many lines were left out since the last line, if any."""
        if self.num_left_out:
            self.sink(f"... {self.num_left_out} lines left out here, they are in the log files")
            self.num_left_out = 0


MEDIAN_STEPS = 10
START_FACTOR = 3


class Watchdog:
    """Remembers the last sign of life and the recent step times; `clock` is replaceable for tests of the arithmetic."""

    def __init__(self, floor_seconds: float, clock=time.monotonic):
        self.floor_seconds = floor_seconds
        self.clock = clock
        self.last = clock()
        self.last_step: float | None = None
        self.seen = False
        self.step_seconds: deque[float] = deque(maxlen=50)

    def progress(self, event: Event) -> None:
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
