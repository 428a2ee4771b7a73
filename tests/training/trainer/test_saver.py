"""Checkpoints in the background: complete or not at all, whatever happens to a writer; and what a stop has time for."""

import errno
import json
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from data_prep.errors import DiskError
from data_prep.plan.reader import open_plan
from tests.support import kept
from tests.support.tiny import write_counting_plan
from tests.training.trainer.test_checkpoint import RANKS, Alone, Shelf, shelf
from training.errors import CheckpointError
from training.launch.exits import ExitReason, TrainingStopped, reason_of_error
from training.trainer import checkpoint, loop, saver, state_files
from training.trainer.checkpoint import Progress, name_of
from training.trainer.loop import StopSignal
from training.trainer.saver import NotWritten, Saver

TWO = [Alone(rank, rank, 2, torch.device("cpu")) for rank in range(2)]


@pytest.fixture
def held_disk(monkeypatch):
    """Files are written when the event is set."""
    may_write, write = threading.Event(), state_files.write_pieces

    def write_when_allowed(*arguments):
        assert may_write.wait(30)
        return write(*arguments)

    monkeypatch.setattr(state_files, "write_pieces", write_when_allowed)
    yield may_write
    may_write.set()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, held_disk):
    engine, writer = shelf(4.0), Saver(tmp_path, RANKS)
    writer.save(engine, Progress(step=4))
    engine.states["layer.weight"]["weight"].fill_(99)  # the next step
    assert checkpoint.newest(tmp_path, RANKS) is None
    held_disk.set()
    writer.wait()
    checkpoint.load(engine, checkpoint.newest(tmp_path, RANKS))
    assert engine.states["layer.weight"]["weight"].unique().tolist() == [4.0]
    assert writer.newest_step == 4


def test_a_step_that_has_a_checkpoint_gets_no_second_one(tmp_path):
    writer = Saver(tmp_path, RANKS)
    for _ in range(2):
        writer.save(shelf(4.0), Progress(step=4))
        written = (tmp_path / name_of(4)).stat().st_mtime_ns if writer.writing is None else None
        writer.wait()
    assert written == (tmp_path / name_of(4)).stat().st_mtime_ns


def test_a_writer_that_fails_ends_the_run_with_its_cause(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = Saver(tmp_path, RANKS)
    with monkeypatch.context() as patched:
        patched.setattr(state_files, "write_pieces", full)
        writer.save(shelf(1.0), Progress(step=1))
        writer.writing.thread.join()
    for raises in (writer.check, writer.wait):
        with pytest.raises(
            DiskError, match=r"step-000001: this checkpoint could not be written: No space.*make"
        ) as told:
            raises()
    assert reason_of_error(told.value) is ExitReason.infrastructure
    assert checkpoint.newest(tmp_path, RANKS) is None


def test_of_another_rank_that_fails_nothing_but_that_is_said(tmp_path, held_disk):
    peer = SimpleNamespace(
        **{name: getattr(RANKS, name) for name in ("rank", "is_first", "world_size", "max", "barrier")}
    )
    peer.sum = lambda *numbers: [1.0, *numbers[1:]]
    writer = Saver(tmp_path, RANKS)
    writer.save(shelf(1.0), Progress(step=1))
    writer.ranks = peer
    with pytest.raises(NotWritten, match="could not be written: another rank could not") as told:
        writer.wait()
    assert reason_of_error(told.value) is ExitReason.infrastructure


def test_an_error_that_ends_the_run_leaves_the_checkpoint_under_way_its_time(tmp_path, held_disk):
    writer = Saver(tmp_path, RANKS)
    writer.save(shelf(4.0), Progress(step=4))
    writer.settle(0.1)
    assert checkpoint.newest(tmp_path, RANKS) is None
    threading.Timer(0.2, held_disk.set).start()
    writer.settle(30)
    assert checkpoint.newest(tmp_path, RANKS) == tmp_path / name_of(4)


def test_the_same_step_twice_waits_for_nothing(tmp_path, held_disk):
    """The best loss, and a regular checkpoint at the same step."""
    writer = Saver(tmp_path, RANKS)
    for _ in range(2):
        writer.save(shelf(4.0), Progress(step=4))
    assert writer.writing.under_way


def test_without_the_files_of_a_rank_there_is_no_checkpoint(tmp_path):
    states = shelf(3.0).states
    first = Saver(tmp_path, TWO[0])
    first.save(Shelf(TWO[0], **states), Progress(step=3))
    first.writing.thread.join(timeout=0.3)
    assert first.writing.under_way and checkpoint.newest(tmp_path, RANKS) is None
    saver.write_part(first.writing.directory, 1, saver.snapshot(Shelf(TWO[1], **states)))
    first.wait()
    found = checkpoint.newest(tmp_path, RANKS)
    assert {file.name for file in found.iterdir()} == {
        "complete.json", "state-00000-00000.safetensors", "state-00001-00000.safetensors",
    }  # fmt: skip
    engine = shelf(0.0)
    checkpoint.load(engine, found)
    assert all(torch.equal(engine.states[name][key], states[name][key]) for name in states for key in states[name])
    (found / "state-00001-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pieces of layer.\w+ \(weight\) are missing"):
        checkpoint.load(engine, found)
    assert checkpoint.newest(tmp_path, RANKS) is None


def test_a_rank_reads_the_numbers_it_asks_for(tmp_path):
    numbers = torch.arange(12.0).reshape(3, 4)
    for rank in TWO:
        (tmp_path / "step").mkdir(exist_ok=True)
        saver.write_part(tmp_path / "step", rank.rank, saver.snapshot(Shelf(rank, a={"weight": numbers})))
    stored = state_files.read_index(tmp_path / "step")["a"]["weight"]
    assert (stored.shape, stored.part(4, 5).tolist()) == ((3, 4), [4, 5, 6, 7, 8])
    assert torch.equal(stored.whole(), numbers)


def test_whole_tensors_of_format_1_are_read(tmp_path):
    """A checkpoint that version 0.1 has written."""
    kept.unpack(tmp_path, "killed/checkpoints")
    root = tmp_path / "outputs" / "killed" / "checkpoints"
    found = checkpoint.newest(root, RANKS)
    assert json.loads((found / "complete.json").read_text())["format_version"] == 1
    stored = state_files.read_index(found)
    expected = load_file(found / "state-00000.safetensors")
    assert len(expected) == sum(map(len, stored.values())) > 10
    for name, value in expected.items():
        parameter, key = name.rsplit("|", 1)
        assert torch.equal(stored[parameter][key].whole(), value)
        assert stored[parameter][key].part(0, 1).tolist() == value.flatten()[:1].tolist()


def run_that_is_to_stop(root: Path, **saved) -> SimpleNamespace:
    stop = StopSignal(RANKS)
    stop.obey_together()
    stop._remember(signal.SIGTERM, None)
    return SimpleNamespace(
        settings=SimpleNamespace(
            stop_deadline_seconds=25.0, keep_best=False, keep_last=2, per_gpu_eval_batch_size=2
        ),
        ranks=RANKS, stop=stop, saver=Saver(root, RANKS, **saved), checkpoints=root, engine=shelf(1.0),
        turn_to=lambda part, step: None,
    )  # fmt: skip


def test_a_stop_writes_a_checkpoint_where_there_is_time(tmp_path):
    with pytest.raises(TrainingStopped, match=r"stopped after step 7; step-000007 is there"):
        loop.leave(run_that_is_to_stop(tmp_path, newest_step=4, seconds=2.0), Progress(step=7))
    assert checkpoint.newest(tmp_path, RANKS) == tmp_path / name_of(7)


def test_a_stop_without_time_says_how_many_steps_are_lost(tmp_path):
    said = r"it would take about 60 s, and 2\d s are left of stop_deadline_seconds=25. 3 steps are lost.*of step 4"
    with pytest.raises(TrainingStopped, match=said):
        loop.leave(run_that_is_to_stop(tmp_path, newest_step=4, seconds=60.0), Progress(step=7))
    assert not list(tmp_path.iterdir())


def test_a_stop_after_a_step_that_has_a_checkpoint_needs_no_time(tmp_path):
    with pytest.raises(TrainingStopped, match=r"stopped after step 4; step-000004 is there"):
        loop.leave(run_that_is_to_stop(tmp_path, newest_step=4, seconds=60.0), Progress(step=4))


def test_a_stop_is_obeyed_in_an_evaluation_and_before_the_first_step(tmp_path):
    run = run_that_is_to_stop(tmp_path)
    run.validation = open_plan(write_counting_plan(tmp_path / "cache"), "validation")
    run.engine.module, asked = torch.nn.Identity(), []
    run.engine.forward = lambda *arguments: asked.append(arguments)
    with pytest.raises(TrainingStopped, match="before the first step was done; nothing is lost"):
        loop.evaluate(run, Progress(), None)
    assert not asked


def test_a_stop_while_the_model_is_loaded_is_obeyed_at_once():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        loading, training = StopSignal(RANKS), StopSignal(RANKS)
        loading.listen()
        with pytest.raises(TrainingStopped, match="before the first step"):
            os.kill(os.getpid(), signal.SIGTERM)
        training.listen()
        training.obey_together()
        assert not training.requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert training.requested() and training.seconds_ago() > 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
