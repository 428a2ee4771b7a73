"""Stage 1: files of JSON -> validated records and the ledger, in units named by the bytes they were made from.

In: `CorpusSettings`. Out: ``<cache_dir>/records/<fingerprint>/``, one directory a unit (a file, a part of about 16 MiB
of a large file, or a group of small neighbouring files), and the ordered list of the units, `RecordsResult`.
Cost: 100-200 MB/s a core; about 150 MiB of memory a process, whatever the size of the corpus.

A unit says nothing about where its bytes were found. So line, offset and file are relative to its pieces; `RecordsUnit`
knows for every piece the path, the offset and the line at which it begins, and `ledger_table` adds them.

    records.arrow     Arrow IPC file, a row per valid record, in file order, a batch per 4 MiB of input
        line    int32                   row of the record in ledger.arrow of this unit
        hash    fixed_size_binary[16]   xxh3_128 of the normal form: key of duplicates and of the validation split
        roles   list<int8>              0 system, 1 user, 2 input beside an instruction, 3 assistant, 4 title, 5 text
        texts   list<large_string>      as many as roles
    ledger.arrow      Arrow IPC file, a row per input record, in file order
        piece   int32                   index into the files of the unit (0 unless small files share the unit)
        line    int64                   line of the piece, from 1, on which it starts; with a user's reader its number
        offset  int64                   bytes from the start of the piece (after decompression); -1 with a user's reader
        length  int32                   bytes of the record
        hash    fixed_size_binary[16]   null if rejected
        reason  dictionary<int8, string>  null if valid; the dictionary is always all of `Reason`, in its order
    quarantine.bin    the bytes of each rejected record, in the order of the ledger, each followed by a newline
    manifest.json     records, valid, rejected {reason: n}, text_bytes, pieces [{bytes, newlines}],
                      examples [{piece, line, reason, detail}] (the first few rejected), and what `data_prep.store` adds
"""

import logging
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from data_prep import store
from data_prep.corpus import UnitSpec, find_files, join, plan_units
from data_prep.errors import CorpusError, PandaError, StoreError
from data_prep.ledger import Reason
from data_prep.normalise import Rejected, Row, content_hash, decode, from_mapping, normalise
from data_prep.read import Block, Piece, Source, read_blocks
from data_prep.settings import CorpusSettings
from data_prep.target import load_target

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int, str], None]

STAGE = "records"
MAX_EXAMPLES = 5
MAX_FILES_IN_ERROR = 10
MIN_BYTES_FOR_PROCESSES = 24 << 20  # below this one process is done before a second has started
PROGRESS_SECONDS = 0.5
READER_BLOCK_RECORDS = 4096
BATCH_BYTES = 1 << 20
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


class UnitFile(BaseModel):
    """Where a piece of a unit is: the file, and the offset and line (from 1) at which the piece begins in it."""

    model_config = ConfigDict(frozen=True)
    path: str
    offset: int
    line: int


class RecordsUnit(BaseModel):
    """One unit of records on disk. ``source`` is the kind, or kind/subdirectory."""

    model_config = ConfigDict(frozen=True)
    path: str
    fingerprint: str
    kind: str
    source: str
    files: list[UnitFile]
    records: int
    valid: int
    rejected: dict[str, int]
    text_bytes: int
    reused: bool


class RecordsResult(BaseModel):
    """What `shard_records` returns: the units in corpus order, and sums over them. ``records`` = valid + rejected."""

    model_config = ConfigDict(frozen=True)
    units: list[RecordsUnit]
    fingerprint: str
    files: int
    bytes: int
    records: int
    valid: int
    rejected: dict[str, int]
    reused: int
    built: int
    seconds: float
    peak_rss_bytes: int


def shard_records(corpus: CorpusSettings, cache_dir: Path, progress: Progress | None = None) -> RecordsResult:
    """Read and validate the whole corpus; units that are there already cost the hashing of their files.

    :raises CorpusError: nothing to read, no usable record, or more than ``max_rejected_fraction`` rejected.
    """
    started = time.perf_counter()
    root = Path(cache_dir) / STAGE
    num_workers = corpus.prepare_workers or len(os.sched_getaffinity(0))
    files = find_files(corpus)
    specs = plan_units(files, corpus, num_workers)
    made = _Units(root, num_workers, progress)
    specs = _joined_where_cut_wrongly(specs, made)
    units = _with_positions(specs, made)
    result = _result(units, made, len(files), time.perf_counter() - started)
    _check(result, made, corpus.max_rejected_fraction)
    return result


def ledger_table(unit: RecordsUnit) -> pa.Table:
    """The ledger of a unit with ``file`` (dictionary of paths), and line and offset counted from the file's start."""
    table = read_arrow(Path(unit.path) / "ledger.arrow")
    piece = table["piece"].to_numpy()
    first_line = np.array([file.line for file in unit.files], np.int64)[piece]
    first_offset = np.array([file.offset for file in unit.files], np.int64)[piece]
    offset = table["offset"].to_numpy()
    columns = {
        "file": pa.DictionaryArray.from_arrays(pa.array(piece), [file.path for file in unit.files]),
        "line": table["line"].to_numpy() + first_line - 1,
        "offset": np.where(offset < 0, offset, offset + first_offset),
        **{name: table[name] for name in ("length", "hash", "reason")},
    }
    return pa.table(columns)


def read_arrow(path: Path) -> pa.Table:
    """An Arrow IPC file, memory-mapped."""
    with pa.memory_map(str(path)) as stream:
        return pa.ipc.open_file(stream).read_all()


def build_unit(root: Path, spec: UnitSpec) -> tuple[store.Built, int]:
    """Make one unit (in any process); also returns the peak memory of the process in bytes."""
    built = store.build(root, spec.fingerprint, lambda directory: _write_unit(directory, spec))
    return built, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ------------------------------------------------------------------------------------------------ one unit


@dataclass
class _Validated:
    """A block as columns. ``reasons`` is (n,) int8, -1 = valid; the others have an entry a valid record."""

    reasons: np.ndarray
    roles: list[bytes] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    details: dict[int, str] = field(default_factory=dict)

    @property
    def valid(self) -> np.ndarray:
        return np.flatnonzero(self.reasons < 0)

    def is_rejected(self, index: int) -> bool:
        return bool(self.reasons[index] >= 0)


class _UnitWriter:
    """The three files of a unit and the counts for its manifest."""

    def __init__(self, directory: Path):
        self.records = pa.ipc.new_file(str(directory / "records.arrow"), RECORDS_SCHEMA)
        self.ledger = pa.ipc.new_file(str(directory / "ledger.arrow"), LEDGER_SCHEMA)
        self.quarantine = (directory / "quarantine.bin").open("wb")
        self.num_records = 0
        self.num_valid = 0
        self.text_bytes = 0
        self.rejected: Counter[str] = Counter()
        self.examples: list[dict[str, Any]] = []

    def __enter__(self) -> "_UnitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.records.close()
        self.ledger.close()
        self.quarantine.close()

    def write(self, pieces: np.ndarray, block: Block, validated: _Validated) -> None:
        """Append a block to all files; ``pieces`` (n,) int32 says of which piece each record is."""
        valid = validated.valid
        if len(valid):
            batch = _records_batch(validated, valid + self.num_records)
            self.text_bytes += batch.column("texts").values.nbytes
            self.records.write_batch(batch)
        self.ledger.write_batch(_ledger_batch(pieces, block, validated))
        for index in np.flatnonzero(validated.reasons >= 0).tolist():
            self._reject(int(pieces[index]), block, index, validated)
        self.num_records += len(block.records)
        self.num_valid += len(valid)

    def _reject(self, piece: int, block: Block, index: int, validated: _Validated) -> None:
        reason = REASONS[validated.reasons[index]]
        self.rejected[reason.value] += 1
        self.quarantine.write(_raw(block.records[index]) + b"\n")
        if len(self.examples) < MAX_EXAMPLES:
            detail = validated.details.get(index, reason.explanation)
            line = int(block.lines[index])
            self.examples.append({"piece": piece, "line": line, "reason": reason.value, "detail": detail})

    def manifest(self, pieces: list[dict[str, int]]) -> dict[str, Any]:
        return {
            "records": self.num_records,
            "valid": self.num_valid,
            "rejected": dict(sorted(self.rejected.items())),
            "text_bytes": self.text_bytes,
            "pieces": pieces,
            "examples": self.examples,
        }


def _write_unit(directory: Path, spec: UnitSpec) -> dict[str, Any]:
    facts: list[dict[str, int]] = []
    parse = decode if spec.reader is None else from_mapping
    edges = [False, False]
    with _UnitWriter(directory) as writer:
        for pieces, block in _gathered(_blocks(spec, facts)):
            validated = _validate(block, parse, spec.kind)
            edges = [edges[0] if writer.num_records else validated.is_rejected(0), validated.is_rejected(-1)]
            writer.write(pieces, block, validated)
    return {**writer.manifest(facts), "rejected_edges": edges}


def _blocks(spec: UnitSpec, facts: list[dict[str, int]]) -> Iterator[tuple[int, Block]]:
    """(number of the piece, block) of all pieces of a unit; adds to ``facts`` what was read of each piece."""
    for number, (piece, expected) in enumerate(zip(spec.pieces, spec.hashes, strict=True)):
        source = Source(piece)
        for block in read_blocks(source) if spec.reader is None else _user_blocks(piece, spec.reader):
            yield number, block
        if spec.reader is None:
            _check_unchanged(source, piece, expected)
        facts.append({"bytes": source.size, "newlines": source.newlines})


def _gathered(blocks: Iterator[tuple[int, Block]]) -> Iterator[tuple[np.ndarray, Block]]:
    """Small blocks joined until they are worth a batch: an Arrow batch costs 0.2 ms, thousands of tiny files many."""
    gathered: list[tuple[int, Block]] = []
    size = 0
    for number, block in blocks:
        gathered.append((number, block))
        size += int(block.lengths.sum())
        if size >= BATCH_BYTES:
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
    )
    return np.repeat(np.array([number for number, _ in gathered], np.int32), counts), joined


def _check_unchanged(source: Source, piece: Piece, expected: str) -> None:
    if source.content_hash != expected:
        raise CorpusError(f"{piece.path} changed while it was read; run again when nobody writes to it")


def _validate(block: Block, parse: Callable[[Any], Row | list], kind: str) -> _Validated:
    result = _Validated(np.full(len(block.records), -1, np.int8))
    for index, fault in block.faults.items():
        result.reasons[index] = REASONS.index(fault)
    for index, record in enumerate(block.records):
        if index not in block.faults:
            try:
                roles, texts = normalise(parse(record), kind)
                content = content_hash(roles, texts)
            except Rejected as rejected:
                result.reasons[index] = REASONS.index(rejected.reason)
                result.details[index] = rejected.detail
                continue
            result.roles.append(roles)
            result.texts += texts
            result.hashes.append(content)
    return result


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


# ------------------------------------------------------------------------------------------------ a user's reader


def _user_blocks(piece: Piece, reader: dict[str, Any]) -> Iterator[Block]:
    """What the user's generator yields, in blocks; its errors are the user's to see, with the file that caused them."""
    count = 0
    try:
        records = iter(load_target(reader, "reader")(piece.path))
        while block := list(islice(records, READER_BLOCK_RECORDS)):
            numbers = np.arange(count + 1, count + len(block) + 1)
            yield Block(block, np.full(len(block), -1), np.zeros(len(block), np.int64), numbers)
            count += len(block)
    except PandaError:
        raise
    except Exception as error:
        where = f"reader {reader['_target_']} failed on {piece.path} after {count} records"
        raise CorpusError(f"{where}: {type(error).__name__}: {error}") from error


def _raw(record: Any) -> bytes:
    """The bytes of a record; of what a user's reader yielded, its JSON, or its repr where it has none."""
    if isinstance(record, (bytes, msgspec.Raw)):
        return bytes(record)
    try:
        return msgspec.json.encode(record)
    except (TypeError, ValueError):
        return repr(record).encode("utf-8", "backslashreplace")


# ------------------------------------------------------------------------------------------------ all units


class _Units:
    """The units that exist so far, by fingerprint, and how to make those that do not."""

    def __init__(self, root: Path, num_workers: int, progress: Progress | None):
        self.root = root
        self.num_workers = num_workers
        self.progress = progress
        self.built: dict[str, store.Built] = {}
        self.peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self._reported = 0.0

    def make(self, specs: list[UnitSpec]) -> None:
        """Find or build every unit; the same content twice is built once."""
        missing = {}
        for spec in specs:
            fp = spec.fingerprint
            if fp not in self.built and fp not in missing:
                if found := store.find(self.root / fp):
                    self.built[fp] = found
                else:
                    missing[fp] = spec
        total = sum(spec.size for spec in specs)
        done = total - sum(spec.size for spec in missing.values())
        for fp, (built, rss) in self._build(missing):
            self.built[fp] = built
            self.peak_rss_bytes = max(self.peak_rss_bytes, rss)
            done += missing[fp].size
            self._report(done, total)

    def _build(self, missing: dict[str, UnitSpec]) -> Iterator[tuple[str, tuple[store.Built, int]]]:
        num_workers = min(self.num_workers, len(missing))
        if num_workers < 2 or sum(spec.size for spec in missing.values()) < MIN_BYTES_FOR_PROCESSES:
            for fp, spec in missing.items():
                yield fp, build_unit(self.root, spec)
            return
        largest_first = sorted(missing, key=lambda fp: -missing[fp].size)
        with worker_pool(num_workers) as pool:
            futures = {pool.submit(build_unit, self.root, missing[fp]): fp for fp in largest_first}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BrokenProcessPool as error:
                raise CorpusError(
                    "A process that reads records was killed (out of memory?). What is finished is kept; go on with "
                    f"--prepare_workers {num_workers // 2}"
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)

    def _report(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.progress and (done == total or now - self._reported >= PROGRESS_SECONDS):
            self._reported = now
            self.progress(STAGE, done, total, "bytes")


def worker_pool(num_workers: int) -> ProcessPoolExecutor:
    """Processes that die with this one. Started from a clean server process: safe beside threads, 20 ms each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_prep.records"])
    return ProcessPoolExecutor(num_workers, mp_context=context, initializer=_die_with_parent)


def _die_with_parent() -> None:
    """A worker waits for work for ever when its parent was killed, and keeps the server process alive: so watch it."""
    threading.Thread(target=_kill_after_parent, daemon=True).start()


def _kill_after_parent() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGKILL)


def _joined_where_cut_wrongly(specs: list[UnitSpec], made: _Units) -> list[UnitSpec]:
    """Make all units. Parts of an array that meet at a rejected record may be cut inside one: join them and repeat."""
    while True:
        made.make(specs)
        joined: list[UnitSpec] = []
        for spec in specs:
            if joined and _cut_wrongly(joined[-1], spec, made):
                joined[-1] = join(joined[-1], spec)
            else:
                joined.append(spec)
        if len(joined) == len(specs):
            return specs
        specs = joined


def _cut_wrongly(before: UnitSpec, after: UnitSpec, made: _Units) -> bool:
    if before.pieces[-1].last or before.pieces[-1].form != "array" or before.fingerprint not in made.built:
        return False
    ends_rejected = made.built[before.fingerprint].manifest["rejected_edges"][1]
    return ends_rejected or made.built[after.fingerprint].manifest["rejected_edges"][0]


def _with_positions(specs: list[UnitSpec], made: _Units) -> list[RecordsUnit]:
    """The units with the place of each piece: lines are counted through the parts of a file."""
    units = []
    line = 1
    for spec in specs:
        built = made.built[spec.fingerprint]
        files = []
        for piece, facts in zip(spec.pieces, built.manifest["pieces"], strict=True):
            line = 1 if piece.first else line
            files.append(UnitFile(path=piece.path, offset=piece.start, line=line))
            line += facts["newlines"]
        facts = {name: built.manifest[name] for name in ("records", "valid", "rejected", "text_bytes")}
        units.append(
            RecordsUnit(
                path=str(built.path),
                fingerprint=spec.fingerprint,
                kind=spec.kind,
                source=spec.source,
                files=files,
                reused=built.reused,
                **facts,
            )
        )
    return units


def _result(units: list[RecordsUnit], made: _Units, num_files: int, seconds: float) -> RecordsResult:
    rejected: Counter[str] = Counter()
    for unit in units:
        rejected.update(unit.rejected)
    reused = sum(unit.reused for unit in units)
    return RecordsResult(
        units=units,
        fingerprint=store.fingerprint(units=[[unit.fingerprint, unit.source] for unit in units]),
        files=num_files,
        bytes=sum(piece["bytes"] for unit in units for piece in made.built[unit.fingerprint].manifest["pieces"]),
        records=sum(unit.records for unit in units),
        valid=sum(unit.valid for unit in units),
        rejected=dict(sorted(rejected.items())),
        reused=reused,
        built=len(units) - reused,
        seconds=seconds,
        peak_rss_bytes=made.peak_rss_bytes,
    )


def _check(result: RecordsResult, made: _Units, max_rejected_fraction: float) -> None:
    num_rejected = result.records - result.valid
    if num_rejected != sum(result.rejected.values()):
        raise StoreError(
            f"{result.records} records, but {result.valid} valid + {sum(result.rejected.values())} rejected"
        )
    if num_rejected > max_rejected_fraction * result.records:
        raise CorpusError(
            f"{num_rejected} of {result.records} records are rejected, more than max_rejected_fraction="
            f"{max_rejected_fraction} allows:\n{_worst_files(result, made)}\nMend the files, or raise the limit."
        )
    if not result.valid:
        problem = f"all {num_rejected} are rejected:\n{_worst_files(result, made)}" if num_rejected else "all are empty"
        raise CorpusError(f"No usable record in {result.files} files: {problem}")


def _worst_files(result: RecordsResult, made: _Units) -> str:
    """The files with most rejected records, with counts and the first of them."""
    counts: Counter[str] = Counter()
    firsts: dict[str, str] = {}
    for unit in result.units:
        if not unit.rejected:
            continue
        ledger = ledger_table(unit)
        rejected = ledger.filter(pc.is_valid(ledger["reason"]))
        counts.update(rejected["file"].to_pylist())
        for example in made.built[unit.fingerprint].manifest["examples"]:
            file = unit.files[example["piece"]]
            line = file.line + example["line"] - 1
            firsts.setdefault(file.path, f"first at line {line}: {example['reason']}: {example['detail']}")
    worst = counts.most_common(MAX_FILES_IN_ERROR)
    lines = [f"  {path}: {count} rejected, {firsts.get(path, '')}" for path, count in worst]
    more = len(counts) - len(worst)
    return "\n".join(lines + ([f"  and {more} more files"] if more else []))
