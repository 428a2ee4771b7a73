"""What a stage shows in the Prefect UI: tables and links.

In: plain results. Out: Prefect artifacts. Cost: ~40 ms each.
"""

from typing import Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact


def show_report(report: dict[str, Any]) -> None:
    """The data report as a table: one line per number, rejected and dropped ones by reason."""
    create_table_artifact(table=report_rows(report), key="data-report", description="What became of the corpus")


def report_rows(report: dict[str, Any]) -> list[dict[str, str]]:
    """The data report flattened to what / number, for tables in the UI and in the terminal."""
    rows = [("records in", report["records_in"]), ("accepted", report["accepted"])]
    rows += [(f"rejected: {reason}", count) for reason, count in report["rejected"].items()]
    rows += [(f"dropped: {reason}", count) for reason, count in report["dropped"].items()]
    rows += [("tokens", report["tokens"]), ("target tokens", report["target_tokens"]), ("rows", report["rows"])]
    return [
        *({"what": what, "number": f"{number:,}"} for what, number in rows),
        {"what": "utilisation", "number": f"{100 * report['utilisation']:.2f} %"},
    ]


def show_evaluation(losses: dict[str, Any]) -> None:
    """Held-out loss before and after training."""
    table = [
        {"held-out loss": moment, **{source: f"{loss:.4f}" for source, loss in by_source.items()}}
        for moment, by_source in losses.items()
    ]
    create_table_artifact(table=table, key="evaluation", description="Held-out loss per target token")


def show_model(version: dict[str, Any], text: str) -> None:
    """The registered version, and what it says."""
    create_markdown_artifact(
        f"**{version['name']}**, version {version['version']} (`{version['uri']}`)\n\n> {text}\n",
        key="model",
        description="The registered model, loaded back",
    )


def show_gate(result: dict[str, Any]) -> None:
    """Why the version became the champion or not: the reasons, then a line per slice and check."""
    table = [{"what": "champion" if result["promoted"] else "challenger", "result": "; ".join(result["reasons"])}]
    create_table_artifact(table=table + gate_rows(result), key="gate", description="Candidate, champion and base")


def gate_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """The comparison flattened to what / result, for tables in the UI and in the terminal."""
    losses = [
        {
            "what": f"loss on {row['slice']} ({row['records']} records) against {row['against']}",
            "result": f"{row['loss']:.4f}, was {row['reference_loss']:.4f}: gain {_interval(row)}",
        }
        for row in result["slices"]
    ]
    checks = [
        {
            "what": f"answers: {row['check']} ({row['prompts']} prompts) against {row['against']}",
            "result": f"{row['share']:.0%}, was {row['reference_share']:.0%}: {_interval(row)}",
        }
        for row in result["checks"]
    ]
    return losses + checks


def _interval(row: dict[str, Any]) -> str:
    return f"{row['gain']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
