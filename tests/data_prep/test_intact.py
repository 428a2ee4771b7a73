"""What was damaged after it was made is made again, or named; what was verified is not read again."""

import json
import os
from pathlib import Path

import pytest

from data_prep import intact, pipeline, store
from data_prep.errors import StoreError
from data_prep.plan.reader import open_plan
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings

FILES = ["plans/*/plan-train.arrow", "plans/*/ledger.arrow", "tokens/*/tokens.arrow", "records/*/records.arrow"]


def flip(path: Path, keep_stamp: bool = False) -> None:
    """One bit in the middle, as a disk does it; sizes say nothing."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    if keep_stamp:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def prepare(tmp_path, bytes_dir):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    records = [{"input": f"question {number}", "target": f"answer {number}"} for number in range(50)]
    (corpus / "a.json").write_text(json.dumps(records))
    settings = CorpusSettings(instruction_tuning_data_dir=str(corpus), pretraining_data_dir=None, prepare_workers=1)

    def run():
        pack = PackSettings(max_seq_length=64)
        return pipeline.prepare(settings, TokenizeSettings(), pack, bytes_dir, tmp_path / "cache")

    return run


@pytest.mark.parametrize("pattern", FILES)
def test_a_flipped_bit_is_made_good(tmp_path, prepare, caplog, pattern):
    plan = Path(prepare().path)
    rows = open_plan(plan, "train").batch(open_plan(plan, "train").row_tokens[:1] * 0).input_ids.tolist()
    prepare()  # all of it is verified now
    damaged = next((tmp_path / "cache").glob(pattern))
    good = damaged.read_bytes()
    flip(damaged)
    prepare()
    assert damaged.read_bytes() == good
    assert f"{damaged.parent}: damaged ({damaged.name}); it is made again" in caplog.text
    assert open_plan(plan, "train").batch(open_plan(plan, "train").row_tokens[:1] * 0).input_ids.tolist() == rows


def test_what_was_verified_is_not_read_again(tmp_path, prepare, monkeypatch):
    prepare()
    prepare()
    monkeypatch.setattr(store, "verify", lambda path: pytest.fail(f"{path} is read again"))
    assert prepare().reused


def test_what_cannot_be_made_again_is_named_with_the_command(tmp_path, prepare):
    plan = Path(prepare().path)
    flip(plan / "plan-train.arrow")
    flip(plan / "ledger.arrow")
    with pytest.raises(StoreError) as caught:
        intact.require_intact(tmp_path / "cache", [plan])
    assert "plan-train.arrow" in str(caught.value) and "ledger.arrow" in str(caught.value)
    assert str(caught.value).endswith(
        "panda verify --discard removes what is damaged, and the next preparation makes it again"
    )


@pytest.mark.parametrize("content", ["", "[]", "{", '{"plans/x": 1}'])
def test_a_damaged_list_of_what_was_verified_means_reading_again(tmp_path, prepare, content):
    plan = Path(prepare().path)
    prepare()
    (tmp_path / "cache" / intact.VERIFIED).write_text(content)
    flip(plan / "plan-train.arrow", keep_stamp=True)
    assert list(intact.damaged(tmp_path / "cache", [plan])) == [plan]
