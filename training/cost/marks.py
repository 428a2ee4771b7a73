"""RUN/time.jsonl: a line each time a run turns to something else, from its first process to its last.

In: what begins now. Out: a line. A line says what holds from its time on, until another line says otherwise, so the
spans between lines leave no gap, whoever wrote them: the flow, the launcher, rank 0. A process that is killed writes
nothing; the next one finds the last sign of life in the run directory, and writes the missing line. Cost: one small
write; 30 us.
"""

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import NotRequired, TypedDict

from data_prep import store
from training import run_files

WAITING = "waiting"  # for its turn, for a person; or ended, until somebody goes on with it
PREPARE = "prepare"  # the data, and whatever else comes before the ranks
LOAD = "load"  # start of the ranks, the model, its engine
WARM_UP = "warm_up"  # the first step of each start: kernels are compiled, memory is laid out
TRAIN = "train"  # all other steps
EVALUATE = "evaluate"  # in training and after it, and the gate
SAVE = "save"  # what training waits for of a checkpoint; the model, its registration
DOWN = "down"  # after a death, until the next start
REPEATED = "repeated"  # steps that were lost with a death and had to be made again; known only afterwards
PARTS = (PREPARE, LOAD, WARM_UP, TRAIN, EVALUATE, SAVE, REPEATED, DOWN, WAITING)

has_own_process: ContextVar[bool] = ContextVar("has_own_process", default=False)
"""Whether this process is there for the run alone, which then begins with it."""

log = logging.getLogger(__name__)


class Mark(TypedDict):
    """A line; a key that is missing leaves things as they were, but for `step`."""

    time: float  # seconds since the epoch
    part: NotRequired[str]
    devices: NotRequired[int]  # that the ranks of the run hold
    gpus: NotRequired[bool]  # whether these are GPUs; else each is a rank on a CPU
    step: NotRequired[int]  # optimizer steps done, where the trainer writes
    resumed_from: NotRequired[int]  # the step that a start of the ranks goes on from


def mark(run_dir: Path, line: Mark) -> None:
    """Add a line; a disk that does not take it costs the account, not the run."""
    try:
        store.append(run_dir / run_files.TIME, json.dumps(line) + "\n", mode=0o600)
    except OSError as error:
        log.warning("%s: not written (%s)", run_dir / run_files.TIME, error.strerror)


def turn_to(run_dir: Path, part: str) -> None:
    """This part of the run begins."""
    mark(run_dir, {"time": time.time(), "part": part})


@contextlib.contextmanager
def holding(run_dir: Path, devices: int) -> Iterator[None]:
    """So many devices are held while the context is open."""
    mark(run_dir, {"time": time.time(), "devices": devices})
    try:
        yield
    finally:
        mark(run_dir, {"time": time.time(), "devices": 0})


def read(run_dir: Path) -> list[Mark]:
    """All lines in the order of their times; a line that a killed process has left unfinished is none."""
    path = run_dir / run_files.TIME
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found: list[Mark] = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return sorted(found, key=lambda one: one["time"])


def end_what_was_killed(run_dir: Path, before: float, is_restart: bool) -> None:
    """Write the line that the last process of the run could not write, if it was killed.

    :param before: when this process began; what is left of the last one may have lived longer.
    :param is_restart: this run was started again by itself, so that nobody has chosen when.
    """
    marks = read(run_dir)
    part = next((one["part"] for one in reversed(marks) if "part" in one), None)
    if part is None or (part == WAITING and not is_restart):
        return
    mark(run_dir, {"time": max(marks[-1]["time"], min(last_sign_of_life(run_dir), before)), "part": DOWN, "devices": 0})


def last_sign_of_life(run_dir: Path) -> float:
    """When a process of the run last wrote a line of any kind."""
    paths = [*run_dir.glob("*.jsonl"), *(run_dir / run_files.LOGS).glob("*.log")]
    return max((path.stat().st_mtime for path in paths), default=0.0)
