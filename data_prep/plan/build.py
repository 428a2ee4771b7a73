"""Stage 3: token shards -> the pack plan, the ledger of the whole corpus and the report. An index; no token is copied.

In: `TokensResult` and the settings. Out: ``<cache_dir>/plans/<fingerprint>/`` and `PlanResult`:

    plan-train.arrow, plan-validation.arrow   rows of segments (`data_prep.plan.plan_file`)
    ledger.arrow    a row per input record of the corpus, in corpus order
        file, line, offset, length, hash            where it is and what it says (hash null if rejected while reading)
        source          dictionary<string>          kind or kind/subdirectory
        split           dictionary<string>          train or validation; null unless accepted
        verdict         dictionary<string>          accepted, rejected or dropped
        reason          dictionary<string>          null if accepted (`data_prep.records.reasons.Reason`)
        tokens, target_tokens   int32               of the example; 0 if rejected while reading
        copies          int32                       times it is in the rows of its split
        cut_tokens      int32                       tokens of an accepted example that are in no row (overflow)
        shard, example  int32                       its place among the shards; -1 if rejected while reading
    manifest.json   max_seq_length, pad_id, sources, shards (paths relative to the plan), report

The fingerprint covers the ordered units (content, source, place of files), the tombstones and the settings of packing,
duplicates, replay, split and mixture. Cost: planning 1,000,000 examples takes under a second, the ledger another.
"""

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from data_prep import intact, store
from data_prep.plan import columns
from data_prep.plan.columns import Block, blocks, joined, made, repeated, running_sum, sums_by, taken, where
from data_prep.plan.duplicates import near_duplicates, sketch
from data_prep.plan.examples import Examples, load_examples
from data_prep.plan.ledger import write_ledger
from data_prep.plan.order import mix64, stable_argsort
from data_prep.plan.pack import MIN_SPACE, best_fit_decreasing, fill
from data_prep.plan.plan_file import Rows, rows_file, write_rows
from data_prep.plan.reader import Plan, prove_rows
from data_prep.plan.report import DataReport, check_conservation, make_report
from data_prep.plan.verdicts import ACCEPTED, REASONS, SPLITS, Pieces, Verdicts, judge, quarantined, taken_down
from data_prep.processes import on_processes, peak_rss_bytes
from data_prep.records.build_unit import RECORDS_FILE
from data_prep.records.reasons import REJECTED
from data_prep.records.shard import RecordsUnit, ledger_table, read_arrow
from data_prep.settings import CorpusSettings, PackSettings
from data_prep.tokens.token_shard import TokenShard
from data_prep.tokens.tokenize import TokensResult

STAGE = "plans"
MIN_BYTES_FOR_PROCESSES = 2 << 20  # of text whose near duplicates are sought: about a second
FILL_FRACTION = 32  # documents fill the space that other examples leave in a row if it is 1/32 of the row or more


class PlanResult(BaseModel):
    """What `plan_rows` returns."""

    model_config = ConfigDict(frozen=True)
    path: str
    fingerprint: str
    reused: bool
    seconds: float
    tokenizer_dir: str
    report: DataReport


def plan_rows(tokens: TokensResult, corpus: CorpusSettings, pack: PackSettings, cache_dir: Path) -> PlanResult:
    """Plan the rows of both splits, or find the plan made before.

    :raises CorpusError: nothing to train on, an unknown source in ``mixture``, or ``overflow=error`` applies.
    :raises StoreError: the numbers do not add up.
    """
    started = time.perf_counter()
    root = Path(cache_dir) / STAGE
    fp = plan_fingerprint(tokens, corpus, pack)
    intact.set_aside_damaged(root.parent, [root / fp])
    built = store.build(root, fp, lambda directory: _write_plan(directory, root / fp, tokens, corpus, pack))
    seconds = time.perf_counter() - started
    stages = {"records": tokens.records.seconds, "tokenize": tokens.seconds, "plan": seconds}
    planned: DataReport = built.manifest["report"]
    report: DataReport = {
        **planned,
        "seconds": {name: round(value, 3) for name, value in stages.items()},
        "reused": {"records": not tokens.records.built, "tokenize": not tokens.built, "plan": built.reused},
        "engines": tokens.engines,
        "peak_rss_bytes": max(peak_rss_bytes(), tokens.peak_rss_bytes, tokens.records.peak_rss_bytes),
        "plan_dir": str(built.path),
    }
    return PlanResult(
        path=str(built.path),
        fingerprint=fp,
        reused=built.reused,
        seconds=seconds,
        tokenizer_dir=tokens.tokenizer_dir,
        report=report,
    )


def plan_fingerprint(tokens: TokensResult, corpus: CorpusSettings, pack: PackSettings) -> str:
    """What a plan depends on. A moved file changes it: the ledger says where each record is."""
    share = corpus.replay_share
    near = corpus.near_duplicate_threshold if corpus.deduplicate == "near" else None
    return store.fingerprint(
        stage=STAGE,
        units=[[u.fingerprint, u.records.source, [f.model_dump() for f in u.records.files]] for u in tokens.units],
        pad_id=tokens.pad_id,
        pack=pack.model_dump(mode="json"),
        duplicates=[corpus.deduplicate, near],
        validation_fraction=corpus.validation_fraction,
        tombstones=taken_down(corpus),
        **({"quarantine": hashes} if (hashes := quarantined(corpus)) else {}),
        **({"replay": [Path(corpus.replay_of).name, share]} if corpus.replay_of and share < 1 else {}),
    )


def _write_plan(
    directory: Path, final: Path, tokens: TokensResult, corpus: CorpusSettings, pack: PackSettings
) -> dict[str, Any]:
    with columns.lying_in(directory):
        return _plan_in(directory, final, tokens, corpus, pack)


def _plan_in(
    directory: Path, final: Path, tokens: TokensResult, corpus: CorpusSettings, pack: PackSettings
) -> dict[str, Any]:
    examples = load_examples(tokens)
    verdicts, pieces = judge(examples, corpus, pack, lambda: _near_duplicates(tokens, corpus, final.parent.parent))
    rows = {split: make_rows(examples, verdicts, pieces, number, pack) for number, split in enumerate(SPLITS)}
    for split in SPLITS:
        write_rows(directory / rows_file(split), rows[split])
    write_ledger(directory, ledger_tables(tokens, examples, verdicts))
    report = make_report(tokens, examples, verdicts, rows, pack)
    check_conservation(report, examples, verdicts, rows)
    manifest = {
        "max_seq_length": pack.max_seq_length,
        "pad_id": tokens.pad_id,
        "sources": examples.sources,
        "shards": [os.path.relpath(unit.path, final) for unit in tokens.units],
        "report": report,
    }
    opened: dict[int, TokenShard] = {}
    report["proof"]["rows_read_equal"] = sum(prove_rows(Plan(final, manifest, rows[split], opened)) for split in SPLITS)
    return manifest


def make_rows(examples: Examples, verdicts: Verdicts, pieces: Pieces, split: int, pack: PackSettings) -> Rows:
    """The rows of one split: pieces of its examples, as often as their copies say, packed."""

    def accepted(block: Block) -> np.ndarray:
        example = pieces.example[block]
        return (verdicts.reason[example] == ACCEPTED) & (verdicts.split[example] == split)

    chosen = where(len(pieces.example), accepted)
    which = repeated(chosen, lambda block: verdicts.copies[pieces.example[chosen[block]]])
    # Pieces of one length are interchangeable for packing: which of them share a row is drawn by seed and content.
    keys = examples.keys
    drawn = made(len(which), np.uint64, lambda block: mix64(keys[pieces.example[which[block]]], pack.seed + 1))
    shuffled = taken(which, stable_argsort(drawn))
    of_pieces = (pieces.example, pieces.start, pieces.length, pieces.cuttable)
    example, start, length, cuttable = (taken(one, shuffled) for one in of_pieces)
    if not pack.packing:
        row = made(len(shuffled), np.int32, lambda block: np.arange(block.start, block.stop))
        return _rows_of(examples, example, start, length, row)
    return _pack(examples, example, start, length, cuttable, pack.max_seq_length)


def _pack(  # noqa: PLR0913, PLR0917  # the columns of the pieces
    examples: Examples, example: np.ndarray, start: np.ndarray, length: np.ndarray, cuttable: np.ndarray, capacity: int
) -> Rows:
    """Pieces that may not be cut by best fit; then documents over the space they leave and over new rows."""
    whole = where(len(cuttable), lambda block: ~cuttable[block])
    documents = where(len(cuttable), cuttable.__getitem__)
    of_whole = taken(length, whole)
    row = best_fit_decreasing(of_whole, capacity)
    num_rows = max((int(row[block].max()) + 1 for block in blocks(len(row))), default=0)
    used = sums_by(row, num_rows, of_whole.__getitem__)
    smallest = max(MIN_SPACE, capacity // FILL_FRACTION)
    open_rows = where(num_rows, lambda block: capacity - used[block] >= smallest)
    spaces = made(len(open_rows), np.int64, lambda block: capacity - used[open_rows[block]])
    filled = fill(taken(length, documents), spaces, open_rows, capacity, num_rows)
    cut = taken(documents, filled.document)
    start_of_cut = made(len(cut), np.int32, lambda block: start[cut[block]] + filled.start[block])
    return _rows_of(
        examples,
        joined([taken(example, whole), taken(example, cut)], example.dtype),
        joined([taken(start, whole), start_of_cut], np.int32),
        joined([of_whole, filled.length], np.int32),
        joined([row, filled.row], np.int32),
    )


def _rows_of(examples: Examples, example: np.ndarray, start: np.ndarray, length: np.ndarray, row: np.ndarray) -> Rows:
    """Segments in any order -> the arrays of a plan file, ordered by row."""
    order = stable_argsort(row)
    example, start, length, row = (taken(one, order) for one in (example, start, length, row))
    num_rows = int(row[-1]) + 1 if len(row) else 0
    segments = sums_by(row, num_rows, lambda block: 1)
    return Rows(
        row_offsets=joined([np.zeros(1), running_sum(segments)], np.int32),
        shard=taken(examples.shard, example),
        example=taken(examples.number, example),
        start=start,
        length=length,
        source=taken(examples.source, example),
        tokens=sums_by(row, num_rows, length.__getitem__).astype(np.int32),
        target_tokens=sums_by(row, num_rows, lambda block: _targets(examples, example, start, length, block)).astype(
            np.int32
        ),
    )


def _targets(
    examples: Examples, example: np.ndarray, start: np.ndarray, length: np.ndarray, block: Block
) -> np.ndarray:
    """Labels of each segment of a block: ``(m,) int32``."""
    targets: np.ndarray = examples.targets[example[block]]
    cut = np.flatnonzero(length[block] != examples.lengths[example[block]])
    targets[cut] = examples.targets_of(example[block][cut], start[block][cut], length[block][cut])
    return targets


def ledger_tables(tokens: TokensResult, examples: Examples, verdicts: Verdicts) -> Iterator[pa.Table]:
    """One row per input record of the corpus, in corpus order; a table a unit, so that no more is in memory at once."""
    files = _Words(file.path for unit in tokens.units for file in unit.records.files)
    sources = _Words(unit.records.source for unit in tokens.units)
    first = 0
    for number, unit in enumerate(tokens.units):
        mine = slice(first, first + unit.examples)
        first += unit.examples
        table = _unit_ledger(unit.records, number, examples, verdicts, mine)
        for name, words in (("file", files), ("source", sources)):
            table = table.set_column(table.schema.get_field_index(name), name, words.recoded(table[name]))
        yield table


class _Words:
    """One dictionary for all tables of a ledger: the values of theirs, in the order in which they come first."""

    def __init__(self, values: Iterable[str]):
        self.number = {value: number for number, value in enumerate(dict.fromkeys(values))}
        self.values = pa.array(list(self.number), pa.string())

    def recoded(self, column: pa.ChunkedArray) -> pa.DictionaryArray:
        """A column with the common dictionary instead of its own."""
        own = _whole(column)
        numbers = np.array([self.number[value] for value in own.dictionary.to_pylist()])
        indices = numbers[own.indices.to_numpy()].astype(own.indices.type.to_pandas_dtype())
        return pa.DictionaryArray.from_arrays(pa.array(indices), self.values)


def _unit_ledger(records: Any, shard: int, examples: Examples, verdicts: Verdicts, mine: slice) -> pa.Table:
    table = ledger_table(records)
    reason = _whole(table["reason"]).indices.fill_null(ACCEPTED).to_numpy().copy()
    valid = np.flatnonzero(reason == ACCEPTED)
    reason[valid] = verdicts.reason[mine]
    accepted = reason == ACCEPTED

    def spread(values: np.ndarray, absent: int = 0) -> pa.Array:
        column = np.full(len(table), absent, dtype=np.int32)
        column[valid] = values
        return pa.array(column)

    rejected = np.isin(reason, [REASONS.index(one) for one in REJECTED])
    verdict = np.where(accepted, 0, np.where(rejected, 1, 2)).astype(np.int8)
    return pa.table({
        **{name: table[name] for name in ("file", "line", "offset", "length", "hash")},
        "source": _words(np.zeros(len(table), np.int8), [records.source]),
        "split": _words(spread(verdicts.split[mine]).to_numpy().astype(np.int8), list(SPLITS), ~accepted),
        "verdict": _words(verdict, ["accepted", "rejected", "dropped"]),
        "reason": _words(reason.astype(np.int8), [one.value for one in REASONS], accepted),
        "tokens": spread(examples.lengths[mine]),
        "target_tokens": spread(examples.targets[mine]),
        "copies": spread(verdicts.copies[mine]),
        "cut_tokens": spread(verdicts.cut[mine]),
        "shard": spread(np.full(len(valid), shard), absent=-1),
        "example": spread(examples.number[mine], absent=-1),
    })  # fmt: skip


def _whole(column: pa.ChunkedArray) -> pa.DictionaryArray:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _words(indices: np.ndarray, words: list[str], absent: np.ndarray | None = None) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(np.maximum(indices, 0), mask=absent), pa.array(words))


def _near_duplicates(tokens: TokensResult, corpus: CorpusSettings, root: Path) -> np.ndarray:
    """The mask of `near_duplicates`, kept below ``root``: it is slow, and another seed or length changes nothing."""
    units = [unit.records for unit in tokens.units]

    def make(directory: Path) -> dict[str, Any]:
        near = near_duplicates(_signatures(units, corpus.prepare_workers), corpus.near_duplicate_threshold)
        np.save(directory / "near.npy", near)
        return {"records": len(near), "near_duplicates": int(near.sum())}

    fps = [unit.fingerprint for unit in units]
    fp = store.fingerprint(stage="near_duplicates", units=fps, threshold=corpus.near_duplicate_threshold)
    return np.load(store.build(root / "near_duplicates", fp, make).path / "near.npy")


def _signatures(units: list[RecordsUnit], prepare_workers: int) -> np.ndarray:
    """Signatures of all records in corpus order; made in several processes where that is worth it."""
    calls = {unit.path: (unit.path,) for unit in units}
    num_workers = min(prepare_workers or len(os.sched_getaffinity(0)), len(calls))
    if num_workers > 1 and sum(unit.text_bytes for unit in units) >= MIN_BYTES_FOR_PROCESSES:
        made = dict(on_processes(num_workers)(_signatures_of, calls))
    else:
        made = {path: _signatures_of(path) for path in calls}
    return np.concatenate([made[unit.path] for unit in units])


def _signatures_of(unit_path: str) -> np.ndarray:
    """In any process: the signatures of one unit's records."""
    chunks = read_arrow(Path(unit_path) / RECORDS_FILE)["texts"].chunks
    return sketch("\n".join(record) for chunk in chunks for record in chunk.to_pylist())
