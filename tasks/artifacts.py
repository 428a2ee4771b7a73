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
