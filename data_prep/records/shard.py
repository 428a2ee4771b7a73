"""Stage 1: files of JSON -> validated records and the ledger, in units named by the bytes they were made from.

In: `CorpusSettings`. Out: ``<cache_dir>/records/<fingerprint>/``, one directory a unit (a file, a part of about 16 MiB
of a large file, or a group of small neighbouring files; several directories where it has more than 32 MiB of text), and
the ordered list of the units, `RecordsResult`. `data_prep.records.build_unit` makes one of them, this module all.
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
    manifest.json     records, valid, rejected {reason: n}, text_bytes, and what `data_prep.store` adds;
                      examples [{piece, line, reason, detail}] of the first few rejected;
                      directories, pieces [{bytes, newlines}], rejected_edges: only in the first directory of a unit
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from data_prep import store
from data_prep.errors import CorpusError, StoreError
from data_prep.processes import FanOut, on_processes, peak_rss_bytes
from data_prep.records.build_unit import RECORDS_FILE, UNIT_LEDGER_FILE, build_unit, find_unit
from data_prep.records.files import InputFile, UnitSpec, find_files, join, plan_units, waves
from data_prep.settings import CorpusSettings

Progress = Callable[[str, int, int, str], None]

STAGE = "records"
MAX_FILES_IN_ERROR = 10
MIN_BYTES_FOR_PROCESSES = 24 << 20  # below this one process is done before a second has started
PROGRESS_SECONDS = 0.5


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

    def texts(self) -> Iterator[str]:
        """Every text of every valid record, in corpus order."""
        for unit in self.units:
            for batch in read_arrow(Path(unit.path) / RECORDS_FILE).to_batches():
                yield from batch.column("texts").values.to_numpy(zero_copy_only=False)


def shard_records(
    corpus: CorpusSettings,
    cache_dir: Path,
    progress: Progress | None = None,
    fan_out: FanOut | None = None,
    tokenizer_dir: Path | None = None,
) -> RecordsResult:
    """Read and validate the whole corpus; units that are there already cost the hashing of their files.

    :param fan_out: where units are made; None = here, in ``prepare_workers`` processes when that is worth it.
    :param tokenizer_dir: for a user's reader that takes a tokenizer; nothing else here looks at it.
    :raises CorpusError: nothing to read, no usable record, or more than ``max_rejected_fraction`` rejected.
    """
    started = time.perf_counter()
    root = Path(cache_dir) / STAGE
    num_workers = corpus.prepare_workers or len(os.sched_getaffinity(0))
    files = find_files(corpus, cache_dir)
    made = _Units(root, num_workers, progress, fan_out, sum(file.size for file in files))
    specs = []
    for wave in waves(plan_units(files, corpus, num_workers, tokenizer_dir, cache_dir)):
        specs += made.make(wave)
    specs = _joined_where_cut_wrongly(specs, made)
    units = _with_positions(specs, made)
    result = _result(units, made, files, time.perf_counter() - started)
    _check(result, corpus.max_rejected_fraction)
    return result


def ledger_table(unit: RecordsUnit) -> pa.Table:
    """The ledger of a unit with ``file`` (dictionary of paths), and line and offset counted from the file's start."""
    table = read_arrow(Path(unit.path) / UNIT_LEDGER_FILE)
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


class _Units:
    """The units that exist so far, by fingerprint, and how to make those that do not."""

    def __init__(self, root: Path, num_workers: int, progress: Progress | None, fan_out: FanOut | None, total: int):
        self.root = root
        self.num_workers = num_workers
        self.progress = progress
        self.fan_out = fan_out
        self.built: dict[str, list[store.Built]] = {}
        self.peak_rss_bytes = peak_rss_bytes()
        self._total = total
        self._done = 0
        self._reported = 0.0

    def make(self, specs: list[UnitSpec]) -> list[UnitSpec]:
        """Find or build every unit, the same content twice once; what was fetched for them goes. Returns them."""
        missing = {}
        for spec in specs:
            fp = spec.fingerprint
            if fp not in self.built and fp not in missing:
                if found := find_unit(self.root, fp):
                    self.built[fp] = found
                else:
                    missing[fp] = spec
        self._done += sum(spec.size for spec in specs) - sum(spec.size for spec in missing.values())
        for fp, (directories, rss) in self._build(missing):
            self.built[fp] = directories
            self.peak_rss_bytes = max(self.peak_rss_bytes, rss)
            self._done += missing[fp].size
            self._report()
        for spec in specs:
            for piece in spec.pieces:
                piece.release()
        return specs

    def _build(self, missing: dict[str, UnitSpec]) -> Iterator[tuple[str, tuple[list[store.Built], int]]]:
        num_workers = min(self.num_workers, len(missing))
        small = num_workers < 2 or sum(spec.size for spec in missing.values()) < MIN_BYTES_FOR_PROCESSES
        if small and not self.fan_out:
            for fp, spec in missing.items():
                yield fp, build_unit(self.root, spec)
            return
        largest_first = sorted(missing, key=lambda fp: -missing[fp].size)
        fan_out = self.fan_out or on_processes(num_workers)
        yield from fan_out(build_unit, {fp: (self.root, missing[fp]) for fp in largest_first})

    def _report(self) -> None:
        now, done = time.monotonic(), min(self._done, self._total)
        if self.progress and (done == self._total or now - self._reported >= PROGRESS_SECONDS):
            self._reported = now
            self.progress(STAGE, done, self._total, "bytes")


def _joined_where_cut_wrongly(specs: list[UnitSpec], made: _Units) -> list[UnitSpec]:
    """Parts of an array that meet at a rejected record may be cut inside one: join those, look again."""
    while True:
        joined: list[UnitSpec] = []
        for spec in specs:
            if joined and _cut_wrongly(joined[-1], spec, made):
                joined[-1] = join(joined[-1], spec)
            else:
                joined.append(spec)
        if len(joined) == len(specs):
            return specs
        specs = made.make(joined)


def _cut_wrongly(before: UnitSpec, after: UnitSpec, made: _Units) -> bool:
    if before.pieces[-1].last or before.pieces[-1].form != "array" or before.fingerprint not in made.built:
        return False
    ends_rejected = made.built[before.fingerprint][0].manifest["rejected_edges"][1]
    return ends_rejected or made.built[after.fingerprint][0].manifest["rejected_edges"][0]


def _with_positions(specs: list[UnitSpec], made: _Units) -> list[RecordsUnit]:
    """Every directory with the place of each of its pieces; lines are counted through the parts of a file."""
    units = []
    line = 1
    for spec in specs:
        directories = made.built[spec.fingerprint]
        files = []
        for piece, facts in zip(spec.pieces, directories[0].manifest["pieces"], strict=True):
            line = 1 if piece.first else line
            files.append(UnitFile(path=piece.path, offset=piece.start, line=line))
            line += facts["newlines"]
        units += [_unit(spec, built, files) for built in directories]
    return units


def _unit(spec: UnitSpec, built: store.Built, files: list[UnitFile]) -> RecordsUnit:
    return RecordsUnit(
        path=str(built.path),
        fingerprint=built.path.name,
        kind=spec.kind,
        source=spec.source,
        files=files,
        reused=built.reused,
        **{name: built.manifest[name] for name in ("records", "valid", "rejected", "text_bytes")},
    )


def _result(units: list[RecordsUnit], made: _Units, files: list[InputFile], seconds: float) -> RecordsResult:
    rejected: Counter[str] = Counter()
    for unit in units:
        rejected.update(unit.rejected)
    reused = sum(unit.reused for unit in units)
    return RecordsResult(
        units=units,
        fingerprint=store.fingerprint(units=[[unit.fingerprint, unit.source] for unit in units]),
        files=len(files),
        bytes=sum(file.size for file in files),
        records=sum(unit.records for unit in units),
        valid=sum(unit.valid for unit in units),
        rejected=dict(sorted(rejected.items())),
        reused=reused,
        built=len(units) - reused,
        seconds=seconds,
        peak_rss_bytes=made.peak_rss_bytes,
    )


def _check(result: RecordsResult, max_rejected_fraction: float) -> None:
    num_rejected = result.records - result.valid
    if num_rejected != sum(result.rejected.values()):
        raise StoreError(
            f"{result.records} records, but {result.valid} valid + {sum(result.rejected.values())} rejected"
        )
    if num_rejected > max_rejected_fraction * result.records:
        raise CorpusError(
            f"{num_rejected} of {result.records} records are rejected, more than max_rejected_fraction="
            f"{max_rejected_fraction} allows:\n{_worst_files(result)}\nMend the files, or raise the limit."
        )
    if not result.valid:
        problem = f"all {num_rejected} are rejected:\n{_worst_files(result)}" if num_rejected else "all are empty"
        raise CorpusError(f"No usable record in {result.files} files: {problem}")


def _worst_files(result: RecordsResult) -> str:
    """The files with most rejected records, with counts and the first of them."""
    counts: Counter[str] = Counter()
    firsts: dict[str, str] = {}
    for unit in result.units:
        if not unit.rejected:
            continue
        ledger = ledger_table(unit)
        rejected = ledger.filter(pc.is_valid(ledger["reason"]))
        counts.update(rejected["file"].to_pylist())
        for example in store.open_manifest(Path(unit.path))["examples"]:
            file = unit.files[example["piece"]]
            line = file.line + example["line"] - 1
            firsts.setdefault(file.path, f"first at line {line}: {example['reason']}: {example['detail']}")
    worst = counts.most_common(MAX_FILES_IN_ERROR)
    lines = [f"  {path}: {count} rejected, {firsts.get(path, '')}" for path, count in worst]
    more = len(counts) - len(worst)
    return "\n".join(lines + ([f"  and {more} more files"] if more else []))
