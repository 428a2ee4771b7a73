"""A registered model proves itself: a child process loads back what MLflow has, and finds RUN/model in it.

In: the URI of a logged model, the run directory, a prompt. Out: the text that the model writes after it; an error that
says what is wrong with it. MLflow's files are read where they lie, or fetched to a temporary directory where they lie
elsewhere. Cost: a process with torch (`training.registry.loaded_back`); for a large model as many as have trained.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

from data_prep.errors import PandaError
from training import run_files
from training.errors import ModelError
from training.launch import launcher
from training.launch.commands import LOAD_BACK
from training.launch.exits import ExitReason
from training.launch.launcher import ExitReport
from training.launch.run_config import read_config
from training.models.hub import base_of
from training.tracking.sync import connect

logger = logging.getLogger(__name__)

WEIGHTS = "artifacts/model"  # where the model lies below the MLflow model directory
WHOLE_BYTES = 1e9  # weights on disk, base included, that one process may hold
FOUND = "found.json"


@dataclass(frozen=True)
class Job:
    """For the child. `package`: the MLflow model directory; `whole`: small enough to be loaded by one process."""

    package: str
    prompt: str
    whole: bool


@dataclass(frozen=True)
class Found:
    """What the model writes after the prompt; empty where it cannot be asked."""

    text: str


class LoadBackEnded(PandaError):
    """The child ended for a reason that says nothing about the model: killed, no memory, cancelled."""

    def __init__(self, report: ExitReport):
        self.report = report
        super().__init__(f"loading back ended: {report.reason.value}: {report.message}")


def prove(model_uri: str, uri: str, run_dir: Path, prompt: str) -> str:
    """What the model that MLflow has writes after `prompt`; it is that of RUN/model.

    :raises ModelError: it cannot be loaded at all, or is another one.
    """
    settings = read_config(run_dir / run_files.CONFIG).settings
    with package(model_uri, uri, run_dir) as directory, scratch(run_dir) as folder:
        whole = weights_bytes(directory / WEIGHTS) <= WHOLE_BYTES
        job = folder / "job.json"
        run_files.write_json(job, asdict(Job(str(directory), prompt, whole)))
        as_launched = settings.model_copy(update={"num_processes": 1}) if whole else settings
        report = launcher.use(LOAD_BACK, run_dir, as_launched, logger.info, "--job", str(job))
        if report.reason is ExitReason.completed:
            return Found(**run_files.read_json(job.with_name(FOUND))).text
    if report.reason is ExitReason.user_error:
        raise ModelError(report.message)
    if report.details:
        logger.error("%s", report.details)
    raise LoadBackEnded(report)


@contextmanager
def package(model_uri: str, uri: str, run_dir: Path) -> Iterator[Path]:
    """The MLflow model directory as MLflow has it: where it lies, else fetched for as long as it is needed."""
    client = connect(uri)
    stored = local_path(client.get_logged_model(model_uri.removeprefix("models:/")).artifact_location)
    if stored and stored.is_dir():
        yield stored
        return
    from mlflow.artifacts import download_artifacts

    with scratch(run_dir) as folder:
        yield Path(download_artifacts(model_uri, dst_path=str(folder), tracking_uri=uri))


@contextmanager
def scratch(run_dir: Path) -> Iterator[Path]:
    """A directory beside the model that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix=".load-back-", dir=run_dir) as directory:
        yield Path(directory)


def local_path(location: str) -> Path | None:
    """The directory of a `file:` location; None for one behind a server or in an object store."""
    parsed = urlparse(location)
    return Path(unquote(parsed.path)) if parsed.scheme in ("", "file") else None


def weights_bytes(model_dir: Path) -> int:
    """Bytes of the weights on disk, those of an adapter's base included where it is a directory of this machine."""
    base = base_of(model_dir)
    places = [model_dir, *([Path(base)] if base and Path(base).is_dir() else [])]
    return sum(file.stat().st_size for place in places for file in place.glob("*.safetensors"))
