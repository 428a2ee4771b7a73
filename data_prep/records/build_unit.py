"""One unit of records: reads its pieces, validates every record, writes the three files of `data_prep.records.shard`.

In: a `UnitSpec`. Out: a directory of the store, or a series of them where the text turns out to be more than 32 MiB
(a compressed file, a user's reader, an array that could not be cut), so that later stages can take one at a time.
Cost: 80-120 MB/s; what can be done per block of 4 MiB is; a record costs its decoding, its checks and its hash.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from data_prep import store
from data_prep.errors import CorpusError
from data_prep.processes import peak_rss_bytes
from data_prep.records.csv_rows import DELIMITERS, read_csv
from data_prep.records.files import UnitSpec
from data_prep.records.json_stream import MAX_RECORD_BYTES, read_blocks
from data_prep.records.normalise import Decoder, Row, content_hash, normalise
from data_prep.records.plain import CHUNK, read_plain
from data_prep.records.reasons import Reason
from data_prep.records.source import WHOLE, Block, Piece, Source
from data_prep.records.tables import read_table
from data_prep.records.turns import Rejected
from data_prep.records.user_reader import read_records

MAX_EXAMPLES = 5
QUARANTINE_BYTES = 16 << 20  # of a directory: the first rejected records; a bomb of 3 MB can hold 3 GB of them
MAX_UNREAD = 100  # names of unread fields that are counted one by one; where keys are data there is no end of them
MORE_UNREAD = "(other names)"
READER_BLOCK_RECORDS = 4096
BATCH_BYTES = 1 << 20
MAX_TEXT_BYTES = 32 << 20
RECORDS_FILE, UNIT_LEDGER_FILE = "records.arrow", "ledger.arrow"
RECORDS_SCHEMA = pa.schema(
    [
        pa.field("line", pa.int32(), nullable=False),
        pa.field("hash", pa.binary(16), nullable=False),
        pa.field("roles", pa.list_(pa.int8()), nullable=False),
        pa.field("texts", pa.list_(pa.large_string()), nullable=False),
    ]
)
LEDGER_SCHEMA = pa.schema(
    [
        pa.field("piece", pa.int32(), nullable=False),
        pa.field("line", pa.int64(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
        pa.field("hash", pa.binary(16)),
        pa.field("reason", pa.dictionary(pa.int8(), pa.string())),
    ]
)
REASONS = list(Reason)


def build_unit(root: Path, spec: UnitSpec) -> tuple[list[store.Built], int]:
    """Make one unit (in any process); also returns the peak memory of the process in bytes."""
    built = find_unit(root, spec.fingerprint) or _write_series(root, spec)
    return built, peak_rss_bytes()


def directories_of(root: Path, fp: str) -> list[Path]:
    """Where the directories of a unit are, as far as its first one can be read."""
    first = store.find(root / fp)
    numbers = range(first.manifest["directories"] if first else 1)
    return [root / series_fingerprint(fp, number) for number in numbers]


def find_unit(root: Path, fp: str) -> list[store.Built] | None:
    """The directories of a unit if all of them are there."""
    first = store.find(root / fp)
    if first is None:
        return None
    wanted = range(1, first.manifest["directories"])
    others = [built for number in wanted if (built := store.find(root / series_fingerprint(fp, number)))]
    return [first, *others] if len(others) == len(wanted) else None


def series_fingerprint(fp: str, number: int) -> str:
    """The name of directory ``number`` of a unit; the first has the name of the unit."""
    return store.fingerprint(series=fp, number=number) if number else fp


@dataclass
class _Validated:
    """A block as columns. ``reasons`` is (n,) int8, -1 = valid; the others have an entry a valid record."""

    reasons: np.ndarray
    roles: list[bytes] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    details: dict[int, str] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)

    @property
    def valid(self) -> np.ndarray:
        return np.flatnonzero(self.reasons < 0)

    def is_rejected(self, index: int) -> bool:
        return bool(self.reasons[index] >= 0)


class _Directory:
    """The three files of a unit while they are written, and the counts for its manifest."""

    def __init__(self, directory: Path):
        self.path = directory
        self.records = pa.ipc.new_file(str(directory / RECORDS_FILE), RECORDS_SCHEMA)
        self.ledger = pa.ipc.new_file(str(directory / UNIT_LEDGER_FILE), LEDGER_SCHEMA)
        self.quarantine = (directory / "quarantine.bin").open("wb")
        self.quarantine_left = QUARANTINE_BYTES
        self.num_records = 0
        self.num_valid = 0
        self.text_bytes = 0
        self.rejected: Counter[str] = Counter()
        self.examples: list[dict[str, Any]] = []
        self.unread: Counter[str] = Counter()

    def close(self) -> None:
        self.records.close()
        self.ledger.close()
        self.quarantine.close()

    def write(self, pieces: np.ndarray, block: Block, validated: _Validated) -> None:
        """Append a block to all files; ``pieces`` (n,) int32 says of which piece each record is."""
        valid = validated.valid
        rejected = np.flatnonzero(validated.reasons >= 0).tolist()
        raw = {index: block.found[index] if block.found else _raw(block.records[index]) for index in rejected}
        block.lengths[rejected] = [len(raw[index]) for index in rejected]  # of a row without bytes: those that are kept
        if len(valid):
            batch = _records_batch(validated, valid + self.num_records)
            self.text_bytes += batch.column("texts").values.nbytes
            self.records.write_batch(batch)
        self.ledger.write_batch(_ledger_batch(pieces, block, validated))
        for index in rejected:
            self._keep(raw[index] + b"\n")
            self._reject(int(pieces[index]), block, index, validated)
        self.num_records += len(block.records)
        self.num_valid += len(valid)
        for name, count in validated.unread.items():
            self.unread[name if name in self.unread or len(self.unread) < MAX_UNREAD else MORE_UNREAD] += count

    def _reject(self, piece: int, block: Block, index: int, validated: _Validated) -> None:
        reason = REASONS[validated.reasons[index]]
        self.rejected[reason.value] += 1
        if len(self.examples) < MAX_EXAMPLES:
            detail = validated.details.get(index, reason.explanation)
            line = int(block.lines[index])
            self.examples.append({"piece": piece, "line": line, "reason": reason.value, "detail": detail})

    def _keep(self, record: bytes) -> None:
        """Up to the limit; from the first record that goes over it on, the ledger alone says where they are."""
        fits = len(record) <= self.quarantine_left
        self.quarantine_left = self.quarantine_left - len(record) if fits else 0
        if fits:
            self.quarantine.write(record)

    def counts(self) -> dict[str, Any]:
        return {
            "records": self.num_records,
            "valid": self.num_valid,
            "rejected": dict(sorted(self.rejected.items())),
            "unread_fields": dict(sorted(self.unread.items())),
            "text_bytes": self.text_bytes,
            "examples": self.examples,
        }


def _write_series(root: Path, spec: UnitSpec) -> list[store.Built]:
    """A directory for every 32 MiB of text; all are published when the last is written, the first at the very end."""
    facts: list[dict[str, int]] = []
    decoder = Decoder(dict(spec.columns))
    edges = None
    with ExitStack() as temporary:
        series = [_Directory(temporary.enter_context(store.building(root, spec.fingerprint)))]
        for pieces, block in _gathered(_blocks(spec, facts)):
            validated = _validate(block, decoder, spec.kind, spec.strict_fields)
            edges = [edges[0] if edges else validated.is_rejected(0), validated.is_rejected(-1)]
            if series[-1].text_bytes >= MAX_TEXT_BYTES:
                series[-1].close()
                fp = series_fingerprint(spec.fingerprint, len(series))
                series.append(_Directory(temporary.enter_context(store.building(root, fp))))
            series[-1].write(pieces, block, validated)
        series[-1].close()
        whole = {"directories": len(series), "pieces": facts, "rejected_edges": edges or [False, False]}
        last_first = reversed(range(len(series)))
        return [_publish(root, spec.fingerprint, series, number, whole) for number in last_first][::-1]


def _publish(root: Path, fp: str, series: list["_Directory"], number: int, whole: dict[str, Any]) -> store.Built:
    body = {**series[number].counts(), **whole} if number == 0 else series[number].counts()
    return store.publish(series[number].path, root / series_fingerprint(fp, number), body)


def _blocks(spec: UnitSpec, facts: list[dict[str, int]]) -> Iterator[tuple[int, Block]]:
    """(number of the piece, block) of all pieces of a unit; adds to ``facts`` what was read of each piece."""
    for number, (piece, expected) in enumerate(zip(spec.pieces, spec.hashes, strict=True)):
        source = Source(piece)
        rows = 0
        for block in _read(source, spec):
            rows += len(block.records)
            yield number, block
        if spec.reader is None:
            _check_unchanged(source, expected)
        facts.append({"bytes": source.size, "newlines": rows if piece.form in WHOLE else source.newlines})


def _read(source: Source, spec: UnitSpec) -> Iterator[Block]:
    form = source.piece.form
    if spec.reader is not None:
        return _user_blocks(source.piece, spec)
    if form in WHOLE:
        return read_table(source.piece)
    return read_csv(source) if form in DELIMITERS else read_blocks(source)


def _gathered(blocks: Iterator[tuple[int, Block]]) -> Iterator[tuple[np.ndarray, Block]]:
    """Small blocks joined until they are worth a batch: an Arrow batch costs 0.2 ms, thousands of tiny files many."""
    gathered: list[tuple[int, Block]] = []
    size = 0
    for number, block in blocks:
        if gathered and block.is_parsed != gathered[-1][1].is_parsed:
            yield _joined(gathered)
            gathered, size = [], 0
        gathered.append((number, block))
        size += int(block.lengths.sum())
        if size >= BATCH_BYTES or block.offsets[0] < 0:  # rows without bytes: as many as their reader saw fit
            yield _joined(gathered)
            gathered, size = [], 0
    if gathered:
        yield _joined(gathered)


def _joined(gathered: list[tuple[int, Block]]) -> tuple[np.ndarray, Block]:
    """One block, and for each of its records the number of its piece ``(n,) int32``."""
    blocks = [block for _, block in gathered]
    counts = [len(block.records) for block in blocks]
    firsts = np.concatenate(([0], np.cumsum(counts)[:-1])).tolist()
    faults = {first + at: why for first, block in zip(firsts, blocks, strict=True) for at, why in block.faults.items()}
    joined = Block(
        [record for block in blocks for record in block.records],
        np.concatenate([block.offsets for block in blocks]),
        np.concatenate([block.lengths for block in blocks]),
        np.concatenate([block.lines for block in blocks]),
        faults,
        [found for block in blocks for found in block.found],
    )
    return np.repeat(np.array([number for number, _ in gathered], np.int32), counts), joined


def _check_unchanged(source: Source, expected: str) -> None:
    piece = source.piece
    content = store.hash_file(*piece.here()) if piece.form in WHOLE else source.content_hash
    if content != expected:
        raise CorpusError(f"{piece.path} changed while it was read; run again when nobody writes to it")


def _validate(block: Block, decoder: Decoder, kind: str, strict_fields: bool) -> _Validated:
    result = _Validated(np.full(len(block.records), -1, np.int8))
    for index, fault in block.faults.items():
        result.reasons[index] = REASONS.index(fault)
    may_be_plain = not (block.is_parsed or decoder.renames)
    for first in range(0, len(block.records), CHUNK):
        chunk = range(first, min(first + CHUNK, len(block.records)))
        is_sound = block.faults.keys().isdisjoint(chunk)
        if may_be_plain and is_sound and (plain := read_plain(block.records[first : chunk.stop], kind)):
            result.roles += plain.roles
            result.texts += plain.texts
            result.hashes += plain.hashes
        else:
            _validate_each(block, chunk, decoder, kind, strict_fields, result)
    return result


def _validate_each(  # noqa: PLR0913, PLR0917  # what all records share
    block: Block, chunk: range, decoder: Decoder, kind: str, strict_fields: bool, result: _Validated
) -> None:
    """Some of the records of a block, one by one."""
    parse: Callable[[Any], Row | list] = decoder.from_mapping if block.is_parsed else decoder.decode
    unread: list[str] = []
    for index in chunk:
        if index not in block.faults:
            try:
                roles, texts = normalise(parse(block.records[index]), kind, unread)
                if sum(map(len, texts)) > MAX_RECORD_BYTES:  # only a user's reader gives as much
                    raise Rejected(Reason.OVERSIZED_RECORD, Reason.OVERSIZED_RECORD.explanation)
                if unread:
                    _note_unread(unread, result.unread, strict_fields)
                content = content_hash(roles, texts)
            except Rejected as rejected:
                result.reasons[index] = REASONS.index(rejected.reason)
                result.details[index] = rejected.detail
                unread.clear()
                continue
            result.roles.append(roles)
            result.texts += texts
            result.hashes.append(content)


def _note_unread(unread: list[str], counts: Counter[str], strict_fields: bool) -> None:
    """Count the fields of one record that nothing was made of, each once, and forget them."""
    names = sorted(set(unread))
    if strict_fields:
        raise Rejected(Reason.UNSUPPORTED_FIELD, f"strict_fields: nothing is made of {', '.join(names)[:200]}")
    counts.update(names)
    unread.clear()


def _records_batch(validated: _Validated, lines: np.ndarray) -> pa.RecordBatch:
    counts = np.fromiter(map(len, validated.roles), np.int32, len(validated.roles))
    offsets = pa.array(np.concatenate(([0], np.cumsum(counts))), pa.int32())
    roles = pa.array(np.frombuffer(b"".join(validated.roles), np.int8))
    texts = pa.array(validated.texts, pa.large_string())
    columns = [
        pa.array(lines, pa.int32()),
        _binary16(validated.hashes),
        pa.ListArray.from_arrays(offsets, roles),
        pa.ListArray.from_arrays(offsets, texts),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=RECORDS_SCHEMA)


def _ledger_batch(pieces: np.ndarray, block: Block, validated: _Validated) -> pa.RecordBatch:
    num_records = len(block.records)
    valid = validated.reasons < 0
    hashes = np.zeros((num_records, 16), np.uint8)
    hashes[valid] = np.frombuffer(b"".join(validated.hashes), np.uint8).reshape(-1, 16)
    reasons = pa.array(validated.reasons, pa.int8(), mask=valid)
    columns = [
        pa.array(pieces, pa.int32()),
        pa.array(block.lines, pa.int64()),
        pa.array(block.offsets, pa.int64()),
        pa.array(block.lengths, pa.int32()),
        pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(16), num_records, [pa.array(valid).buffers()[1], pa.py_buffer(hashes)]
        ),
        pa.DictionaryArray.from_arrays(reasons, pa.array([reason.value for reason in REASONS])),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=LEDGER_SCHEMA)


def _binary16(values: list[bytes]) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(values), [None, pa.py_buffer(b"".join(values))])


def _user_blocks(piece: Piece, spec: UnitSpec) -> Iterator[Block]:
    """What the user's reader yields, in blocks."""
    assert spec.reader is not None, "only units with a reader come here"
    count = 0
    records = read_records(spec.reader, piece.path, spec.tokenizer_dir)
    while block := list(islice(records, READER_BLOCK_RECORDS)):
        numbers = np.arange(count + 1, count + len(block) + 1)
        yield Block(block, np.full(len(block), -1), np.zeros(len(block), np.int64), numbers)
        count += len(block)


def _raw(record: Any) -> bytes:
    """The bytes of a record; of what a user's reader yielded, its JSON, or its repr where it has none."""
    if isinstance(record, (bytes, msgspec.Raw)):
        return bytes(record)
    try:
        return msgspec.json.encode(record)
    except (TypeError, ValueError):
        return repr(record).encode("utf-8", "backslashreplace")
