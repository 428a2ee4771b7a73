"""Which texts occur in what a plan trains on: whole, or nearly, whatever their case, spacing and punctuation.

In: texts (held-out records, neutral texts, questions of a benchmark), a plan. Out: for each text the training record
that holds most of it, as FILE:LINE, and which share of it that is. Texts are compared as UTF-8 without white space and
punctuation, in lower case and NFKC, by all runs of `RUN` bytes: 12 Chinese characters, or about 7 English words. A
shorter text has to be the same as a whole. Hashes are 64 bits of a rolling polynomial, so no text is kept.
Cost: one pass over the training records, at 6 MB a second of CPU. Memory: a block of records, the hashes of the texts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.plan.ledger import Ledger, open_ledger
from data_prep.records.build_unit import RECORDS_FILE
from data_prep.records.shard import read_arrow

RUN = 36
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)
_TABLE_BITS = 20
_WORDS = np.zeros(256, bool)
_WORDS[[*b"0123456789abcdefghijklmnopqrstuvwxyz", *range(128, 256)]] = True
_PUNCTUATION = ((0xE2, 0x80), (0xE3, 0x80))  # first bytes of the marks of English and Chinese that NFKC leaves


@dataclass(frozen=True)
class Overlap:
    """The training record that holds most of a text: where it is, and the share of the text's runs in it."""

    place: str
    share: float


@dataclass(frozen=True)
class _Runs:
    """Hashes of runs of many records, in their order; a record shorter than a run has one of itself."""

    hashes: np.ndarray  # (m,) uint64
    begin: np.ndarray  # (m,) int64, place among the bytes of all records
    starts: np.ndarray  # (records + 1,) int64, where each record begins there

    def records_of(self, which: np.ndarray) -> np.ndarray:
        """The records that some of the runs are in."""
        return np.searchsorted(self.starts, self.begin[which], side="right") - 1


def find(texts: list[str], plan_dir: Path) -> list[Overlap | None]:
    """For each text where most of it is among the training records of a plan; None: no run of it is."""
    wanted = _runs(pa.array(texts, pa.large_string()), np.arange(len(texts) + 1))
    order = np.argsort(wanted.hashes, kind="stable")
    hashes, owner = wanted.hashes[order], wanted.records_of(order)
    table = np.zeros(1 << _TABLE_BITS, bool)
    table[_slot(hashes)] = True
    total = np.bincount(owner, minlength=len(texts))
    best, where = np.zeros(len(texts), np.int64), np.full((len(texts), 2), -1)
    ledger = open_ledger(plan_dir)
    for shard, numbers, runs in _trained(ledger):
        maybe = np.flatnonzero(table[_slot(runs.hashes)])
        first, last = (np.searchsorted(hashes, runs.hashes[maybe], side) for side in ("left", "right"))
        hits = np.repeat(np.arange(len(maybe)), last - first)
        which = np.arange(len(hits)) - np.repeat(np.cumsum(last - first) - (last - first), last - first) + first[hits]
        pairs = np.unique(np.stack([runs.records_of(maybe)[hits], which]), axis=1)  # a run counts once in a record
        if not pairs.size:
            continue
        found, counts = np.unique(np.stack([owner[pairs[1]], pairs[0]]), axis=1, return_counts=True)
        for text, record, count in zip(*found.tolist(), counts.tolist(), strict=True):
            if count > best[text]:
                best[text], where[text] = count, (shard, numbers[record])
    return [
        Overlap(f"{file}:{line}", round(float(best[text] / total[text]), 4)) if best[text] else None
        for text, (file, line) in enumerate(ledger.origin(*one) if one[0] >= 0 else ("", 0) for one in where.tolist())
    ]


def _trained(ledger: Ledger) -> Iterator[tuple[int, np.ndarray, _Runs]]:
    """Shard, numbers of its training records and their runs, a block of records at a time."""
    mine = ledger.accepted("train").select(["shard", "example"])
    shards, examples = mine["shard"].to_numpy(), mine["example"].to_numpy()
    for shard in np.unique(shards).tolist():
        chosen, first = np.sort(examples[shards == shard]), 0
        for chunk in read_arrow(ledger.records_dir(shard) / RECORDS_FILE)["texts"].chunks:
            numbers = chosen[(chosen >= first) & (chosen < first + len(chunk))]
            if len(numbers):
                records = chunk.take(pa.array(numbers - first))
                yield shard, numbers, _runs(records.flatten(), records.offsets.to_numpy())
            first += len(chunk)


def _runs(texts: pa.Array, offsets: np.ndarray) -> _Runs:
    """The runs of records whose texts are ``texts[offsets[i] : offsets[i + 1]]``, joined."""
    plain = pc.utf8_lower(pc.utf8_normalize(texts, form="NFKC")).cast(pa.large_string())
    starts = np.frombuffer(plain.buffers()[1], np.int64)[plain.offset : plain.offset + len(plain) + 1]
    data = np.frombuffer(plain.buffers()[2] or b"", np.uint8)[starts[0] : starts[-1]]
    kept = np.flatnonzero(_is_word(data))
    ends = np.searchsorted(kept, starts[offsets - offsets[0]] - starts[0])
    values = data[kept].astype(np.uint64) + np.uint64(1)
    powers, inverses = _powers(_BASE, len(values)), _powers(_INVERSE, len(values) + 1)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values * powers)])
    lengths = np.diff(ends)
    long = lengths >= RUN
    begin = np.flatnonzero(_inside(ends, long, len(values)))
    short = np.flatnonzero(~long & (lengths > 0))
    whole = (sums[ends[short + 1]] - sums[ends[short]]) * inverses[ends[short]]
    hashes = np.concatenate([(sums[begin + RUN] - sums[begin]) * inverses[begin], whole])
    return _Runs(_mixed(hashes), np.concatenate([begin, ends[short]]), ends)


def _is_word(data: np.ndarray) -> np.ndarray:
    """Which bytes are of letters or digits."""
    words = _WORDS[data]
    for lead, second in _PUNCTUATION:
        mark = np.flatnonzero((data[:-2] == lead) & (data[1:-1] == second))
        words[np.concatenate([mark, mark + 1, mark + 2])] = False
    return words


def _inside(ends: np.ndarray, long: np.ndarray, length: int) -> np.ndarray:
    """Where a run may begin: in a record of that length, and so that it ends in it, ``(length,) bool``."""
    steps = np.zeros(length + 1, np.int64)
    np.add.at(steps, ends[:-1][long], 1)
    np.add.at(steps, ends[1:][long] - RUN + 1, -1)
    return np.cumsum(steps)[:length] > 0


def _powers(base: int, count: int) -> np.ndarray:
    """``base ** i`` modulo 2**64, ``(count,) uint64``."""
    factors = np.full(max(count, 1), base, dtype=np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)[:count]


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """The low bits of a polynomial depend on few characters; those of these on all."""
    hashes = (hashes ^ (hashes >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return hashes ^ (hashes >> np.uint64(32))


def _slot(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(64 - _TABLE_BITS)).astype(np.int64)
