"""Lay out RUN/model as an MLflow model directory: code, signature, requirements, and the weights as hard links.

In: RUN/model (safetensors, tokenizer; full weights or an adapter). Out: a directory MLflow loads with `mlflow.pyfunc`.
Nothing is unpickled, loaded into memory or copied on one file system; on another the files are copied once. Cost: one
sha256 pass over the weights (0.7 GB/s and more), for the identity of what is registered.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

SERVED_MODEL = Path(__file__).with_name("served_model.py")
WEIGHTS = "artifacts/model"  # where the model lies below the MLflow model directory
ADAPTER = "adapter_config.json"
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


def base_of(model_dir: Path) -> str | None:
    """What an adapter is an adapter of (directory or hub id); None for full weights."""
    path = model_dir / ADAPTER
    return json.loads(path.read_text())["base_model_name_or_path"] if path.exists() else None


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
