"""Order is a function: literal values, every row once an epoch, the same rows whatever the ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.plan.order import position_of, rows_of_step, split_step, stable_argsort, steps_per_epoch


def test_known_order_never_changes():
    # A changed literal means that resumed runs would repeat or miss rows: it is a new format, not a fix.
    assert rows_of_step(10, 10, seed=42, epoch=0, step_in_epoch=0).tolist() == KNOWN[0]
    assert rows_of_step(10, 10, seed=42, epoch=1, step_in_epoch=0).tolist() == KNOWN[1]


KNOWN = ([9, 1, 2, 5, 0, 8, 3, 7, 6, 4], [2, 9, 5, 4, 8, 1, 7, 3, 0, 6])


@pytest.mark.parametrize(("num_rows", "rows_per_step"), [(1, 1), (1, 8), (7, 3), (12, 4), (1000, 64)])
@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_holds_every_row_once(num_rows, rows_per_step, epoch):
    steps = steps_per_epoch(num_rows, rows_per_step)
    rows = [rows_of_step(num_rows, rows_per_step, 1, epoch, step) for step in range(steps)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(num_rows))
    assert all(len(step) == rows_per_step for step in rows[:-1])
    assert 0 < len(rows[-1]) <= rows_per_step


def test_seed_and_epoch_change_the_order():
    orders = {tuple(rows_of_step(50, 50, seed, epoch, 0)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_order_is_spread_over_the_corpus():
    first = rows_of_step(10_000, 1000, 0, 0, 0)
    assert abs(first.mean() - 5000) < 300


@pytest.mark.parametrize("step", [-1, 3])
def test_a_step_outside_the_epoch_is_an_error(step):
    with pytest.raises(IndexError, match="an epoch of 3 steps"):
        rows_of_step(9, 3, 0, 0, step)


def test_split_step_literal():
    ranks = split_step(np.array([10, 11, 12, 13, 14]), world_size=2, micro_batch=2)
    assert ranks.dtype == np.int64
    assert ranks.tolist() == [[[10, 11], [14, -1]], [[12, 13], [-1, -1]]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_batch", [1, 2, 5])
@pytest.mark.parametrize("num_rows", [1, 7, 16, 40])
def test_split_step_deals_every_row_once(world_size, micro_batch, num_rows):
    ranks = split_step(np.arange(num_rows), world_size, micro_batch)
    assert ranks.shape == (world_size, -(-num_rows // (world_size * micro_batch)), micro_batch)
    assert sorted(ranks[ranks >= 0].tolist()) == list(range(num_rows))
    together = ranks.transpose(1, 0, 2).reshape(-1, micro_batch)
    alone = split_step(np.arange(num_rows), 1, micro_batch)[0]
    assert together[: len(alone)].tolist() == alone.tolist(), "micro-batches do not depend on the number of ranks"


def test_position_of_inverts_rows_of_step():
    rows = np.arange(23)
    steps = position_of(23, 4, seed=5, epoch=2, rows=rows)
    assert all(row in rows_of_step(23, 4, 5, 2, int(step)) for row, step in zip(rows, steps, strict=True))


@pytest.mark.parametrize(("dtype", "low", "high"), [(np.int32, -(2**31), 2**31 - 1), (np.uint64, 0, 2**64 - 1)])
@given(data=st.data())
def test_stable_argsort_is_the_stable_order(dtype, low, high, data):
    key = st.integers(low, high) | st.integers(0, 3)
    keys = np.array(data.draw(st.lists(key, max_size=40)), dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.plan.columns.BLOCK", data.draw(st.sampled_from([1, 3, 1 << 18])))
        assert stable_argsort(keys).tolist() == np.argsort(keys, kind="stable").tolist()
