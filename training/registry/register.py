"""A finished run's model becomes one version of a registered model, however often this is tried.

In: RUN/model (safetensors and tokenizer; full weights or an adapter), the MLflow run. Out: a `ModelVersion`. The steps,
each of which a later try finds done by the tag `panda.key` (hash of the run and of the step whose weights are deployed,
tag `panda.step`; not of bytes, which the same weights have others of under another version of this code): logged model
created -> files linked or uploaded -> logged model READY -> loaded back and compared (`training.registry.proof`) ->
version created. A logged model that was left half-done, or that is not what RUN/model is, is deleted.

What MLflow is given, the package, is a model for `mlflow.pyfunc`: code (`served_model`), signature, requirements, and
the weights as hard links. Nothing is unpickled. Cost: a loading in a child process and an upload; on one file system no
copy.
"""

import hashlib
import importlib.metadata
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from training import run_files
from training.errors import MlflowAway, ModelError
from training.launch import ownership
from training.launch.run_config import read_config
from training.models.hub import base_of
from training.registry.proof import WEIGHTS, local_path, prove
from training.tracking.logged_models import NOT_IN_NAMES, REGISTERED, deployed_step
from training.tracking.redact import what_it_says
from training.tracking.sync import away_errors, connect
from training.tracking.tags import KEY_TAG, STEP_TAG

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.tracking import MlflowClient

    from training.tracking.run import TrackedRun

logger = logging.getLogger(__name__)

RETRY_SECONDS = (2, 5, 10, 20, 40)
PATIENT_SECONDS = (60,) * 60  # after those
FULL = "disk is full"  # as SQLite says it, also through a server
SHOWN_CHARS = 200
FINAL_ERRORS = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "PERMISSION_DENIED")
SERVED_MODEL = Path(__file__).with_name("served_model.py")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ModelVersion:
    """A version of a registered model; `uri` is `models:/NAME/VERSION`, `text` what it wrote, loaded back."""

    name: str
    version: int
    uri: str
    text: str = field(compare=False, repr=False)


def register_run(tracked: "TrackedRun", name: str, tags: dict[str, str], prompt: str) -> tuple[ModelVersion, str]:
    """The version for RUN/model, and what it writes after `prompt`; an empty text where it cannot be asked.

    :raises MlflowAway: MLflow did not answer; the message says how to go on.
    :raises ModelError: what MLflow has is not the model; the message says so, and no version is made.
    """
    model_dir, again = tracked.run_dir / run_files.MODEL, f"go on with --resume --run_name {tracked.run_dir.name}"
    try:
        run_id = with_retries(tracked.wait_for_run_id, patient=True)
        version = _registered(_model_of(tracked.run_dir, run_id, tags, tracked.uri, prompt), name)
    except MlflowAway as error:
        raise MlflowAway(f"{model_dir} is complete but not registered: {error}; when it is back, {again}") from error
    except ModelError as error:
        raise ModelError(f"{model_dir} is not registered: {error}; when that is mended, {again}") from error
    return version, version.text


def register(run_dir: Path, run_id: str, name: str, tags: dict[str, str], uri: str) -> ModelVersion:
    """The version of `name` for RUN/model of this run: created, or the one that is there already.

    :raises ModelError: loaded back it is not RUN/model.
    """
    return _registered(_model_of(run_dir, run_id, tags, uri), name)


def _model_of(run_dir: Path, run_id: str, tags: dict[str, str], uri: str, prompt: str = "") -> "_Model":
    step = deployed_step(run_dir)
    key = hashlib.sha256(f"{run_id}\0step {step}".encode()).hexdigest()[:32]
    return _Model(run_dir, run_id, uri, {**tags, STEP_TAG: str(step), KEY_TAG: key}, prompt)


def _registered(model: "_Model", name: str) -> ModelVersion:
    return with_retries(lambda: _register(connect(model.uri), model, name), patient=True)


def with_retries(action: Callable[[], Result], patient: bool = False) -> Result:
    """Run an action that can be repeated, again while MLflow does not answer: for a minute and a half.

    :param patient: for an hour more, where a training that is done would have to wait for the next run; not for room
        on a disk, which somebody has to make.
    :raises MlflowAway: it did not for longer than that.
    """
    for number, seconds in enumerate((*RETRY_SECONDS, *(PATIENT_SECONDS if patient else ()), None)):
        try:
            return action()
        except away_errors() as error:
            said = what_it_says(error, SHOWN_CHARS)
            if getattr(error, "error_code", None) in FINAL_ERRORS:
                raise
            if FULL in said and number >= len(RETRY_SECONDS):
                raise MlflowAway(f"MLflow cannot write ({said}): make room") from error
            if seconds is None:
                raise MlflowAway(f"MLflow does not answer ({said})") from error
            logger.warning("MLflow does not answer (%s); trying again in %s s", said, seconds)
            time.sleep(seconds)
    raise AssertionError("the last try returns or raises")


@dataclass(frozen=True)
class _Model:
    """What is to be registered, and the tags that name it."""

    run_dir: Path
    run_id: str
    uri: str
    tags: dict[str, str]
    prompt: str

    @property
    def model_dir(self) -> Path:
        return self.run_dir / run_files.MODEL

    @property
    def key(self) -> str:
        return self.tags[KEY_TAG]


def _register(client: "MlflowClient", model: _Model, name: str) -> ModelVersion:
    """Find the version, or a logged model to make it of, or make both; the version comes last, when all is right."""
    version = find_version(client, name, model.key)
    logged = find_logged(client, model)
    if not (version or logged) and adopt_older(client, model):
        version, logged = find_version(client, name, model.key), find_logged(client, model)
    if version:
        text = _as_registered(version, model)
    else:
        logged = logged or log_model(client, model.model_dir, model.run_id, model.tags)
        text = _proven(client, logged, model)
        ensure_registered_model(client, name)
        ownership.check(model.run_dir)
        version = client.create_model_version(
            name, source=logged.model_uri, run_id=model.run_id, tags=model.tags, model_id=logged.model_id
        )
    return ModelVersion(name, int(version.version), f"models:/{name}/{version.version}", text)


def _as_registered(version: Any, model: _Model) -> str:
    """What the version that is there writes; one run and step have one version, so other weights are an error."""
    try:
        return prove(version.source, model.uri, model.run_dir, model.prompt)
    except ModelError as error:
        this = f"models:/{version.name}/{version.version}, registered by this run at step {model.tags[STEP_TAG]}"
        raise ModelError(f"{this}: {error}; what is trained anew belongs into a run of its own") from error


def _proven(client: "MlflowClient", logged: "LoggedModel", model: _Model) -> str:
    """What the logged model writes, loaded back; one that is not what was trained does not stay."""
    try:
        return prove(logged.model_uri, model.uri, model.run_dir, model.prompt)
    except ModelError:
        discard(client, logged)
        raise


def find_version(client: "MlflowClient", name: str, key: str) -> Any | None:
    """The version with our key: of several (two tries at once) the oldest."""
    found = client.search_model_versions(f"name = '{name}' and tags.`{KEY_TAG}` = '{key}'")
    return min(found, key=lambda version: int(version.version), default=None)


def find_logged(client: "MlflowClient", model: _Model) -> "LoggedModel | None":
    """A READY logged model with our key; half-done ones of earlier tries are deleted."""
    found = logged_models(client, model.run_id, f"= '{model.key}'")
    ready = [one for one in found if str(one.status) == "READY"]
    for one in found:
        if one not in ready:
            discard(client, one)
    return ready[0] if ready else None


def logged_models(client: "MlflowClient", run_id: str, key: str) -> "list[LoggedModel]":
    """What a run has logged to be registered, with a key that is as `key` says."""
    experiment = client.get_run(run_id).info.experiment_id
    wanted = f"source_run_id = '{run_id}' and tags.`{KEY_TAG}` {key}"
    return list(client.search_logged_models([experiment], wanted))


def adopt_older(client: "MlflowClient", model: _Model) -> bool:
    """Give our key to what earlier code has registered of this run; returns whether there was such a model.

    Its key was made of the model's bytes and its step is not written down, so the weights decide: a run that went on
    since has others.
    """
    older = [one for one in logged_models(client, model.run_id, "LIKE '%'") if STEP_TAG not in one.tags]
    for half_done in (one for one in older if str(one.status) != "READY"):
        discard(client, half_done)
    mine = next((one for one in older if str(one.status) == "READY" and _is(one, model)), None)
    if mine is None:
        return False
    named = {KEY_TAG: model.key, STEP_TAG: model.tags[STEP_TAG]}
    client.set_logged_model_tags(mine.model_id, named)
    for version in client.search_model_versions(f"run_id = '{model.run_id}'"):
        if version.source == mine.model_uri:
            for tag, value in named.items():
                client.set_model_version_tag(version.name, version.version, tag, value)
    return True


def _is(logged: "LoggedModel", model: _Model) -> bool:
    """Whether a logged model has the weights of RUN/model."""
    try:
        prove(logged.model_uri, model.uri, model.run_dir, model.prompt)
    except ModelError as error:
        logger.info("%s of this run is another model: %s", logged.model_uri, error)
        return False
    return True


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


def ensure_registered_model(client: "MlflowClient", name: str) -> None:
    """Create the registered model unless it is there."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def write_package(model_dir: Path, package: Path) -> None:
    """Write the MLflow model directory `package`; it must not exist. Code of the model is trusted as in training."""
    from mlflow.pyfunc import save_model

    base, config = base_of(model_dir), model_dir.with_name(run_files.CONFIG)
    trusted = config.is_file() and read_config(config).settings.trust_remote_code
    with warnings.catch_warnings():  # the input example is saved apart
        warnings.filterwarnings("ignore", message="(?s).*input example was not provided.*")
        save_model(
            path=str(package),
            python_model=str(SERVED_MODEL),
            signature=signature(),
            model_config={**({"base_model": base} if base else {}), **({"trust_remote_code": True} if trusted else {})},
            pip_requirements=requirements(is_adapter=base is not None),
            metadata={"panda": {"kind": "adapter" if base else "full", "base_model": base}},
        )
    save_example(package)
    link_tree(model_dir, package / WEIGHTS)
    declare_weights(package, model_dir)


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
