"""The files of a checkpoint: pieces of flattened tensors, written and hashed at once, read by ranges.

In: pieces of weights and optimizer states, (parameter, key, first number, shape of the whole); later the range that is
wanted. Out: safetensors files; flat tensors. Cost: writing copies nothing, reading takes the memory of what is wanted.

A file of format 2, where this rank has the numbers 6 to 11 of a matrix of 3 x 4::

    header    "layer.weight|exp_avg|6": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}
              "__metadata__": {"layer.weight|exp_avg": "[3, 4]"}
    the bytes of the pieces, one after another

Format 1 has whole tensors in their own shape, named "layer.weight|exp_avg", and no such metadata: a piece that begins
at 0. No pickle is read or written.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from data_prep.store import HASH_CHUNK_BYTES, FileEntry
from training.errors import CheckpointError

SEPARATOR = "|"
METADATA = "__metadata__"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class NamedPiece:
    """Numbers of a tensor, on the CPU, flat."""

    parameter: str
    key: str  # "weight", or the name of an optimizer state
    start: int  # the first of them in the whole tensor, flattened
    shape: tuple[int, ...]  # of the whole tensor
    value: Tensor

    @property
    def tensor(self) -> str:
        return f"{self.parameter}{SEPARATOR}{self.key}"


def write_pieces(path: Path, pieces: Iterable[NamedPiece]) -> FileEntry:
    """A file of pieces, on the disk when this returns: ``{"bytes", "xxh3"}``."""
    pieces = list(pieces)
    hashed = xxhash.xxh3_128()
    with open(path, "wb", buffering=0) as stream:
        for part in (_header(pieces), *(_bytes_of(piece.value) for piece in pieces)):
            for first in range(0, len(part), HASH_CHUNK_BYTES):
                chunk = part[first : first + HASH_CHUNK_BYTES]
                hashed.update(chunk)
                write_chunk(stream, chunk)
        os.fsync(stream.fileno())
        size = stream.tell()
    return {"bytes": size, "xxh3": hashed.hexdigest()}


def write_chunk(stream: Any, chunk: memoryview) -> None:
    """All of a chunk; a raw file may take less than it is given."""
    while chunk:
        chunk = chunk[stream.write(chunk) :]


def _header(pieces: list[NamedPiece]) -> memoryview:
    """Length and JSON; the bytes start at a multiple of 8."""
    header: dict[str, Any] = {METADATA: {piece.tensor: json.dumps(list(piece.shape)) for piece in pieces}}
    offset = 0
    for piece in pieces:
        end = offset + piece.value.nbytes
        header[f"{piece.tensor}{SEPARATOR}{piece.start}"] = {
            "dtype": NAMES[piece.value.dtype], "shape": [piece.value.numel()], "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return memoryview(len(text).to_bytes(8, "little") + text)


def _bytes_of(value: Tensor) -> memoryview:
    return value.contiguous().flatten().view(torch.uint8).numpy().data


@dataclass(frozen=True)
class _Place:
    """Where a piece lies."""

    file: Path
    offset: int  # of its first byte
    start: int  # of its first number, in the whole tensor
    stop: int


@dataclass
class StoredTensor:
    """A weight or a state in a checkpoint, whichever files have its pieces."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    places: list[_Place] = field(default_factory=list)

    def part(self, start: int, length: int) -> Tensor:
        """``(length,)``: the numbers from `start` on, read from the files that have them."""
        numbers = torch.empty(length, dtype=self.dtype)
        buffer, size = _bytes_of(numbers), self.dtype.itemsize
        for place in self.places:
            first, last = max(start, place.start), min(start + length, place.stop)
            if first < last:
                target = buffer[(first - start) * size : (last - start) * size]
                _read_into(target, place.file, place.offset + (first - place.start) * size)
        return numbers

    def whole(self) -> Tensor:
        """All of it, in its shape."""
        return self.part(0, math.prod(self.shape)).reshape(self.shape)

    def is_covered(self) -> bool:
        """Whether the pieces are all there, each number once."""
        reached = 0
        for place in sorted(self.places, key=lambda place: place.start):
            if place.start != reached:
                return False
            reached = place.stop
        return reached == math.prod(self.shape)


def _read_into(target: memoryview, file: Path, offset: int) -> None:
    with open(file, "rb", buffering=0) as stream:
        stream.seek(offset)
        while target:
            num_read = stream.readinto(target)
            if not num_read:
                raise CheckpointError(f"{file}: ends before its last tensor does")
            target = target[num_read:]


def read_index(directory: Path) -> dict[str, dict[str, StoredTensor]]:
    """{parameter: {key: stored tensor}} of all files of a checkpoint; reads their headers.

    :raises CheckpointError: pieces are missing, or a header is damaged.
    """
    index: dict[str, dict[str, StoredTensor]] = {}
    for file in sorted(directory.glob("state-*.safetensors")):
        for parameter, key, shape, dtype, place in _sound_entries(file):
            stored = index.setdefault(parameter, {}).setdefault(key, StoredTensor(shape, dtype))
            stored.places.append(place)
    for parameter, states in index.items():
        for key, stored in states.items():
            if not stored.is_covered():
                raise CheckpointError(
                    f"{directory}: pieces of {parameter} ({key}) are missing; take an older checkpoint"
                )
    return index


def _sound_entries(file: Path) -> list[tuple[str, str, tuple[int, ...], torch.dtype, _Place]]:
    """What a file holds."""
    try:
        return list(_entries(file))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{file}: its header is damaged ({error}); take an older checkpoint") from error


def _entries(file: Path) -> Iterator[tuple[str, str, tuple[int, ...], torch.dtype, _Place]]:
    """What a file holds, of format 1 or 2."""
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError(f"a header of {length} bytes in a file of {file.stat().st_size}")
        header = json.loads(stream.read(length))
    shapes = header.pop(METADATA, None) or {}
    for name, entry in header.items():
        offset, shape = 8 + length + entry["data_offsets"][0], tuple(entry["shape"])
        count, dtype = math.prod(shape), DTYPES[entry["dtype"]]
        tensor, _, first = name.rpartition(SEPARATOR)
        whole = tensor not in shapes  # format 1
        parameter, _, key = (name if whole else tensor).rpartition(SEPARATOR)
        start = 0 if whole else int(first)
        place = _Place(file, offset, start, start + count)
        yield parameter, key, shape if whole else tuple(json.loads(shapes[tensor])), dtype, place
