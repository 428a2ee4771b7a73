"""Tracking: one MLflow run per run of the flow, opened before training and closed with its true status.

In: settings, run directory, facts. Out: a run in MLflow. The files of RUN are the truth and MLflow follows them from a
thread, so that no outage, slow server or full disk ever touches training: what could not be sent stays in RUN and is
sent by the next run with the same output directory, which also closes the runs of killed processes (status KILLED).
Cost: one thread that wakes every five seconds; opening waits for nothing, not even MLflow's import.
"""

import contextlib
import getpass
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from training import run_files
from training.errors import MlflowAway
from training.launch.commands import machine_kind
from training.launch.exits import ExitReason
from training.settings import TrackingSettings
from training.tracking import plots, run_record, system_metrics
from training.tracking import sync as mlflow_sync
from training.tracking.looks import only_a_look
from training.tracking.redact import redact, redact_text, what_it_says
from training.tracking.run_record import Dataset, RunRecord
from training.tracking.tags import CODE_CHANGED_TAG, COMMIT_TAG, NOTE_TAG, USER_TAG

logger = logging.getLogger(__name__)

SYNC_SECONDS = 5.0
MAX_NOTE_CHARS = 4500  # MLflow takes 5,000 bytes and more, depending on its database
_sending = threading.Lock()  # one writer of a run's record at a time


@dataclass(frozen=True)
class RunMetadata:
    """What is known of a run before it trains; `reports` (name of a file of the run -> content) become artifacts."""

    params: dict[str, Any]
    datasets: list[Dataset] = field(default_factory=list)
    reports: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TrackedRun:
    """An open run. `run_id` is None as long as MLflow could not be reached."""

    run_dir: Path
    uri: str

    @property
    def run_id(self) -> str | None:
        """The id MLflow gave the run."""
        return run_record.read_known(self.run_dir).run_id

    def wait_for_run_id(self) -> str:
        """The id, after trying to send all that is known now; for registration, which cannot go on without it.

        News of the run that MLflow does not take keep no model from being registered.
        """
        self.sync()
        run_id = self.run_id
        if run_id is None:
            raise MlflowAway(f"no run could be opened at {redact_text(self.uri)}")
        return run_id

    def describe(self, markdown: str) -> None:
        """Set what MLflow shows as the description of the run; sent with the next news."""
        self.tag({NOTE_TAG: redact_text(markdown)[:MAX_NOTE_CHARS]})

    def tag(self, tags: dict[str, str]) -> None:
        """Set tags of the run; sent with the next news."""
        with _sending:
            record = run_record.read_known(self.run_dir)
            record.tags |= tags
            record.sent_facts = False
            run_record.write(self.run_dir, record)

    def sync(self) -> bool:
        """Send what is new; False, with a warning, when MLflow cannot be reached. Raises nothing."""
        return try_sync(self.run_dir, self.uri)


def tracking_uri(settings: TrackingSettings, output_dir: Path) -> str:
    """The URI as set, that of MLflow's own environment variable, or an SQLite file in the output directory."""
    ours = f"sqlite:///{output_dir.absolute() / 'mlflow.db'}"
    return settings.mlflow_tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or ours


@contextlib.contextmanager
def open_run(settings: TrackingSettings, run_dir: Path, facts: RunMetadata) -> Iterator[TrackedRun]:
    """Open the run (a resumed one again), follow its files, close it with what really happened."""
    tracked = TrackedRun(run_dir, tracking_uri(settings, run_dir.parent))
    _open_record(settings, tracked, facts)
    status = "FAILED"
    try:
        with following(tracked), system_metrics.sampling(run_dir):
            yield tracked
        status = run_record.FINISHED
    except BaseException as error:
        status = status_of(error)
        raise
    finally:
        close_run(tracked, status)


def _open_record(settings: TrackingSettings, tracked: TrackedRun, facts: RunMetadata) -> None:
    """Write (or reopen) RUN/tracking.json and the facts that become artifacts."""
    run_dir = tracked.run_dir
    tags = {**facts.tags, **source_tags()}
    write_reports(run_dir, {**facts.reports, run_files.ENVIRONMENT_REPORT: environment()})
    record = run_record.read(run_dir)
    if record:
        record.reopen(tags)
    else:
        record = RunRecord(
            experiment=settings.experiment_name,
            run_name=run_dir.name,
            uri=redact_text(tracked.uri),
            params={name: as_param(value) for name, value in redact(facts.params).items()},
            tags=tags,
            datasets=[asdict(dataset) for dataset in facts.datasets],
        )
    run_record.write(run_dir, record)


def as_param(value: Any) -> str:
    """Text of a parameter: plain for strings, JSON for the rest."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def write_reports(run_dir: Path, reports: dict[str, Any]) -> None:
    """A file each, in RUN/report."""
    (run_dir / run_files.REPORT).mkdir(exist_ok=True)
    for name, content in reports.items():
        text = json.dumps(content, ensure_ascii=False, indent=1, default=str)
        (run_dir / name).write_text(text, encoding="utf-8")


def environment() -> dict[str, Any]:
    """Python, the kind of machine and the version of every installed distribution: the lock of this run."""
    return {"python": sys.version, "machine": machine_kind(), "packages": _packages()}


@cache
def _packages() -> dict[str, str]:
    """Name -> version, by name. Reading them takes half a second."""
    read = (found.metadata for found in importlib.metadata.distributions())
    return dict(sorted(((one["Name"], one["Version"]) for one in read), key=lambda item: str(item[0]).lower()))


def source_tags() -> dict[str, str]:
    """Who runs this, commit of the code, and whether it was changed since; no commit outside of a git repository."""
    try:
        user = {USER_TAG: getpass.getuser()}
    except (OSError, KeyError, ImportError):  # a container whose user has no name
        user = {}
    try:
        commit, changes = (_git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return user
    return {**user, COMMIT_TAG: commit, CODE_CHANGED_TAG: str(bool(changes)).lower()}


def _git(*arguments: str) -> str:
    directory = Path(__file__).parent  # of the code, wherever the run is
    done = subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@contextlib.contextmanager
def following(tracked: TrackedRun, interval_seconds: float = SYNC_SECONDS) -> Iterator[None]:
    """Send what is new every few seconds, from a thread; longer pauses while MLflow does not answer."""
    done = threading.Event()
    thread = threading.Thread(target=_follow, args=(tracked, done, interval_seconds), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _follow(tracked: TrackedRun, done: threading.Event, interval_seconds: float) -> None:
    try:
        reconcile(tracked.run_dir.parent, tracked.uri)
    except (OSError, ValueError, TypeError):  # a record of another version, or a directory that cannot be read
        logger.warning("earlier runs in %s were not looked after", tracked.run_dir.parent, exc_info=True)
    pause = 0.0
    while not done.wait(pause):
        pause = interval_seconds if tracked.sync() else min(60.0, interval_seconds + 2 * pause)


def try_sync(run_dir: Path, uri: str) -> bool:
    """`mlflow_sync.sync`, for which MLflow being away (or broken in whatever way) is a warning, never an error."""
    try:
        with _sending:
            mlflow_sync.sync(run_dir, uri)
    except Exception as error:
        logger.warning(
            "MLflow at %s has not taken the news of %s (%s); they are kept there and sent later",
            redact_text(uri), run_dir, what_it_says(error),
        )  # fmt: skip
        return False
    return True


def status_of(error: BaseException) -> str:
    """MLflow's status for what ended the run: the exit report of training where there is one."""
    report = getattr(error, "report", None)
    if report is not None and isinstance(report.reason, ExitReason):
        return report.reason.mlflow_status
    return "FAILED" if isinstance(error, Exception) else "KILLED"


def close_run(tracked: TrackedRun, status: str) -> bool:
    """End the run with FINISHED, FAILED or KILLED; False when MLflow will hear of it later."""
    with only_a_look(f"the plots of {tracked.run_dir}"):
        plots.write_plots(tracked.run_dir)
    record = run_record.read_known(tracked.run_dir)
    record.finish(status)
    run_record.write(tracked.run_dir, record)
    return tracked.sync()


def reconcile(output_dir: Path, uri: str) -> list[Path]:
    """Close the runs of killed processes and send what earlier runs could not; returns the runs that were completed."""
    completed = []
    for path in sorted(output_dir.glob(f"*/{run_files.TRACKING}")):
        record = run_record.read_known(path.parent)
        if record.is_settled or record.uri != redact_text(uri):
            continue
        if record.status == run_record.RUNNING:
            if record.is_owner_alive:
                continue
            record.finish("KILLED")
            run_record.write(path.parent, record)
        if try_sync(path.parent, uri):
            completed.append(path.parent)
    return completed
