"""Columns that may be longer than memory, calculated a block at a time: what plans are made of.

In: functions of a block (a slice of positions). Out: numpy arrays; inside `lying_in` the long ones are mapped from
files without a name, which the kernel writes out where memory is short. Where an array lies changes no value. Cost: a
process holds some blocks of `BLOCK` entries, whatever the length; speed is that of numpy on arrays that fit a cache.
"""

import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, cast

import numpy as np

BLOCK = 1 << 18
MAPPED_BYTES = 1 << 20
Block = slice
_place: ContextVar[Path | None] = ContextVar("place", default=None)


@contextmanager
def lying_in(directory: Path) -> Iterator[None]:
    """Long columns that are made inside lie in this directory, as long as somebody uses them."""
    token = _place.set(directory)
    try:
        yield
    finally:
        _place.reset(token)


def blocks(count: int) -> Iterator[Block]:
    """All of so many entries, some at a time: what is calculated on the way takes several times their place."""
    return (slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))


def zeros(count: int, dtype: type | np.dtype) -> np.ndarray:
    """``(count,)`` of zeros."""
    size = count * np.dtype(dtype).itemsize
    directory = _place.get()
    if directory is None or size < MAPPED_BYTES:
        return np.zeros(count, dtype)
    with TemporaryFile(dir=directory) as file:
        return _mapped(cast(BinaryIO, file), size, dtype)


def made(count: int, dtype: type | np.dtype, of: Callable[[Block], Any]) -> np.ndarray:
    """``(count,)`` of what a function says of each block."""
    column = zeros(count, dtype)
    for block in blocks(count):
        column[block] = of(block)
    return column


def taken(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """``values[places]``."""
    return made(len(places), values.dtype, lambda block: values[places[block]])


def joined(parts: Iterable[np.ndarray], dtype: type | np.dtype) -> np.ndarray:
    """The parts one after another, however many and long."""
    held, size, file = [np.zeros(0, dtype)], 0, None
    directory = _place.get()
    for part in (whole[block] for whole in parts for block in blocks(len(whole))):
        held.append(np.asarray(part, dtype))
        size += held[-1].nbytes
        if directory is not None and size >= MAPPED_BYTES:
            file = file or cast(BinaryIO, TemporaryFile(dir=directory, buffering=0))  # noqa: SIM115  # closed below
            while held:
                _write(file, held.pop(0))
    if file is None:
        return np.concatenate(held)
    with file:
        for part in held:
            _write(file, part)
        return _mapped(file, size, dtype)


def where(count: int, holds: Callable[[Block], np.ndarray]) -> np.ndarray:
    """The positions where a condition holds, ascending: ``(m,)`` int32, of more than that can count int64."""
    return joined((block.start + np.flatnonzero(holds(block)) for block in blocks(count)), index_type(count))


def repeated(values: np.ndarray, times: Callable[[Block], np.ndarray]) -> np.ndarray:
    """``np.repeat``: each value so many times."""
    return joined((np.repeat(values[block], times(block)) for block in blocks(len(values))), values.dtype)


def running_sum(values: np.ndarray) -> np.ndarray:
    """``np.cumsum`` in int64."""
    result, before = zeros(len(values), np.int64), 0
    for block in blocks(len(values)):
        np.cumsum(values[block], dtype=np.int64, out=result[block])
        result[block] += before
        before = int(result[block.stop - 1])
    return result


def sums_by(keys: np.ndarray, count: int, values: Callable[[Block], Any]) -> np.ndarray:
    """``(count,)`` int64: for each key the sum of the values of its entries."""
    sums = zeros(count, np.int64)
    for block in blocks(len(keys)):
        np.add.at(sums, keys[block], np.asarray(values(block), np.int64))  # of another type: six times as slow
    return sums


def total(count: int, values: Callable[[Block], np.ndarray]) -> int:
    """The sum of integers or of where a condition holds."""
    return sum(int(np.sum(values(block), dtype=np.int64)) for block in blocks(count))


def index_type(count: int) -> type:
    """The type of an index into so many entries."""
    return np.int32 if count <= np.iinfo(np.int32).max else np.int64


def _write(file: BinaryIO, part: np.ndarray) -> None:
    view = np.ascontiguousarray(part).data.cast("B")
    while len(view):
        view = view[file.write(view) :]


def _mapped(file: BinaryIO, size: int, dtype: type | np.dtype) -> np.ndarray:
    os.posix_fallocate(file.fileno(), 0, size)  # so that a full disk is an error here and no signal later
    return np.frombuffer(mmap.mmap(file.fileno(), size), dtype)
