"""Seconds of each stage of a run. In: `with watch(stage):`. Out: `watch.seconds`. Cost: none."""

import contextlib
import time
from collections.abc import Iterator


class Stopwatch:
    """Wall-clock seconds by stage, rounded to milliseconds, in the order the stages ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = round(time.monotonic() - started, 3)
