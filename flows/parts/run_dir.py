"""The directory of one run: its name, what is written into it, and when it counts as done.

In: settings. Out: `<output_dir>/<run>/` with ``config.yaml`` first and ``summary.json`` last; no summary, not done.
``outcome.json`` says why a run failed. A run that a deployment starts goes on with the newest unfinished one if it
would do the same work. Cost: none.
"""

import contextlib
import errno
import itertools
import json
import logging
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import yaml

from configs.errors import ConfigError
from configs.load import Loaded, load
from configs.settings import PandaSettings, UnattendedSettings
from data_prep import in_use
from data_prep.plan.report import DataReport
from training import run_files
from training.cost.account import Account
from training.launch import ownership
from training.launch.exits import ExitReason
from training.run_files import CorpusAlarm, Culprit, Losses, Registered, Spike, Trained
from training.tracking import run_record

if TYPE_CHECKING:
    from training.comparison.job import GateResult

logger = logging.getLogger(__name__)

AFTER_DATA = ("train", "evaluate", "register", "gate")
"""Stages that go on in a run directory that is there."""
CLAIM_SECONDS = 60.0  # from its directory to its lock a run needs milliseconds
NOT_THE_WORK = {
    *("run_name", "resume", "paths", "prepare_workers", "prepare_cluster", "price_per_gpu_hour", "currency"),
    *UnattendedSettings.model_fields,
}
"""What may differ between a run and the one it goes on with."""


class Outcome(TypedDict):
    """The name of the final state, and its message."""

    name: str
    message: str


class Summary(TypedDict, total=False):
    """summary.json, and what `--json` prints; a run that ends early has less. In the order in which it comes to be."""

    run_dir: str
    prefect_flow_run_id: str
    records: dict[str, Any]
    tokens: int
    target_tokens: int
    data: DataReport
    corpus_alarm: CorpusAlarm
    spikes: list[Spike]
    standing_out: list[Culprit]
    mlflow_run_id: str | None
    training: Trained
    seconds: dict[str, float]
    losses: Losses
    model: Registered
    gate: "GateResult"
    account: Account
    outcome: Outcome


@dataclass(frozen=True)
class RunDir:
    """Paths of one run."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / run_files.CONFIG

    @property
    def outcome(self) -> Path:
        return self.path / run_files.OUTCOME

    @property
    def summary(self) -> Path:
        return self.path / run_files.SUMMARY


def unfinished(settings: PandaSettings, plan_dir: Path) -> RunDir | None:
    """The newest run that was interrupted (killed, cancelled, machine lost) while doing what this one is to do."""
    runs = _runs(settings)
    if not runs or runs[-1].summary.exists():
        return None
    run = runs[-1]
    obstacle = _obstacle(run, settings, plan_dir)
    if obstacle:
        logger.warning("%s was not finished; starting anew, because %s", run.name, obstacle)
        return None
    logger.info("%s was not finished: going on with it", run.name)
    return run


def begun_by(flow_run: str, settings: PandaSettings) -> RunDir | None:
    """The directory of a run that is started again after a crash: it was the last to write there."""
    if not flow_run:
        return None
    return next((run for run in _runs(settings)[::-1] if is_of(run, flow_run)), None)


def is_of(run: RunDir, flow_run: str) -> bool:
    """Whether that flow run was the last to write there."""
    return bool(flow_run) and ownership.owner_of(run.path).get("flow_run") == flow_run


def finished_by(flow_run: str, settings: PandaSettings) -> Summary | None:
    """What a run had come to when it crashed after its last stage: nothing is left to do."""
    run = begun_by(flow_run, settings)
    return run_files.read_json(run.summary) if run and run.summary.exists() else None


def started_again(flow_run: str, settings: PandaSettings, plan_dir: Path) -> RunDir | None:
    """The directory that a run which crashed goes on with; None: it had not come so far, or other work is due now."""
    run = begun_by(flow_run, settings)
    obstacle = _other_work(run, settings, plan_dir) if run else None
    if run and obstacle:
        logger.warning("%s was not finished; starting anew, because %s", run.name, obstacle)
    elif run:
        logger.info("%s was not finished: going on with it, started again", run.name)
    return None if obstacle else run


def _runs(settings: PandaSettings) -> list[RunDir]:
    """All of the output directory, the newest last."""
    output = Path(settings.output_dir).absolute()
    return sorted((RunDir(path.parent) for path in output.glob(f"*/{run_files.CONFIG}")), key=lambda run: run.name)


def _obstacle(run: RunDir, settings: PandaSettings, plan_dir: Path) -> str | None:
    """Why a run cannot be gone on with."""
    record = run_record.read(run.path)
    if record and record.status == run_record.RUNNING and record.is_owner_alive:
        return "it is still running"
    outcome = run.outcome
    reason = run_files.read_json(outcome)["reason"] if outcome.exists() else ExitReason.cancelled
    if reason not in (ExitReason.cancelled, ExitReason.lost_rank, ExitReason.infrastructure):
        return f"it ended with {reason}, which trying again does not help"
    return _other_work(run, settings, plan_dir)


def _other_work(run: RunDir, settings: PandaSettings, plan_dir: Path) -> str | None:
    """Why it was not the work that is to be done now."""
    before = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    if Path(before["paths"]["plan_dir"]) != plan_dir.absolute():
        return "the data have changed since"
    now = settings.model_dump(mode="json")
    changed = [name for name, value in now.items() if name not in NOT_THE_WORK and before.get(name) != value]
    return f"settings differ: {', '.join(changed)}" if changed else None


def write_outcome(run: RunDir, reason: ExitReason, message: str) -> None:
    """Write ``outcome.json``: why the run failed, for whoever thinks of going on with it."""
    with contextlib.suppress(OSError):  # a full disk is why it failed, mostly
        run_files.write_atomically(run.outcome, json.dumps({"reason": reason, "message": message}, indent=2) + "\n")


def create(settings: PandaSettings) -> RunDir:
    """Make the directory of a new run, or open the one to resume."""
    output = Path(settings.output_dir).absolute()
    if settings.resume:
        return _existing(output, settings.run_name)
    name = settings.run_name or f"{time.strftime('%Y%m%d-%H%M%S')}-{Path(settings.model).name}"
    try:
        output.mkdir(parents=True, exist_ok=True)
        path = _claimed(output, name) if settings.run_name else _free(output, name)
    except OSError as error:
        raise ConfigError([f"output_dir={settings.output_dir!r}: cannot write there ({error.strerror})"]) from None
    if path is None and _is_abandoned(output / name):
        path = output / name
    if path is None:
        raise ConfigError(
            [f"run_name={name!r}: {output / name} is there already; choose another name, or go on with it: --resume"]
        )
    return RunDir(path)


def _free(output: Path, name: str) -> Path:
    """A directory of our own, also when several runs start in the same second."""
    names = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
    return next(path for path in (_claimed(output, one) for one in names) if path)


def _claimed(output: Path, name: str) -> Path | None:
    """The directory, if no other run has it: of several that want the same one, one gets it.

    A directory can be renamed to where nothing or an empty one is; with a folder in it, it is not empty any more.
    """
    path, ours = output / name, output / f".{name}.{os.getpid()}"
    ours.mkdir(mode=0o700, exist_ok=True)  # settings, texts of the corpus, weights: for their owner alone
    (ours / run_files.LOGS).mkdir(exist_ok=True)
    try:
        ours.rename(path)
    except OSError as error:
        shutil.rmtree(ours)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return None
        raise
    return path


def _is_abandoned(path: Path) -> bool:
    """Whether who claimed it was killed before the run had a configuration: there is nothing to go on with."""
    has_begun = (path / run_files.CONFIG).exists() or not (path / run_files.LOGS).is_dir()
    if has_begun or not ownership.is_free(path):
        return False
    owner = ownership.owner_of(path)
    if owner:
        return ownership.is_here(owner)
    return time.time() - path.stat().st_mtime > CLAIM_SECONDS


def as_in_the_run(loaded: Loaded, values: dict[str, Any], overrides: list[str] | None) -> Loaded:
    """Where a run is gone on with: what nobody gave a value for is as in that run, but for the stages to do."""
    settings = loaded.settings
    if not settings.resume and settings.from_stage not in AFTER_DATA:
        return loaded
    run = _existing(Path(settings.output_dir).absolute(), settings.run_name)
    return load({"from_stage": None, "until_stage": None, **values}, overrides, run.config)


def _existing(output: Path, name: str | None) -> RunDir:
    runs = [output / name] if name else sorted(path.parent for path in output.glob(f"*/{run_files.CONFIG}"))
    if not runs or not (runs[-1] / run_files.CONFIG).exists():
        where = f"run_name={name!r}" if name else f"output_dir={str(output)!r}"
        raise ConfigError([f"{where}: no run to resume there; start one without --resume"])
    return RunDir(runs[-1])


def write_config(run: RunDir, settings: PandaSettings, paths: dict[str, Path | None]) -> None:
    """Write ``config.yaml``: the flat configuration and ``paths``, all that a rank of the training needs to know."""
    content = settings.model_dump(mode="json")
    in_use.note_user(Path(settings.cache_dir), run.path.parent)
    content["paths"] = {name: str(path.absolute()) if path else None for name, path in paths.items()}
    run_files.write_atomically(run.config, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    logger.info("all settings of this run: %s (--conf_path takes such a file)", run.config)


def write_summary(run: RunDir, summary: Summary) -> None:
    """Write ``summary.json``, the last file of a run."""
    run_files.write_atomically(run.summary, json.dumps(summary, ensure_ascii=False, indent=2) + "\n")
