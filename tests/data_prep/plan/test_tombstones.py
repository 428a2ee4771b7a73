"""Records taken down: no plan uses them, all their copies are gone, and the ledger says so."""

import json
from pathlib import Path

import pytest

from data_prep.errors import PandaError
from data_prep.plan import tombstones
from data_prep.plan.build import plan_rows
from data_prep.records.reasons import Reason
from data_prep.records.shard import read_arrow, shard_records
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
from data_prep.tokens.tokenize import tokenize_records

HASH = "0123456789abcdef" * 2


def ledger_of(plan) -> list[dict]:
    return read_arrow(Path(plan.path) / "ledger.arrow").to_pylist()


@pytest.fixture
def planned(tmp_path, bytes_dir):
    """A function that plans a small corpus with the tombstones of the moment."""
    data = tmp_path / "instruction"
    data.mkdir()
    pairs = [{"input": f"question {i % 4}", "target": f"answer {i % 4}"} for i in range(6)]
    (data / "a.json").write_text(json.dumps(pairs))
    corpus = CorpusSettings(
        instruction_tuning_data_dir=str(data), pretraining_data_dir=None, validation_fraction=0,
        tombstones=str(tmp_path / "tombstones.jsonl"),
    )  # fmt: skip

    def plan():
        records = shard_records(corpus, tmp_path / "cache")
        tokens = tokenize_records(records, TokenizeSettings(), bytes_dir, tmp_path / "cache", 1)
        return plan_rows(tokens, corpus, PackSettings(max_seq_length=64), tmp_path / "cache")

    return plan


def test_a_tombstone_drops_a_record_and_its_copies_and_changes_the_plan(planned, tmp_path):
    before = planned()
    first = ledger_of(before)[0]
    tombstones.append(tmp_path / "tombstones.jsonl", [{"hash": first["hash"].hex(), "record": "a.json:1"}])
    after = planned()
    assert before.fingerprint != after.fingerprint
    reasons = [row["reason"] for row in ledger_of(after)]
    assert reasons == [Reason.TAKEN_DOWN, None, None, None, Reason.TAKEN_DOWN, Reason.DUPLICATE]
    assert after.report["dropped"] == {"duplicate": 1, "taken_down": 2}
    (tmp_path / "tombstones.jsonl").unlink()
    again = planned()
    assert again.fingerprint == before.fingerprint and again.reused


def test_a_last_line_that_a_person_left_without_its_end_is_kept(tmp_path):
    path = tmp_path / "tombstones.jsonl"
    path.write_text(json.dumps({"hash": HASH}))
    other = HASH[::-1]
    tombstones.append(path, [{"hash": other}])
    assert tombstones.read(path) == sorted([HASH, other])
    path.write_text("not a tombstone, and nobody's to remove")
    with pytest.raises(PandaError, match="not a tombstone"):
        tombstones.append(path, [{"hash": other}])
    assert path.read_text() == "not a tombstone, and nobody's to remove"


def test_appending_again_adds_nothing(tmp_path):
    path = tmp_path / "list" / "tombstones.jsonl"
    assert tombstones.append(path, [{"hash": HASH, "note": "a wish"}]) == [{"hash": HASH, "note": "a wish"}]
    assert tombstones.append(path, [{"hash": HASH}]) == []
    assert tombstones.read(path) == [HASH]
    assert tombstones.read(tmp_path / "none") == []


@pytest.mark.parametrize("line", ["nonsense", "{}", '{"hash": "12"}', '{"hash": "zz"}', "[]"])
def test_a_line_that_is_no_tombstone_stops_the_run(tmp_path, line):
    path = tmp_path / "tombstones.jsonl"
    path.write_text(json.dumps({"hash": HASH}) + "\n" + line + "\n")
    with pytest.raises(PandaError, match=r"tombstones.jsonl:2: not a tombstone"):
        tombstones.read(path)
