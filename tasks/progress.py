"""Progress of a long stage: one line now and then in the log, one bar in the Prefect UI.

In: (done, total, unit) as often as the stage likes. Out: a log line every `LOG_SECONDS` and an update of the stage's
progress artifact every `UI_SECONDS`, both with rate and time left. Cost: an update is ~40 ms, hence the limits.
"""

import logging
import time
from typing import Any

from prefect.artifacts import create_progress_artifact, update_progress_artifact

LOG_SECONDS = 5.0
UI_SECONDS = 2.0

logger = logging.getLogger(__name__)


class StageProgress:
    """Rate-limited reporter of one stage; call it with (stage, done, total, unit)."""

    def __init__(self, key: str):
        self.key = key
        self.started = self.logged = self.shown = time.monotonic()
        self.first_done: int | None = None  # where the rate is counted from: the first call, not the start-up before it
        self.artifact: Any = None

    def __call__(self, stage: str, done: int, total: int, unit: str, note: str = "") -> None:
        now = time.monotonic()
        if self.first_done is None:
            self.first_done, self.started = done, now
        text = describe(done, total, unit, done - self.first_done, now - self.started) + (f", {note}" if note else "")
        finished = done >= total
        if now - self.logged >= LOG_SECONDS or (finished and self.logged >= self.started):
            self.logged = now
            logger.info("%s: %s", stage, text)
        if now - self.shown >= UI_SECONDS or (finished and self.artifact):
            self.shown = now
            self._show(100 * done / max(total, 1), f"{stage}: {text}")

    def _show(self, percent: float, text: str) -> None:
        if self.artifact is None:
            self.artifact = create_progress_artifact(percent, key=self.key, description=text)
        else:
            update_progress_artifact(self.artifact, percent, description=text)


def describe(done: int, total: int, unit: str, done_here: int, seconds: float) -> str:
    """``1,200 of 5,000 records (24 %), 400 records/s, 10 s left``; the rate counts only what was done here."""
    rate = done_here / seconds if seconds else 0.0
    text = f"{done:,} of {total:,} {unit} ({100 * done / max(total, 1):.0f} %)"
    if rate:
        text += f", {rate:,.{0 if rate >= 10 else 2}f} {unit}/s, {(total - done) / rate:,.0f} s left"
    return text
