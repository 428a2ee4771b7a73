"""The result of the gate for people: the verdict with its reasons, then a line per slice and per check of the answers.

In: what RUN/gate.json holds. Out: Markdown, for the description of the version in MLflow and the artifact in Prefect.
"""

from collections.abc import Iterable

from training.comparison.approval import WAITING
from training.comparison.job import GateResult
from training.comparison.statistics import CHECKS, CheckRow, SliceRow, interval_of


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
        heads = ("held-out loss on", "records", "against", "loss", "its loss", "gain [95 %]")
        parts.append(_table(heads, map(_slice, result["slices"])))
    if result["checks"]:
        heads = ("answers", "prompts", "against", "share", "its share", "better, worse")
        parts.append(_table(heads, map(_check, result["checks"])))
    return "\n\n".join(parts)


def _slice(row: SliceRow) -> Iterable[str]:
    losses = (f"{row['loss']:.4f}", f"{row['reference_loss']:.4f}")
    return row["slice"], str(row["records"]), row["against"], *losses, str(interval_of(row))


def _check(row: CheckRow) -> Iterable[str]:
    shares = (f"{row['share']:.0%}", f"{row['reference_share']:.0%}")
    name = CHECKS[row["check"]].removeprefix("answers ")
    return name, str(row["prompts"]), row["against"], *shares, f"{row['better']}, {row['worse']}"


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [heads, ["---"] * 6, *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', ' ') for cell in line)} |" for line in lines)
