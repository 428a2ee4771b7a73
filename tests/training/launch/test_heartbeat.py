"""Work that takes long and is no step shows that it goes on, so that nobody takes it for a hang."""

import json

import pytest

from tests.training.trainer.test_checkpoint import RANKS, shelf
from training.launch import heartbeat
from training.launch.events import PREFIX
from training.launch.heartbeat import Heartbeat
from training.trainer import checkpoint
from training.trainer.checkpoint import Progress
from training.trainer.saver import Saver


def events(capsys) -> list[dict]:
    lines = capsys.readouterr().out.splitlines()
    return [json.loads(line.removeprefix(PREFIX)) for line in lines if line.startswith(PREFIX)]


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(heartbeat, "SECONDS", -1.0)


def test_a_sign_says_what_is_done(impatient, capsys):
    Heartbeat("evaluation", 8, "micro-batches")(3)
    said = {"event": "alive", "doing": "evaluation", "total": 8, "unit": "micro-batches", "done": 3}
    assert events(capsys) == [said]


def test_at_most_one_in_ten_seconds(capsys):
    sign = Heartbeat("evaluation", 8, "micro-batches")
    for done in range(8):
        sign(done)
    assert events(capsys) == []


def test_rank_0_speaks(impatient, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    Heartbeat("evaluation", 8, "micro-batches")(3)
    assert events(capsys) == []


def test_checkpoints_give_signs(impatient, tmp_path, capsys):
    saver = Saver(tmp_path, RANKS)
    saver.save(shelf(1.0), Progress(step=1))
    saver.wait()
    checkpoint.load(shelf(0.0), checkpoint.newest(tmp_path, RANKS))
    doing = {event["doing"] for event in events(capsys)}
    assert doing == {"writing a checkpoint", "checking a checkpoint", "reading a checkpoint"}
