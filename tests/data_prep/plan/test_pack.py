"""Packing: literal rows, and for any lengths that no token is lost and no row too long."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.plan.pack import MIN_PIECE, best_fit_decreasing, fill, split_evenly

NONE = np.zeros(0, dtype=np.int32)


@pytest.mark.parametrize(
    ("lengths", "capacity", "rows"),
    [
        ([], 8, []),
        ([8], 8, [0]),
        ([3, 5, 8, 4, 4], 8, [1, 1, 0, 2, 2]),
        ([1, 1, 1, 1, 1], 2, [0, 0, 1, 1, 2]),
        ([5, 6, 3, 2], 8, [1, 0, 1, 0]),  # 6+2 and 5+3: best fit, first fit would do the same
        ([6, 5, 4, 2, 3, 4], 8, [0, 1, 2, 0, 1, 2]),
    ],
)
def test_best_fit_decreasing_literal(lengths, capacity, rows):
    assert best_fit_decreasing(np.array(lengths, dtype=np.int32), capacity).tolist() == rows


@given(st.lists(st.integers(1, 64), max_size=300), st.integers(64, 80))
def test_best_fit_decreasing_equals_the_slow_one(lengths, capacity):
    rows = best_fit_decreasing(np.array(lengths, dtype=np.int32), capacity)
    used = np.bincount(rows, weights=lengths, minlength=1) if lengths else np.zeros(1)
    assert used.max() <= capacity
    assert sorted(used.tolist()) == sorted(_slow_best_fit(lengths, capacity))


def _slow_best_fit(lengths, capacity):
    used = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, tokens in enumerate(used) if tokens + length <= capacity]
        if fitting:
            used[max(fitting, key=lambda i: used[i])] += length
        else:
            used.append(length)
    return used or [0]


def test_fill_literal():
    filled = fill(np.array([6, 4, 9]), np.array([9]), np.array([3]), capacity=10, first_new_row=7)
    # Row 3 has 9 free: 6 + 3 of the second (whose last token would be alone: so 9 goes first and takes it whole).
    pieces = list(zip(*(column.tolist() for column in vars(filled).values()), strict=True))
    assert pieces == [(0, 0, 6, 3), (2, 0, 3, 3), (2, 3, 6, 7), (1, 0, 4, 7)]


@settings(deadline=None)
@given(
    st.lists(st.integers(MIN_PIECE, 200), min_size=1, max_size=120),
    st.lists(st.integers(8, 32), max_size=20),
    st.integers(32, 64),
)
def test_fill_loses_no_token_and_leaves_no_gap(lengths, spaces, capacity):
    lengths, spaces = np.array(lengths), np.array(spaces, dtype=np.int64)
    filled = fill(lengths, spaces, np.arange(len(spaces)), capacity, first_new_row=len(spaces))
    assert filled.length.min() >= MIN_PIECE
    for document, length in enumerate(lengths):
        mine = np.flatnonzero(filled.document == document)
        ends = filled.start[mine] + filled.length[mine]
        assert filled.start[mine].tolist() == [0, *ends[:-1].tolist()]
        assert ends[-1] == length
    used = np.bincount(filled.row, weights=filled.length)
    space = np.full(len(used), capacity)
    space[: len(spaces)] = spaces[: len(used)]
    assert (used <= space).all()


def test_fill_is_exactly_full_on_ordinary_documents():
    lengths = np.random.default_rng(0).lognormal(5, 1, 20_000).astype(np.int64) + MIN_PIECE
    filled = fill(lengths, NONE, NONE, 2048, 0)
    used = np.bincount(filled.row, weights=filled.length)
    assert (used[:-1] == 2048).all()
    assert filled.length.min() >= MIN_PIECE


def test_documents_of_one_length_still_have_no_short_piece():
    filled = fill(np.full(1000, 7), NONE, NONE, 16, 0)
    assert filled.length.min() >= MIN_PIECE
    assert filled.length.sum() == 7000


@pytest.mark.parametrize(
    ("length", "capacity", "parts"),
    [
        (8, 8, [(0, 8)]),
        (9, 8, [(0, 7), (7, 2)]),
        (20, 8, [(0, 8), (8, 8), (16, 4)]),
        (17, 8, [(0, 8), (8, 7), (15, 2)]),
    ],
)
def test_split_evenly(length, capacity, parts):
    assert split_evenly(length, capacity) == parts


def test_a_million_pieces_are_packed_tightly_in_a_second():
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 1_000_000), 2, 2048).astype(np.int32)
    started = time.process_time()
    rows = best_fit_decreasing(lengths, 2048)
    assert time.process_time() - started < 2
    assert lengths.sum() / (2048 * (rows.max() + 1)) > 0.998
