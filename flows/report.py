"""The report of a run for a person at a terminal. In: the summary. Out: text on stdout. Cost: none."""

import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from configs.settings import PandaSettings
from tasks.artifacts import report_rows
from training.secrets import public_link, redact_text
from training.settings import TrackingSettings
from training.tracking import tracking_uri


def show(summary: dict[str, Any], settings: PandaSettings) -> None:
    """Data report, losses, model, a text it generates, seconds per stage, and where to look further."""
    console = Console(highlight=False)
    if summary["outcome"]["name"] != "Completed":
        console.print(f"[bold]{summary['outcome']['name']}[/bold]: {summary['outcome']['message']}")
    if "data" in summary:
        _print_data(console, summary)
    if "losses" in summary:
        _print_table(console, "Held-out loss per target token", _losses(summary["losses"]))
    if "model" in summary:
        _print_model(console, summary["model"])
    if "gate" in summary:
        _print_gate(console, summary["gate"])
    if "seconds" in summary:
        _print_table(console, "Seconds", [(stage, f"{took:.1f}") for stage, took in summary["seconds"].items()])
    if "run_dir" in summary:
        console.print(f"Run directory: {summary['run_dir']}\nTo look at this run:", markup=False)
        for command in ui_commands(settings, summary):
            console.print(f"  {command}", markup=False, soft_wrap=True)


def _print_data(console: Console, summary: dict[str, Any]) -> None:
    """The data report, and which of its stages had nothing to do."""
    _print_table(console, "Data", [(row["what"], row["number"]) for row in report_rows(summary["data"])])
    reused = [stage for stage, was in summary["data"]["reused"].items() if was]
    if reused:
        console.print(f"Reused from an earlier run: {', '.join(reused)}")


def _print_model(console: Console, model: dict[str, Any]) -> None:
    """The registered version, and what it says."""
    console.print(f"Registered [bold]{model['name']}[/bold] version {model['version']}   {model['uri']}")
    console.print("Loaded back from the registry, it answers:")
    console.print(f"  > {model['prompt'].strip()}\n  {model['sample'].strip()}", markup=False)


def _print_gate(console: Console, gate: dict[str, Any]) -> None:
    """Champion or not, and why."""
    console.print("It is the champion now:" if gate["promoted"] else "It stays challenger:", style="bold")
    for reason in gate["reasons"]:
        console.print(f"  {reason}", markup=False)


def ui_commands(settings: PandaSettings, summary: dict[str, Any]) -> list[str]:
    """The commands that open the two UIs, each with the address of this run."""
    prefect = f"prefect server start    # http://127.0.0.1:4200/runs/flow-run/{summary['prefect_flow_run_id']}"
    uri = tracking_uri(TrackingSettings.of(settings), Path(summary["run_dir"]).parent)
    mlflow = f"mlflow ui --backend-store-uri {shlex.quote(redact_text(uri))}    # http://127.0.0.1:5000"
    link = public_link(uri)
    return [prefect, f"{link} (MLflow)" if link else mlflow]


def _losses(losses: dict[str, dict[str, float]]) -> list[tuple[str, str]]:
    return [(f"{source} {moment}", f"{loss:.4f}") for moment, by in losses.items() for source, loss in by.items()]


def _print_table(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    """A heading, then name and number in two columns."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 2))
    table.add_column()
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(f"[bold]{title}[/bold]")
    console.print(table)
