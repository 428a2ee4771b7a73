"""Delta checkpoints: weights minus those of a base whose licence forbids passing them on, added to the base again.

In: a checkpoint and, when it is a delta, its base. Out: a checkpoint directory with the sum, made once and kept in
``<cache_dir>/models/<fingerprint of both contents>/``. A delta is known by the word "delta" in its name
(``llama-panda-zh-7b-delta``) or by a file ``delta.json`` in it: ``{"base": "owner/name", "sum": 50637.1836}``, both
optional; ``sum`` is that of all values of the result, published with some deltas (Alpaca) and checked here.
Cost: reads both, writes one; memory of three tensors in float32.

Checked: both have the same tensors with the same shapes; all values are finite; the delta is no whole checkpoint
(which would point the same way as the base); the published sum; a few tensors of the result, read back.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import store
from training.errors import CheckpointError
from training.models.hub import DELTA_MARKER, base_checkpoint, named_delta, resolve_checkpoint, without_base
from training.models.tensor_file import INDEX, TensorInfo, read_values, rounded, tensors_of, widened, write
from training.settings import ModelSettings

logger = logging.getLogger(__name__)

NOT_WEIGHTS = re.compile(r"\.rotary_emb\.inv_freq$")
"""Constants that checkpoints of 2023 carry; transformers computes them."""
SUM_TOLERANCE = 0.01
MAX_COSINE = 0.9
NUM_SPOTS = 3
NOT_COPIED = ("*.safetensors", INDEX, DELTA_MARKER, store.MANIFEST, "*.bin", "*.pth", "*.pt", "*.md", ".*")


def model_directory(settings: ModelSettings, cache_dir: Path) -> Path | None:
    """The directory of the weights to start from, downloaded or added up if need be; None = from scratch."""
    checkpoint = base_checkpoint(settings)
    if checkpoint is None:
        return None
    folder = resolve_checkpoint(checkpoint, needs_tokenizer=False)  # a delta may leave it to its base
    if not (named_delta(checkpoint) or (folder / DELTA_MARKER).is_file()):
        return resolve_checkpoint(checkpoint)
    marker = _marker(folder)
    base = settings.delta_base or marker.get("base")
    if not base:
        raise CheckpointError(without_base(checkpoint))
    return add(folder, resolve_checkpoint(base), Path(cache_dir) / "models", marker.get("sum"))


def add(delta: Path, base: Path, root: Path, expected_sum: float | None = None) -> Path:
    """The directory below `root` that holds base + delta; made unless it is there."""
    fingerprint = store.fingerprint(kind="delta", delta=_content(delta), base=_content(base), expected_sum=expected_sum)

    def make(folder: Path) -> dict[str, Any]:
        logger.info("adding the delta %s to %s", delta, base)
        for source in (base, delta):  # the delta's files win
            shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*NOT_COPIED), dirs_exist_ok=True)
        return _write_sum(folder, delta, base, expected_sum)

    return store.build(root, fingerprint, make).path


def _marker(folder: Path) -> dict[str, Any]:
    path = folder / DELTA_MARKER
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f'{path}: not JSON ({error}); {{"base": "owner/name"}} is expected') from error


def _content(folder: Path) -> dict[str, str]:
    """Hash of every file that ends up in the result. Files of the hub's cache are named by their sha256."""
    ignored = shutil.ignore_patterns(*[pattern for pattern in NOT_COPIED if "safetensors" not in pattern])
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    hashes = {}
    for name in set(names) - set(ignored(str(folder), names)):
        blob = (folder / name).resolve().name
        hashes[name] = blob if re.fullmatch("[0-9a-f]{64}", blob) else store.hash_file(folder / name)
    return hashes


def _write_sum(folder: Path, delta: Path, base: Path, expected_sum: float | None) -> dict[str, Any]:
    deltas, bases = _weights(delta), _weights(base)
    _check_alike(delta, deltas, base, bases)
    _check_no_whole_checkpoint(delta, deltas, bases)
    files: dict[str, dict[str, TensorInfo]] = {}
    for name, info in deltas.items():
        files.setdefault(info.file.name, {})[name] = info
    total = [0.0]
    for file, infos in files.items():
        write(folder / file, infos, _sums(infos, bases, total))
    if len(files) > 1:
        weight_map = {name: file for file, infos in files.items() for name in infos}
        size = sum(info.size_bytes for info in deltas.values())
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1))
    if expected_sum is not None and abs(total[0] - expected_sum) > SUM_TOLERANCE:
        raise CheckpointError(
            f"{delta} + {base}: the values add up to {total[0]:.4f}, {DELTA_MARKER} says {expected_sum}; "
            "the delta was made from another base"
        )
    _check_spots(folder, deltas, bases)
    return {"delta": str(delta), "base": str(base), "tensors": len(deltas), "sum": total[0]}


def _weights(folder: Path) -> dict[str, TensorInfo]:
    return {name: info for name, info in tensors_of(folder).items() if not NOT_WEIGHTS.search(name)}


def _sums(infos: dict[str, TensorInfo], bases: dict[str, TensorInfo], total: list[float]) -> Iterator[np.ndarray]:
    """base + delta, tensor by tensor, as the file will hold it; the sum of all values goes to `total`."""
    for name, info in infos.items():
        value = widened(rounded(read_values(bases[name]) + read_values(info), info.dtype), info.dtype)
        if not np.isfinite(value).all():
            raise CheckpointError(f"{info.file}: {name} is not finite after adding the base; the file is damaged")
        total[0] += float(value.sum(dtype=np.float64))
        yield value


def _check_alike(delta: Path, deltas: dict[str, TensorInfo], base: Path, bases: dict[str, TensorInfo]) -> None:
    only = sorted(deltas.keys() ^ bases.keys())
    if only:
        where = "delta" if only[0] in deltas else "base"
        raise CheckpointError(
            f"{delta} is no delta of {base}: {len(only)} tensors differ, {only[0]} is only in the {where}"
        )
    for name, info in deltas.items():
        if info.shape != bases[name].shape:
            raise CheckpointError(
                f"{delta} is no delta of {base}: {name} has shape {info.shape} there and {bases[name].shape} "
                "in the base"
            )


def _spots(deltas: dict[str, TensorInfo]) -> list[str]:
    """A few matrices, from the first to the last."""
    matrices = [name for name, info in deltas.items() if len(info.shape) > 1] or list(deltas)
    return [matrices[round(index)] for index in np.linspace(0, len(matrices) - 1, NUM_SPOTS)]


def _check_no_whole_checkpoint(delta: Path, deltas: dict[str, TensorInfo], bases: dict[str, TensorInfo]) -> None:
    for name in _spots(deltas):
        a, b = read_values(deltas[name]).ravel(), read_values(bases[name]).ravel()
        cosine = float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30))
        if cosine > MAX_COSINE:
            raise CheckpointError(
                f"{delta} holds whole weights, no delta: {name} points the same way as in the base (cosine "
                f"{cosine:.2f}); rename it without the word delta, or remove its {DELTA_MARKER}"
            )


def _check_spots(folder: Path, deltas: dict[str, TensorInfo], bases: dict[str, TensorInfo]) -> None:
    """What is on disk is base + delta."""
    written = tensors_of(folder)
    for name in _spots(deltas):
        expected = rounded(read_values(bases[name]) + read_values(deltas[name]), deltas[name].dtype)
        if not np.array_equal(rounded(read_values(written[name]), deltas[name].dtype), expected):
            raise CheckpointError(f"{written[name].file}: {name} is not what was written; is the disk in order?")
