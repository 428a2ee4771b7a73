"""Tell MLflow what it does not know yet of a run: run, params, data sets, metrics, artifacts, status.

In: a run directory with `tracking.json` (see `run_record`) and the URI. Out: MLflow has it, `tracking.json` says so.
Every step can be repeated: a process may die, or the server go away, between any two of them. Cost: batches of at most
1,000 metrics for what is new in the metric files; MLflow's import (2 to 4 s) once.
"""

import contextlib
import importlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from training import run_files
from training.errors import MlflowAway
from training.tracking import logged_models, run_record
from training.tracking.database import file_of, make_database
from training.tracking.redact import redact_text, what_it_says
from training.tracking.run_record import SERIES, RunRecord, metrics_of, new_lines
from training.tracking.tags import KIND_TAG, RUN_DIR_TAG, RUN_TOKEN_TAG, USER_TAG

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

ARTIFACTS = (
    run_files.CONFIG, run_files.METRICS, run_files.EVALUATIONS, run_files.EVALUATION, run_files.GATE, run_files.TRAINED,
    run_files.SUMMARY, run_files.PAGE, run_files.TIME,
)  # fmt: skip
ARTIFACTS_DIR = "mlartifacts"
URI_VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
TRAINING = "custom_model_development"
"""Without this kind MLflow's pages take our runs for evaluations of an agent."""
TRAINING_VIEW = "?workflowType=machine_learning"
"""At the end of a link: without it a browser that is new to MLflow opens the pages for agents, whatever the kind."""
MAX_METRICS = 1000  # MLflow's limits of a batch
MAX_PARAMS = 100
MAX_PARAM_CHARS = 6000
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout belongs to `--json`
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the default waits for minutes; what failed is sent again later anyway
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
CHATTER = {
    "mlflow.store.model_registry.abstract_store": logging.WARNING,  # "Waiting up to 300 seconds"
    "mlflow.store.db.utils": logging.CRITICAL,  # "Creating initial tables"; tracebacks of what it raises as well
    "urllib3.connectionpool": logging.ERROR,  # each retry; the outage is told once, by us
}
logger = logging.getLogger(__name__)

_pointing = threading.Lock()
_importing = threading.Lock()
_reached: set[str] = set()  # databases that have answered this process


def import_mlflow() -> None:
    """Import mlflow, set up as we want it, or wait for the thread that does.

    Its modules import each other; a second thread would be given one that is half imported (Python prefers that to a
    deadlock), and the first one fails with it.
    """
    with _importing:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        for name, level in CHATTER.items():
            logging.getLogger(name).setLevel(level)
        importlib.import_module("mlflow")


def connect(uri: str) -> "MlflowClient":
    """A client of this server or database, which is created when missing."""
    import_mlflow()
    from mlflow.tracking import MlflowClient

    if is_remote_database(uri) and uri not in _reached:
        check_answers(uri)
        _reached.add(uri)
    make_database(uri)
    point_mlflow_at(uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def away_errors() -> tuple[type[Exception], ...]:
    """What is raised where MLflow does not answer, and also where it says no."""
    import_mlflow()
    from mlflow.exceptions import MlflowException
    from requests import RequestException  # an upload through a server raises these as they are
    from sqlalchemy.exc import SQLAlchemyError  # a database that cannot be reached

    return MlflowException, RequestException, SQLAlchemyError, MlflowAway


def is_remote_database(uri: str) -> bool:
    """PostgreSQL and the like, named directly: ``postgresql+psycopg://user@host/mlflow``."""
    return "://" in uri and not uri.startswith(("http://", "https://", "file:", "sqlite:"))


def check_answers(uri: str) -> None:
    """Connect once; MLflow itself would try for 100 seconds before it says that a database cannot be reached.

    :raises sqlalchemy.exc.SQLAlchemyError: it cannot.
    """
    from sqlalchemy import create_engine

    engine = create_engine(uri)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def point_mlflow_at(uri: str) -> None:
    """Set MLflow's global URIs, through which it resolves `models:/` whatever the client says.

    It also writes them into the environment, for children. There a password would be seen by every rank, and the next
    run of this process would take it for what a person has set: the environment is left as it was.
    """
    from mlflow.tracking import get_registry_uri, get_tracking_uri, set_registry_uri, set_tracking_uri

    with _pointing:
        if (get_tracking_uri(), get_registry_uri()) == (uri, uri):  # not for a moment in the environment, where it is
            return
        before = {name: os.environ.pop(name, None) for name in URI_VARIABLES}
        set_tracking_uri(uri)
        set_registry_uri(uri)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def sync(run_dir: Path, uri: str) -> RunRecord:
    """Send all that is new; raises MLflow's exception when it cannot be reached."""
    record = run_record.read_known(run_dir)
    client = connect(uri)
    if record.run_id is None:
        record.run_id = find_run(client, record, uri, run_dir) or create_run(client, record, uri, run_dir)
        run_record.write(run_dir, record)
    if not record.sent_facts:
        send_facts(client, record)
        record.sent_facts = True
        run_record.write(run_dir, record)
    for name, prefix in SERIES.items():
        send_series(client, record, run_dir / name, prefix)
        run_record.write(run_dir, record)
    send_status(client, record, run_dir)
    run_record.write(run_dir, record)
    return record


def find_run(client: "MlflowClient", record: RunRecord, uri: str, run_dir: Path) -> str | None:
    """The run of an earlier try whose answer was lost; found by our token."""
    runs = client.search_runs(
        [experiment_id(client, record, uri, run_dir)], f"tags.`{RUN_TOKEN_TAG}` = '{record.token}'"
    )
    return runs[0].info.run_id if runs else None


def create_run(client: "MlflowClient", record: RunRecord, uri: str, run_dir: Path) -> str:
    """A new run, marked with our token."""
    tags = {RUN_TOKEN_TAG: record.token, RUN_DIR_TAG: str(run_dir)}
    tags |= {USER_TAG: record.tags[USER_TAG]} if USER_TAG in record.tags else {}  # MLflow also makes a field of it
    created = client.create_run(experiment_id(client, record, uri, run_dir), record.started_ms, tags, record.run_name)
    return created.info.run_id


def experiment_id(client: "MlflowClient", record: RunRecord, uri: str, run_dir: Path) -> str:
    """The experiment, created when missing; a database of ours keeps artifacts beside itself."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(record.experiment)
    if found:
        return found.experiment_id
    try:
        return client.create_experiment(record.experiment, artifact_location=artifact_location(uri, run_dir.parent))
    except MlflowException:  # another process was faster
        found = client.get_experiment_by_name(record.experiment)
        if not found:
            raise
        return found.experiment_id


def artifact_location(uri: str, output_dir: Path) -> str | None:
    """`mlartifacts` beside an SQLite file, in the output directory for another database; a server has its own place."""
    if database := file_of(uri):
        return (database.parent / ARTIFACTS_DIR).as_uri()
    return (output_dir.absolute() / ARTIFACTS_DIR).as_uri() if is_remote_database(uri) else None


def send_facts(client: "MlflowClient", record: RunRecord) -> None:
    """Params (once, MLflow never changes them), tags and data sets; and that the run is running."""
    from mlflow.entities import Dataset as MlflowDataset
    from mlflow.entities import DatasetInput, InputTag, Param, RunTag

    run = client.get_run(record.known_id)
    open_training_view(client, run.info.experiment_id)
    known = run.data.params
    new = [Param(name, value[:MAX_PARAM_CHARS]) for name, value in record.params.items() if name not in known]
    for first in range(0, len(new), MAX_PARAMS):
        with unless_refused("parameters"):
            client.log_batch(record.known_id, params=new[first : first + MAX_PARAMS])
    with unless_refused("the tags"):
        client.log_batch(record.known_id, tags=[RunTag(name, value) for name, value in record.tags.items()])
    inputs = [
        DatasetInput(
            dataset=MlflowDataset(
                name=dataset["name"],
                digest=dataset["digest"][:36],
                source_type="local",
                source=json.dumps({"uri": dataset["path"]}),
                profile=json.dumps(dataset["profile"], ensure_ascii=False),
            ),
            tags=[InputTag("mlflow.data.context", dataset["context"])],
        )
        for dataset in record.datasets
    ]
    with unless_refused("the data sets"):
        client.log_inputs(record.known_id, inputs)
    if record.status == run_record.RUNNING:
        client.update_run(record.known_id, status=run_record.RUNNING)
        record.sent_status = run_record.RUNNING


def open_training_view(client: "MlflowClient", experiment_id: str) -> None:
    """Set the kind of the experiment, unless somebody has chosen one."""
    if KIND_TAG not in client.get_experiment(experiment_id).tags:
        client.set_experiment_tag(experiment_id, KIND_TAG, TRAINING)


@contextlib.contextmanager
def unless_refused(what: str) -> Iterator[None]:
    """Go on without what MLflow will not take however often it is sent; what follows is to arrive all the same."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        logger.warning("MLflow does not take %s of the run: %s", what, what_it_says(error))


def send_series(client: "MlflowClient", record: RunRecord, path: Path, prefix: str) -> None:
    """The lines of a metrics file that are new since the last time.

    A run that went on from a checkpoint makes some steps again: with the same numbers, so MLflow has them already.
    """
    offset, lines = new_lines(path, record.sent_offsets.get(path.name, 0))
    done = record.sent_steps.get(path.name, -1)
    lines = [line for line in lines if "step" not in line or line["step"] > done]
    batch: list[Metric] = []
    for line in lines:
        metrics = list(metrics_of(line, prefix, record.started_ms))
        if len(batch) + len(metrics) > MAX_METRICS:
            client.log_batch(record.known_id, metrics=batch)
            batch = []
        batch += metrics
    if batch:
        client.log_batch(record.known_id, metrics=batch)
    record.sent_offsets[path.name] = offset
    record.sent_steps[path.name] = max([done, *(line["step"] for line in lines if "step" in line)])


def send_status(client: "MlflowClient", record: RunRecord, run_dir: Path) -> None:
    """Artifacts that are new or changed; the status last, so that a finished run is a complete one."""
    if record.status == run_record.RUNNING:
        return
    send_artifacts(client, record, run_dir)
    if record.sent_status != record.status:
        try_send_models(client, record, run_dir)
        client.set_terminated(record.known_id, record.status, record.ended_ms or int(time.time() * 1000))
        record.sent_status = record.status


def try_send_models(client: "MlflowClient", record: RunRecord, run_dir: Path) -> None:
    """The checkpoints as logged models: to rank them by; that MLflow refuses them is no reason to keep a run open."""
    try:
        logged_models.send(client, record, run_dir)
    except Exception as error:
        logger.warning("the checkpoints of %s are not among MLflow's models (%s)", run_dir, what_it_says(error))


def send_artifacts(client: "MlflowClient", record: RunRecord, run_dir: Path) -> None:
    """RUN/report/ and the small files of the run, without passwords."""
    files = [run_dir / name for name in ARTIFACTS] + sorted((run_dir / run_files.REPORT).glob("*"))
    for path in files:
        if not path.is_file():
            continue
        stamp = f"{path.stat().st_mtime_ns}-{path.stat().st_size}"
        name = str(path.relative_to(run_dir))
        if record.sent_files.get(name) != stamp:
            log_redacted(client, record.known_id, path, None if path.parent == run_dir else path.parent.name)
            record.sent_files[name] = stamp


def log_redacted(client: "MlflowClient", run_id: str, path: Path, folder: str | None) -> None:
    """One artifact; of a text file a copy without passwords."""
    with tempfile.TemporaryDirectory(prefix="panda-artifact-") as directory:
        copy = Path(directory) / path.name
        if path.suffix in (".yaml", ".json", ".jsonl", ".txt", ".md"):
            copy.write_text(redact_text(path.read_text(encoding="utf-8")), encoding="utf-8")
        else:
            shutil.copyfile(path, copy)
        client.log_artifact(run_id, str(copy), folder)
