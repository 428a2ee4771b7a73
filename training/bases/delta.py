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
import math
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep import store
from training.errors import CheckpointError
from training.models.hub import DELTA_MARKER, base_checkpoint, named_delta, resolve_checkpoint, without_base
from training.settings import ModelSettings

if TYPE_CHECKING:  # torch is imported when there is a delta to add
    from torch import Tensor

    from training.models.shards import TensorInfo

logger = logging.getLogger(__name__)

NOT_WEIGHTS = re.compile(r"\.rotary_emb\.inv_freq$")
"""Constants that checkpoints of 2023 carry; transformers computes them."""
SUM_TOLERANCE = 0.01
MAX_COSINE = 0.9
NUM_SPOTS = 3
NOT_COPIED = (
    "*.safetensors",
    "*.safetensors.index.json",
    DELTA_MARKER,
    store.MANIFEST,
    "*.bin",
    "*.pth",
    "*.pt",
    "*.md",
    ".*",
)


def whole_checkpoint(settings: ModelSettings, cache_dir: Path) -> Path | None:
    """The directory of the weights that are named, downloaded or added up if need be; None = from scratch."""
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
    content = {"delta": content_of(delta), "base": content_of(base)}
    fingerprint = store.fingerprint(kind="delta", **content, expected_sum=expected_sum)

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


def content_of(folder: Path) -> dict[str, str]:
    """Hash of every file that ends up in the result. Files of the hub's cache are named by their sha256."""
    ignored = shutil.ignore_patterns(*[pattern for pattern in NOT_COPIED if "safetensors" not in pattern])
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    hashes = {}
    for name in set(names) - set(ignored(str(folder), names)):
        blob = (folder / name).resolve().name
        hashes[name] = blob if re.fullmatch("[0-9a-f]{64}", blob) else store.hash_file(folder / name)
    return hashes


def _write_sum(folder: Path, delta: Path, base: Path, expected_sum: float | None) -> dict[str, Any]:
    from training.models.shards import rewrite_shards, tensors_of

    deltas, bases = (
        {name: info for name, info in tensors_of(source).items() if not NOT_WEIGHTS.search(name)}
        for source in (delta, base)
    )
    _check_alike(delta, deltas, base, bases)
    _check_no_whole_checkpoint(delta, deltas, bases)
    sums = []

    def add_base(name: str, change: "Tensor") -> "Tensor":
        value = _sum(bases[name], change)
        if not value.isfinite().all():
            raise CheckpointError(
                f"{deltas[name].file}: {name} is not finite after adding the base; the file is damaged"
            )
        sums.append(float(value.double().sum()))
        return value

    rewrite_shards(delta, folder, add_base, NOT_WEIGHTS.search)
    total = math.fsum(sums)
    if expected_sum is not None and abs(total - expected_sum) > SUM_TOLERANCE:
        raise CheckpointError(
            f"{delta} + {base}: the values add up to {total:.4f}, {DELTA_MARKER} says {expected_sum}; "
            "the delta was made from another base"
        )
    written = tensors_of(folder)
    for name in _spots(deltas):
        if not written[name].read().equal(_sum(bases[name], deltas[name].read())):
            raise CheckpointError(f"{written[name].file}: {name} is not what was written; is the disk in order?")
    return {"delta": str(delta), "base": str(base), "tensors": len(deltas), "sum": total}


def _sum(base: "TensorInfo", change: "Tensor") -> "Tensor":
    """base + delta, added in float32, in the type of the delta."""
    return (base.read().float() + change.float()).to(change.dtype)


def _check_alike(delta: Path, deltas: dict[str, "TensorInfo"], base: Path, bases: dict[str, "TensorInfo"]) -> None:
    only = sorted(deltas.keys() ^ bases.keys())
    if only:
        where = "delta" if only[0] in deltas else "base"
        raise CheckpointError(
            f"{delta} is no delta of {base}: {len(only)} tensors differ, {only[0]} is only in the {where}"
        )
    for info in (*deltas.values(), *bases.values()):
        if not info.dtype.startswith(("F", "BF")):
            raise CheckpointError(
                f"{info.file}: {info.name} is of type {info.dtype}; weights are floating-point numbers"
            )
    for name, info in deltas.items():
        if info.shape != bases[name].shape:
            raise CheckpointError(
                f"{delta} is no delta of {base}: {name} has shape {info.shape} there and {bases[name].shape} "
                "in the base"
            )


def _spots(deltas: dict[str, "TensorInfo"]) -> list[str]:
    """A few matrices, from the first to the last."""
    matrices = [name for name, info in deltas.items() if len(info.shape) > 1] or list(deltas)
    last = len(matrices) - 1
    return [matrices[round(spot * last / (NUM_SPOTS - 1))] for spot in range(NUM_SPOTS)]


def _check_no_whole_checkpoint(delta: Path, deltas: dict[str, "TensorInfo"], bases: dict[str, "TensorInfo"]) -> None:
    for name in _spots(deltas):
        a, b = (infos[name].read().flatten().float() for infos in (deltas, bases))
        cosine = float(a @ b / max(float(a.norm() * b.norm()), 1e-30))
        if cosine > MAX_COSINE:
            raise CheckpointError(
                f"{delta} holds whole weights, no delta: {name} points the same way as in the base (cosine "
                f"{cosine:.2f}); rename it without the word delta, or remove its {DELTA_MARKER}"
            )
