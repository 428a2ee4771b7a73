"""A short slice of `make chaos` with fixed seeds, and that its table shows what is wrong."""

import pytest

from benchmarks.chaos import preparation
from benchmarks.chaos.findings import Round, Row, failures, table
from benchmarks.chaos.fuzz import feed
from benchmarks.chaos.readers import READERS, Reader, Wrong


def test_readers_read_or_refuse(tmp_path):
    """100 mutations of known inputs to each reader: JSON, configuration, checkpoints, requests, ..."""
    found = feed(seed=11, folder=tmp_path, inputs=100)
    assert found.tried >= 100 * (len(READERS) - 2) and not found.findings, found.findings


@pytest.mark.parametrize(("error", "kind"), [(KeyError("x"), "untyped"), (Wrong("x"), "wrong")])
def test_a_fault_of_a_reader_is_found_with_its_input(tmp_path, monkeypatch, error, kind):
    def read(data, _):
        raise error

    monkeypatch.setattr("benchmarks.chaos.readers.READERS", {"broken": Reader(read, (b"seed",))})
    ((found, what),) = feed(seed=1, folder=tmp_path, inputs=5).findings
    assert found == kind and "broken" in what and "input b" in what


def test_damaged_files_of_a_cache_are_named_and_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "FILES", 2)
    monkeypatch.setattr(preparation, "RECORDS", 60)
    found = preparation.damage(seed=3, ground=tmp_path)
    assert found.tried == 10 and not found.findings, found.findings


def test_the_table_counts_what_was_found():
    one, row = Round(tried=4), Row()
    one.found("lost", "a step")
    row.add(one, seconds=2)
    row.add(Round(tried=3), seconds=1)
    lines = table({"kill": row}).splitlines()
    assert lines[1].split() == ["kill", "2", "7", "6", "1", "0", "0", "0", "3"]
    assert lines[2].split() == ["all", *lines[1].split()[1:]]
    assert "--case kill --seed 7 --rounds 1" in failures([("kill", 7, one.findings[0])])
