"""Plans from in-memory examples, for tests of whatever reads a plan; written by the product's own writers.

plan_dir = write_plan(tmp_path, [example([1, 2], [3, 4]), example([], [5, 6, 7])], max_seq_length=8)
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep import store
from data_prep.plan.ledger import LEDGER_FILE
from data_prep.plan.plan_file import Rows, rows_file, write_rows
from data_prep.plan.reader import target_ranges
from data_prep.tokens.token_shard import TOKENS_FILE, TokenShard, write_shard

Example = tuple[list[int], list[int]]  # ids, run lengths alternating masked and target
Segment = tuple[int, int, int]  # example, start, length


def example(*segments: Sequence[int]) -> Example:
    """An example from alternating masked and target ids: ``example(prompt, answer, next_prompt, next_answer)``."""
    return [token for segment in segments for token in segment], [len(segment) for segment in segments]


def write_plan(
    root: Path,
    examples: list[Example],
    *,
    max_seq_length: int,
    rows: list[list[Segment]] | None = None,
    validation: list[list[Segment]] | None = None,
    example_sources: list[int] | None = None,
    sources: list[str] | None = None,
    pad_id: int = 0,
) -> Path:
    """Write one token shard and a plan over it below ``root``; returns the plan directory.

    Without ``rows`` every example is a training row of its own. A segment is (example, start, length).
    """
    rows = [[(i, 0, len(ids))] for i, (ids, _) in enumerate(examples)] if rows is None else rows
    of_example = example_sources or [0] * len(examples)
    shard = make_shard(examples)
    content = repr((examples, rows, validation, max_seq_length, of_example))
    tokens = store.build(root / "tokens", store.fingerprint(examples=repr(examples)), lambda d: _save(d, shard)).path

    def make(directory: Path) -> dict:
        for split, split_rows in (("train", rows), ("validation", validation or [])):
            write_rows(directory / rows_file(split), make_rows(shard, split_rows, of_example))
        _write_ledger(directory / LEDGER_FILE, len(examples))
        return {"max_seq_length": max_seq_length, "pad_id": pad_id, "sources": sources or ["instruction"],
                "shards": [f"../../tokens/{tokens.name}"]}  # fmt: skip

    return store.build(root / "plans", store.fingerprint(content=content), make).path


def make_shard(examples: list[Example]) -> TokenShard:
    """Examples as the flat arrays of a shard."""
    return TokenShard(
        ids=np.array([token for ids, _ in examples for token in ids], dtype=np.int32),
        offsets=np.cumsum([0, *(len(ids) for ids, _ in examples)], dtype=np.int64),
        spans=np.array([run for _, runs in examples for run in runs], dtype=np.int32),
        span_offsets=np.cumsum([0, *(len(runs) for _, runs in examples)], dtype=np.int32),
    )


def make_rows(shard: TokenShard, rows: list[list[Segment]], of_example: list[int]) -> Rows:
    """Literal rows as the flat arrays of a plan file."""
    segments = [segment for row in rows for segment in row]
    offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int32)
    targets = [sum(high - low for low, high in target_ranges(shard.runs(e), start, n)) for e, start, n in segments]

    def column(values: list[int], dtype: type) -> np.ndarray:
        return np.array(values, dtype=dtype)

    return Rows(
        row_offsets=offsets,
        shard=np.zeros(len(segments), dtype=np.int32),
        example=column([e for e, _, _ in segments], np.int32),
        start=column([start for _, start, _ in segments], np.int32),
        length=column([n for _, _, n in segments], np.int32),
        source=column([of_example[e] for e, _, _ in segments], np.int8),
        tokens=column([sum(n for _, _, n in row) for row in rows], np.int32),
        target_tokens=column([sum(targets[a:b]) for a, b in pairwise(offsets)], np.int32),
    )


def _save(directory: Path, shard: TokenShard) -> dict:
    write_shard(directory / TOKENS_FILE, shard)
    return {"examples": shard.num_examples}


def _write_ledger(path: Path, num_examples: int) -> None:
    table = pa.table({
        "file": pa.array(["memory.json"] * num_examples).dictionary_encode(),
        "line": pa.array(range(1, num_examples + 1), pa.int64()),
        "hash": pa.array([number.to_bytes(16, "big") for number in range(num_examples)], pa.binary(16)),
        "shard": pa.array([0] * num_examples, pa.int32()),
        "example": pa.array(range(num_examples), pa.int32()),
    })  # fmt: skip
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
