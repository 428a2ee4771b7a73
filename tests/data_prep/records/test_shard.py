"""shard_records on real files: units, ledger, quarantine, errors, increments, parts, workers, kill -9, two at once."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import store, targets
from data_prep.errors import CorpusError, PandaError
from data_prep.records import build_unit as unit_module
from data_prep.records import files as corpus_module
from data_prep.records import shard as records_module
from data_prep.records import source as source_module
from data_prep.records.files import find_files, plan_units
from data_prep.records.reasons import Reason
from data_prep.records.shard import RecordsResult, ledger_table, read_arrow, shard_records
from data_prep.records.turns import Role
from data_prep.settings import CorpusSettings
from tests.support.real_corpora import REAL

PAIR = {"input": "a", "target": "b"}


def corpus(directory: Path | None, pretraining: Path | None = None, **fields) -> CorpusSettings:
    fields = {"prepare_workers": 1, "max_rejected_fraction": 1.0, **fields}
    return CorpusSettings(
        instruction_tuning_data_dir=directory and str(directory),
        pretraining_data_dir=pretraining and str(pretraining),
        **fields,
    )


def write(directory: Path, **files: list | str | bytes) -> Path:
    """Files by name (``__`` is a dot, ``___`` a slash): a list is written as a JSON array."""
    for name, content in files.items():
        path = directory / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content) if isinstance(content, list) else content
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    return directory


def pairs(start: int, stop: int) -> list[dict]:
    return [
        {"input": f"in {number}", "target": f"out {number} " + "x" * (number % 50)} for number in range(start, stop)
    ]


def all_texts(result: RecordsResult) -> list[list[str]]:
    return [
        texts for unit in result.units for texts in read_arrow(Path(unit.path) / "records.arrow")["texts"].to_pylist()
    ]


def contents(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.glob("*/*/*") if path.is_file()}


def check_places(result: RecordsResult) -> None:
    """Every ledger line points at the record's bytes; the valid ones in order make up records.arrow."""
    for unit in result.units:
        ledger = ledger_table(unit)
        reasons = ledger["reason"].to_pylist()
        places = zip(*(ledger[name].to_pylist() for name in ("file", "line", "offset", "length")), strict=True)
        for file, line, offset, length in places:
            data = Path(file).read_bytes()
            assert 0 <= offset <= offset + length <= len(data)
            assert data[:offset].count(b"\n") + 1 == line
        rows = read_arrow(Path(unit.path) / "records.arrow")
        assert rows["line"].to_pylist() == [index for index, reason in enumerate(reasons) if reason is None]
        valid_hashes = [
            value for value, reason in zip(ledger["hash"].to_pylist(), reasons, strict=True) if reason is None
        ]
        assert rows["hash"].to_pylist() == valid_hashes
        assert (len(reasons), len(rows)) == (unit.records, unit.valid)


def test_the_files_of_a_unit(tmp_path):
    lines = (
        '{"input": "a", "target": "b"}\n{"input": 5, "target": "b"}\n\nnonsense\n{"instruction": "i", "output": "o"}\n'
    )
    result = shard_records(corpus(write(tmp_path / "in", a__jsonl=lines)), tmp_path / "cache")
    (unit,) = result.units
    rows = read_arrow(Path(unit.path) / "records.arrow")
    assert rows["line"].to_pylist() == [0, 3]
    assert rows["roles"].to_pylist() == [[Role.USER, Role.ASSISTANT]] * 2
    assert rows["texts"].to_pylist() == [["a", "b"], ["i", "o"]]
    ledger = ledger_table(unit)
    assert ledger["line"].to_pylist() == [1, 2, 4, 5]
    assert ledger["offset"].to_pylist() == [0, 30, 59, 68]
    assert ledger["length"].to_pylist() == [29, 27, 8, 35]
    assert ledger["reason"].to_pylist() == [None, "wrong_type", "malformed_json", None]
    assert [value is None for value in ledger["hash"].to_pylist()] == [False, True, True, False]
    assert set(ledger["file"].to_pylist()) == {str(tmp_path / "in/a.jsonl")}
    assert (Path(unit.path) / "quarantine.bin").read_bytes() == b'{"input": 5, "target": "b"}\nnonsense\n'
    assert (result.records, result.valid, result.rejected) == (4, 2, {"malformed_json": 1, "wrong_type": 1})
    assert (unit.kind, unit.source, result.files, result.bytes) == ("instruction", "instruction", 1, len(lines))
    assert RecordsResult.model_validate_json(result.model_dump_json()) == result
    check_places(result)


def test_order_sources_and_names(tmp_path):
    text = json.dumps([PAIR])
    write(tmp_path / "in", b__json=text, a___z__jsonl=text, a___y___x__json=text, _hidden__txt=text, notes__txt=text)
    write(tmp_path / "in", __secret___a__json=text)
    write(tmp_path / "pre", c__json='{"text": "x"}')
    files = find_files(corpus(tmp_path / "in", tmp_path / "pre"))
    assert [(Path(file.path).name, file.source) for file in files] == [
        ("x.json", "instruction/a"),
        ("z.jsonl", "instruction/a"),
        ("b.json", "instruction"),
        ("c.json", "pretraining"),
    ]


def test_nothing_to_read_is_said_clearly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match=r"(?s)instruction_tuning_data_dir: .*nowhere does not exist"):
        shard_records(corpus(tmp_path / "nowhere"), tmp_path)
    with pytest.raises(CorpusError, match=r"empty holds no \.json"):
        shard_records(corpus(tmp_path / "empty"), tmp_path)
    with pytest.raises(CorpusError, match="No corpus: give"):
        shard_records(corpus(None), tmp_path)
    with pytest.raises(CorpusError, match=r"(?s)instruction_tuning does not exist.*pretraining does not exist"):
        shard_records(CorpusSettings(), tmp_path)
    write(tmp_path / "in", a__json="[]", b__jsonl="\n")
    with pytest.raises(CorpusError, match="No usable record in 2 files: all are empty"):
        shard_records(corpus(tmp_path / "in"), tmp_path)
    with pytest.raises(CorpusError, match="is a file"):
        shard_records(corpus(tmp_path / "in/a.json"), tmp_path)


def test_a_default_directory_may_be_missing_if_the_other_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "dataset/pretraining", a__jsonl='{"text": "x"}\n')
    assert shard_records(CorpusSettings(), tmp_path / "cache").valid == 1


def test_too_many_rejected_names_the_files(tmp_path):
    bad = [{"input": "x", "target": ""}] * 3
    write(tmp_path / "in", a__json=pairs(0, 10), b__json=[PAIR, *bad], c__jsonl='{"input": "x"}\n' + json.dumps(PAIR))
    with pytest.raises(CorpusError) as error:
        shard_records(corpus(tmp_path / "in", max_rejected_fraction=0.1), tmp_path / "cache")
    message = str(error.value)
    assert "4 of 16 records are rejected, more than max_rejected_fraction=0.1" in message
    assert "b.json: 3 rejected, first at line 1: empty_target" in message
    assert "c.jsonl: 1 rejected, first at line 1: missing_field" in message
    assert "a.json" not in message
    assert shard_records(corpus(tmp_path / "in", max_rejected_fraction=0.25), tmp_path / "cache").reused == 3


def test_the_same_again_and_one_file_more(tmp_path):
    directory = write(tmp_path / "in", a__json=pairs(0, 10), c__json=pairs(20, 30))
    first = shard_records(corpus(directory), tmp_path / "cache")
    again = shard_records(corpus(directory), tmp_path / "cache")
    assert (first.reused, first.built, again.reused, again.built) == (0, 2, 2, 0)
    assert again.fingerprint == first.fingerprint
    write(directory, b__json=pairs(10, 20))
    more = shard_records(corpus(directory), tmp_path / "cache")
    assert (more.reused, more.built) == (2, 1)
    assert more.fingerprint != first.fingerprint
    assert all_texts(more) == [[row["input"], row["target"]] for row in pairs(0, 30)]
    os.rename(directory / "a.json", directory / "z.json")
    os.utime(directory / "c.json", (1, 1))
    moved = shard_records(corpus(directory), tmp_path / "cache")
    assert (moved.reused, moved.built) == (3, 0)


def test_the_same_content_twice_is_read_once_and_counted_twice(tmp_path):
    directory = write(tmp_path / "in", a__json=pairs(0, 10), b__json=pairs(0, 10))
    result = shard_records(corpus(directory), tmp_path / "cache")
    assert (result.records, len(result.units), len(store.directories(tmp_path / "cache/records"))) == (20, 2, 1)
    assert [unit.files[0].path[-6:] for unit in result.units] == ["a.json", "b.json"]


def unit_fingerprints(settings: CorpusSettings) -> list[str]:
    return [spec.fingerprint for spec in plan_units(find_files(settings), settings, 1)]


def test_what_changes_the_fingerprint_and_what_does_not(tmp_path, monkeypatch):
    directory = write(tmp_path / "in", a__json=pairs(0, 5))
    before = unit_fingerprints(corpus(directory))
    same = {
        "prepare_workers": 3,
        "max_rejected_fraction": 0.5,
        "deduplicate": "none",
        "near_duplicate_threshold": 0.5,
        "validation_fraction": 0.5,
    }
    for name, value in same.items():
        assert unit_fingerprints(corpus(directory, **{name: value})) == before, name
    elsewhere = shutil.copytree(directory, tmp_path / "elsewhere")
    assert unit_fingerprints(corpus(elsewhere)) == before
    assert unit_fingerprints(corpus(None, elsewhere)) != before
    reader = {"_target_": "users_functions.read_semicolons"}
    assert unit_fingerprints(corpus(directory, reader=reader)) != before
    assert unit_fingerprints(corpus(directory, reader=reader)) != unit_fingerprints(
        corpus(directory, reader={**reader, "skip": 1})
    )
    monkeypatch.setattr(store, "FORMAT_VERSION", 99)
    assert unit_fingerprints(corpus(directory)) != before
    monkeypatch.undo()
    write(directory, a__json=pairs(0, 6))
    assert unit_fingerprints(corpus(directory)) != before


def big_array(num_records: int, broken: tuple[int, ...] = ()) -> str:
    return "[\n" + ",\n".join(partly_broken(num_records, broken, indent=2)) + "\n]\n"


def partly_broken(num_records: int, broken: tuple[int, ...], indent: int | None) -> list[str]:
    texts = [json.dumps(record, indent=indent) for record in pairs(0, num_records)]
    for number in broken:
        texts[number] = texts[number].replace('",', "", 1)
    return texts


@pytest.mark.parametrize("broken", [(), (3, 500, 501, 999), tuple(range(0, 1000, 7))])
@pytest.mark.parametrize("form", ["array", "lines"])
def test_parts_of_a_large_file_give_what_the_whole_gives(tmp_path, monkeypatch, form, broken):
    text = big_array(1000, broken)
    if form == "lines":
        text = "\n".join(partly_broken(1000, broken, indent=None))
    directory = write(tmp_path / "in", a__json=text)
    whole = shard_records(corpus(directory), tmp_path / "whole")
    monkeypatch.setattr(corpus_module, "PART_BYTES", 5000)
    parts = shard_records(corpus(directory), tmp_path / "parts")
    assert len(whole.units) == 1 and len(parts.units) > 3
    assert all_texts(parts) == all_texts(whole)
    assert (parts.records, parts.rejected, parts.bytes) == (whole.records, whole.rejected, whole.bytes)
    one, many = ledger_table(whole.units[0]), [ledger_table(unit) for unit in parts.units]
    for name in ("line", "offset", "length", "hash", "reason"):
        assert [value for table in many for value in table[name].to_pylist()] == one[name].to_pylist()
    check_places(parts)


def test_a_cut_inside_a_record_is_noticed_and_mended(tmp_path, monkeypatch):
    """Records whose first key is also that of an object inside them: the guessed border can be a wrong one."""
    records = [
        {"messages": [{"role": "user", "content": "q" * 30}], "more": [{"messages": []}, {"messages": []}]}
        for _ in range(99)
    ]
    for number, record in enumerate(records):
        record["messages"].append({"role": "assistant", "content": f"answer {number}"})
    monkeypatch.setattr(corpus_module, "PART_BYTES", 1000)
    result = shard_records(corpus(write(tmp_path / "in", a__json=records)), tmp_path / "cache")
    assert (result.valid, result.rejected) == (99, {})
    assert [texts[1] for texts in all_texts(result)] == [f"answer {number}" for number in range(99)]


def test_appending_to_a_large_file_keeps_its_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "PART_BYTES", 5000)
    lines = [json.dumps(record) + "\n" for record in pairs(0, 1000)]
    directory = write(tmp_path / "in", a__jsonl="".join(lines[:900]))
    first = shard_records(corpus(directory), tmp_path / "cache")
    write(directory, a__jsonl="".join(lines))
    more = shard_records(corpus(directory), tmp_path / "cache")
    assert more.reused >= len(first.units) - 2
    assert all_texts(more) == [[row["input"], row["target"]] for row in pairs(0, 1000)]


def test_many_small_files_share_units_and_a_new_one_costs_its_neighbours(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "GROUP_BYTES", 2000)
    names = {f"f{number:04}__json": pairs(number * 5, number * 5 + 5) for number in range(200)}
    directory = write(tmp_path / "in", **names)
    first = shard_records(corpus(directory), tmp_path / "cache")
    assert 5 < len(first.units) < 100
    assert all_texts(first) == [[row["input"], row["target"]] for row in pairs(0, 1000)]
    assert [file.path for unit in first.units for file in unit.files] == sorted(map(str, directory.iterdir()))
    check_places(first)
    write(directory, f0100b__json=[PAIR])
    assert shard_records(corpus(directory), tmp_path / "cache").built <= 2


@pytest.mark.parametrize("workers", [2, 5])
def test_the_number_of_workers_changes_no_byte(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(corpus_module, "PART_BYTES", 5000)
    monkeypatch.setattr(records_module, "MIN_BYTES_FOR_PROCESSES", 0)
    directory = write(tmp_path / "in", a__json=big_array(500, (7, 8)), b__json=pairs(0, 100))
    one = shard_records(corpus(directory), tmp_path / "one")
    many = shard_records(corpus(directory, prepare_workers=workers), tmp_path / "many")
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    assert many.fingerprint == one.fingerprint


def test_a_compressed_file_becomes_a_series_of_directories(tmp_path, monkeypatch):
    monkeypatch.setattr(unit_module, "MAX_TEXT_BYTES", 20_000)
    monkeypatch.setattr(unit_module, "BATCH_BYTES", 5_000)
    monkeypatch.setattr(source_module, "WINDOW_BYTES", 5_000)
    text = big_array(1000, (500,)).encode()
    result = shard_records(corpus(write(tmp_path / "in", a__json__gz=gzip.compress(text))), tmp_path / "cache")
    assert len(result.units) > 2
    whole = shard_records(corpus(write(tmp_path / "plain", a__json=text)), tmp_path / "plain_cache")
    assert all_texts(result) == all_texts(whole)
    for name in ("line", "offset", "length", "reason"):
        parts = [value for unit in result.units for value in ledger_table(unit)[name].to_pylist()]
        assert parts == [value for unit in whole.units for value in ledger_table(unit)[name].to_pylist()]
    before = contents(tmp_path / "cache")
    again = shard_records(corpus(tmp_path / "in"), tmp_path / "cache")
    assert (again.reused, again.built, again.fingerprint) == (len(result.units), 0, result.fingerprint)
    for unit in (result.units[0], result.units[2]):
        store.discard(Path(unit.path))
        assert shard_records(corpus(tmp_path / "in"), tmp_path / "cache").fingerprint == result.fingerprint
        assert contents(tmp_path / "cache") == before


def test_progress_reports_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(records_module, "PROGRESS_SECONDS", 0)
    directory = write(tmp_path / "in", a__json=[PAIR], b__json=[PAIR, PAIR])
    calls = []
    shard_records(corpus(directory), tmp_path / "cache", lambda *call: calls.append(call))
    total = sum(path.stat().st_size for path in directory.iterdir())
    assert calls[-1] == ("records", total, total, "bytes")
    assert [done for _, done, _, _ in calls] == sorted(done for _, done, _, _ in calls)


def test_a_users_reader(tmp_path):
    directory = write(tmp_path / "in", a__csv="head;er\na;b\nc;\n")
    reader = {"_target_": "users_functions.read_semicolons", "skip": 1}
    result = shard_records(corpus(directory, reader=reader), tmp_path / "cache")
    assert all_texts(result) == [["a", "b"]]
    ledger = ledger_table(result.units[0])
    assert (ledger["line"].to_pylist(), ledger["offset"].to_pylist()) == ([1, 2], [-1, -1])
    assert ledger["reason"].to_pylist() == [None, "empty_target"]
    assert (Path(result.units[0].path) / "quarantine.bin").read_bytes() == b'{"input":"c","target":""}\n'


def test_a_users_reader_that_yields_what_is_no_record(tmp_path):
    directory = write(tmp_path / "in", a__csv="")
    reader = {"_target_": "users_functions.read_wildly"}
    result = shard_records(corpus(directory, reader=reader), tmp_path / "cache")
    reasons = ledger_table(result.units[0])["reason"].to_pylist()
    assert reasons == [None, "unknown_shape", "wrong_type", "invalid_utf8"]


@pytest.mark.parametrize(
    ("reader", "message"),
    [
        (
            {"_target_": "users_functions.read_semicolons"},
            "failed on .*a.csv after 0 records: ValueError",
        ),
        ({"_target_": "users_functions.nothing"}, "cannot import"),
        ({"_target_": "no_such_module.nothing"}, "no module no_such_module"),
    ],
)
def test_a_users_reader_that_fails(tmp_path, reader, message):
    directory = write(tmp_path / "in", a__csv="no semicolon")
    with pytest.raises(PandaError, match=message):
        shard_records(corpus(directory, reader=reader), tmp_path / "cache")


def test_a_users_reader_that_hangs_is_ended(tmp_path, monkeypatch):
    """Also one that goes on whatever is raised."""
    monkeypatch.setattr(targets, "LONGEST_SECONDS", 0.2)
    before = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[1]
    directory = write(tmp_path / "in", a__csv="")
    with pytest.raises(CorpusError, match=r"failed on .*a\.csv after 1 records: TimeoutError: no result after 0\.2 s"):
        shard_records(corpus(directory, reader={"_target_": "users_functions.read_and_wait"}), tmp_path / "cache")
    assert (signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[1]) == before


def test_a_flipped_byte_is_named_and_rebuilt(tmp_path):
    directory = write(tmp_path / "in", a__json=pairs(0, 100), b__json=pairs(100, 200))
    first = shard_records(corpus(directory), tmp_path / "cache")
    before = contents(tmp_path / "cache")
    path = Path(first.units[1].path)
    data = bytearray((path / "records.arrow").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "records.arrow").write_bytes(data)
    damaged = {directory.name: store.verify(directory) for directory in store.directories(tmp_path / "cache/records")}
    assert {name: files for name, files in damaged.items() if files} == {path.name: ["records.arrow"]}
    store.discard(path)
    again = shard_records(corpus(directory), tmp_path / "cache")
    assert (again.reused, again.built) == (1, 1)
    assert contents(tmp_path / "cache") == before


SCRIPT = textwrap.dedent("""
    import sys
    from pathlib import Path
    from data_prep.records import files, shard
    from data_prep.settings import CorpusSettings

    if __name__ == "__main__":
        files.PART_BYTES, shard.MIN_BYTES_FOR_PROCESSES = 200_000, 0
        settings = CorpusSettings(
            instruction_tuning_data_dir=sys.argv[1], pretraining_data_dir=None, prepare_workers=int(sys.argv[3])
        )
        print("started", flush=True)
        print(shard.shard_records(settings, Path(sys.argv[2])).built, flush=True)
""")


def start_preparation(tmp_path: Path, cache: str, workers: int) -> subprocess.Popen:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "in"), str(tmp_path / cache), str(workers)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        start_new_session=True,
    )


def members(session: int) -> list[int]:
    """The living processes of a session (its workers included)."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_moment_and_run_again_gives_the_same_bytes(tmp_path, workers):
    directory = write(tmp_path / "in", a__json=big_array(40_000, (7, 20_000)), b__json=pairs(0, 10_000))
    finished = start_preparation(tmp_path, "whole", 1)
    assert finished.communicate(timeout=120)[0].split() == [b"started", b"18"]
    kills = 0
    for delay in (0.02, 0.1, 0.25, 0.4, 0.6):
        process = start_preparation(tmp_path, "killed", workers)
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        deadline = time.monotonic() + 20
        while members(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert members(process.pid) == []  # the workers died with it
    assert kills > 1
    process = start_preparation(tmp_path, "killed", workers)
    process.communicate(timeout=120)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert list((tmp_path / "killed/records").glob(".*")) == []
    assert directory.exists()


def test_two_preparations_at_once(tmp_path):
    write(tmp_path / "in", a__json=big_array(20_000))
    both = [start_preparation(tmp_path, "both", workers) for workers in (1, 2)]
    for process in both:
        process.communicate(timeout=120)
        assert process.returncode == 0
    start_preparation(tmp_path, "one", 1).communicate(timeout=120)
    assert contents(tmp_path / "both") == contents(tmp_path / "one")


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    directory = write(tmp_path / "in", a__json=pairs(0, 5))

    def plan_and_write(*arguments):
        specs = list(plan_units(*arguments))
        write(directory, a__json=pairs(0, 6))
        return specs

    monkeypatch.setattr(records_module, "plan_units", plan_and_write)
    with pytest.raises(CorpusError, match=r"a\.json changed while it was read"):
        shard_records(corpus(directory), tmp_path / "cache")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(st.lists(st.one_of(st.just(json.dumps(PAIR).encode()), st.binary(max_size=40)), max_size=12))
def test_whatever_the_bytes_are_records_in_is_valid_plus_rejected(tmp_path, lines):
    directory = write(tmp_path / "in", a__jsonl=b"\n".join(lines), b__jsonl=json.dumps(PAIR))
    result = shard_records(corpus(directory), tmp_path / "cache")
    assert result.records == result.valid + sum(result.rejected.values())
    assert result.valid >= 1
    check_places(result)
    assert set(result.rejected) <= set(Reason)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real corpora at {REAL} (PANDA_REAL_CORPORA)")
def test_the_real_corpora(tmp_path):
    settings = corpus(REAL / "instruction_tuning", REAL / "pretraining", max_rejected_fraction=0)
    result = shard_records(settings, tmp_path)
    assert (result.records, result.valid, result.rejected) == (2390, 2390, {})
    check_places(result)
    lengths = np.array([len(texts) for texts in all_texts(result)])
    assert set(lengths.tolist()) == {1, 2, 3}


def test_rejected_bytes_are_kept_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(unit_module, "QUARANTINE_BYTES", 100)
    folder = tmp_path / "corpus"
    folder.mkdir()
    bad = [f'{{"input": "broken {number:04}"' for number in range(20)]
    (folder / "a.jsonl").write_text("\n".join([json.dumps(PAIR), *bad, json.dumps(PAIR), ""]))
    result = shard_records(corpus(folder), tmp_path / "cache")
    assert result.rejected == {"malformed_json": 20}
    kept = (Path(result.units[0].path) / "quarantine.bin").read_text().splitlines()
    assert kept == bad[: len(kept)] and 0 < sum(len(line) + 1 for line in kept) <= 100
    assert len(ledger_table(result.units[0])) == 22


def test_a_user_reader_is_held_to_the_limit_of_a_record_too(tmp_path, monkeypatch):
    monkeypatch.setattr(unit_module, "MAX_RECORD_BYTES", 1000)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "long_reader.py").write_text(
        'def read(path):\n    return [{"input": "a", "target": "b" * n} for n in (1, 2000)]\n'
    )
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("x")
    result = shard_records(corpus(folder, reader={"_target_": "long_reader.read"}), tmp_path / "cache")
    assert (result.valid, result.rejected) == (1, {"oversized_record": 1})
