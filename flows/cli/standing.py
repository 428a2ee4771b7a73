"""`panda` alone: where things stand. The last runs, the champions, the servers, the next run of a schedule.

In: the flags that say where runs and registry are. Out: a few lines, or one JSON object with ``--json``. Nothing is
started or made: what is not there yet is said, with the command that makes it. Cost: reading small files; 2 s of
imports each where there is a registry, and where a Prefect server is up.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.cli import CONF_PATH, JSON, VERBOSE, configure
from data_prep.errors import PandaError
from flows.cli.console import plain_table, stdout_console
from flows.parts.run_dir import RunDir
from training import run_files
from training.tracking import run_record

NUM_RUNS = 3
MESSAGE_CHARS = 100
FIELDS = {"output_dir", "mlflow_tracking_uri"}
TEXT = "Where things stand: the last runs, the champions, the servers, the next run of a schedule."


@dataclass(frozen=True)
class Standing:
    """What is shown, a text a line; an empty list where there is nothing yet."""

    runs: list[str]
    champions: list[str]
    servers: list[str]
    next: list[str]


HINTS = {
    "runs": "none in {output_dir} yet: make demo, or python train.py --help; those of another: panda --output_dir DIR",
    "champions": "none yet",
    "servers": "down: panda up starts them",
    "next": "nothing is scheduled: panda schedule",
}


def show(argv: list[str]) -> int:
    """Print it."""
    line, loaded = configure("panda", TEXT, argv, [CONF_PATH, JSON, VERBOSE], FIELDS)
    settings = loaded.settings
    found = Standing(
        [_run(run) for run in last_runs(Path(settings.output_dir))],
        _champions(argv),
        _servers(Path(".panda").absolute()),
        _next_run(),
    )
    if line.switches.json:
        from flows.cli.run import print_json

        print_json(asdict(found))
        return 0
    table = plain_table(2)
    for name, lines in asdict(found).items():
        for number, text in enumerate(lines or [HINTS[name].format(output_dir=settings.output_dir)]):
            table.add_row("" if number else name, text)
    stdout_console().print(table)
    print("panda --help lists the commands")
    return 0


def last_runs(output_dir: Path) -> list[RunDir]:
    """The newest ones, newest first."""
    configs = output_dir.glob(f"*/{run_files.CONFIG}")
    return [
        RunDir(path.parent) for path in sorted(configs, key=lambda path: path.stat().st_mtime)[: -NUM_RUNS - 1 : -1]
    ]


def _run(run: RunDir) -> str:
    """Its name, and what became of it."""
    try:
        return f"{run.name}  {_became(run)}{_alarm(run)}"
    except (PandaError, OSError, ValueError, KeyError, TypeError) as error:  # a file that is half there, or changed
        return f"{run.name}  cannot be read ({type(error).__name__}: {error})"


def _alarm(run: RunDir) -> str:
    """What the corpus alarm has found, by name."""
    path = run.path / run_files.CORPUS_ALARM
    findings = run_files.read_json(path)["findings"] if path.exists() else []
    return f"; the corpus has changed: {', '.join(one['measure'] for one in findings)}" if findings else ""


def _became(run: RunDir) -> str:
    if run.summary.exists():
        outcome: dict[str, Any] = run_files.read_json(run.summary)["outcome"]
        return f"{outcome['name']}: {_short(outcome['message'])}"
    record = run_record.read(run.path)
    steps = run.path / run_files.METRICS
    lines = steps.read_text(encoding="utf-8").splitlines() if steps.exists() else []
    last = json.loads(lines[-1]) if lines else None
    where = f"step {last['step']}, loss {last['loss']:.4f}" if last else "no step yet"
    if record and record.status == run_record.RUNNING and record.is_owner_alive:
        return f"runs: {where}"
    if record and record.status == run_record.FINISHED:
        return f"ended where until_stage said ({where}); it goes on with --resume --run_name {run.name}"
    if run.outcome.exists():
        ended = run_files.read_json(run.outcome)
        return f"{ended['reason']}: {_short(ended['message'])} ({where})"
    return f"was interrupted ({where}): python train.py --resume --run_name {run.name}"


def _short(message: str) -> str:
    first = next(iter(message.splitlines()), "")
    return first if len(first) <= MESSAGE_CHARS else f"{first[:MESSAGE_CHARS]}..."


def _champions(argv: list[str]) -> list[str]:
    """Of each model in the registry."""
    from flows.cli.registry import parse_verb
    from training.registry.versions import RegistryError

    try:
        versions = parse_verb("panda", TEXT, argv).registry.versions()
    except RegistryError:  # not there, or it does not answer: `panda models` says which
        return []
    return [f"{one.uri}  of run {one.run_id}" for one in versions if "champion" in one.aliases]


def _servers(state_dir: Path) -> list[str]:
    from flows.stack import process_manager
    from flows.stack.up import condition

    services = process_manager.services_of(state_dir)
    return [f"{one['name']}  {condition(one)}  {one['address']}".rstrip() for one in services]


def _next_run() -> list[str]:
    """The first run that waits for its time, where a server is up."""
    from flows.stack.prefect_home import address
    from flows.stack.prefect_server import unusable

    there = address()
    if unusable(there):
        return []
    os.environ.update(there.variables())
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort

    waiting = FlowRunFilter.model_validate({"state": {"type": {"any_": ["SCHEDULED"]}}})
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(flow_run_filter=waiting, sort=FlowRunSort.EXPECTED_START_TIME_ASC, limit=1)
        return [
            f"{run.expected_start_time.astimezone():%Y-%m-%d %H:%M %Z}  {client.read_flow(run.flow_id).name}/"
            f"{client.read_deployment(run.deployment_id).name}"
            for run in runs
            if run.expected_start_time and run.deployment_id
        ]
