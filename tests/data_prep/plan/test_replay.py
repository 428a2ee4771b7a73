"""Going on from an earlier model: new records all, of the old ones a share that is stable from plan to plan."""

import json
from pathlib import Path

import pytest

from data_prep.errors import CorpusError
from data_prep.plan.build import plan_rows
from data_prep.records.shard import read_arrow, shard_records
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
from data_prep.tokens.tokenize import tokenize_records


@pytest.fixture
def planned(tmp_path, bytes_dir):
    """A function that plans a corpus of so many files of 200 records."""
    data = tmp_path / "instruction"
    data.mkdir()

    def plan(num_files: int, **settings):
        for number in range(num_files):
            records = [{"input": f"question {number} {i}", "target": f"answer {i}"} for i in range(200)]
            (data / f"{number}.json").write_text(json.dumps(records))
        corpus = CorpusSettings(instruction_tuning_data_dir=str(data), pretraining_data_dir=None, **settings)
        records = shard_records(corpus, tmp_path / "cache")
        tokens = tokenize_records(records, TokenizeSettings(), bytes_dir, tmp_path / "cache", 1)
        return plan_rows(tokens, corpus, PackSettings(max_seq_length=64), tmp_path / "cache")

    return plan


def trained(plan, number: int) -> set[bytes]:
    """Content of the training records of a file."""
    rows = read_arrow(Path(plan.path) / "ledger.arrow").to_pylist()
    return {row["hash"] for row in rows if row["split"] == "train" and row["file"].endswith(f"{number}.json")}


def test_new_records_all_and_a_share_of_the_old_ones(planned):
    first = planned(1)
    second = planned(2, replay_of=first.path, replay_share=0.25)
    assert trained(second, 1) == trained(planned(2), 1)
    assert trained(second, 0) < trained(first, 0)
    assert 0.15 < len(trained(second, 0)) / len(trained(first, 0)) < 0.35
    assert second.report["dropped"] == {"not_replayed": len(trained(first, 0)) - len(trained(second, 0))}
    assert second.report["validation_records"] == planned(2).report["validation_records"]
    whole = planned(2).report["target_tokens"]
    assert second.report["target_tokens"] + second.report["not_replayed_target_tokens"] == whole


def test_a_larger_share_only_adds_and_none_is_possible(planned):
    first = planned(1)
    quarter, half, none = (planned(2, replay_of=first.path, replay_share=share) for share in (0.25, 0.5, 0))
    assert trained(quarter, 0) < trained(half, 0)
    assert not trained(none, 0)


def test_what_was_left_out_stays_old(planned):
    first = planned(1)
    second = planned(2, replay_of=first.path, replay_share=0.25)
    third = planned(3, replay_of=second.path, replay_share=0.25)
    assert trained(third, 0) == trained(second, 0)
    assert trained(third, 1) < trained(second, 1)


def test_all_of_the_old_ones_is_the_plan_without_replay(planned):
    assert planned(1, replay_of="nowhere", replay_share=1.0).fingerprint == planned(1).fingerprint


def test_a_plan_that_is_not_there_is_named(planned, tmp_path):
    with pytest.raises(CorpusError, match="no plan there"):
        planned(1, replay_of=str(tmp_path / "none"), replay_share=0.5)
