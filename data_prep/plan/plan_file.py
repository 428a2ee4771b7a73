"""The file of a pack plan: one Arrow row per training row, an index that copies no tokens.

``plan-train.arrow`` and ``plan-validation.arrow`` are Arrow IPC files with one uncompressed record batch::

    tokens         int32   tokens of the row, at most max_seq_length
    target_tokens  int32   labels of the row that are not -100
    segments       list<struct<shard int32, example int32, start int32, length int32, source int8>>

    a row of two segments: example 7 of shard 0 whole, then the first 3 tokens of example 2 of shard 4
    segments [(0, 7, 0, 5, 1), (4, 2, 0, 3, 0)]    tokens 8

``shard`` indexes the ``shards`` of the plan's manifest (paths relative to the plan), ``source`` its ``sources``.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

_SEGMENT = pa.struct([("shard", pa.int32()), ("example", pa.int32()), ("start", pa.int32()), ("length", pa.int32()),
                      ("source", pa.int8())])  # fmt: skip
SCHEMA = pa.schema([("tokens", pa.int32()), ("target_tokens", pa.int32()), ("segments", pa.list_(_SEGMENT))])


@dataclass(frozen=True)
class Rows:
    """Training rows as flat arrays; row ``i`` is made of segments ``row_offsets[i]:row_offsets[i + 1]``."""

    row_offsets: np.ndarray  # (num_rows + 1,) int32
    shard: np.ndarray  # (num_segments,) int32
    example: np.ndarray  # (num_segments,) int32
    start: np.ndarray  # (num_segments,) int32
    length: np.ndarray  # (num_segments,) int32
    source: np.ndarray  # (num_segments,) int8
    tokens: np.ndarray  # (num_rows,) int32
    target_tokens: np.ndarray  # (num_rows,) int32

    @property
    def num_rows(self) -> int:
        return len(self.row_offsets) - 1

    def segments_of(self, shard: int, example: int) -> tuple[np.ndarray, np.ndarray]:
        """Segments of one example and the row that each is in: two ``(n,) int64``."""
        segments = np.flatnonzero((self.shard == shard) & (self.example == example))
        return segments, np.searchsorted(self.row_offsets, segments, side="right") - 1


def rows_file(split: str) -> str:
    """File name of a split's rows inside the plan directory."""
    return f"plan-{split}.arrow"


def write_rows(path: Path, rows: Rows) -> None:
    """Write the arrays as a plan file."""
    fields = [pa.array(getattr(rows, field.name), field.type) for field in _SEGMENT]
    segments = pa.ListArray.from_arrays(
        pa.array(rows.row_offsets, pa.int32()), pa.StructArray.from_arrays(fields, fields=list(_SEGMENT))
    )
    columns = [pa.array(rows.tokens, pa.int32()), pa.array(rows.target_tokens, pa.int32()), segments]
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(pa.record_batch(columns, schema=SCHEMA))


def open_rows(path: Path) -> Rows:
    """Map a plan file; columns are views of it."""
    tokens, target_tokens, segments = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0).columns
    fields = {field.name: segments.values.field(i).to_numpy() for i, field in enumerate(_SEGMENT)}
    return Rows(segments.offsets.to_numpy(), **fields, tokens=tokens.to_numpy(), target_tokens=target_tokens.to_numpy())
