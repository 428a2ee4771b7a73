"""The registry: a finished run's model becomes one version of a registered model, however often this is tried.

In: RUN/model, the MLflow run. Out: a `ModelVersion`. The steps, each of which a later try finds done by the tag
`panda.key` (hash of the run and of the model's bytes): logged model created -> files linked or uploaded -> logged model
READY -> version created. A logged model that was left half-done is deleted and made again. Cost: one hash over the
weights and one upload; on one file system hard links instead of the upload.
"""

import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlparse

from training.errors import MlflowAway
from training.imports import silence_vain_warnings
from training.mlflow_sync import connect, import_mlflow
from training.model_package import content_hash, link_tree, write_package
from training.secrets import what_it_says

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.tracking import MlflowClient

    from training.tracking import TrackedRun

logger = logging.getLogger(__name__)

KEY_TAG = "panda.key"
RETRY_SECONDS = (2, 5, 10, 20, 40)
SHOWN_CHARS = 200
SAMPLE_TOKENS = 48
FINAL_ERRORS = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "PERMISSION_DENIED")
NOT_IN_NAMES = re.compile(r"""[/:.%"']""")  # of a logged model; versions of models have dots: llama-3.1-8b
Result = TypeVar("Result")


@dataclass(frozen=True)
class ModelVersion:
    """A version of a registered model; `uri` is `models:/NAME/VERSION`."""

    name: str
    version: int
    uri: str


def register_run(tracked: "TrackedRun", name: str, tags: dict[str, str], prompt: str) -> tuple[ModelVersion, str]:
    """The version for RUN/model, and what it writes after `prompt` when it is loaded back.

    :raises MlflowAway: MLflow did not answer; the message says how to go on.
    """
    try:
        run_id = patiently(tracked.wait_for_run_id)
        version = register(tracked.run_dir, run_id, name, tags, tracked.uri)
        return version, load_and_generate(version.uri, prompt, SAMPLE_TOKENS, tracked.uri)
    except MlflowAway as error:
        raise MlflowAway(
            f"{tracked.run_dir / 'model'} is complete but not registered: {error}; when it is back, go on with "
            f"--resume --run_name {tracked.run_dir.name}"
        ) from error


def register(run_dir: Path, run_id: str, name: str, tags: dict[str, str], uri: str) -> ModelVersion:
    """The version of `name` for RUN/model of this run: created, or the one that is there already."""
    model_dir = run_dir / "model"
    key = hashlib.sha256(f"{run_id}\0{content_hash(model_dir)}".encode()).hexdigest()[:32]
    return patiently(lambda: _register(connect(uri), model_dir, run_id, name, {**tags, KEY_TAG: key}))


def patiently(action: Callable[[], Result]) -> Result:
    """Run an action that can be repeated, again while MLflow does not answer.

    :raises MlflowAway: it did not for longer than a minute.
    """
    import_mlflow()
    from mlflow.exceptions import MlflowException
    from requests import RequestException  # an upload through a server raises these as they are
    from sqlalchemy.exc import SQLAlchemyError  # a database that cannot be reached

    for seconds in (*RETRY_SECONDS, None):
        try:
            return action()
        except (MlflowException, RequestException, SQLAlchemyError, MlflowAway) as error:
            said = what_it_says(error, SHOWN_CHARS)
            if getattr(error, "error_code", None) in FINAL_ERRORS:
                raise
            if seconds is None:
                raise MlflowAway(f"MLflow does not answer ({said})") from error
            logger.warning("MLflow does not answer (%s); trying again in %s s", said, seconds)
            time.sleep(seconds)
    raise AssertionError("the last try returns or raises")


def _register(client: "MlflowClient", model_dir: Path, run_id: str, name: str, tags: dict[str, str]) -> ModelVersion:
    version = find_version(client, name, tags[KEY_TAG])
    if version is None:
        logged = find_logged(client, run_id, tags[KEY_TAG]) or log_model(client, model_dir, run_id, tags)
        ensure_registered_model(client, name)
        created = client.create_model_version(
            name, source=f"models:/{logged.model_id}", run_id=run_id, tags=tags, model_id=logged.model_id
        )
        version = int(created.version)
    return ModelVersion(name, version, f"models:/{name}/{version}")


def find_version(client: "MlflowClient", name: str, key: str) -> int | None:
    """The version with our key: of several (two tries at once) the oldest."""
    found = client.search_model_versions(f"name = '{name}' and tags.`{KEY_TAG}` = '{key}'")
    return min((int(version.version) for version in found), default=None)


def find_logged(client: "MlflowClient", run_id: str, key: str) -> "LoggedModel | None":
    """A READY logged model with our key; half-done ones of earlier tries are deleted."""
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models([experiment], f"tags.`{KEY_TAG}` = '{key}'")
    ready = [model for model in found if str(model.status) == "READY"]
    for model in found:
        if model not in ready:
            discard(client, model)
    return ready[0] if ready else None


def discard(client: "MlflowClient", model: "LoggedModel") -> None:
    """Delete a half-done logged model, and its files where they are local."""
    client.delete_logged_model(model.model_id)
    directory = local_path(model.artifact_location)
    if directory:
        shutil.rmtree(directory, ignore_errors=True)


def log_model(client: "MlflowClient", model_dir: Path, run_id: str, tags: dict[str, str]) -> "LoggedModel":
    """A READY logged model with the files of RUN/model."""
    run = client.get_run(run_id)
    logged = client.create_logged_model(
        run.info.experiment_id,
        name=NOT_IN_NAMES.sub("-", run.info.run_name),
        source_run_id=run_id,
        tags=tags,
        model_type="panda",
    )
    with tempfile.TemporaryDirectory(prefix=".package-", dir=model_dir.parent) as directory:
        package = Path(directory) / "package"
        write_package(model_dir, package)
        target = local_path(logged.artifact_location)
        if target:
            link_tree(package, target)
        else:
            client.log_model_artifacts(logged.model_id, str(package))
    return client.finalize_logged_model(logged.model_id, "READY")


def local_path(location: str) -> Path | None:
    """The directory of a `file:` location; None for one behind a server or in an object store."""
    parsed = urlparse(location)
    return Path(unquote(parsed.path)) if parsed.scheme in ("", "file") else None


def ensure_registered_model(client: "MlflowClient", name: str) -> None:
    """Create the registered model unless it is there."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def load_and_generate(model_uri: str, prompt: str, max_new_tokens: int, uri: str) -> str:
    """Text the registered model writes after `prompt`, loaded back through `mlflow.pyfunc`."""
    model = patiently(lambda: load_served(model_uri, uri))
    return model.predict({"prompt": [prompt]}, params={"max_new_tokens": max_new_tokens})[0]


def load_served(model_uri: str, uri: str) -> Any:
    """A registered model, loaded through `mlflow.pyfunc`."""
    connect(uri)
    import mlflow

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    silence_vain_warnings()
    return mlflow.pyfunc.load_model(model_uri)
