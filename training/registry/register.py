"""The registry: a finished run's model becomes one version of a registered model, however often this is tried.

In: RUN/model, the MLflow run. Out: a `ModelVersion`. The steps, each of which a later try finds done by the tag
`panda.key` (hash of the run and of the model's bytes): logged model created -> files linked or uploaded -> logged model
READY -> version created. A logged model that was left half-done is deleted and made again. Cost: one hash over the
weights and one upload; on one file system hard links instead of the upload.

Lay out RUN/model as an MLflow model directory: code, signature, requirements, and the weights as hard links.

In: RUN/model (safetensors, tokenizer; full weights or an adapter). Out: a directory MLflow loads with `mlflow.pyfunc`.
Nothing is unpickled, loaded into memory or copied on one file system; on another the files are copied once. Cost: one
sha256 pass over the weights (0.7 GB/s and more), for the identity of what is registered.
"""

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlparse

import yaml

from training.errors import MlflowAway
from training.lean_imports import silence_vain_warnings
from training.models.hub import base_of
from training.tracking.logged_models import NOT_IN_NAMES, REGISTERED
from training.tracking.redact import what_it_says
from training.tracking.sync import connect, import_mlflow

SERVED_MODEL = Path(__file__).with_name("served_model.py")
WEIGHTS = "artifacts/model"  # where the model lies below the MLflow model directory
CHUNK_BYTES = 1 << 22


def content_hash(directory: Path) -> str:
    """sha256 over names and contents of the files of a directory, in sorted order."""
    total = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        total.update(f"{path.relative_to(directory)}\0{hash_file(path)}\0".encode())
    return total.hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_package(model_dir: Path, package: Path) -> None:
    """Write the MLflow model directory `package`; it must not exist."""
    from mlflow.pyfunc import save_model

    base = base_of(model_dir)
    with quiet():
        save_model(
            path=str(package),
            python_model=str(SERVED_MODEL),
            signature=signature(),
            model_config={"base_model": base} if base else {},
            pip_requirements=requirements(is_adapter=base is not None),
            metadata={"panda": {"kind": "adapter" if base else "full", "base_model": base}},
        )
    save_example(package)
    link_tree(model_dir, package / WEIGHTS)
    declare_weights(package, model_dir)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without MLflow's advice to give an input example, which is saved apart."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*input example was not provided.*")
        yield


def signature() -> Any:
    """Chat messages or prompts in, text out; the parameters of generation with their defaults."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
    from mlflow.types.schema import Array, Object, Property

    message = Object([Property("role", DataType.string), Property("content", DataType.string)])
    inputs: list[ColSpec | TensorSpec] = [
        ColSpec(Array(message), "messages", required=False),
        ColSpec("string", "prompt", required=False),
    ]
    params = [
        ParamSpec("max_new_tokens", DataType.long, 128),
        ParamSpec("max_tokens", DataType.long, 0),
        ParamSpec("temperature", DataType.double, 0.0),
        ParamSpec("top_p", DataType.double, 1.0),
    ]
    return ModelSignature(Schema(inputs), Schema([ColSpec("string")]), ParamSchema(params))


def save_example(package: Path) -> None:
    """An input example in MLflow's layout. `save_model` would run the model on it, for which it has no weights yet."""
    from mlflow.models import Model
    from mlflow.models.utils import _save_example

    description = Model.load(str(package))
    _save_example(description, {"messages": [{"role": "user", "content": "Hello"}]}, str(package))
    description.save(str(package / "MLmodel"))


def requirements(is_adapter: bool) -> list[str]:
    """The distributions the served model needs, pinned to what it was made with (without local build tags)."""
    names = ["mlflow", "torch", "transformers", "safetensors", "accelerate", *(["peft"] if is_adapter else [])]
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in names]


def link_tree(source: Path, target: Path) -> None:
    """Hard-link every file of a directory; copy where the file system does not let us.

    Safe because RUN/model is written once and replaced as a whole: a linked file is never written again.
    """
    for path in sorted(source.rglob("*")):
        if path.is_file():
            link(path, target / path.relative_to(source))


def link(path: Path, target: Path) -> None:
    """A hard link, or a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def declare_weights(package: Path, model_dir: Path) -> None:
    """Tell MLflow's description of the model about the files linked in: `context.artifacts["model"]`."""
    path = package / "MLmodel"
    description = yaml.safe_load(path.read_text())
    description["flavors"]["python_function"]["artifacts"] = {
        "model": {"path": WEIGHTS, "uri": model_dir.absolute().as_uri()}
    }
    description["model_size_bytes"] = sum(file.stat().st_size for file in package.rglob("*") if file.is_file())
    path.write_text(yaml.safe_dump(description, sort_keys=False))


if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.tracking import MlflowClient

    from training.tracking.run import TrackedRun

logger = logging.getLogger(__name__)

KEY_TAG = "panda.key"
RETRY_SECONDS = (2, 5, 10, 20, 40)
SHOWN_CHARS = 200
SAMPLE_TOKENS = 48
FINAL_ERRORS = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "PERMISSION_DENIED")
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
        model_type=REGISTERED,
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
