"""What the ranks say to whoever launched them, and the supervisor to the launcher: every event and its fields.

In: an event. Out: a line `PANDA {json}` on stdout, which goes to the log of the rank; or the event of such a line. The
ranks of a machine may share a log, where another one (or C code) has perhaps begun a line and not ended it: an event
begins one of its own. pdsh prefixes lines with `host: `; that is understood. Events are plain mappings whose types say
what is in them; one that this code does not know (a worker of another's, a test) passes through. Cost: one write.
"""

import json
import re
import sys
from collections.abc import Mapping
from typing import Any, Literal, TypedDict, cast

from training.run_files import HeldOut, StepRecord

PREFIX = "PANDA "
LINE = re.compile(rf"^(?:\S+: )?{PREFIX}(\{{.*\}})$")


class Start(TypedDict):
    """The first step is about to begin."""

    event: Literal["start"]
    after_step: int
    steps: int
    resumed: bool


class Step(TypedDict):
    """An optimizer step is done; it also has what metrics.jsonl has."""

    event: Literal["step"]
    steps: int
    eta_seconds: float
    step: int
    loss: float


class Alive(TypedDict):
    """What takes long and is no step goes on."""

    event: Literal["alive"]
    doing: str
    total: int
    unit: str
    done: int


class Evaluation(TypedDict):
    """The held-out loss has been computed."""

    event: Literal["evaluation"]
    after_step: int
    eval_loss: float
    sources: HeldOut


class Checkpoint(TypedDict):
    """A checkpoint is complete."""

    event: Literal["checkpoint"]
    after_step: int
    path: str
    seconds: float
    stall_seconds: float  # what training waited for


class Model(TypedDict):
    """What is deployed is on disk."""

    event: Literal["model"]
    path: str


class Done(TypedDict):
    """Training has come to its end; it also has what train.json has."""

    event: Literal["done"]


class Exit(TypedDict):
    """The last words of a rank: why it ends (a value of `ExitReason`)."""

    event: Literal["exit"]
    reason: str
    rank: int
    message: str
    details: str
    time: float


class MicroBatch(TypedDict):
    """The settings that say how the rows of a step are split."""

    per_gpu_train_batch_size: int
    gradient_accumulation_steps: int


class OutOfMemory(MicroBatch):
    """Of the launcher itself: it goes on with a smaller micro-batch."""

    event: Literal["out_of_memory"]
    source: str


Event = Start | Step | Alive | Evaluation | Checkpoint | Model | Done | Exit | OutOfMemory


class Started(TypedDict):
    """The supervisor has started a command."""

    event: Literal["started"]
    name: str
    pid: int


class Exited(TypedDict):
    """A command of the supervisor has ended; `ended_by_us`: killed, which says nothing about the cause."""

    event: Literal["exited"]
    name: str
    code: int
    ended_by_us: bool


def step_done(steps: int, eta_seconds: float, record: StepRecord) -> Step:
    """The event of a step; `record` is its line in metrics.jsonl."""
    return cast(Step, {"event": "step", "steps": steps, "eta_seconds": eta_seconds, **record})


def training_done(summary: Mapping[str, Any]) -> Done:
    """The event of the end; `summary` is the content of train.json."""
    return cast(Done, {"event": "done", **summary})


def emit(event: Event) -> None:
    """Print one event, in one write and on a line of its own, so that what several ranks write never mixes with it."""
    sys.stdout.write(f"\n{PREFIX}{json.dumps(event, ensure_ascii=False, default=str)}\n")
    sys.stdout.flush()


def event_of(line: str) -> Event | None:
    """The event of a line, None for every other line."""
    match = LINE.match(line)
    if not match:
        return None
    try:
        found = json.loads(match.group(1))
    except (ValueError, RecursionError):
        return None
    return cast(Event, found) if isinstance(found, dict) and "event" in found else None
