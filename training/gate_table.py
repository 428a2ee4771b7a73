"""The result of the gate as a table for people: the verdict with its reasons, then a line per slice and check.

In: what RUN/gate.json holds. Out: rows of what / result, or Markdown (the description of the version in MLflow).
"""

from typing import Any

from training.gate import CHECKS, interval_of


def verdict_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """Rows for a table."""
    verdict = {"what": "champion" if result["promoted"] else "challenger", "result": "; ".join(result["reasons"])}
    return [verdict, *map(_slice, result["slices"]), *map(_check, result["checks"])]


def verdict_markdown(result: dict[str, Any]) -> str:
    """The same as a Markdown table."""
    cells = [f"| {row['what']} | {row['result'].replace('|', ' ')} |" for row in verdict_rows(result)]
    return "\n".join(["| gate | result |", "| --- | --- |", *cells])


def _slice(row: dict[str, Any]) -> dict[str, str]:
    return {
        "what": f"loss on {row['slice']} ({row['records']} records) against {row['against']}",
        "result": f"{row['loss']:.4f}, was {row['reference_loss']:.4f}: gain {interval_of(row)}",
    }


def _check(row: dict[str, Any]) -> dict[str, str]:
    return {
        "what": f"{CHECKS[row['check']]} ({row['prompts']} prompts) against {row['against']}",
        "result": f"{row['share']:.0%}, was {row['reference_share']:.0%}: {row['better']} better, {row['worse']} worse",
    }
