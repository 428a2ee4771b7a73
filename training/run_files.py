"""The files of a run: their names, for whoever writes or reads them, on disk and among the artifacts in MLflow.

In: a run directory (RUN) or a name. Out: names relative to RUN, in the order in which they come to be; two ways to
handle a small file. Old runs have these names, so they never change. Cost: none.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeVar

from data_prep.errors import PandaError
from data_prep.store import write_atomically

CONFIG = "config.yaml"  # the flat configuration, and `paths`
TRACKING = "tracking.json"  # what MLflow is to know and has been told: training.tracking.run_record
LOGS = "logs"  # of the ranks
METRICS = "metrics.jsonl"  # a line a step
EVALUATIONS = "evaluations.jsonl"  # a line each time the held-out loss is computed
STANDING_OUT = "standing_out.jsonl"  # a line a step that was no spike, with records whose loss is out of the ordinary
SPIKES = "spikes.jsonl"  # a line each time loss or gradient norm was out of the ordinary
SYSTEM = "system.jsonl"  # a line each ten seconds: the load of the machine
TIME = "time.jsonl"  # a line each time the run turns to something else
STOP = "stop.json"  # the step after which max_gpu_hours has ended training
CHECKPOINTS = "checkpoints"  # what is needed to resume
MODEL = "model"  # what is deployed
TRAINED = "train.json"  # the worker's summary; training has come to its end
EVALUATION = "evaluation.json"  # held-out losses of what lies in RUN/model
GATE_JOB = "gate-job.json"  # what the gate is to compare
GATE = "gate.json"  # what it has found, and what was decided
APPROVAL = "approval.json"  # what a person was asked, and the answer
CORPUS_APPROVAL = "corpus-approval.json"  # the same, of the corpus
ACCOUNT = "account.jsonl"  # a line each time the run ends: where its time went, what it cost
OUTCOME = "outcome.json"  # why the run failed
PAGE = "report.html"  # all of it for people
SUMMARY = "summary.json"  # the last file: without it the run is not done

REPORT = "report"  # a folder, all of which is sent to MLflow
DATA_REPORT = f"{REPORT}/data.json"  # the report of the plan
CORPUS_REPORT = f"{REPORT}/corpus.json"  # the files of the corpus, with their hashes
CORPUS_PROFILE = f"{REPORT}/corpus_profile.arrow"  # what the corpus looks like, for the next one to be compared with
CORPUS_ALARM, CORPUS_PLOT = f"{REPORT}/corpus_alarm.json", f"{REPORT}/corpus_alarm.png"  # what has moved in it
ENVIRONMENT_REPORT = f"{REPORT}/environment.json"  # Python and the packages
GATE_RECORDS = f"{REPORT}/gate_records.jsonl"  # the loss of every held-out record under every model
LOSS_PLOT, SPEED_PLOT = f"{REPORT}/loss.png", f"{REPORT}/speed.png"


Made = TypeVar("Made")


class SourceLoss(TypedDict):
    """Of the held-out target tokens of a source, or of all of them."""

    loss: float  # mean over target tokens, in nats
    perplexity: float
    target_tokens: int


HeldOut = dict[str, SourceLoss]
"""By source, and of `all` of them together; {} when nothing is held out."""


class Spans(TypedDict):
    """Where the seconds of a step went."""

    seconds_data: float  # waiting for rows
    seconds_forward: float
    seconds_backward: float
    seconds_step: float  # the update


class StepRecord(Spans):
    """A line of metrics.jsonl."""

    step: int  # optimizer steps done, with this one
    epoch: float
    loss: float  # mean over the target tokens of the step, in nats
    learning_rate: float
    grad_norm: float  # before clipping
    rows: int
    tokens: int
    target_tokens: int
    padding: float  # share of the computed tokens
    seconds: float
    tokens_per_second: float
    target_tokens_per_second: float
    mfu: NotRequired[float]  # model FLOPs utilisation, where the peak of the device is known
    memory_peak_bytes: int


class Culprit(TypedDict):
    """A record whose loss is out of the ordinary."""

    file: str
    line: int
    hash: str  # 32 hex digits, as in a tombstone
    loss: float  # per target token
    target_tokens: int


class Spike(TypedDict):
    """A line of spikes.jsonl."""

    step: int
    loss: float
    loss_limit: float | None  # None: there was none
    grad_norm: float
    grad_norm_limit: float | None
    done: str  # "warned", "skipped" or "rewound"
    says: str  # all of the above in words
    back_to: NotRequired[int]  # the checkpoint that a rewound run goes on from
    records: list[Culprit]  # worst first


class StandingOut(TypedDict):
    """A line of standing_out.jsonl."""

    step: int
    records: list[Culprit]  # worst first


Losses = dict[str, dict[str, float]]
"""Held-out loss by moment (before, after) and source; `all` of them together."""


class Trained(TypedDict):
    """What is read of train.json; it also has the rest of the trainer's progress."""

    steps: int
    tokens: int
    target_tokens: int
    seconds: float
    first_loss: float | None  # None: there was nothing left to do
    last_loss: float | None
    eval_before: HeldOut
    rows_per_step: NotRequired[int]
    best_step: NotRequired[int | None]
    spikes: NotRequired[int]
    steps_without_update: NotRequired[int]
    total_steps: NotRequired[int]
    stopped: NotRequired[str]  # why it ended before all its steps were done; empty where they were


class Moved(TypedDict):
    """A change between two corpora; the fields of `data_prep.inspection.drift.Finding`, with lines as FILE:LINE."""

    measure: str
    slice: str
    says: str
    before: float
    now: float
    effect: float
    chance: float
    lines: list[str]


class CorpusAlarm(TypedDict):
    """corpus_alarm.json: what has moved since the corpus of that version; a note where nothing was compared."""

    compared_with: str | None
    note: str
    findings: list[Moved]


class Registered(TypedDict):
    """A version of this run, the prompt it was asked, and what it wrote."""

    name: str
    version: int
    uri: str
    prompt: str
    sample: str


def read_json(path: Path) -> Any:
    """The content of a small JSON file.

    :raises PandaError: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file; a last line that a killed run left unfinished is not one."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def read_as(path: Path, make: Callable[..., Made]) -> Made:
    """What is made of the fields of a small JSON file.

    :raises PandaError: it is damaged, or has other fields.
    """
    try:
        return make(**read_json(path))
    except TypeError as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> PandaError:
    """For a file of a run that cannot be read: all of them but config.yaml are made again when they are missing."""
    return PandaError(f"{path}: damaged ({error}); take it from a copy, or remove it and go on with --resume")


def write_json(path: Path, content: Any) -> None:
    """The content as JSON that people can read."""
    write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1))
