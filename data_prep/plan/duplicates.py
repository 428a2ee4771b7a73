"""Which records repeat an earlier one: exactly (by content hash), or nearly (MinHash over 5-character shingles).

In: hashes or signatures of texts in corpus order. Out: a mask, True for a record to drop; the first of equals is always
kept, so the verdict on a record never changes when files are added behind it.
Cost: exact 0.1 us a record, in numpy. Near: 0.25 ms a record of 700 characters for its signature, which any process can
make (`sketch`), 0.05 ms for the comparison, which is one after another; 3 KB of memory.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from data_prep.errors import CorpusError
from data_prep.plan import columns
from data_prep.plan.columns import blocks
from data_prep.plan.order import stable_argsort

SHINGLE_CHARACTERS = 5
NUM_PERMUTATIONS = 128


def exact_duplicates(hashes: np.ndarray) -> np.ndarray:
    """``hashes`` (n, 16) uint8 -> (n,) bool, True where an earlier row is equal."""
    high, low = _halves(hashes)
    order = stable_argsort(high)  # equal hashes stay in corpus order
    result, odd = columns.zeros(len(hashes), np.bool_), []
    for block in blocks(len(order) - 1):
        first, second = order[block], order[block.start + 1 : block.stop + 1]
        same_high, same_low = high[first] == high[second], low[first] == low[second]
        result[second[same_high & same_low]] = True
        odd += (block.start + np.flatnonzero(same_high & ~same_low)).tolist()
    for place in odd:  # first halves alone collide once in 10**8 corpora of a million
        _mark_equal_in_both(result, order, high, low, place)
    return result


def _mark_equal_in_both(result: np.ndarray, order: np.ndarray, high: np.ndarray, low: np.ndarray, place: int) -> None:
    """Among all that have the first half of the one at a place."""
    first = last = place
    while first and high[order[first - 1]] == high[order[place]]:
        first -= 1
    while last < len(order) and high[order[last]] == high[order[place]]:
        last += 1
    seen = set()
    for member in order[first:last].tolist():
        result[member] = low[member] in seen
        seen.add(low[member])


def _halves(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(n, 16) uint8`` -> two ``(n,) uint64``."""
    halves = np.ascontiguousarray(hashes).view(np.uint64).reshape(-1, 2)
    # each is made before `half` is the next one
    high, low = (columns.made(len(halves), np.uint64, lambda block: halves[block, half]) for half in (0, 1))  # noqa: B023
    return high, low


class Known:
    """Hashes to look others up in: a set of ``(m, 16) uint8`` that may be longer than memory."""

    def __init__(self, hashes: np.ndarray):
        high, low = _halves(hashes)
        order = stable_argsort(high)
        self.high, self.low = columns.taken(high, order), columns.taken(low, order)

    def holds(self, hashes: np.ndarray) -> np.ndarray:
        """Which rows of ``(n, 16) uint8`` are among them: ``(n,) bool``; n entries are in memory."""
        wanted = np.ascontiguousarray(hashes).view(np.uint64).reshape(-1, 2)
        found = np.zeros(len(wanted), bool)
        place = np.searchsorted(self.high, wanted[:, 0])
        left = np.flatnonzero(place < len(self.high))
        while len(left):  # once, but for equal first halves
            left = left[self.high[place[left]] == wanted[left, 0]]
            found[left] |= self.low[place[left]] == wanted[left, 1]
            place[left] += 1
            left = left[~found[left] & (place[left] < len(self.high))]
        return found


def sketch(texts: Iterable[str]) -> np.ndarray:
    """MinHash signatures of the sets of all 5-character shingles: ``(n, NUM_PERMUTATIONS) uint32``.

    :raises CorpusError: datasketch is not installed.
    """
    blank = _blank()
    signatures = [np.zeros((0, NUM_PERMUTATIONS), np.uint32)]
    for text in texts:
        one = blank.copy()
        one.update_batch(_shingles(text).tolist())
        signatures.append(one.hashvalues[None].astype(np.uint32))
    return np.concatenate(signatures)


def near_duplicates(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """(n,) bool, True where a kept earlier text has an estimated Jaccard similarity of at least ``threshold``.

    The similarity is estimated from 128 permutations (error about 0.04), of candidates found by locality-sensitive
    hashing; see http://infolab.stanford.edu/~ullman/mmds/ch3.pdf.
    """
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold=min(threshold, 0.9), num_perm=NUM_PERMUTATIONS)
    probe = _blank()
    result = np.zeros(len(signatures), bool)
    for number, signature in enumerate(signatures):
        probe.hashvalues = signature
        candidates = signatures[index.query(probe)]
        result[number] = ((candidates == signature).mean(axis=1) >= threshold).any()
        if not result[number]:
            index.insert(number, probe, check_duplication=False)
    return result


def _blank() -> Any:
    try:
        from datasketch import MinHash
    except ImportError:
        raise CorpusError(
            "deduplicate=near needs datasketch: pip install 'panda-train[near-duplicates]', or use deduplicate=exact"
        ) from None
    return MinHash(NUM_PERMUTATIONS, hashfunc=int)


def _shingles(text: str) -> np.ndarray:
    """The set of hashes of all runs of 5 characters, (m,) uint32; of a shorter text that of the text itself."""
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    width = min(SHINGLE_CHARACTERS, len(characters))
    count = len(characters) - width + 1 if width else 0
    hashes = np.zeros(count, np.uint32)
    for shift in range(width):
        hashes = (hashes ^ characters[shift : shift + count]) * np.uint32(0x9E3779B1)
        hashes ^= hashes >> np.uint32(15)
    return np.unique(hashes)
