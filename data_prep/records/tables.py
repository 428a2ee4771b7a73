"""Tables -> blocks of records: Parquet files and Arrow IPC files, a row being a record and its columns the fields.

In: a `Piece` of a file. Out: `Block`s whose records are dicts, as a reader of the user gives them; a null is an absent
field. A row has a number (`line`, from 1) but no bytes of its own, so its offset is -1. Rows come in batches of 4 MiB.

A large Parquet file is cut where a row group of its own begins, a large Arrow file at its record batches, into parts of
at least `PART_BYTES` uncompressed. A part is a range of bytes of the file, as with JSON; what it needs of the rest, the
schema, is part of it by its hash (``opening``). An Arrow file with dictionaries is read as one. The two forms of Arrow,
file and stream, are told apart by the first bytes: `datasets` writes streams.
Cost: 60-150 MB/s of text a core; memory some MiB beside the largest page of Parquet, whatever the size of the file.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_prep.errors import CorpusError
from data_prep.records.reasons import Reason
from data_prep.records.source import Block, Piece

PART_BYTES = 16 << 20
BATCH_BYTES = 4 << 20
MAX_BATCH_ROWS = 16_384
MAGIC = b"ARROW1\x00\x00"
DAMAGED = (pa.ArrowException, OSError, ValueError)


def cut_table(whole: Piece, size: int) -> list[Piece]:
    """The parts of a Parquet or Arrow file of so many bytes.

    :raises CorpusError: it is damaged, or no such file.
    """
    local, _, _ = whole.here()
    try:
        starts, schema = _row_groups(local) if whole.form == "parquet" else _record_batches(local)
    except DAMAGED as error:
        raise _unreadable(whole, error) from error
    if len(starts) < 2:
        return [whole]
    opening = xxhash.xxh3_128_digest(schema.serialize().to_pybytes())
    return [
        replace(whole, start=start, stop=stop, opening=opening, first=start == 0, last=stop == size)
        for start, stop in pairwise([0, *starts[1:], size])
    ]


def read_table(piece: Piece) -> Iterator[Block]:
    """All rows of a piece, in order.

    :raises CorpusError: the file is damaged. How many rows are lost with it is not known, so the run stops.
    """
    row = 1
    local, _, _ = piece.here()
    try:
        batches = _parquet_batches(piece, local) if piece.form == "parquet" else _arrow_batches(piece, local)
        for batch in filter(len, batches):
            yield _block(batch, row)
            row += batch.num_rows
    except DAMAGED as error:
        raise _unreadable(piece, error, row) from error


def _unreadable(piece: Piece, error: Exception, row: int = 0) -> CorpusError:
    where = f" after row {row - 1}" if row > 1 else ""
    return CorpusError(
        f"{piece.path}: not readable as {piece.form}{where}: {error}; write the file again, or take it away"
    )


def _row_groups(local: str) -> tuple[list[int], pa.Schema]:
    """Where parts of at least PART_BYTES begin, as offsets of bytes; the first is that of the first row group."""
    with pq.ParquetFile(local) as file:
        footer = file.metadata
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
        sizes = [(_first_byte(group), group.total_byte_size) for group in groups if group.num_rows]
        schema = file.schema_arrow
    in_order = all(before[0] < after[0] for before, after in pairwise(sizes))
    return (_parts(sizes) if in_order else []), schema


def _first_byte(group: Any) -> int:
    chunks = (group.column(number) for number in range(group.num_columns))
    return min(
        min(at for at in (chunk.dictionary_page_offset, chunk.data_page_offset) if at is not None) for chunk in chunks
    )


def _parts(sizes: list[tuple[int, int]]) -> list[int]:
    starts, size = [], PART_BYTES
    for start, more in sizes:
        if size >= PART_BYTES:
            starts.append(start)
            size = 0
        size += more
    return starts


def _parquet_batches(piece: Piece, local: str) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(local, buffer_size=1 << 20) as file:  # a buffer, so that a column is not read as a whole
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            if not group.num_rows or not _is_in(piece, _first_byte(group)):
                continue
            rows = BATCH_BYTES * group.num_rows // max(group.total_byte_size, 1)
            yield from file.iter_batches(min(max(rows, 1), MAX_BATCH_ROWS), [number])


def _is_in(piece: Piece, start: int) -> bool:
    return piece.start <= start and (piece.stop is None or start < piece.stop)


def _record_batches(local: str) -> tuple[list[int], pa.Schema]:
    """The same of an Arrow file; only the heads of its messages are read."""
    with pa.memory_map(local) as stream:
        _pass_magic(stream)
        schema = pa.ipc.read_schema(stream)
        sizes, start = [], stream.tell()
        for message in _messages(stream):
            if message.type == "dictionary":
                return [], schema
            sizes.append((start, stream.tell() - start))
            start = stream.tell()
    return _parts(sizes), schema


def _messages(stream: pa.NativeFile) -> Iterator[pa.Message]:
    """Up to the end that the stream states. A stream may also end with the file, where its writer was not closed."""
    while True:
        try:
            yield pa.ipc.read_message(stream)
        except EOFError:
            return


def _pass_magic(stream: pa.NativeFile) -> None:
    """The file form is the stream form between a magic and a table of contents."""
    if stream.read(len(MAGIC)) != MAGIC:
        stream.seek(0)


def _arrow_batches(piece: Piece, local: str) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(local) as stream:
        _pass_magic(stream)
        for batch in _whole_stream(stream) if piece.first and piece.last else _part_of_stream(stream, piece):
            rows = min(max(BATCH_BYTES * batch.num_rows // max(batch.nbytes, 1), 1), MAX_BATCH_ROWS)
            for start in range(0, batch.num_rows, rows):
                yield batch.slice(start, rows)


def _whole_stream(stream: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    yield from pa.ipc.open_stream(stream)


def _part_of_stream(stream: pa.NativeFile, piece: Piece) -> Iterator[pa.RecordBatch]:
    schema = pa.ipc.read_schema(stream)
    stream.seek(max(piece.start, stream.tell()))
    for message in _messages(stream):
        yield pa.ipc.read_record_batch(message, schema)
        if piece.stop is not None and stream.tell() >= piece.stop:
            return


def _block(batch: pa.RecordBatch, first_row: int) -> Block:
    count = batch.num_rows
    faults: dict[int, Reason] = {}
    columns = [_values(column, faults) for column in batch.columns]
    names = batch.schema.names
    records = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)] if columns else [{}] * count
    numbers = np.arange(first_row, first_row + count)
    return Block(records, np.full(count, -1), np.zeros(count, np.int64), numbers, faults)


def _values(column: pa.Array, faults: dict[int, Reason]) -> list:
    """A column as Python's values; a text that is not UTF-8, which Arrow lets through, is a fault of its row."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        return column.to_numpy(zero_copy_only=False).tolist() if is_text else column.to_pylist()
    except (UnicodeDecodeError, pa.ArrowException):
        values: list[Any] = []
        for number in range(len(column)):
            try:
                values.append(column[number].as_py())
            except UnicodeDecodeError:
                faults[number] = Reason.INVALID_UTF8
                values.append(None)
        return values
