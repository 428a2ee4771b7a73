"""The result of the gate for people: the verdict with its reasons, then a line per slice, check and metric.

In: what RUN/gate.json holds. Out: Markdown, for the description of the version in MLflow and the artifact in Prefect.
"""

from collections.abc import Iterable
from typing import Any

from training.comparison.approval import WAITING
from training.comparison.intervals import CONFIDENCE
from training.comparison.job import GateResult, OverlapRow
from training.comparison.statistics import CHECKS, CheckRow, MetricRow, SliceRow, interval_of

MAX_NAMED = 10


def verdict_markdown(result: GateResult) -> str:
    """Verdict, reasons, and a table each for losses and answers where there are any."""
    waits = "approval" in result and result["approval"]["answer"] == WAITING
    outcome = "waits for approval" if waits else "champion" if result["promoted"] else "challenger"
    reasons = "\n".join(f"- {reason}" for reason in result["reasons"])
    return "\n\n".join(part for part in (f"**{outcome}**", reasons, comparison_markdown(result)) if part)


def comparison_markdown(result: GateResult) -> str:
    """A table each for losses and answers where there are any."""
    parts = []
    if result["slices"]:
        heads: tuple[Any, ...] = (
            "held-out loss on",
            "records",
            "against",
            "loss",
            "its loss",
            f"gain [{result.get('confidence', CONFIDENCE):.0%}]",
        )
        parts.append(_table(heads, map(_slice, result["slices"])))
    if result["checks"]:
        heads = ("answers", "prompts", "against", "share", "its share", "better, worse")
        parts.append(_table(heads, map(_check, result["checks"])))
    if result.get("metrics"):
        heads = ("metric or benchmark", "items", "against", "mean", "its mean", "better by")
        parts.append(_table(heads, map(_metric, result["metrics"])))
    if result.get("overlaps"):
        parts.append(_overlaps(result["overlaps"]))
    return "\n\n".join(parts)


def _overlaps(rows: list[OverlapRow]) -> str:
    first = [f"- {row['record']} is in {row['trained']} ({row['share']:.0%})" for row in rows[:MAX_NAMED]]
    more = [f"- and {len(rows) - MAX_NAMED} more, in gate.json"] if len(rows) > MAX_NAMED else []
    return "\n".join([f"Left out, as the candidate was trained on them: {len(rows)}", "", *first, *more])


def _slice(row: SliceRow) -> Iterable[str]:
    losses = (f"{row['loss']:.4f}", f"{row['reference_loss']:.4f}")
    return row["slice"], str(row["records"]), row["against"], *losses, str(interval_of(row))


def _check(row: CheckRow) -> Iterable[str]:
    shares = (f"{row['share']:.0%}", f"{row['reference_share']:.0%}")
    name = CHECKS[row["check"]].removeprefix("answers ")
    return name, str(row["prompts"]), row["against"], *shares, f"{row['better']}, {row['worse']}"


def _metric(row: MetricRow) -> Iterable[str]:
    values = (f"{row['value']:.4f}", f"{row['reference_value']:.4f}")
    return row["metric"], str(row["items"]), row["against"], *values, str(interval_of(row))


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [heads, ["---"] * 6, *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', ' ') for cell in line)} |" for line in lines)
