"""Held-out loss per source, and the files of metrics."""

import json
import math

import numpy as np
import pytest
import torch

from data_prep.plan.reader import open_plan
from tests.support.tiny import write_counting_plan
from tests.training.trainer.test_checkpoint import RANKS
from training.run_files import read_lines
from training.trainer.evaluation import held_out_losses, summary
from training.trainer.metrics import Clock, JsonLines


def test_summary_by_hand():
    result = summary(np.array([[6.0, 0.0, 2.0], [3, 0, 1]]), ["a", "empty", "b"])
    assert result == {
        "a": {"loss": 2.0, "perplexity": math.exp(2), "target_tokens": 3},
        "b": {"loss": 2.0, "perplexity": math.exp(2), "target_tokens": 1},
        "all": {"loss": 2.0, "perplexity": math.exp(2), "target_tokens": 4},
    }


def test_a_huge_loss_has_a_finite_perplexity():
    assert math.isfinite(summary(np.array([[1e6], [1.0]]), ["a"])["all"]["perplexity"])


@pytest.mark.parametrize("micro_batch", [1, 4, 100])
def test_every_target_counts_once_for_its_source(tmp_path, micro_batch):
    plan = open_plan(write_counting_plan(tmp_path), "validation")
    result = held_out_losses(lambda batch: batch.sources.float() + 1, plan, micro_batch, RANKS)  # loss 1 and loss 2
    everything = plan.batch(np.arange(plan.num_rows))
    targets = everything.labels != -100
    for index, source in enumerate(plan.sources):
        expected = int((targets & (everything.sources == index)).sum())
        assert result[source] == pytest.approx(
            {"loss": index + 1, "perplexity": math.exp(index + 1), "target_tokens": expected}
        )
    assert result["all"]["target_tokens"] == int(plan.row_target_tokens.sum())


def test_lines_after_the_resumed_step_are_dropped_and_half_lines_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3]
    JsonLines(path, last_step=2).write(step=3, loss=0.5)
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3]
    assert read_lines(path)[-1]["loss"] == 0.5


def test_clock_adds_up_spans():
    clock = Clock(torch.device("cpu"))
    for _ in range(2):
        with clock.span("forward"):
            pass
    taken = clock.take()
    assert set(taken) == {"seconds_data", "seconds_forward", "seconds_backward", "seconds_step"}
    assert taken["seconds_forward"] > 0 == taken["seconds_data"]
    assert clock.take()["seconds_forward"] == 0
