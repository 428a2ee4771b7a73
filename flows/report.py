"""The report of a run for a person at a terminal. In: the summary. Out: text on stdout. Cost: none."""

import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from configs.settings import PandaSettings
from tasks.artifacts import report_rows


def show(summary: dict[str, Any], settings: PandaSettings) -> None:
    """Data report, losses, model, a text it generates, seconds per stage, and where to look further."""
    console = Console(highlight=False)
    console.print(_table("Data", [(row["what"], row["number"]) for row in report_rows(summary["data"])]))
    reused = [stage for stage, was in summary["data"]["reused"].items() if was]
    if reused:
        console.print(f"Reused from an earlier run: {', '.join(reused)}")
    console.print(_table("Held-out loss per target token", _losses(summary["losses"])))
    model = summary["model"]
    console.print(f"Registered [bold]{model['name']}[/bold] version {model['version']}   {model['uri']}")
    console.print("Loaded back from the registry, it answers:")
    console.print(f"  > {model['prompt'].strip()}\n  {model['sample'].strip()}", markup=False)
    console.print(_table("Seconds", [(stage, f"{seconds:.1f}") for stage, seconds in summary["seconds"].items()]))
    console.print(f"Run directory: {summary['run_dir']}\nTo look at this run:", markup=False)
    for command in ui_commands(settings):
        console.print(f"  {command}", markup=False, soft_wrap=True)


def ui_commands(settings: PandaSettings) -> list[str]:
    """The commands that open the two UIs on this run."""
    uri = settings.mlflow_tracking_uri or f"sqlite:///{Path(settings.output_dir).absolute() / 'mlflow.db'}"
    mlflow = f"mlflow ui --backend-store-uri {shlex.quote(uri)}" if "://" in uri and not uri.startswith("http") else uri
    return [
        "prefect server start    # then open http://127.0.0.1:4200",
        f"{mlflow}    # then open http://127.0.0.1:5000",
    ]


def _losses(losses: dict[str, dict[str, float]]) -> list[tuple[str, str]]:
    return [(f"{source} {moment}", f"{loss:.4f}") for moment, by in losses.items() for source, loss in by.items()]


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    return table
