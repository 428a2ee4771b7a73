"""Metrics of the user's own, on the answers that a model has generated, and what each metric and benchmark means.

In: the settings of the gate, prompts and right answers as text, a model's answers. Out: a value for each answer, and
the `Measure` (direction, limit) by which `statistics` judges them. A function is found and allowed as every other
`_target_` node. Cost: the user's.
"""

import numpy as np

from data_prep.errors import PandaError
from data_prep.targets import load_target
from training.comparison.statistics import Measure
from training.settings import GateSettings

BENCHMARK = "benchmark "  # before the name of a task


def measures(settings: GateSettings) -> dict[str, Measure]:
    """Name -> what its values mean."""
    entries = dict(settings.gate_metrics or {})
    entries |= {f"{BENCHMARK}{task}": entry for task, entry in (settings.gate_benchmarks or {}).items()}
    return {
        name: Measure(entry.get("higher_is_better", True), float(entry.get("max_regression", 0.0)))
        for name, entry in entries.items()
    }


def of_answers(settings: GateSettings, asked: list[tuple[str, str]], answers: list[str]) -> dict[str, np.ndarray]:
    """Metric -> its value for each answer, ``(num_prompts,) float64``.

    :param asked: (prompt, right answer) of each.
    :raises PandaError: a function may not be called, fails, or returns no number.
    """
    return {
        name: np.array([
            _value(name, entry["function"], prompt, answer, target)
            for (prompt, target), answer in zip(asked, answers, strict=True)
        ], dtype=np.float64)
        for name, entry in (settings.gate_metrics or {}).items()
    }  # fmt: skip


def _value(name: str, node: dict[str, object], prompt: str, answer: str, target: str) -> float:
    function = load_target(node, f"gate_metrics: {name}")
    try:
        return float(function(prompt=prompt, answer=answer, target=target))
    except PandaError:
        raise
    except Exception as error:
        raise PandaError(
            f"gate_metrics: {name}: {node['_target_']}(prompt={prompt[:40]!r}, answer={answer[:40]!r}, "
            f"target={target[:40]!r}) failed: {type(error).__name__}: {error}"
        ) from error
