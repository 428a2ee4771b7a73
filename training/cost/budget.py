"""`max_gpu_hours`: training ends while there is time for all that follows it, at a step that is remembered.

In: what the run has used, what loading, evaluation and checkpoints took in it. Out: whether a step is the last one.
RUN/stop.json keeps that step, since the clock has chosen it: a run that is killed afterwards and goes on ends there
again, with the same weights, unless it is given other hours. Cost: two small files at the start of training, and the
decision, which is rank 0's, in an all-reduce a step.
"""

import time
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from training import run_files
from training.cost.account import Span, device_seconds, spans
from training.cost.marks import EVALUATE, LOAD, read

LOADINGS = 6
"""Times that a model is loaded (or written) and evaluated once training stops: at its end, by `evaluate`, after
registration, and by the gate, which compares three at most."""


@dataclass(frozen=True)
class Budget:
    """Of the ranks that train; seconds are those of a clock, as long as `devices` are held."""

    run_dir: Path
    hours: float
    devices: int
    used: float  # device-seconds at `since`, by earlier starts of this run as well
    since: float  # seconds of a clock that nobody sets (`time.monotonic`)
    loading: float  # seconds from the start of the ranks to their first step, the evaluation aside
    evaluation: float  # seconds of the longest one so far
    stopped_at: int | None  # in an earlier start

    @classmethod
    def of(cls, run_dir: Path, hours: float, devices: int) -> "Budget":
        """At the first step of a start: with what is known by then."""
        found = spans(read(run_dir), time.time())
        loading = [sum(span.seconds for span in one) for part, one in groupby(found, _part) if part == LOAD]
        evaluations = [span.seconds for span in found if span.part == EVALUATE and span.step is not None]
        return cls(
            run_dir=run_dir,
            hours=hours,
            devices=devices,
            used=device_seconds(found),
            since=time.monotonic(),
            loading=max(loading, default=0.0),
            evaluation=max(evaluations, default=0.0),
            stopped_at=stopped_at(run_dir, hours),
        )

    def is_last(self, step: int, now: float, step_seconds: float, checkpoint_seconds: float) -> bool:
        """Whether one more step would take the time of what follows; or whether training ended here before."""
        if self.stopped_at is not None:
            return step >= self.stopped_at
        follows = checkpoint_seconds + LOADINGS * (self.loading + self.evaluation)
        return self.used + (now - self.since + step_seconds + follows) * self.devices > self.hours * 3600

    def stop(self, step: int) -> None:
        """Remember that this was the last step."""
        run_files.write_json(self.run_dir / run_files.STOP, {"step": step, "max_gpu_hours": self.hours})


def _part(span: Span) -> str:
    return span.part


def stopped_at(run_dir: Path, hours: float | None) -> int | None:
    """The step at which a run with so many hours was ended; None: it was not, or has other hours now."""
    path = run_dir / run_files.STOP
    if not path.exists():
        return None
    known = run_files.read_json(path)
    return known["step"] if known["max_gpu_hours"] == hours else None


def in_words(step: int, total_steps: int, hours: float) -> str:
    """Why training ended."""
    return f"max_gpu_hours={hours:g} ended training after step {step:,} of {total_steps:,}"
