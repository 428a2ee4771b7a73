"""What a stage shows in the Prefect UI: tables and links.

In: plain results. Out: Prefect artifacts; one that cannot be made is a warning (`only_a_look`). Cost: ~40 ms each.

Progress of a long stage: one line now and then in the log, one bar in the Prefect UI.

In: (done, total, unit) as often as the stage likes. Out: a log line every `LOG_SECONDS`, an update of the stage's
progress artifact every `UI_SECONDS`, and a line in the terminal (`bar.py`), with rate and time left. Cost: an update is
~40 ms, hence the limits.
"""

import logging
import os
import time
from pathlib import Path
from typing import Any

from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.runtime import flow_run

from data_prep.inspection.render import as_code
from data_prep.plan.report import DataReport
from tasks.bar import BAR
from training import run_files
from training.comparison.job import GateResult
from training.comparison.report import verdict_markdown
from training.registry.register import with_retries
from training.run_files import CorpusAlarm, Culprit, Losses, Registered, Spike
from training.tracking.looks import only_a_look
from training.tracking.plots import data_uri, write_plots
from training.tracking.redact import public_link, redact_text
from training.tracking.run import TrackedRun
from training.tracking.sync import TRAINING_VIEW, connect

MLFLOW_UI, MLFLOW_DATABASE = "PANDA_MLFLOW_UI", "PANDA_MLFLOW_DATABASE"
"""Set by `panda up` for its worker: where people look at MLflow, and the only database that they see there."""


@only_a_look("the data report")
def show_report(report: DataReport) -> None:
    """The data report as a table: one line per number, rejected and dropped ones by reason."""
    create_table_artifact(table=report_rows(report), key="data-report", description="What became of the corpus")


def report_rows(report: DataReport) -> list[dict[str, str]]:
    """The data report flattened to what / number, for tables in the UI and in the terminal."""
    rows = [("records in", report["records_in"]), ("accepted", report["accepted"])]
    rows += [(f"rejected: {reason}", count) for reason, count in report["rejected"].items()]
    rows += [(f"dropped: {reason}", count) for reason, count in report["dropped"].items()]
    rows += [(f"nothing is made of: {name}", count) for name, count in report.get("unread_fields", {}).items()]
    rows += [("tokens", report["tokens"]), ("target tokens", report["target_tokens"]), ("rows", report["rows"])]
    return [
        *({"what": what, "number": f"{number:,}"} for what, number in rows),
        {"what": "utilisation", "number": f"{100 * report['utilisation']:.2f} %"},
    ]


@only_a_look("the examples")
def show_prepared(markdown: str) -> None:
    """Packing, lengths, and examples with their mask."""
    create_markdown_artifact(markdown, key="prepared-data", description="Packing, lengths, examples with their mask")


@only_a_look("the curves")
def show_pictures(run_dir: Path) -> None:
    """Loss curve and speed, inside the artifact: the UI cannot read files."""
    for path in write_plots(run_dir):
        create_image_artifact(data_uri(path), key=f"curve-{path.stem}", description=path.stem)


@only_a_look("the artifact of the corpus alarm")
def show_corpus_alarm(alarm: CorpusAlarm, picture: Path | None) -> None:
    """What has moved, with lines to look at, and a picture of it."""
    create_markdown_artifact(alarm_markdown(alarm), key="corpus-alarm", description="This corpus beside the champion's")
    if picture:
        create_image_artifact(data_uri(picture), key="corpus-alarm-picture", description="What moved")


def alarm_markdown(alarm: CorpusAlarm) -> str:
    """A section a finding."""
    if not alarm["findings"]:
        return alarm["note"] or f"Nothing to look into, beside the corpus of {alarm['compared_with']}.\n"
    parts = [f"Beside the corpus of {alarm['compared_with']}:\n"]
    for one in alarm["findings"]:
        lines = "".join(f"- `{line}`\n" for line in one["lines"])
        parts.append(f"### {one['measure']}: {one['slice']}\n\n{one['says']}\n\n{lines}")
    return "\n".join(parts)


def alarm_in_words(alarm: CorpusAlarm) -> str:
    """One line: what has moved, the first few changes."""
    found = [f"{one['measure']} ({one['slice']}): {one['says']}" for one in alarm["findings"]]
    more = f"; and {len(found) - MAX_TOLD} more" if len(found) > MAX_TOLD else ""
    return "; ".join(found[:MAX_TOLD]) + more or alarm["note"] or "nothing to look into"


@only_a_look("the spikes")
def show_spikes(spikes: list[Spike], others: list[Culprit]) -> None:
    """Each spike, what was done about it, and the records that stood out; those that did without a spike."""
    markdown = spikes_markdown(spikes, others)
    create_markdown_artifact(markdown, key="spikes", description="Steps and records out of the ordinary")


def spikes_markdown(spikes: list[Spike], others: list[Culprit]) -> str:
    """A section a spike, and one of the other records."""
    parts = [
        f"### Step {spike['step']}: {spike['says']}\n\n{_records(spike['records']) or 'No record stands out.'}\n"
        for spike in spikes
    ]
    if others:
        parts.append(f"### Records that stand out, in steps that do not\n\n{_records(others)}\n")
    return "\n".join(parts)


def _records(records: list[Culprit]) -> str:
    return "".join(f"- `{one['file']}:{one['line']}`: loss {one['loss']:.2f}\n" for one in records)


@only_a_look("the links")
def show_links(run_dir: Path, tracked: TrackedRun, version: Registered) -> dict[str, str] | None:
    """From here to MLflow and back; returns the links by name, in Markdown."""
    links = links_of(run_dir, tracked, version)
    rows = "".join(f"| {name} | {link} |\n" for name, link in links.items())
    create_markdown_artifact(f"| | |\n| --- | --- |\n{rows}", key="links", description="Where to look further")
    return links


def links_of(run_dir: Path, tracked: TrackedRun, version: Registered) -> dict[str, str]:
    """Model, MLflow run, Prefect run, directory. MLflow's links open its training pages, not those of GenAI."""
    model = f"{version['name']} version {version['version']}"
    where = addresses(tracked, version["uri"])
    run = f"{tracked.run_id} in {redact_text(tracked.uri)}"
    page = f"`{run_dir / run_files.PAGE}`"
    if "version" in where:
        model, run = f"[{model}]({where['version']})", f"[{tracked.run_id}]({where['MLflow run']})"
        of_run = where["MLflow run"].removesuffix(TRAINING_VIEW)
        page = f"[{run_files.PAGE}]({of_run}/artifacts/{run_files.PAGE}{TRAINING_VIEW})"
    prefect = f"[{flow_run.name}]({flow_run.ui_url})" if flow_run.ui_url else str(flow_run.id)
    return {"model": model, "report": page, "MLflow run": run, "Prefect run": prefect, "directory": f"`{run_dir}`"}


def addresses(tracked: TrackedRun, version: str) -> dict[str, str]:
    """Where to look at run and version in MLflow; of a database that no server shows, the run alone."""
    is_shown = tracked.uri == os.environ.get(MLFLOW_DATABASE)
    address, run_id = os.environ.get(MLFLOW_UI) if is_shown else public_link(tracked.uri), tracked.run_id
    if not (address and run_id):
        return {"MLflow run": f"{run_id} in {tracked.uri}"}
    experiment = with_retries(lambda: connect(tracked.uri).get_run(run_id)).info.experiment_id
    return {
        "MLflow run": f"{address}/#/experiments/{experiment}/runs/{run_id}{TRAINING_VIEW}",
        "version": f"{address}/#/{'/versions/'.join(version.replace(':', '').rsplit('/', 1))}{TRAINING_VIEW}",
    }


@only_a_look("the table of losses")
def show_evaluation(losses: Losses) -> None:
    """Held-out loss before and after training."""
    table = [
        {"held-out loss": moment, **{source: f"{loss:.4f}" for source, loss in by_source.items()}}
        for moment, by_source in losses.items()
    ]
    create_table_artifact(table=table, key="evaluation", description="Held-out loss per target token")


@only_a_look("the artifact of the model")
def show_model(version: Registered) -> None:
    """The registered version, and what it says."""
    create_markdown_artifact(model_markdown(version), key="model", description="The registered model, loaded back")


def model_markdown(version: Registered) -> str:
    """Prompt and text as code: what a model writes may hold any character that means something to Markdown or HTML."""
    head = f"**{version['name']}**, version {version['version']} (`{version['uri']}`)"
    prompt, text = version["prompt"].strip(), version["sample"].strip()
    shown = as_code(text) if text else "*No text: it ends at once, or writes only blanks.*"
    return f"{head}\n\nAsked:\n\n{as_code(prompt)}\n\nit writes:\n\n{shown}\n"


@only_a_look("the artifact of the gate")
def show_gate(result: GateResult) -> None:
    """Why the version became the champion or not: the reasons, then a line per slice and check."""
    create_markdown_artifact(markdown=verdict_markdown(result), key="gate", description="Candidate, champion and base")


MAX_TOLD = 3  # changes of a corpus, in one line
LOG_SECONDS = 5.0
UI_SECONDS = 2.0

logger = logging.getLogger(__name__)


class StageProgress:
    """Rate-limited reporter of one stage; call it with (stage, done, total, unit)."""

    def __init__(self, key: str):
        self.key = key
        self.started = self.logged = self.shown = time.monotonic()
        self.first_done: int | None = None  # where the rate is counted from: the first call, not the start-up before it
        self.artifact: Any = None

    def __call__(self, stage: str, done: int, total: int, unit: str, loss: float | None = None) -> None:
        now = time.monotonic()
        if self.first_done is None:
            self.first_done, self.started = done, now
        text = describe(done, total, unit, done - self.first_done, now - self.started)
        text += "" if loss is None else f", loss {loss:.4f}"
        BAR.show(stage, done, total, text, loss)
        finished = done >= total
        if now - self.logged >= LOG_SECONDS or (finished and self.logged >= self.started):
            self.logged = now
            logger.info("%s: %s", stage, text)
        if now - self.shown >= UI_SECONDS or (finished and self.artifact):
            self.shown = now
            self._show(100 * done / max(total, 1), f"{stage}: {text}")

    def _show(self, percent: float, text: str) -> None:
        if self.artifact is None:
            self.artifact = create_progress_artifact(percent, key=self.key, description=text)
        else:
            update_progress_artifact(self.artifact, percent, description=text)


def describe(done: int, total: int, unit: str, done_here: int, seconds: float) -> str:
    """``1,200 of 5,000 records (24 %), 400 records/s, 10 s left``; the rate counts only what was done here."""
    rate = done_here / seconds if seconds else 0.0
    text = f"{done:,} of {total:,} {unit} ({100 * done / max(total, 1):.0f} %)"
    if rate:
        text += f", {rate:,.{0 if rate >= 10 else 2}f} {unit}/s, {(total - done) / rate:,.0f} s left"
    return text
