"""What the gate is to compare: the candidate of a run, the champion of its model, the base it started from.

In: what the registry knows (`training.registry.promotion`). Out: `Job`, written to RUN/gate-job.json for
`training.compare`, which asks the models in a process of its own and needs no MLflow. Cost: none.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training import run_files


@dataclass(frozen=True)
class Job:
    """A model is {"name", "model_dir", "template"}; `champion_plan`: what the champion was trained on, if known.

    A model whose files cannot be had has "problem" instead of "model_dir".
    """

    gate: dict[str, Any]
    cache_dir: str
    candidate: dict[str, Any]
    champion: dict[str, Any] | None = None
    champion_plan: str | None = None
    base: dict[str, Any] | None = None


def write_job(job: Job, run_dir: Path) -> None:
    """Write RUN/gate-job.json."""
    run_files.write_json(run_dir / run_files.GATE_JOB, asdict(job))


def read_job(run_dir: Path) -> Job:
    """RUN/gate-job.json."""
    return Job(**run_files.read_json(run_dir / run_files.GATE_JOB))
