"""Run the flow in this process and tell a person what came of it.

In: the command line and the configuration it makes. Out: exit code; the report on stdout (or one JSON line), logs on
stderr. With a Prefect server up the run shows there at once; without one it shows in a server started later.
Cost beyond the stages: 2 s of imports, 3 s more when a temporary server has to start.

What `--json` prints. In: plain values. Out: one JSON object as the last line of stdout. Cost: none.

The report of a run for a person at a terminal. In: the summary. Out: text on stdout. Cost: none.
"""

import contextlib
import json
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from configs.cli import CommandLine
from configs.errors import ConfigError
from configs.load import Loaded
from configs.settings import PandaSettings
from data_prep.errors import PandaError
from flows.cli.console import plain_table, stdout_console
from flows.parts import preflight
from flows.parts.run_dir import Summary
from flows.stack.prefect_home import address
from flows.stack.prefect_server import connected, unusable
from training.cost.marks import has_own_process
from training.cost.words import in_a_line, in_words
from training.run_files import Losses, Registered
from training.settings import TrackingSettings
from training.tracking.redact import public_link, redact_text
from training.tracking.run import tracking_uri
from training.tracking.sync import TRAINING_VIEW

if TYPE_CHECKING:
    from training.comparison.job import GateResult


def print_json(value: Mapping[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False, default=str), flush=True)


logger = logging.getLogger(__name__)


def run(line: CommandLine, loaded: Loaded) -> int:
    """Check, then run `panda-train` with what was typed as its parameters."""
    use_sample_corpus_if_nothing_else(loaded)
    preflight.check(loaded.settings, chosen(loaded))
    require_somebody_to_ask(loaded)
    has_own_process.set(True)
    summary = call_flow(as_parameters(line))
    if line.switches.json:
        print_json(summary)
    else:
        show(summary, loaded.settings)
    return 0


def as_parameters(line: CommandLine) -> dict[str, Any]:
    """What was typed as parameters of the flow, where None means "not given": an explicit none is an override."""
    nothing = [f"{name}=null" for name, value in line.values.items() if value is None]
    return {**line.values, "overrides": [*line.overrides, *nothing] or None, "conf_path": line.switches.conf_path}


def chosen(loaded: Loaded) -> set[str]:
    """Names somebody gave a value for."""
    return {name for name, origin in loaded.origins.items() if origin != "default"}


def require_somebody_to_ask(loaded: Loaded) -> None:
    """A temporary server has no UI, so a run would train and then wait in vain."""
    asks = {"require_approval=true": loaded.settings.require_approval}
    asks["corpus_alarm=approve"] = loaded.settings.corpus_alarm == "approve"
    wanted = [setting for setting, is_on in asks.items() if is_on]
    if wanted and (reason := unusable(address())):
        raise ConfigError([
            f"{setting}: {reason}, in whose UI somebody could answer; start one first: panda up" for setting in wanted
        ])  # fmt: skip


def use_sample_corpus_if_nothing_else(loaded: Loaded) -> None:
    """`--model panda-tiny` is for trying things out: without any corpus it writes and uses the sample."""
    data_dirs = {"instruction_tuning_data_dir", "pretraining_data_dir"}
    if loaded.settings.model == "panda-tiny" and not Path("dataset").exists() and not chosen(loaded) & data_dirs:
        from data_prep.sample import write_sample

        logger.info("no corpus in ./dataset: writing the sample corpus there")
        write_sample(Path("dataset"))


def call_flow(parameters: dict[str, Any]) -> Summary:
    """Run the flow to its end; its failure is raised here, a user's error as the `PandaError` it is."""
    os.environ.setdefault("DO_NOT_TRACK", "1")
    with contextlib.redirect_stdout(sys.stderr), connected() as wait_for_server:  # stdout is for results
        from flows.panda_train import panda_train

        wait_for_server()
        with everything_sent(), server_there():
            state = panda_train(**parameters, return_state=True)
            result: Any = state.result(raise_on_failure=False)
    if state.is_completed():
        return result
    if isinstance(result, PandaError):
        raise result
    raise PandaError(f"the run ended as {state.name}: {state.message}")


@contextlib.contextmanager
def server_there() -> Iterator[None]:
    """A server that goes away for longer than Prefect's client waits is told in a line."""
    from flows.parts.flow_states import of_a_server_that_is_away

    try:
        yield
    except Exception as error:
        why = of_a_server_that_is_away(error)
        if not why:
            raise
        more = "what is finished is kept; the same command goes on, with --resume if it had begun to train"
        raise PandaError(f"{why}; {more}") from error


@contextlib.contextmanager
def everything_sent() -> Iterator[None]:
    """Before a temporary server ends, wait for what is sent to it in batches; later Prefect retries for a minute."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    try:
        yield
    finally:
        APILogWorker.drain_all(timeout=10)
        EventsWorker.drain_all(timeout=10)


def show(summary: Summary, settings: PandaSettings) -> None:
    """Data report, losses, model, a text it generates, where the time went, where to look further, the cost."""
    console = stdout_console()
    if summary["outcome"]["name"] != "Completed":
        console.print(f"[bold]{summary['outcome']['name']}[/bold]: {summary['outcome']['message']}")
    if "data" in summary:
        _print_data(console, summary)
    if "losses" in summary:
        nothing = [("no record is held out (validation_fraction)", "")]
        _print_table(console, "Held-out loss per target token", _losses(summary["losses"]) or nothing)
    if "model" in summary:
        _print_model(console, summary["model"])
    if "gate" in summary:
        _print_gate(console, summary["gate"])
    if "account" in summary:
        _print_table(console, "Time and cost", in_words(summary["account"]))
    elif "seconds" in summary:
        _print_table(console, "Seconds", [(stage, f"{took:.1f}") for stage, took in summary["seconds"].items()])
    if "run_dir" in summary:
        _print_where(console, settings, summary)
    if "account" in summary:
        account = summary["account"]
        line = in_a_line(account["wall_seconds"], account, f"goodput {account['goodput']:.1%}")
        console.print(f"This took {line}", markup=False)


def _print_data(console: Console, summary: Summary) -> None:
    """The data report, and which of its stages had nothing to do."""
    from tasks.reporting import report_rows  # imports Prefect, which must find the address of its server first

    _print_table(console, "Data", [(row["what"], row["number"]) for row in report_rows(summary["data"])])
    reused = [stage for stage, was in summary["data"]["reused"].items() if was]
    if reused:
        console.print(f"Reused from an earlier run: {', '.join(reused)}")


def _print_model(console: Console, model: Registered) -> None:
    """The registered version, and what it says."""
    console.print(f"Registered [bold]{model['name']}[/bold] version {model['version']}   {model['uri']}")
    console.print("Loaded back from the registry, it goes on like this:")
    console.print(f"  > {model['prompt'].strip()}\n  {model['sample'].strip()}", markup=False)


def _print_gate(console: Console, gate: "GateResult") -> None:
    """Champion or not, and why."""
    console.print("It is the champion now:" if gate["promoted"] else "It stays challenger:", style="bold")
    for reason in gate["reasons"]:
        console.print(f"  {reason}", markup=False)


def ui_commands(settings: PandaSettings, summary: Summary) -> list[str]:
    """The commands that open the two UIs, each with the address of this run."""
    there = address()
    page = f"{there.url.removesuffix('/api')}/runs/flow-run/{summary['prefect_flow_run_id']}"
    prefect = f"panda up    # {page}" if unusable(there) else f"{page} (Prefect)"
    uri = tracking_uri(TrackingSettings.of(settings), Path(summary["run_dir"]).parent)
    pages = f"/#/experiments{TRAINING_VIEW}"
    mlflow = f"mlflow ui --backend-store-uri {shlex.quote(redact_text(uri))}    # http://127.0.0.1:5000{pages}"
    link = public_link(uri)
    return [prefect, f"{link}{pages} (MLflow)" if link else mlflow]


def _print_where(console: Console, settings: PandaSettings, summary: Summary) -> None:
    console.print(f"Run directory: {summary['run_dir']}\nTo look at this run:", markup=False)
    for command in ui_commands(settings, summary):
        console.print(f"  {command}", markup=False, soft_wrap=True)


def _losses(losses: Losses) -> list[tuple[str, str]]:
    return [(f"{source} {moment}", f"{loss:.4f}") for moment, by in losses.items() for source, loss in by.items()]


def _print_table(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    """A heading, then name and number in two columns."""
    table = plain_table(2, indent=2)
    table.columns[1].justify = "right"
    for row in rows:
        table.add_row(*row)
    console.print(f"[bold]{title}[/bold]")
    console.print(table)
