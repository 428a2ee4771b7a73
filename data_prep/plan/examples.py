"""All examples of a corpus as arrays, in corpus order: what a plan is made from.

In: `TokensResult`. Out: `Examples`, one entry per valid record of every unit. No token is read, only lengths and runs.
Cost: 0.15 us an example and 54 bytes, which of a large corpus are not in memory but in mapped files.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from data_prep.plan import columns
from data_prep.plan.columns import blocks
from data_prep.records.build_unit import RECORDS_FILE
from data_prep.records.shard import read_arrow
from data_prep.tokens.token_shard import TOKENS_FILE, TokenShard, open_shard
from data_prep.tokens.tokenize import TokensResult, TokensUnit, place_of


@dataclass(frozen=True)
class Examples:
    """Arrays over the n examples of the corpus. The runs of example ``i`` are ``runs[run_offsets[i]:...[i + 1]]``."""

    units: list[TokensUnit]
    sources: list[str]
    shard: np.ndarray  # (n,) int32, position of the unit in the corpus
    number: np.ndarray  # (n,) int32, example inside its shard
    source: np.ndarray  # (n,) int8, index into sources
    pretraining: np.ndarray  # (n,) bool
    hashes: np.ndarray  # (n, 16) uint8 of the normalised record
    lengths: np.ndarray  # (n,) int32 tokens
    runs: np.ndarray  # (num_runs,) int32
    run_offsets: np.ndarray  # (n + 1,) int64
    refused: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """``(m,)`` positions of those that the template cannot express."""

    def __len__(self) -> int:
        return len(self.shard)

    @cached_property
    def keys(self) -> np.ndarray:
        """The first 8 bytes of each hash: ``(n,) uint64``, uniform and a function of the content alone."""
        return np.ascontiguousarray(self.hashes).view(np.uint64).reshape(-1, 2)[:, 0]

    @cached_property
    def targets(self) -> np.ndarray:
        """Labels of each example put into a row whole: ``(n,) int32``."""
        targets = columns.zeros(len(self), np.int32)
        for block in blocks(len(self)):
            offsets = self.run_offsets[block.start : block.stop + 1]
            runs = self.runs[offsets[0] : offsets[-1]]
            own = offsets - offsets[0]
            odd = (np.arange(len(runs)) - np.repeat(own[:-1], np.diff(own))) % 2 == 1
            sums = np.concatenate([[0], np.cumsum(np.where(odd, runs, 0), dtype=np.int64)])
            all_targets = sums[own[1:]] - sums[own[:-1]]
            targets[block] = all_targets - ((self.prompt[block] == 0) & (all_targets > 0))
        return targets

    @cached_property
    def prompt(self) -> np.ndarray:
        """Masked tokens before the first target of each example: ``(n,) int32``; 0 without runs."""
        prompt = columns.zeros(len(self), np.int32)
        for block in blocks(len(self)):
            offsets = self.run_offsets[block.start : block.stop + 1]
            has_runs = np.flatnonzero(np.diff(offsets) > 0)
            prompt[block.start + has_runs] = self.runs[offsets[has_runs]]
        return prompt

    def place(self, example: int) -> str:
        """``file:line`` of the record of an example, for messages."""
        return place_of(self.units[self.shard[example]].records, int(self.number[example]))

    def targets_of(self, example: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        """Labels of segments, all ``(m,)``: their target tokens but for the first of the segment."""
        first = np.minimum(start + 1, start + length)
        return self._targets_before(example, start + length) - self._targets_before(example, first)

    def _targets_before(self, example: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Target tokens among the first ``position`` tokens of each example."""
        first = self.run_offsets[example]
        count = self.run_offsets[example + 1] - first
        result = np.zeros(len(example), dtype=np.int64)
        left = position.astype(np.int64)
        active = np.flatnonzero(count > 0)
        number = 0
        while len(active):  # once per run of the longest example: 2 for a pair, 2 per turn of a chat
            run = self.runs[first[active] + number]
            inside = np.minimum(run, left[active])
            result[active] += inside * (number % 2)
            left[active] -= inside
            number += 1
            active = active[(count[active] > number) & (left[active] > 0)]
        return result


def load_examples(tokens: TokensResult) -> Examples:
    """Gather what a plan needs of every unit."""
    units = tokens.units
    sources = list(dict.fromkeys(unit.records.source for unit in units))
    count = sum(unit.examples for unit in units)
    shard, number, lengths = (columns.zeros(count, np.int32) for _ in range(3))
    source, pretraining = columns.zeros(count, np.int8), columns.zeros(count, np.bool_)
    hashes, run_offsets = columns.zeros(16 * count, np.uint8).reshape(-1, 16), columns.zeros(count + 1, np.int64)
    first = 0
    for index, unit in enumerate(units):
        tokens_of = open_shard(Path(unit.path) / TOKENS_FILE)
        mine = slice(first, first := first + tokens_of.num_examples)
        shard[mine], number[mine], lengths[mine] = index, np.arange(tokens_of.num_examples), tokens_of.lengths
        source[mine], pretraining[mine] = sources.index(unit.records.source), unit.records.kind == "pretraining"
        hashes[mine] = _hashes(unit.records.path)
        run_offsets[mine.start + 1 : mine.stop + 1] = run_offsets[mine.start] + tokens_of.span_offsets[1:]
    runs = columns.joined((_runs(open_shard(Path(unit.path) / TOKENS_FILE)) for unit in units), np.int32)
    refused = columns.joined(_refused(units), np.int64)
    return Examples(units, sources, shard, number, source, pretraining, hashes, lengths, runs, run_offsets, refused)


def _refused(units: list[TokensUnit]) -> Iterator[np.ndarray]:
    first = 0
    for unit in units:
        yield first + np.array(unit.refused, np.int64)
        first += unit.examples


def _hashes(unit_path: str) -> np.ndarray:
    column = read_arrow(Path(unit_path) / RECORDS_FILE)["hash"]
    parts = [
        np.frombuffer(chunk.buffers()[1], dtype=np.uint8).reshape(-1, 16)[chunk.offset : chunk.offset + len(chunk)]
        for chunk in column.chunks
    ]
    return np.concatenate([np.zeros((0, 16), np.uint8), *parts])


def _runs(shard: TokenShard) -> np.ndarray:
    return shard.spans[: shard.span_offsets[-1]]
