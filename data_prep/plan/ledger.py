"""The ledger of a plan: what became of every input record, and the way from a record to its bytes, texts and tokens.

In: a plan directory. Out: `Ledger`, a memory-mapped Arrow table, a row per input record in corpus order (`build` tells
its columns), and the questions that are asked of it. Cost: pages of the file; a question is one pass over
the columns it needs, a second for a million records at most.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep import store
from data_prep.errors import PandaError
from data_prep.records.build_unit import RECORDS_FILE
from data_prep.records.shard import read_arrow

LEDGER_FILE = "ledger.arrow"
MAX_FOUND = 20
"""Records that one FILE:LINE may mean: an array of short ones on one line."""


class LedgerEntry(TypedDict):
    """A row of the ledger; `data_prep.plan.build` says what the columns mean."""

    file: str
    line: int
    offset: int
    length: int
    hash: bytes | None
    source: str
    split: str | None
    verdict: str
    reason: str | None
    tokens: int
    target_tokens: int
    copies: int
    cut_tokens: int
    shard: int
    example: int


@dataclass(frozen=True)
class Ledger:
    """The ledger of one plan."""

    plan_dir: Path
    manifest: dict[str, Any]
    table: pa.Table

    def entry(self, index: int) -> LedgerEntry:
        """One row as plain values."""
        return self.table.slice(index, 1).to_pylist()[0]

    def files(self) -> list[str]:
        """The files of the corpus, each once."""
        return self.table["file"].cast(pa.string()).unique().to_pylist()

    def accepted(self, split: str | None = None) -> pa.Table:
        """The records that are in the rows of a split, or of any."""
        mine = pc.equal(self.table["verdict"], "accepted")
        return self.table.filter(mine if split is None else pc.and_(mine, pc.equal(self.table["split"], split)))

    def with_hash(self, content: bytes) -> pa.Table:
        """The records of one content, 16 bytes; the first of them is the one that is kept."""
        return self.table.filter(pc.equal(self.table["hash"], pa.scalar(content, pa.binary(16))))

    def origin(self, shard: int, example: int) -> tuple[str, int]:
        """(file, line) of the record an example was made from."""
        entry = self.entry_of(shard, example)
        return entry["file"], entry["line"]

    def entry_of(self, shard: int, example: int) -> LedgerEntry:
        """The row of the record an example was made from."""
        mine = pc.and_(
            pc.equal(self.table["shard"], pa.scalar(shard, pa.int32())),
            pc.equal(self.table["example"], pa.scalar(example, pa.int32())),
        )
        return self.table.filter(mine).to_pylist()[0]

    def at(self, place: str) -> list[int]:
        """Rows of the records that start on a line, given as FILE:LINE; FILE may be the end of a path.

        :raises PandaError: no such file or line in this corpus.
        """
        file, _, line = place.rpartition(":")
        if not file or not line.isdigit():
            raise PandaError(f"why: {place!r} is not FILE:LINE, such as dataset/instruction_tuning/a.jsonl:42")
        names = [name for name in self.files() if _ends_with(name, file)]
        if not names:
            raise PandaError(f"why: no file {file!r} in this corpus")
        mine = pc.is_in(self.table["file"].cast(pa.string()), pa.array(names)).to_numpy()
        lines = self.table["line"].to_numpy()
        found = np.flatnonzero(mine & (lines == int(line)))
        if not len(found):  # inside a record of several lines
            before = np.flatnonzero(mine & (lines < int(line)))
            found = before[lines[before] == lines[before].max()] if len(before) else before
        if not len(found):
            raise PandaError(f"why: no record at {place}; {names[0]} has records from line {lines[mine].min()} on")
        return found[:MAX_FOUND].tolist()

    def tokens_dir(self, shard: int) -> Path:
        """The directory of a token shard."""
        return (self.plan_dir / self.manifest["shards"][shard]).resolve()

    def records_dir(self, shard: int) -> Path:
        """The unit of records that a token shard was made from."""
        tokens = self.tokens_dir(shard)
        return tokens.parent.parent / "records" / store.open_manifest(tokens)["records"]

    def read_texts(self, entries: Iterable[LedgerEntry]) -> tuple[pa.ListArray, pa.ListArray]:
        """Roles and texts of valid records, given as rows with `shard` and `example`, in their order."""
        tables: dict[int, pa.Table] = {}
        roles, texts = [], []
        for entry in entries:
            if entry["shard"] not in tables:
                tables[entry["shard"]] = read_arrow(self.records_dir(entry["shard"]) / RECORDS_FILE)
            record = tables[entry["shard"]].slice(entry["example"], 1)
            roles.append(record["roles"][0].as_py())
            texts.append(record["texts"][0].as_py())
        return pa.array(roles, pa.list_(pa.int8())), pa.array(texts, pa.list_(pa.large_string()))


def open_ledger(plan_dir: Path) -> Ledger:
    """Map the ledger of a plan; StoreError if the plan is damaged or of another format version."""
    plan_dir = Path(plan_dir).resolve()
    return Ledger(plan_dir, store.open_manifest(plan_dir), read_arrow(plan_dir / LEDGER_FILE))


def write_ledger(directory: Path, tables: Iterable[pa.Table]) -> None:
    """Write the ledger of a plan that is being made, one table after another; all have the same dictionaries."""
    parts = iter(tables)
    first = next(parts)
    with pa.OSFile(str(directory / LEDGER_FILE), "wb") as sink, pa.ipc.new_file(sink, first.schema) as writer:
        for table in chain([first], parts):
            writer.write_table(table)


def hex_hashes(column: pa.ChunkedArray) -> list[str | None]:
    """Hashes, 16 bytes each, as 32 hex digits."""
    return [None if value is None else value.hex() for value in column.to_pylist()]


def records_with(directory: Path, text: str) -> np.ndarray:
    """Numbers of the valid records of a unit that contain a text: ``(n,) int64``, ascending."""
    numbers, first = [np.zeros(0, np.int64)], 0
    for chunk in read_arrow(directory / RECORDS_FILE)["texts"].chunks:
        hits = np.flatnonzero(pc.match_substring(chunk.values, text).to_numpy(zero_copy_only=False))
        numbers.append(first + np.searchsorted(chunk.offsets.to_numpy(), hits, side="right") - 1)
        first += len(chunk)
    return np.unique(np.concatenate(numbers))


def _ends_with(name: str, file: str) -> bool:
    wanted = Path(file).parts
    return Path(name).parts[-len(wanted) :] == wanted or Path(name) == Path(file).absolute()
