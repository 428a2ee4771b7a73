"""Benchmarks of a registered version, asked by lm-eval (the extra `lm-eval`); results go to MLflow.

In: a model directory (whole weights, or an adapter and its base), names of lm-eval's tasks or of one's own in a
directory. Out: `Score`s; metrics ``benchmark/<task>/<metric>`` and the artifact `benchmarks/<tasks>.json` of the run
behind the version, and tags ``panda.benchmark.<task>`` of the version. The verb decides about nothing; of the tasks
that `gate_benchmarks` names the gate compares every record. Cost: lm-eval's index of tasks (14 s), the model in memory,
one forward pass for each answer that is weighed; the tasks' data are downloaded once unless they are local.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import PandaError, did_you_mean
from training.devices import any_device
from training.export.export import find_base
from training.models.hub import base_of
from training.registry.versions import Registry, Version
from training.tracking.redact import redact_text
from training.tracking.tags import BENCHMARK_TAG

INSTALL = "pip install 'lm-eval>=0.4.13'"


class BenchmarkError(PandaError):
    """lm-eval is absent, does not know a task, or cannot have its data."""


@dataclass(frozen=True)
class Questions:
    """What to ask. `task_dir`: a directory of task files of one's own; `limit`: only so many records of each task."""

    tasks: list[str]
    task_dir: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    chat: bool = False  # through the model's chat template
    batch_size: int = 8
    trust_remote_code: bool = False  # code that comes with the model
    each_record: bool = False  # the report also has the metrics of every record


@dataclass(frozen=True)
class Score:
    """One metric of one task, with lm-eval's standard error where it has one."""

    task: str
    metric: str
    value: float
    error: float | None
    shots: int
    records: int  # that were asked
    available: int

    def __str__(self) -> str:
        spread = "" if self.error is None else f" ± {self.error:.4f}"
        return f"{self.metric} {self.value:.4f}{spread}, {self.shots}-shot, {self.records} of {self.available} records"


def ask(model_dir: Path, questions: Questions, base: Path | None = None) -> tuple[list[Score], dict[str, Any]]:
    """Scores of a model, and lm-eval's whole report.

    :raises BenchmarkError: lm-eval is not installed, does not know a task, or cannot have its data.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise BenchmarkError(f"benchmarks are asked by lm-eval, which is not installed: {INSTALL}") from error

    manager = TaskManager(include_path=str(questions.task_dir) if questions.task_dir else None)
    _check_known(questions.tasks, manager.all_tasks)
    args = model_args(model_dir, base, questions.trust_remote_code)
    try:
        report = simple_evaluate(
            model="hf", model_args=args, tasks=list(questions.tasks), task_manager=manager,
            num_fewshot=questions.num_fewshot, limit=questions.limit, batch_size=questions.batch_size,
            apply_chat_template=questions.chat, log_samples=questions.each_record,
            device=any_device().type,
        )  # fmt: skip
    except OSError as error:  # of datasets and huggingface_hub
        raise BenchmarkError(f"the data of {', '.join(questions.tasks)} cannot be had: {error}") from error
    return list(scores_of(report)), report


def item_values(
    model_dir: Path, task: str, entry: dict[str, Any], trust_remote_code: bool
) -> tuple[np.ndarray, list[str]]:
    """The metric of each record of a task, in the order of the records: ``(n,) float64``; and its longest text.

    :param entry: what `gate_benchmarks` says of the task.
    :raises BenchmarkError: as `ask`; or the task has no such metric of single records.
    """
    options = {name: entry[name] for name in ("limit", "num_fewshot", "chat") if name in entry}
    task_dir = Path(entry["task_dir"]) if "task_dir" in entry else None
    questions = Questions([task], task_dir, trust_remote_code=trust_remote_code, each_record=True, **options)
    _, report = ask(model_dir, questions)
    metric, samples = entry.get("metric", "acc"), report.get("samples", {}).get(task, [])
    if not samples or any(not isinstance(one.get(metric), int | float) for one in samples):
        known = sorted(name for name, value in (samples[0] if samples else {}).items() if isinstance(value, float))
        raise BenchmarkError(
            f"gate_benchmarks: {task}: no {metric!r} of single records"
            + (f"; there is {', '.join(known)}" if known else "; name a task, not a group of tasks")
        )
    in_order = sorted(samples, key=lambda one: one["doc_id"])
    texts = [
        max((text for text in one["doc"].values() if isinstance(text, str)), key=len, default="") for one in in_order
    ]
    return np.array([one[metric] for one in in_order], dtype=np.float64), texts


def model_args(model_dir: Path, base: Path | None, trust_remote_code: bool = False) -> dict[str, Any]:
    """lm-eval's description of the model: an adapter on its base, with the tokenizer it was trained with."""
    reference = base_of(model_dir)
    common = {"tokenizer": str(model_dir), "dtype": "auto", "trust_remote_code": trust_remote_code}
    if reference is None:
        return {"pretrained": str(model_dir), **common}
    return {"pretrained": str(base or find_base(reference)), "peft": str(model_dir), **common}


def _check_known(tasks: list[str], known: list[str]) -> None:
    for task in tasks:
        if task not in known:
            raise BenchmarkError(f"lm-eval has no task {task!r}{did_you_mean(task, known)}; all: lm-eval ls tasks")


def scores_of(report: dict[str, Any]) -> Iterator[Score]:
    """The metrics in lm-eval's report; its keys are ``metric,filter`` with ``none`` for no filter."""
    for task, found in {**report["results"], **report.get("groups", {})}.items():
        counts = report["n-samples"].get(task, {})
        for key, value in found.items():
            metric, comma, how = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = found.get(f"{metric}_stderr,{how}")
            yield Score(
                task, metric if how == "none" else f"{metric}/{how}", float(value),
                float(error) if isinstance(error, int | float) else None, report["n-shot"].get(task) or 0,
                counts.get("effective", 0), counts.get("original", 0),
            )  # fmt: skip


def record(registry: Registry, version: Version, scores: list[Score], report: dict[str, Any]) -> None:
    """Write scores to the run behind a version, and to the version; asking again replaces them."""
    client = registry.client
    for score in scores:
        client.log_metric(version.run_id, f"benchmark/{score.task}/{score.metric}", score.value)
    by_task: dict[str, list[str]] = {}
    for score in scores:
        by_task.setdefault(score.task, []).append(str(score))
    registry.tag(version, {f"{BENCHMARK_TAG}{task}": "; ".join(texts) for task, texts in by_task.items()})
    content = {"version": version.uri, "scores": [asdict(score) for score in scores], "lm_eval": report}
    with tempfile.TemporaryDirectory(prefix="panda-benchmark-") as directory:
        path = Path(directory) / f"{'-'.join(sorted(by_task))[:100]}.json"
        path.write_text(redact_text(json.dumps(content, ensure_ascii=False, indent=1, default=str)), encoding="utf-8")
        client.log_artifact(version.run_id, str(path), "benchmarks")
