"""Checkpoints on disk: the newest whole one is found, damaged ones are skipped, the last good one is never at risk."""

import json
import logging

import pytest
import torch

from training.distributed import Ranks
from training.engines.engine import WEIGHT, share
from training.errors import CheckpointError
from training.planning.memory import disk_bytes
from training.settings import CheckpointSettings
from training.trainer import checkpoint, saver
from training.trainer.checkpoint import COMPLETE, Progress, name_of
from training.trainer.saver import Saver


class Alone(Ranks):
    """One rank that asks nobody."""

    def _reduced(self, values, operation):
        return list(values)


RANKS = Alone(0, 0, 1, torch.device("cpu"))


class Shelf:
    """An engine as a checkpoint sees one: parameters by name, of which a rank has a part."""

    def __init__(self, ranks=RANKS, **states):
        self.ranks, self.states = ranks, states

    def trained(self):
        return list(self.states)

    def read(self):
        for name, state in self.states.items():
            yield name, {key: share(value, self.ranks) for key, value in state.items()}

    def write(self, name, states):
        self.states[name] = {key: stored.whole() for key, stored in states.items()}


def shelf(value: float) -> Shelf:
    state = {WEIGHT: torch.full((2, 3), value), "exp_avg": torch.full((2, 3), -value), "step": torch.tensor(value)}
    return Shelf(**{"layer.weight": state, "layer.bias": {WEIGHT: torch.full((3,), value)}})


def save(root, step: int) -> None:
    writer = Saver(root, RANKS)
    writer.save(shelf(float(step)), Progress(step=step, rows_per_step=8, first_loss=2.5))
    writer.wait()


def test_what_is_saved_is_what_is_loaded(tmp_path):
    save(tmp_path, 4)
    engine = shelf(0.0)
    newest = checkpoint.newest(tmp_path, RANKS)
    checkpoint.load(engine, newest)
    for name, state in shelf(4.0).states.items():
        assert set(engine.states[name]) == set(state)
        assert all(torch.equal(engine.states[name][key], state[key]) for key in state)
    assert checkpoint.read_progress(newest) == Progress(step=4, rows_per_step=8, first_loss=2.5)


def test_large_states_go_into_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(saver, "FILE_BYTES", 1)
    save(tmp_path, 1)
    assert len(list(tmp_path.glob("*/state-*.safetensors"))) == 4
    engine = shelf(0.0)
    checkpoint.load(engine, checkpoint.newest(tmp_path, RANKS))
    assert engine.states["layer.bias"][WEIGHT].tolist() == [1, 1, 1]


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def other_text(path, before, after):
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


DAMAGES = {
    "byte": lambda directory: flip_a_byte(directory / "state-00000-00000.safetensors"),
    "truncated": lambda directory: (directory / "state-00000-00000.safetensors").write_bytes(b"short"),
    "missing file": lambda directory: (directory / "state-00000-00000.safetensors").unlink(),
    "no marker": lambda directory: (directory / COMPLETE).unlink(),
    "half a marker": lambda directory: (directory / COMPLETE).write_text('{"format_version": 1, "fil'),
    "other version": lambda directory: (directory / COMPLETE).write_text('{"format_version": 99, "files": {}}'),
    "marker of another step": lambda directory: other_text(directory / COMPLETE, '"step": 4', '"step": 6'),
    "marker of another shape": lambda directory: (directory / COMPLETE).write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped(tmp_path, damage, caplog):
    for step in (2, 4):
        save(tmp_path, step)
    DAMAGES[damage](tmp_path / name_of(4))
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(tmp_path, RANKS) == tmp_path / name_of(2)
    assert damage == "no marker" or "step-000004: skipped" in caplog.text


def test_a_damaged_checkpoint_is_written_again_when_its_step_comes_again(tmp_path):
    save(tmp_path, 4)
    DAMAGES["byte"](tmp_path / name_of(4))
    save(tmp_path, 4)
    assert checkpoint.newest(tmp_path, RANKS) == tmp_path / name_of(4)
    checkpoint.prune(tmp_path, keep_last=1, best_step=None)
    assert [path.name for path in tmp_path.iterdir()] == [name_of(4)]


def test_none_when_there_is_none(tmp_path):
    assert checkpoint.newest(tmp_path, RANKS) is None


def test_prune_keeps_the_last_and_the_best_and_removes_leftovers(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (tmp_path / ".step-000005-123").mkdir()
    checkpoint.prune(tmp_path, keep_last=2, best_step=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name_of(step) for step in (1, 3, 4)]


def test_a_damaged_checkpoint_does_not_push_out_a_good_one(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / name_of(3) / COMPLETE).unlink()
    checkpoint.prune(tmp_path, keep_last=1, best_step=None)
    assert checkpoint.newest(tmp_path, RANKS) == tmp_path / name_of(2)


def test_what_a_resumed_run_skipped_is_gone_before_it_could_push_out_a_good_one(tmp_path):
    for step in (2, 4):
        save(tmp_path, step)
    DAMAGES["byte"](tmp_path / name_of(4))
    checkpoint.discard_after(tmp_path, checkpoint.read_progress(checkpoint.newest(tmp_path, RANKS)).step)
    save(tmp_path, 3)
    checkpoint.prune(tmp_path, keep_last=1, best_step=None)
    assert [path.name for path in tmp_path.iterdir()] == [name_of(3)]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save(tmp_path, 1)
    other = Shelf(**{"layer.weight": {WEIGHT: torch.zeros(2, 3)}})
    with pytest.raises(CheckpointError, match=r"holds layer.bias, which is not trained"):
        checkpoint.load(other, checkpoint.newest(tmp_path, RANKS))
    wider = shelf(0.0)
    wider.states["extra.weight"] = {WEIGHT: torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"lacks 1 trained parameters, first extra.weight"):
        checkpoint.load(wider, checkpoint.newest(tmp_path, RANKS))


def test_disk_need_is_refused_before_the_start(tmp_path):
    settings = CheckpointSettings(keep_last=2, keep_best=True)
    assert disk_bytes(num_trained=10**9, num_saved=10**8, settings=settings) == 48 * 10**9 + 4 * 10**8
    with pytest.raises(CheckpointError, match=r"need 1000000.00 GB.*lower keep_last"):
        checkpoint.check_disk(tmp_path, 10**15)
    checkpoint.check_disk(tmp_path, 1)


def test_the_marker_is_readable_json_with_sizes_and_hashes(tmp_path):
    save(tmp_path, 1)
    marker = json.loads((tmp_path / name_of(1) / COMPLETE).read_text())
    assert marker["progress"]["step"] == 1
    assert {name: set(entry) for name, entry in marker["files"].items()} == {
        "state-00000-00000.safetensors": {"bytes", "xxh3"}
    }
