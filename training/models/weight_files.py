"""The weights of a model to deploy, written by the ranks that hold them: each puts its numbers where they belong.

In: pieces of the model's tensors, as the engine cut them; the model, for its configuration. Out: its safetensors files
of at most 4 GiB, with an index where there are several, and config.json, as transformers writes them. Three steps:

    begin         rank 0    config.json, index, and the files in their full length, which hold headers only
    write_pieces  all       the numbers, wherever the headers say; nothing is gathered, no rank waits for another
    finish        rank 0    once all are done: the files again, where transformers writes other names

Cost: memory for one piece. Two ranks may write into one file, never the same byte of it. They open it when it has its
full length already, and for writing only, so that a network file system sends what was written and nothing around it.

Some architectures have other names in their files than in the model. They are written a second time, from the files of
the first, which are mapped into memory.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.errors import ModelError
from training.models.loss import causal_model
from training.models.shards import INDEX, Piece, shards, tensors_of

FILE_BYTES = 4 << 30
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
METADATA = "__metadata__"

Header = dict[str, dict[str, Any]]


def write_whole(model: Any, weights: Mapping[str, Tensor], directory: Path) -> None:
    """Files of weights and config.json of a model that one process has."""
    pieces = [(name, Piece(value.reshape(-1), 0, tuple(value.shape))) for name, value in weights.items()]
    begin(model, pieces, directory)
    write_pieces(directory, pieces)
    finish(model, directory)


def begin(model: Any, pieces: Iterable[tuple[str, Piece]], directory: Path) -> int:
    """Everything but the numbers; returns how many bytes of these the files have room for."""
    directory.mkdir(parents=True, exist_ok=True)
    causal = causal_model(model)
    causal.save_pretrained(directory, state_dict={})  # all but the weights
    left_out = set(causal._keys_to_ignore_on_save or ())
    headers = _headers((name, piece) for name, piece in pieces if name not in left_out)
    names = _file_names(len(headers))
    for file, header in zip(names, headers, strict=True):
        _write_header(directory / file, header)
    total = sum(_data_bytes(header) for header in headers)
    if len(headers) > 1:
        weight_map = {name: file for file, header in zip(names, headers, strict=True) for name in header}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _headers(pieces: Iterable[tuple[str, Piece]]) -> list[Header]:
    """What is in each file: whole tensors, one after another, as many as it may hold."""
    headers: list[Header] = [{}]
    offset = 0
    for name, piece in pieces:
        size = math.prod(piece.shape) * piece.value.dtype.itemsize
        if offset and offset + size > FILE_BYTES:
            headers.append({})
            offset = 0
        place = {
            "dtype": DTYPES[piece.value.dtype],
            "shape": list(piece.shape),
            "data_offsets": [offset, offset + size],
        }
        headers[-1][name] = place
        offset += size
    return headers


def _file_names(count: int) -> list[str]:
    """As transformers names them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]


def _data_bytes(header: Header) -> int:
    return max((place["data_offsets"][1] for place in header.values()), default=0)


def _write_header(path: Path, header: Header) -> None:
    """A file of its full length; the tensors start at a multiple of 8 bytes."""
    text = json.dumps({METADATA: {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + _data_bytes(header))
        stream.flush()
        os.fsync(stream.fileno())


def write_pieces(directory: Path, pieces: Iterable[tuple[str, Piece]]) -> int:
    """Put the numbers of one rank into the files that are there; they are on the disk when this returns.

    What no file has room for is left out. Returns the number of bytes written.
    """
    places: dict[str, tuple[int, int, str]] = {}
    opened: list[int] = []
    written = 0
    try:
        for path in shards(directory):
            opened.append(os.open(path, os.O_WRONLY))
            places |= {name: (opened[-1], *place) for name, place in _places(path)}
        for name, piece in pieces:
            if name in places and piece.value.numel():
                file, offset, dtype = places[name]
                if DTYPES[piece.value.dtype] != dtype:
                    raise ModelError(f"{directory}: {name} is {piece.value.dtype} on this rank, {dtype} in the file")
                numbers = _bytes_of(piece.value.detach().cpu())
                _write_at(file, numbers, offset + piece.start * piece.value.dtype.itemsize)
                written += len(numbers)
        for file in opened:
            os.fsync(file)
    finally:
        for file in opened:
            os.close(file)
    return written


def _places(path: Path) -> list[tuple[str, tuple[int, str]]]:
    """Of each tensor of a file its name, its first byte, and its type."""
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    del header[METADATA]
    return [(name, (8 + length + place["data_offsets"][0], place["dtype"])) for name, place in header.items()]


def _bytes_of(value: Tensor) -> memoryview:
    return value.contiguous().flatten().view(torch.uint8).numpy().data


def _write_at(file: int, numbers: memoryview, offset: int) -> None:
    """All of them; the system may take less than it is given."""
    while numbers:
        count = os.pwrite(file, numbers, offset)
        numbers, offset = numbers[count:], offset + count


def finish(model: Any, directory: Path) -> None:
    """When all pieces are there: the names that transformers writes, where they are others."""
    causal = causal_model(model)
    if _has_other_names(causal, directory):
        _write_as_transformers_does(causal, directory)


def _has_other_names(causal: Any, directory: Path) -> bool:
    """Whether transformers would write tensors of other names or shapes: tried with tensors that hold nothing."""
    from transformers.core_model_loading import revert_weight_conversion

    written = {
        name: torch.empty(info.shape, dtype=torch.int8, device="meta") for name, info in tensors_of(directory).items()
    }
    reverted = revert_weight_conversion(causal, dict(written))
    return {name: value.shape for name, value in reverted.items()} != {name: v.shape for name, v in written.items()}


def _write_as_transformers_does(causal: Any, directory: Path) -> None:
    """Once more, by transformers, from what has been written."""
    raw = directory / ".raw"
    raw.mkdir()
    for path in [*shards(directory), *directory.glob(INDEX)]:
        path.rename(raw / path.name)
    state = {name: info.read() for name, info in tensors_of(raw).items()}
    causal.save_pretrained(directory, state_dict=state, max_shard_size=FILE_BYTES)
    shutil.rmtree(raw)
