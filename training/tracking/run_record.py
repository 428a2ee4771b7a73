"""RUN/tracking.json: what MLflow is to know of a run and has been told of it; and the metrics that it is told.

In: facts of the run, lines of its metric files. Out: one small file, replaced atomically; `Metric`s. The file is the
spool of tracking: a run whose process was killed, or whose MLflow server was down, can be completed from it by any
later process. Cost: one small write a synchronisation.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import psutil

from training import run_files

if TYPE_CHECKING:
    from mlflow.entities import Metric

RUNNING, FINISHED = "RUNNING", "FINISHED"
HELD_OUT, HELD_OUT_CONTEXT = "held-out", "validation"  # the data set that losses of models are measured on
SERIES = {run_files.METRICS: "", run_files.EVALUATIONS: "eval/", run_files.SYSTEM: "", run_files.ACCOUNT: ""}
"""File -> prefix of its metrics."""


@dataclass(frozen=True)
class Dataset:
    """A data set of the run as MLflow shows it; `digest` is the fingerprint (at most 36 characters)."""

    name: str
    digest: str
    path: str
    context: str = "training"
    profile: Mapping[str, object] = field(default_factory=dict)


class Process(TypedDict):
    """Who owns the run: enough to find out later whether that process is still alive."""

    host: str
    pid: int
    started: float


def this_process() -> Process:
    """The process that asks."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}


@dataclass
class RunRecord:
    """The content of RUN/tracking.json; `sent_*` say what MLflow already has."""

    experiment: str
    run_name: str
    uri: str  # without password; only to recognise the server
    params: dict[str, str]
    tags: dict[str, str]
    datasets: list[dict[str, Any]]
    status: str = RUNNING
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    owner: Process = field(default_factory=this_process)
    started_ms: int = field(default_factory=lambda: int(time.time() * 1000))
    ended_ms: int | None = None
    run_id: str | None = None
    sent_facts: bool = False
    sent_offsets: dict[str, int] = field(default_factory=dict)
    sent_files: dict[str, str] = field(default_factory=dict)
    sent_steps: dict[str, int] = field(default_factory=dict)  # file -> the last step MLflow has of it
    sent_status: str = RUNNING

    def finish(self, status: str) -> None:
        """The run has ended with this status; MLflow is to be told."""
        self.status = status
        self.ended_ms = int(time.time() * 1000)

    def reopen(self, tags: dict[str, str]) -> None:
        """The run goes on (resumed) in this process."""
        self.status, self.ended_ms, self.owner = RUNNING, None, this_process()
        self.tags.update(tags)
        self.sent_facts, self.sent_status = False, RUNNING  # its next end is news, even if MLflow never hears it runs

    @property
    def known_id(self) -> str:
        """MLflow's id of a run that MLflow has."""
        assert self.run_id is not None, "the run is created before anything is sent about it"
        return self.run_id

    @property
    def is_owner_alive(self) -> bool:
        """Whether the process of a running record lives; a process of another machine is taken to."""
        if self.owner["host"] != socket.gethostname():
            return True
        try:
            return abs(psutil.Process(self.owner["pid"]).create_time() - self.owner["started"]) < 1
        except psutil.NoSuchProcess:
            return False

    @property
    def is_settled(self) -> bool:
        """Whether the run has ended and MLflow knows all of it."""
        return self.status != RUNNING and self.sent_status == self.status


def read(run_dir: Path) -> RunRecord | None:
    """The record of a run directory, None if it has none."""
    return read_known(run_dir) if (run_dir / run_files.TRACKING).exists() else None


def read_known(run_dir: Path) -> RunRecord:
    """The record of a run directory that has one."""
    return run_files.read_as(run_dir / run_files.TRACKING, RunRecord)


def write(run_dir: Path, record: RunRecord) -> None:
    """Replace the record in one go."""
    run_files.write_json(run_dir / run_files.TRACKING, asdict(record))


def new_lines(path: Path, offset: int) -> tuple[int, list[dict[str, Any]]]:
    """(offset after the last whole line, its objects). A resumed run cuts its file: then all is read again."""
    if not path.exists():
        return 0, []
    with open(path, "rb") as file:
        file.seek(max(0, offset - 1))
        if offset and file.read(1) != b"\n":
            file.seek(0)
            offset = 0
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    return offset + len(whole), [json.loads(line) for line in whole.splitlines()]


def metrics_of(line: dict[str, Any], prefix: str, started_ms: int, **of: str) -> "Iterator[Metric]":
    """The numbers of a line as MLflow metrics; nested ones are joined by `/` (`eval/sources/instruction/loss`).

    :param of: what they are metrics of beside the run: `model_id`, `dataset_name`, `dataset_digest`.
    """
    from mlflow.entities import Metric

    step = int(line.get("step", 0))
    milliseconds = int(line["time"] * 1000) if "time" in line else started_ms + step
    for name, value in flatten(line):
        if name not in ("step", "time") and isinstance(value, int | float) and not isinstance(value, bool):
            yield Metric(prefix + name, float(value), milliseconds, step, **of)


def flatten(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of the leaves of nested mappings."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{path}{name}/")
        else:
            yield f"{path}{name}", value
