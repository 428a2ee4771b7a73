"""The safetensors files of a checkpoint, read and written anew one tensor at a time.

In: a checkpoint directory; what becomes of each tensor. Out: where its tensors are; the same files with other values.
Cost: values are mapped into memory, so that a checkpoint of any size needs a few tensors' worth of it (safetensors' own
`save_file` wants all tensors of a file at once).

    file:  8 bytes length of the header | header, JSON: {name: {dtype, shape, data_offsets}} | the tensors' bytes
"""

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from training.errors import CheckpointError

INDEX = "model.safetensors.index.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """A rank's part of a tensor: contiguous numbers of the flattened whole, maybe none."""

    value: Tensor  # ``(n,)``, where the engine keeps it: copy it before the next step
    start: int  # the first of them in the whole tensor
    shape: tuple[int, ...]  # of the whole tensor; () for a number, such as the steps made


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint and where it is."""

    file: Path
    name: str
    dtype: str  # F32, BF16, I64, ...
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """Its values, mapped from the file: what is never looked at takes no memory."""
        with _opened(self.file) as tensors:
            return tensors.get_tensor(self.name)


def shards(folder: Path) -> list[Path]:
    """The files of a checkpoint: those its index names, else all safetensors files in it."""
    index = folder / INDEX
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no .safetensors files; pickled weights (.bin) are not read")
    return files


def tensors_of(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint by name, in the order of their bytes."""
    return tensors_in(shards(folder))


def tensors_in(files: list[Path]) -> dict[str, TensorInfo]:
    """All tensors of files by name, in the order of their bytes."""
    infos = {}
    for file in files:
        with _opened(file) as tensors:
            for name in tensors.offset_keys():
                view = tensors.get_slice(name)
                infos[name] = TensorInfo(file, name, view.get_dtype(), tuple(view.get_shape()))
    return infos


def rewrite_shards(
    folder: Path,
    target: Path,
    change: Callable[[str, Tensor], Tensor],
    drop: Callable[[str], Any] = lambda name: None,
    num_rows: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """The same files, tensors, shapes and types in `target`, with the values that `change` gives for each.

    :param drop: true for names of tensors that are left out
    :param num_rows: of those that get more rows or fewer
    """
    files, size, weight_map = shards(folder), 0, {}
    for number, file in enumerate(files, 1):
        log.info("writing %s, file %d of %d", target / file.name, number, len(files))
        with _opened(file) as tensors:
            names = [name for name in tensors.offset_keys() if not drop(name)]
            shapes = {name: tensors.get_slice(name).get_shape() for name in names}
            shapes |= {name: [num_rows[name], *shapes[name][1:]] for name in num_rows.keys() & shapes.keys()}
            sizes = {name: math.prod(shapes[name]) * tensors.get_tensor(name).itemsize for name in names}
            with open(target / file.name, "wb") as stream:
                stream.write(_header(tensors, shapes, sizes))
                for name in names:
                    stream.write(_bytes_of(change(name, tensors.get_tensor(name))))
                stream.flush()
                os.fsync(stream.fileno())
        size += sum(sizes.values())
        weight_map.update(dict.fromkeys(names, file.name))
    if len(files) > 1 or (folder / INDEX).is_file():
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (target / INDEX).write_text(json.dumps(index, indent=1))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file as safetensors gives it, whole or an error."""
    try:
        tensors = safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from error
    with tensors as opened:
        yield opened


def _header(tensors: Any, shapes: dict[str, list[int]], sizes: dict[str, int]) -> bytes:
    """Length and JSON: the types of `tensors`, of these shapes and bytes, laid one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, size in sizes.items():
        dtype = tensors.get_slice(name).get_dtype()
        header[name] = {"dtype": dtype, "shape": shapes[name], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def _bytes_of(value: Tensor) -> memoryview:
    return value.contiguous().flatten().view(torch.uint8).numpy().data
