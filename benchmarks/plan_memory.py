"""How much memory planning takes a record: plans of made units, which are there in seconds whatever their number.

In: numbers of records. Out: a line for each: seconds, peak memory of the process that plans, bytes a record; what the
growth from the first to the last says of a billion, and the last beside the first. The units hold hashes, lengths and
runs of made examples; their texts are empty and their ids zero, which a plan never looks at.

    python -m benchmarks.plan_memory --records 1000000 2000000 4000000
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa

from benchmarks.prepare import watch
from benchmarks.rows import Row, say
from data_prep import store
from data_prep.plan.build import plan_rows
from data_prep.records.build_unit import LEDGER_SCHEMA, REASONS, RECORDS_FILE, RECORDS_SCHEMA, UNIT_LEDGER_FILE
from data_prep.records.shard import RecordsResult, RecordsUnit, UnitFile
from data_prep.settings import CorpusSettings, PackSettings
from data_prep.tokens.token_shard import TOKENS_FILE, TokenShard, write_shard
from data_prep.tokens.tokenize import TokensResult, TokensUnit

UNIT_RECORDS = 100_000
BYTES_OF_TEXT = 160  # of a record, for its place in the file


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--records", type=int, nargs="+", default=[1_000_000, 2_000_000, 4_000_000])
    options.add_argument("--work", type=Path, default=Path("/tmp/panda-plan-memory"))
    options.add_argument("--plan", type=int, help="only plan so many, in this process")
    given = options.parse_args()
    if given.plan:
        tokens = made_units(given.work, given.plan)
        started = time.process_time()
        plan_rows(tokens, CorpusSettings(tombstones=None), PackSettings(max_seq_length=2048), given.work / "cache")
        print(json.dumps({"seconds": time.process_time() - started}))
        return
    found = [measured(given.work, number) for number in given.records]
    if len(found) > 1:
        most, least = given.records[-1], given.records[0]
        each = (found[-1] - found[0]) / (most - least)
        print(f"growth: {each:.0f} bytes a record; {each:.0f} GB for a billion", flush=True)
        what, against = (f"{number / 1e6:g} million records" for number in (most, least))
        say(Row(f"memory to plan {what}", found[-1] / 2**20, against, found[0] / 2**20, "MiB", at_most=1.25))
    shutil.rmtree(given.work)


def measured(work: Path, number: int) -> int:
    """The peak of a process that plans so many records, in bytes."""
    made_units(work, number)
    shutil.rmtree(work / "cache" / "plans", ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.plan_memory", "--work", str(work), "--plan", str(number)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak = watch(psutil.Process(process.pid))[process.pid]
        seconds = json.loads(process.stdout.read())["seconds"]  # type: ignore[union-attr]  # a PIPE
    print(
        f"{number:>12,} records: {seconds:6.1f} s of CPU, {peak}, {peak.anonymous / number:.0f} bytes a record",
        flush=True,
    )
    return peak.anonymous


def made_units(work: Path, number: int) -> TokensResult:
    """As many units as that takes, each made once."""
    cache = work / "cache"
    units = [_made_unit(cache, unit) for unit in range(-(-number // UNIT_RECORDS))]
    records = [unit.records for unit in units]
    sums = {"examples": len(units) * UNIT_RECORDS, "tokens": sum(unit.tokens for unit in units)}
    result = RecordsResult(
        units=records, fingerprint="made", files=len(units), bytes=0, records=sums["examples"], valid=sums["examples"],
        rejected={}, unread_fields={}, reused=0, built=len(units), seconds=0, peak_rss_bytes=0,
    )  # fmt: skip
    return TokensResult(
        units=units, records=result, tokenizer_dir="", tokenizer_fingerprint="", template_fingerprint="", eos_id=0,
        pad_id=0, target_tokens=0, engines={}, reused=0, built=len(units), seconds=0, peak_rss_bytes=0, **sums,
    )  # fmt: skip


def _made_unit(cache: Path, number: int) -> TokensUnit:
    rng = np.random.default_rng(number)
    runs = rng.integers(2, 12, (UNIT_RECORDS, 2), dtype=np.int32)
    built = store.build(cache / "records", f"made-{number}", lambda directory: _write_records(directory, rng))
    tokens = store.build(
        cache / "tokens", f"made-{number}", lambda directory: _write_tokens(directory, runs, built.path.name)
    )
    counts = {"records": UNIT_RECORDS, "valid": UNIT_RECORDS, "rejected": {}, "unread_fields": {}}
    facts = {**counts, "text_bytes": 0, "reused": True}
    unit = RecordsUnit(
        path=str(built.path), fingerprint=built.path.name, kind="instruction", source="instruction",
        files=[UnitFile(path=f"made/{number}.jsonl", offset=0, line=1)], **facts,
    )  # fmt: skip
    proof = dict.fromkeys(("targets", "targets_ending_in_stop", "targets_decoded_equal", "examples_without_target"), 0)
    return TokensUnit(
        path=str(tokens.path), fingerprint=tokens.path.name, records=unit, examples=UNIT_RECORDS,
        tokens=int(runs.sum()), target_tokens=int(runs[:, 1].sum()), engine="made", proof=proof, refused=[],
        why_refused="", reused=True,
    )  # fmt: skip


def _write_records(directory: Path, rng: np.random.Generator) -> dict[str, int]:
    count = UNIT_RECORDS
    hashes = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), count, [None, pa.py_buffer(rng.bytes(16 * count))])
    lines = np.arange(count, dtype=np.int32)
    empty = np.zeros(count + 1, np.int32)
    columns = [
        pa.array(lines), hashes, pa.ListArray.from_arrays(empty, pa.array([], pa.int8())),
        pa.ListArray.from_arrays(empty, pa.array([], pa.large_string())),
    ]  # fmt: skip
    with pa.ipc.new_file(str(directory / RECORDS_FILE), RECORDS_SCHEMA) as writer:
        writer.write_batch(pa.record_batch(columns, schema=RECORDS_SCHEMA))
    reasons = pa.array(np.zeros(count, np.int8), mask=np.ones(count, bool))
    columns = [
        pa.array(np.zeros(count, np.int32)), pa.array(lines + 1, pa.int64()),
        pa.array(lines.astype(np.int64) * BYTES_OF_TEXT), pa.array(np.full(count, BYTES_OF_TEXT, np.int32)), hashes,
        pa.DictionaryArray.from_arrays(reasons, pa.array([reason.value for reason in REASONS])),
    ]  # fmt: skip
    with pa.ipc.new_file(str(directory / UNIT_LEDGER_FILE), LEDGER_SCHEMA) as writer:
        writer.write_batch(pa.record_batch(columns, schema=LEDGER_SCHEMA))
    return {"records": count}


def _write_tokens(directory: Path, runs: np.ndarray, records: str) -> dict[str, str]:
    offsets = np.concatenate([[0], np.cumsum(runs.sum(axis=1, dtype=np.int64))])
    shard = TokenShard(
        np.zeros(offsets[-1], np.int32), offsets, runs.ravel(), np.arange(0, runs.size + 1, 2, dtype=np.int32)
    )
    write_shard(directory / TOKENS_FILE, shard)
    return {"records": records}


if __name__ == "__main__":
    main()
