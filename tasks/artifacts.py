"""What a stage shows in the Prefect UI: tables and links.

In: plain results. Out: Prefect artifacts. Cost: ~40 ms each.
"""

import base64
import os
from pathlib import Path
from typing import Any

from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact

from training.gate_table import verdict_markdown
from training.mlflow_sync import connect
from training.plots import write_plots
from training.registry import patiently
from training.secrets import public_link, redact_text
from training.tracking import TrackedRun

MLFLOW_UI = "PANDA_MLFLOW_UI"  # set by `panda up` for its worker: where people look at MLflow


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


def show_prepared(markdown: str) -> None:
    """Packing, lengths, and examples with their mask."""
    create_markdown_artifact(markdown, key="prepared-data", description="Packing, lengths, examples with their mask")


def show_pictures(run_dir: Path) -> None:
    """Loss curve and speed, inside the artifact: the UI cannot read files."""
    for path in write_plots(run_dir):
        picture = base64.b64encode(path.read_bytes()).decode()
        create_image_artifact(f"data:image/png;base64,{picture}", key=f"curve-{path.stem}", description=path.stem)


def show_links(run_dir: Path, tracked: TrackedRun, version: dict[str, Any]) -> None:
    """From here to MLflow; MLflow's run has the way back as the tag prefect.flow_run_url."""
    address = os.environ.get(MLFLOW_UI) or public_link(tracked.uri)
    model = f"{version['name']} version {version['version']}"
    run_id = tracked.run_id
    if address and run_id:
        model = f"[{model}]({address}/#/models/{version['name']}/versions/{version['version']})"
        experiment = patiently(lambda: connect(tracked.uri).get_run(run_id)).info.experiment_id
        run = f"[{run_id}]({address}/#/experiments/{experiment}/runs/{run_id})"
    else:
        run = f"{run_id} in {redact_text(tracked.uri)}"
    text = f"| | |\n| --- | --- |\n| model | {model} |\n| MLflow run | {run} |\n| directory | `{run_dir}` |\n"
    create_markdown_artifact(text, key="links", description="Where to look further")


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
    create_markdown_artifact(markdown=verdict_markdown(result), key="gate", description="Candidate, champion and base")
