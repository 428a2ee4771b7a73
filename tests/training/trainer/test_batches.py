"""Rows of a step: the same on any number of ranks, every row once an epoch, counts known before the start."""

from itertools import pairwise

import numpy as np
import pytest

from data_prep.plan.reader import open_plan
from tests.support.tiny import write_counting_plan
from training.settings import TrainSettings
from training.trainer.batches import batch_schedule, prefetch


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return open_plan(write_counting_plan(tmp_path_factory.mktemp("plan"), num_rows=37), "train")


def scheduled(plan, world_size=1, rows_per_step=None, **settings):
    defaults = {"per_gpu_train_batch_size": 2, "gradient_accumulation_steps": 2, "seed": 3}
    return batch_schedule(plan, TrainSettings(**{**defaults, **settings}), world_size, rows_per_step)


def test_every_row_once_an_epoch_and_another_order_in_the_next(plan):
    whole = scheduled(plan, num_train_epochs=2)
    assert (whole.steps_per_epoch, whole.total_steps) == (10, 20)
    epochs = [np.concatenate([whole.rows(step) for step in range(e * 10, e * 10 + 10)]) for e in (0, 1)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(37))] * 2
    assert epochs[0].tolist() != epochs[1].tolist()
    assert len(whole.rows(9)) == 1, "the last step of an epoch is smaller, not dropped"


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (1, 1), (2, 2), (2, 4), (4, 2), (4, 1), (8, 1)])
def test_rows_of_a_step_do_not_depend_on_ranks_and_micro_batch(plan, world_size, micro_batch):
    one = scheduled(plan, rows_per_step=8)
    for step in range(one.total_steps):
        shares = [one.micro_batches(step, rank, world_size, micro_batch) for rank in range(world_size)]
        rows = np.concatenate([share.ravel() for share in shares])
        assert sorted(rows[rows >= 0]) == sorted(one.rows(step))
        assert len({share.shape for share in shares}) == 1, "all ranks make the same number of micro-steps"


def test_target_tokens_are_known_and_right(plan):
    one = scheduled(plan)
    for step in (0, 9):
        assert one.target_tokens(step) == int((plan.batch(one.rows(step)).labels != -100).sum())


@pytest.mark.parametrize(
    ("settings", "total"), [({}, 10), ({"num_train_epochs": 1.5}, 15), ({"max_steps": 3}, 3), ({"max_steps": 25}, 25)]
)
def test_length_of_a_run(plan, settings, total):
    assert scheduled(plan, **settings).total_steps == total


def test_resuming_keeps_the_rows_of_a_step(plan):
    assert scheduled(plan, world_size=2).rows_per_step == 8
    assert (
        scheduled(plan, world_size=1, rows_per_step=8).rows(4).tolist()
        == scheduled(plan, world_size=2).rows(4).tolist()
    )


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_threads_change_no_order(plan, num_workers):
    wanted = list(scheduled(plan).wanted(3, 0, 1, 2))
    batches = list(prefetch(plan, wanted, num_workers, prefetch_factor=2))
    assert [batch.rows for batch in batches] == [tuple(rows) for rows in wanted]
    assert any(left.rows != right.rows for left, right in pairwise(batches))


def test_a_loader_that_is_abandoned_leaves_no_thread_waiting(plan):
    batches = prefetch(plan, scheduled(plan).wanted(0, 0, 1, 2), 2, 2)
    next(batches)
    batches.close()
