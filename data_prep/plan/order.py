"""Which rows a step trains on, as a pure function of (seed, epoch, step); independent of the number of ranks.

In: the number of rows of a plan. Out: row indices; ``-1`` stands for an all-padding row. Resume is therefore a seek,
and N ranks train on the same rows per step as M ranks do.

The permutation of an epoch sorts the rows by a 64-bit mix of (seed, epoch, row): integer arithmetic only, so the order
is the same on every machine and with every numpy version (``numpy.random`` promises neither). Cost: 50 ms for
1,000,000 rows, once an epoch (the last two permutations are kept).
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

BLOCK = 1 << 18
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1


def mix64(values: np.ndarray, key: int) -> np.ndarray:
    """splitmix64 of each value under a key: ``(n,) uint64`` -> ``(n,) uint64``, uniform and the same everywhere.

    https://doi.org/10.1145/2660193.2660195
    """
    z = values.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(_key64(key))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _key64(key: int) -> int:
    z = (key * _GOLDEN + _GOLDEN) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    return z ^ (z >> 27)


def stable_argsort(keys: np.ndarray) -> np.ndarray:
    """``np.argsort(keys, kind="stable")`` of ``(n,)`` int32 or uint64, as ``(n,) int64``.

    Four to ten times as fast: numpy's vectorised sort is not stable and gives no places, so the place of a key is made
    part of it. In 64-bit keys the low bits give way to the place; where keys differ in those bits alone (of a million
    hashes, one time in thirty) the result is out of order, and they are sorted the long way.
    """
    if keys.dtype == np.int32:
        narrow = keys.astype(np.int64)  # in place from here on: three times the memory otherwise
        narrow <<= 32
        narrow |= np.arange(len(keys))
        narrow.sort()
        narrow &= 0xFFFFFFFF
        return narrow
    place_bits = (1 << len(keys).bit_length()) - 1
    packed = keys & np.uint64(_MASK64 ^ place_bits)
    packed |= np.arange(len(keys), dtype=np.uint64)
    packed.sort()
    packed &= np.uint64(place_bits)
    order = packed.view(np.int64)
    in_order = keys[order]
    return order if (in_order[1:] >= in_order[:-1]).all() else np.argsort(keys, kind="stable")


@lru_cache(maxsize=2)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    keys = mix64(np.arange(num_rows, dtype=np.uint64), (seed << 32) ^ epoch)
    order = stable_argsort(keys)
    order.flags.writeable = False
    return order


def steps_per_epoch(num_rows: int, rows_per_step: int) -> int:
    """Steps of one epoch: the last one is smaller, never dropped."""
    return -(-num_rows // rows_per_step)


def rows_of_step(num_rows: int, rows_per_step: int, seed: int, epoch: int, step_in_epoch: int) -> np.ndarray:
    """Rows of one step: ``(<= rows_per_step,) int64``; the steps of an epoch hold every row exactly once."""
    start = step_in_epoch * rows_per_step
    if not 0 <= start < num_rows:
        raise IndexError(f"step {step_in_epoch} of an epoch of {steps_per_epoch(num_rows, rows_per_step)} steps")
    return _permutation(num_rows, seed, epoch)[start : start + rows_per_step]


def split_step(rows: np.ndarray, world_size: int, micro_batch: int) -> np.ndarray:
    """Rows of a step for every rank: ``(world_size, micro_steps, micro_batch) int64``, padded with -1.

    Micro-batches are dealt to the ranks in turn. Which rows share one does not depend on the number of ranks, so
    neither does dropout, which is seeded by them. 5 rows, 2 ranks, micro-batches of 2::

        rows  [10, 11, 12, 13, 14]   rank 0: [[10, 11], [14, -1]]   rank 1: [[12, 13], [-1, -1]]
    """
    micro_steps = steps_per_epoch(len(rows), world_size * micro_batch)
    padded = np.full(micro_steps * world_size * micro_batch, -1, dtype=np.int64)
    padded[: len(rows)] = rows
    return np.ascontiguousarray(padded.reshape(micro_steps, world_size, micro_batch).transpose(1, 0, 2))


def position_of(num_rows: int, rows_per_step: int, seed: int, epoch: int, rows: np.ndarray) -> np.ndarray:
    """In which step of an epoch each of ``rows`` is trained: ``(n,) int64``, the inverse of `rows_of_step`."""
    inverse = np.empty(num_rows, dtype=np.int64)
    inverse[_permutation(num_rows, seed, epoch)] = np.arange(num_rows)
    return inverse[rows] // rows_per_step


def uniform(keys: np.ndarray, salt: int) -> np.ndarray:
    """A number in [0, 1) per content key: ``(n,) float64``."""
    drawn = np.empty(len(keys))
    for block in blocks(len(keys)):
        drawn[block] = (mix64(keys[block], salt) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return drawn


def blocks(count: int) -> Iterator[slice]:
    """All of so many entries, some at a time: what is calculated on the way takes several times their place."""
    return (slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))


def index_type(count: int) -> type:
    """The type of an index into so many entries."""
    return np.int32 if count <= np.iinfo(np.int32).max else np.int64
