"""The flow's part of the account of time: seconds by stage, and what begins when.

In: `with watch(stage):` around each stage. Out: `watch.seconds`, by stage; lines of RUN/time.jsonl, which wait in
memory until the run has a directory. Cost: none.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from prefect.runtime import flow_run

from training.cost.marks import (
    EVALUATE,
    LOAD,
    PREPARE,
    SAVE,
    WAITING,
    Mark,
    end_what_was_killed,
    has_own_process,
    mark,
    read,
)

WORKERS_RUN = "PREFECT__FLOW_RUN_ID"  # set by a worker for the process of a run
FIRST_PART = {"train": LOAD, "evaluate": EVALUATE, "register": SAVE, "gate": EVALUATE, "promote": SAVE}
"""What a stage begins with; those that are not here prepare."""


class Stopwatch:
    """Wall-clock seconds by stage, rounded to milliseconds, in the order the stages ran; and what begins when."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.began = _began()
        self._run_dir: Path | None = None
        self._marks: list[Mark] = [{"time": self.began, "part": PREPARE}]

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        self.turn_to(FIRST_PART.get(stage, PREPARE))
        try:
            yield
        finally:
            self.seconds[stage] = round(time.monotonic() - started, 3)

    def turn_to(self, part: str) -> None:
        """This part begins."""
        line: Mark = {"time": time.time(), "part": part}
        if self._run_dir is None:
            self._marks.append(line)
        else:
            mark(self._run_dir, line)

    @contextlib.contextmanager
    def writing_in(self, run_dir: Path, is_restart: bool) -> Iterator[None]:
        """The run has its directory; what ends the context, but for a kill, ends the run or lets it wait."""
        if read(run_dir):
            end_what_was_killed(run_dir, self.began, is_restart)
        else:
            mark(run_dir, {"time": min(_due(), self.began), "part": WAITING})
        for line in self._marks:
            mark(run_dir, line)
        self._run_dir = run_dir
        try:
            yield
        finally:
            self.turn_to(WAITING)


def _began() -> float:
    """When the process of the run was started: that of a worker is there for one run, and so is `train.py`."""
    if has_own_process.get() or WORKERS_RUN in os.environ:
        return psutil.Process().create_time()
    return time.time()


def _due() -> float:
    """When the flow run was to start; now, where no flow asks."""
    due = flow_run.scheduled_start_time
    return due.timestamp() if due else time.time()
