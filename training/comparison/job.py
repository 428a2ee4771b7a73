"""What the gate is to compare, and what it finds: the two files between the flow and the process that compares.

In: what the registry knows (`training.registry.promotion`). Out: `Job`, written to RUN/gate-job.json for
`training.compare`, which scores the models in a process of its own and needs no MLflow; `GateResult`, what it writes to
RUN/gate.json and the flow completes. Cost: none.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from training import run_files
from training.comparison.statistics import CheckRow, MetricRow, SliceRow
from training.errors import ModelError


@dataclass(frozen=True)
class ModelUnderTest:
    """A model to score. `template`: the setting it was trained with; `problem`: why its files cannot be had.

    `quantised`: an adapter was trained on weights in 4 bits, on which it is asked too.
    """

    name: str
    template: str | dict[str, Any]
    model_dir: str | None = None
    problem: str | None = None
    quantised: bool = False

    @property
    def files(self) -> Path:
        """Its directory.

        :raises ModelError: its files cannot be had.
        """
        if self.model_dir is None:
            raise ModelError(str(self.problem))
        return Path(self.model_dir)


@dataclass(frozen=True)
class Job:
    """`champion_plan`: what the champion was trained on, if known; `gate`: the settings of the gate."""

    gate: dict[str, Any]
    cache_dir: str
    candidate: ModelUnderTest
    champion: ModelUnderTest | None = None
    champion_plan: str | None = None
    base: ModelUnderTest | None = None

    @property
    def models(self) -> dict[str, ModelUnderTest]:
        """Role -> model, the candidate first."""
        given = {"candidate": self.candidate, "champion": self.champion, "base": self.base}
        return {role: one for role, one in given.items() if one}


class Answered(TypedDict):
    """What a person has said, or that none has: one of the words of `training.comparison.approval`."""

    answer: str
    comment: str


class OverlapRow(TypedDict):
    """A record that was left out of the comparison, because a training record holds most of it."""

    record: str  # FILE:LINE, or the number of a benchmark's question
    trained: str  # FILE:LINE
    share: float


class Answer(TypedDict):
    """A text that was generated, and what is to be said of it; `exact` is None for long targets."""

    text: str
    ends: bool
    not_empty: bool
    no_repetition: bool
    exact: bool | None


class GateResult(TypedDict):
    """RUN/gate.json: the verdict and its tables; what was not compared has only those, and its reason."""

    promoted: bool
    reasons: list[str]
    slices: list[SliceRow]
    checks: list[CheckRow]
    metrics: NotRequired[list[MetricRow]]
    reference: NotRequired[str | None]  # what was decisive: the champion, else the base
    candidate: NotRequired[str]
    champion: NotRequired[str]
    base: NotRequired[str]
    records: NotRequired[int]
    records_elsewhere: NotRequired[int]  # neutral texts, and what was held out for the champion
    records_digest: NotRequired[str]
    excluded_records: NotRequired[int]
    confidence: NotRequired[float]
    settings: NotRequired[dict[str, Any]]
    overlaps: NotRequired[list[OverlapRow]]
    problems: NotRequired[dict[str, str]]  # role -> why it could not be scored
    asked: NotRequired[list[tuple[str, str]]]  # prompts and right answers
    answers: NotRequired[dict[str, list[Answer]]]  # by role, to these
    approval: NotRequired[Answered]
    settled: NotRequired[bool]  # in memory only: by an earlier execution of the run


def write_job(job: Job, run_dir: Path) -> None:
    """Write RUN/gate-job.json."""
    models = {role: {name: value for name, value in asdict(one).items() if value} for role, one in job.models.items()}
    run_files.write_json(run_dir / run_files.GATE_JOB, {**asdict(job), **models})


def read_job(run_dir: Path) -> Job:
    """RUN/gate-job.json."""

    def make(**written: Any) -> Job:
        roles = ("candidate", "champion", "base")
        return Job(**{**written, **{role: ModelUnderTest(**written[role]) for role in roles if written.get(role)}})

    return run_files.read_as(run_dir / run_files.GATE_JOB, make)
