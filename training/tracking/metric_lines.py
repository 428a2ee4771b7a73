"""The lines of a run's metric files as MLflow's metrics.

In: lines of metrics.jsonl, evaluations.jsonl, system.jsonl, account.jsonl. Out: `Metric`s of the run or a model.
Cost: none.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from training.run_files import ACCOUNT, EVALUATIONS, METRICS, SYSTEM

if TYPE_CHECKING:
    from mlflow.entities import Metric

SERIES = {METRICS: "", EVALUATIONS: "eval/", SYSTEM: "", ACCOUNT: ""}  # file -> prefix of its metrics


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
