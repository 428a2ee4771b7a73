"""The file of tokens: one Arrow row per example. Written by `tokenize`, mapped by the plan and the reader.

``tokens.arrow`` is one Arrow IPC file with one record batch, uncompressed, so that columns are views of the file::

    input_ids  large_list<int32>   ids of the example
    spans      list<int32>         run lengths, alternating masked and target: sum == len(input_ids)

    an example "<s> 1 + 1 = | 2 </s>" whose last two tokens are targets:
    input_ids [1, 20, 30, 20, 31, 21, 2]     spans [5, 2]

A document whose every token is a target has spans ``[0, n]``. Cost of reading: a page fault per 4 KiB touched.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

TOKENS_FILE = "tokens.arrow"
SCHEMA = pa.schema([("input_ids", pa.large_list(pa.int32())), ("spans", pa.list_(pa.int32()))])


@dataclass(frozen=True)
class TokenShard:
    """Examples of one shard as flat arrays; example ``i`` is ``ids[offsets[i]:offsets[i + 1]]``."""

    ids: np.ndarray  # (num_tokens,) int32
    offsets: np.ndarray  # (num_examples + 1,) int64
    spans: np.ndarray  # (num_spans,) int32
    span_offsets: np.ndarray  # (num_examples + 1,) int32

    @property
    def num_examples(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example: ``(num_examples,) int32``."""
        return np.diff(self.offsets).astype(np.int32)

    def runs(self, example: int) -> np.ndarray:
        """Run lengths of one example, masked first: ``(num_runs,) int32``."""
        return self.spans[self.span_offsets[example] : self.span_offsets[example + 1]]

    def target_mask(self, example: int) -> np.ndarray:
        """Which tokens of one example are targets: ``(length,) bool``."""
        runs = self.runs(example)
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs)


def write_shard(path: Path, shard: TokenShard) -> None:
    """Write the arrays of a shard as ``tokens.arrow``, without copying a token."""
    ids = pa.LargeListArray.from_arrays(
        pa.array(shard.offsets, pa.int64()), pa.array(np.ascontiguousarray(shard.ids), pa.int32())
    )
    spans = pa.ListArray.from_arrays(pa.array(shard.span_offsets, pa.int32()), pa.array(shard.spans, pa.int32()))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(pa.record_batch([ids, spans], schema=SCHEMA))


def open_shard(path: Path) -> TokenShard:
    """Map a shard's file; nothing is read before it is touched."""
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    ids, spans = batch.column(0), batch.column(1)
    return TokenShard(
        ids=ids.values.to_numpy(), offsets=ids.offsets.to_numpy(), spans=spans.values.to_numpy(),
        span_offsets=spans.offsets.to_numpy(),
    )  # fmt: skip
