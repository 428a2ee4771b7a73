"""Safetensors files, read and written one tensor at a time, without torch.

In: a checkpoint directory. Out: names, types, shapes and places of its tensors; values as float32; new files.
Cost: a header is one small read; values are mapped into memory, so that a checkpoint of any size needs one tensor's
worth of it.

    file:  8 bytes length of the header | header, JSON: {name: {dtype, shape, data_offsets}} | the tensors' bytes
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.errors import CheckpointError

INDEX = "model.safetensors.index.json"
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1}
NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
"""Types whose values are read; numpy has no bfloat16, whose bits are the upper half of a float32."""
MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint and where its bytes are."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * WIDTHS[self.dtype]


def tensors_of(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint by name: of the files its index names, else of all safetensors files in it."""
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    return {name: info for file in names for name, info in read_header(folder / file).items()}


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file, in the order of their bytes."""
    try:
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header: dict[str, Any] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            infos = {
                name: TensorInfo(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
                for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
            }
            _check_size(path, infos)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from error
    return infos


def _check_size(path: Path, infos: dict[str, TensorInfo]) -> None:
    expected = max((info.start + info.size_bytes for info in infos.values()), default=0)
    if path.stat().st_size < expected:
        raise ValueError(f"{path.stat().st_size} bytes instead of {expected}")


def read_values(info: TensorInfo) -> np.ndarray:
    """The values of a tensor, in its shape, float32."""
    if info.dtype not in NUMPY:
        raise CheckpointError(f"{info.file}: a tensor of type {info.dtype}; weights in {', '.join(NUMPY)} are needed")
    if not math.prod(info.shape):
        return np.zeros(info.shape, np.float32)
    return widened(np.memmap(info.file, NUMPY[info.dtype], "r", info.start, info.shape), info.dtype)


def widened(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Values as a file of type `dtype` holds them, as float32."""
    return (raw.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else raw.astype(np.float32)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 values as a file of type `dtype` holds them; bfloat16 as uint16, ties to even."""
    if dtype != "BF16":
        return values.astype(NUMPY[dtype])
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write(path: Path, infos: dict[str, TensorInfo], values: Iterator[np.ndarray]) -> None:
    """Write tensors with the names, types and shapes of `infos`, values taken one by one in that order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in infos.items():
        header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [offset, offset + info.size_bytes]}
        offset += info.size_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8 bytes
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for info, value in zip(infos.values(), values, strict=True):
            stream.write(rounded(value, info.dtype).tobytes())
        stream.flush()
        os.fsync(stream.fileno())
