"""Packing as pure functions of lengths: which piece goes into which row, and where documents are cut.

In: lengths. Out: row numbers and cuts; no token is touched. Two algorithms:

- `best_fit_decreasing` for pieces that may not be cut (arXiv 2404.10830): longest first, each into the fullest row that
  takes it. All pieces of one length are placed together, so the cost is that of the distinct lengths: 397,000 pieces
  in 40 ms, 99.87 % full.
- `fill` for documents that may be cut: they are laid one after another over the free space of the rows and cut where a
  row ends, so every row but the last is full. No piece is shorter than 2 tokens, as the first of a piece is no target.

    capacities [3, 4, 4, ...]   documents A (5 tokens), B (4)   ->   A A A | A A B B | B B . .
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_prep.plan.columns import Block, blocks, joined, made, running_sum, sums_by, total, zeros
from data_prep.plan.order import stable_argsort

MIN_PIECE = 2  # the first token of a piece is no target, so a piece of one token would train nothing
MIN_SPACE = 8  # free space that `fill` uses
SWAP_CANDIDATES = 64


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Row of each piece: ``(n,) int32`` -> ``(n,) int32``, rows numbered from 0; all lengths are in [1, capacity]."""
    rows = zeros(len(lengths), np.int32)
    order = stable_argsort(made(len(lengths), np.int32, lambda block: -lengths[block]))
    counts = sums_by(lengths, capacity + 1, lambda block: 1)
    free = _FreeRows(capacity)
    start = 0
    for size in np.flatnonzero(counts)[::-1].tolist():
        for placed in free.place(size, int(counts[size])):
            rows[order[start : start + len(placed)]] = placed
            start += len(placed)
    return rows


class _FreeRows:
    """Open rows by free space: ``rows[space]`` is a stack of arrays of row numbers; bit ``space`` of ``mask``: any."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.num_rows = 0
        self.rows: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]
        self.mask = 0

    def place(self, size: int, count: int) -> Iterator[np.ndarray]:
        """Rows of ``count`` pieces of one size, some at a time: ``(m,) int32``, together ``(count,)``.

        Best fit puts a piece into the fullest row that takes it, which then is the fullest for the next piece too:
        so a row with space for m of them gets m at once.
        """
        while count:
            fitting = self.mask >> size
            space = size + (fitting & -fitting).bit_length() - 1 if fitting else self.capacity
            per_row = space // size
            wanted = -(-count // per_row)
            rows = self._take(space, wanted) if fitting else self._open(wanted)
            number = min(count, len(rows) * per_row)
            for block in blocks(len(rows)):
                yield np.repeat(rows[block], per_row)[: number - block.start * per_row]
            self._put_back(rows, space, size, per_row, number)
            count -= number

    def _open(self, number: int) -> np.ndarray:
        first = self.num_rows
        self.num_rows += number
        return _numbers(number, np.int32, first)

    def _take(self, space: int, wanted: int) -> np.ndarray:
        stack = self.rows[space]
        rows = stack.pop()
        if len(rows) > wanted:
            stack.append(rows[wanted:])
            rows = rows[:wanted]
        if not stack:
            self.mask &= ~(1 << space)
        return rows

    def _put_back(self, rows: np.ndarray, space: int, size: int, per_row: int, number: int) -> None:
        in_last = number - (len(rows) - 1) * per_row
        self._push(rows[:-1], space - per_row * size)
        self._push(rows[-1:], space - in_last * size)

    def _push(self, rows: np.ndarray, space: int) -> None:
        if len(rows) and space:
            self.rows[space].append(rows)
            self.mask |= 1 << space


@dataclass(frozen=True)
class Filled:
    """Pieces of documents: piece ``i`` is ``length[i]`` tokens of ``document[i]`` from ``start[i]``, in ``row[i]``."""

    document: np.ndarray  # (num_pieces,) int64
    start: np.ndarray  # (num_pieces,) int32
    length: np.ndarray  # (num_pieces,) int32
    row: np.ndarray  # (num_pieces,) int32


def fill(lengths: np.ndarray, spaces: np.ndarray, rows: np.ndarray, capacity: int, first_new_row: int) -> Filled:
    """Lay documents over free spaces, then over new rows, cutting them where a row ends.

    :param lengths: ``(n,)`` tokens of each document, at least `MIN_PIECE`.
    :param spaces: ``(m,)`` free tokens at the end of the rows ``rows``, each at least `MIN_SPACE`.
    """
    capacity_needed = total(len(lengths), lambda block: lengths[block])
    new_rows = 2 * (-(-capacity_needed // capacity) + 1)  # more than enough; rows that stay empty have no piece
    spaces = joined([spaces, made(new_rows, np.int64, lambda _: capacity)], np.int64)
    rows = joined([rows, _numbers(new_rows, np.int64, first_new_row)], np.int64)
    borders = running_sum(spaces)
    order, starts = _lay(lengths, borders)
    return _cut(order, starts, lengths, borders, rows)


def _lay(lengths: np.ndarray, borders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order of the documents and the place where each starts, such that no cut leaves a piece of one token.

    That is: no document starts or ends one token before or after a border. Where one would, the next documents are
    tried in its place; if none of them will do, a few places before it are left free.
    """
    order = _numbers(len(lengths), np.int64)
    starts = joined([np.zeros(1), running_sum(lengths)], np.int64)
    at = 0
    while (bad := _first_bad(starts, borders, at)) is not None:
        at = bad - 1  # the document that ends at the bad place
        candidates = order[at : at + SWAP_CANDIDATES]
        ends = starts[at] + lengths[candidates]
        good = np.flatnonzero(~_touches(ends, borders))
        if len(good):
            order[[at, at + good[0]]] = order[[at + good[0], at]]
            last = at + int(good[0]) + 1
            starts[at + 1 : last + 1] = starts[at] + np.cumsum(lengths[order[at:last]])
            at += 1
        else:
            _leave_free(starts, borders, at)
    return order, starts[:-1]


def _first_bad(starts: np.ndarray, borders: np.ndarray, at: int, window: int = 4096) -> int | None:
    """The first document boundary from ``at`` on that is one token off a border; boundary 0 never is."""
    for low in range(max(at, 1), len(starts), window):
        bad = np.flatnonzero(_touches(starts[low : low + window], borders))
        if len(bad):
            return low + int(bad[0])
    return None


def _touches(places: np.ndarray, borders: np.ndarray) -> np.ndarray:
    """Which places are exactly one token before or after a border (or after 0)."""
    after = np.searchsorted(borders, places)
    following = borders[np.minimum(after, len(borders) - 1)]
    previous = np.where(after > 0, borders[np.maximum(after - 1, 0)], 0)
    return (following - places == 1) | (places - previous == 1)


def _leave_free(starts: np.ndarray, borders: np.ndarray, at: int) -> None:
    """Move document ``at`` and all after it by the fewest places that free both its ends from the borders."""
    ends = starts[at : at + 2]
    shift = next(shift for shift in itertools.count(1) if not _touches(ends + shift, borders).any())
    starts[at:] += shift


def _cut(order: np.ndarray, starts: np.ndarray, lengths: np.ndarray, borders: np.ndarray, rows: np.ndarray) -> Filled:
    """Cut every document at the borders inside it."""

    def pieces(block: Block) -> np.ndarray:
        """Those of some documents: ``(m, 4)`` document, start, length, row."""
        start, number_of = starts[block], order[block]
        end = start + lengths[number_of]
        first_border = np.searchsorted(borders, start, side="right")
        num_cuts = np.searchsorted(borders, end, side="left") - first_border
        of = np.repeat(np.arange(len(start)), num_cuts + 1)
        number = np.arange(len(of)) - np.repeat(np.cumsum(num_cuts + 1) - num_cuts - 1, num_cuts + 1)
        row = first_border[of] + number
        low = np.where(number == 0, start[of], borders[row - 1])
        high = np.where(number == num_cuts[of], end[of], borders[row])
        return np.stack([number_of[of], low - start[of], high - low, rows[row]], axis=1)

    found = joined((pieces(block).ravel() for block in blocks(len(order))), np.int64).reshape(-1, 4)

    def column(which: int, dtype: type) -> np.ndarray:
        return made(len(found), dtype, lambda block: found[block, which])

    return Filled(column(0, np.int64), column(1, np.int32), column(2, np.int32), column(3, np.int32))


def _numbers(count: int, dtype: type, first: int = 0) -> np.ndarray:
    return made(count, dtype, lambda block: np.arange(first + block.start, first + block.stop))


def split_evenly(length: int, capacity: int) -> list[tuple[int, int]]:
    """Parts (start, length) of an example longer than a row, each of at most ``capacity`` and at least `MIN_PIECE`."""
    parts = [(start, min(capacity, length - start)) for start in range(0, length, capacity)]
    if len(parts) > 1 and parts[-1][1] < MIN_PIECE:
        start = parts[-2][0]
        parts[-2:] = [(start, capacity - 1), (start + capacity - 1, MIN_PIECE)]
    return parts
