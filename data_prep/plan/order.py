"""Which rows a step trains on, as a pure function of (seed, epoch, step); independent of the number of ranks.

In: the number of rows of a plan. Out: row indices; ``-1`` stands for an all-padding row. Resume is therefore a seek,
and N ranks train on the same rows per step as M ranks do.

The permutation of an epoch sorts the rows by a 64-bit mix of (seed, epoch, row): integer arithmetic only, so the order
is the same on every machine and with every numpy version (``numpy.random`` promises neither). Cost: 50 ms for
1,000,000 rows, once an epoch (the last two permutations are kept).
"""

from functools import lru_cache

import numpy as np

from data_prep.plan import columns
from data_prep.plan.columns import blocks

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
    part of it. In 64-bit keys the low bits give way to the place; the few that differ in those bits alone (some pairs
    of ten million hashes, 6 % of a billion) are put in order afterwards.
    """
    places = columns.made(len(keys), np.int64, lambda block: np.arange(block.start, block.stop))
    if keys.dtype == np.int32:
        for block in blocks(len(keys)):
            places[block] |= keys[block].astype(np.int64) << 32
        places.sort()
        places &= 0xFFFFFFFF
        return places
    place_bits = (1 << len(keys).bit_length()) - 1
    packed = places.view(np.uint64)
    for block in blocks(len(keys)):
        packed[block] |= keys[block] & np.uint64(_MASK64 ^ place_bits)
    packed.sort()
    packed &= np.uint64(place_bits)
    _order_by_low_bits(places, keys, place_bits)
    return places


def _order_by_low_bits(order: np.ndarray, keys: np.ndarray, low: int) -> None:
    """Sort what is ordered by all bits but the low ones by these too; in place."""
    start = 0
    while start < len(order):
        stop = _end_of_equals(order, keys, low, min(start + columns.BLOCK, len(order)))
        found = keys[order[start:stop]]
        if (found[1:] < found[:-1]).any():
            same = np.flatnonzero(found[1:] ^ found[:-1] <= np.uint64(low))
            members = np.union1d(same, same + 1)
            mine = order[start + members]
            order[start + members] = mine[np.lexsort((mine, found[members]))]
        start = stop


def _end_of_equals(order: np.ndarray, keys: np.ndarray, low: int, stop: int) -> int:
    """Where those end that differ from the one before ``stop`` in the low bits at most."""
    last = keys[order[stop - 1]]
    while stop < len(order):
        others = np.flatnonzero(keys[order[stop : stop + columns.BLOCK]] ^ last > np.uint64(low))
        if len(others):
            return stop + int(others[0])
        stop = min(stop + columns.BLOCK, len(order))
    return stop


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
    return (mix64(keys, salt) >> np.uint64(11)).astype(np.float64) * 2.0**-53
