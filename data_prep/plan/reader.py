"""From the rows of a pack plan to batches of arrays: the read side that training uses.

In: a plan directory. Out: `Batch` of numpy arrays. A row of two segments (a prompt "A B" with target "C D </s>", then a
document "X Y" of which every token is a target) padded to 9::

    input_ids     A    B   C   D  </s>   X    Y   pad  pad
    labels      -100 -100  C   D  </s> -100   Y  -100 -100
    position_ids  0    1   2   3    4    0    1    0    1
    sources       0    0   0   0    0    1    1   -1   -1

Labels are unshifted, as in Hugging Face; the first token of every segment is never a target, because nothing before it
may predict it. Positions restart at every segment; padding is one more segment, known by position and not by id.
Cost: about 50 us a row of 2,048 tokens; memory is the mapped files' pages. Opening checks the sizes of all files.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from data_prep import store
from data_prep.errors import StoreError
from data_prep.plan.ledger import Ledger, open_ledger
from data_prep.plan.plan_file import Rows, open_rows, rows_file
from data_prep.tokens.checks import SAMPLE, spread
from data_prep.tokens.token_shard import TOKENS_FILE, TokenShard, open_shard

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """A micro-batch; T is the length of its longest row."""

    input_ids: np.ndarray  # (B, T) int64
    labels: np.ndarray  # (B, T) int64, -100 where the token is no target
    position_ids: np.ndarray  # (B, T) int64
    sources: np.ndarray  # (B, T) int8, -1 for padding


@dataclass(frozen=True)
class Plan:
    """The rows of one split of a plan. Shards are mapped when first touched."""

    path: Path
    manifest: dict
    rows: Rows
    _shards: dict[int, TokenShard] = field(default_factory=dict, repr=False)

    @property
    def num_rows(self) -> int:
        return self.rows.num_rows

    @property
    def sources(self) -> list[str]:
        return self.manifest["sources"]

    @property
    def row_tokens(self) -> np.ndarray:
        """Tokens of each row without padding: ``(num_rows,) int32``."""
        return self.rows.tokens

    @property
    def row_target_tokens(self) -> np.ndarray:
        """Labels of each row that are not -100: ``(num_rows,) int32``."""
        return self.rows.target_tokens

    def batch(self, rows: np.ndarray) -> Batch:
        """Assemble rows, ``(B,) int64``; -1 is an all-padding row."""
        width = max([1, *(int(self.rows.tokens[row]) for row in rows if row >= 0)])
        shape = (len(rows), width)
        batch = Batch(
            input_ids=np.full(shape, self.manifest["pad_id"], dtype=np.int64),
            labels=np.full(shape, IGNORED, dtype=np.int64),
            position_ids=np.zeros(shape, dtype=np.int64),
            sources=np.full(shape, -1, dtype=np.int8),
        )
        for line, row in enumerate(rows):
            end = self._fill(batch, line, int(row)) if row >= 0 else 0
            batch.position_ids[line, end:] = np.arange(width - end)
        return batch

    def origins(self, row: int) -> list[tuple[str, int]]:
        """(file, line) of the record behind each segment of a row, for messages; reads the ledger."""
        rows = self.rows
        segments = range(rows.row_offsets[row], rows.row_offsets[row + 1])
        return [self.ledger.origin(int(rows.shard[one]), int(rows.example[one])) for one in segments]

    def _fill(self, batch: Batch, line: int, row: int) -> int:
        """Write the segments of a row into one line of the batch; returns the tokens written."""
        rows, at = self.rows, 0
        for segment in range(rows.row_offsets[row], rows.row_offsets[row + 1]):
            shard, example = self._shard(int(rows.shard[segment])), int(rows.example[segment])
            start, length = int(rows.start[segment]), int(rows.length[segment])
            begin, end = int(shard.offsets[example]) + start, at + length
            batch.input_ids[line, at:end] = shard.ids[begin : begin + length]
            batch.position_ids[line, at:end] = np.arange(length)
            batch.sources[line, at:end] = rows.source[segment]
            for low, high in target_ranges(shard.runs(example), start, length):
                batch.labels[line, at + low : at + high] = batch.input_ids[line, at + low : at + high]
            at = end
        return at

    def _shard(self, index: int) -> TokenShard:
        if index not in self._shards:
            directory = (self.path / self.manifest["shards"][index]).resolve()
            store.open_manifest(directory)
            self._shards[index] = open_shard(directory / TOKENS_FILE)
        return self._shards[index]

    @cached_property
    def ledger(self) -> Ledger:
        """What became of every record; mapped when first asked."""
        return open_ledger(self.path)


def open_plan(plan_dir: Path, split: Literal["train", "validation"]) -> Plan:
    """Map the rows of one split; StoreError if the plan is damaged or of another format version."""
    plan_dir = Path(plan_dir).resolve()
    return Plan(plan_dir, store.open_manifest(plan_dir), open_rows(plan_dir / rows_file(split)))


def target_ranges(runs: np.ndarray, start: int, length: int) -> list[tuple[int, int]]:
    """Targets of the segment ``[start, start + length)`` of an example, relative to the segment, as [low, high).

    The first token of a segment is never one. Runs [2, 3] (two masked, three targets), start 0, length 4: [(2, 4)].
    """
    ends = np.cumsum(runs) - start
    ranges = []
    for run in range(1, len(runs), 2):
        low, high = max(int(ends[run - 1]), 1), min(int(ends[run]), length)
        if low < high:
            ranges.append((low, high))
    return ranges


def prove_rows(plan: Plan) -> int:
    """Read `SAMPLE` rows of a plan as training will and compare them with what the plan says of them.

    :returns: the number of rows read.
    :raises StoreError: a row differs.
    """
    for row in spread(np.arange(plan.num_rows)).tolist():
        batch = plan.batch(np.array([row]))
        targets = batch.labels != IGNORED
        found = (batch.labels.shape[1], int(targets.sum()))
        if found != (plan.row_tokens[row], plan.row_target_tokens[row]):
            said = (int(plan.row_tokens[row]), int(plan.row_target_tokens[row]))
            raise StoreError(f"row {row} of the plan has {said} tokens and targets; read back it has {found}")
        if (batch.labels[targets] != batch.input_ids[targets]).any() or targets[batch.position_ids == 0].any():
            raise StoreError(f"row {row} of the plan has a wrong label")
    return min(SAMPLE, plan.num_rows)
