"""Duplicates: the first is kept, near ones are found at the threshold and others are not."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import CorpusError
from data_prep.plan.duplicates import Known, exact_duplicates, near_duplicates, sketch


def rows(*values: int) -> np.ndarray:
    return np.array([[0] * 15 + [value] for value in values], np.uint8).reshape(-1, 16)


def test_the_first_of_equal_hashes_is_kept():
    assert exact_duplicates(rows(7, 3, 7, 7, 5, 3)).tolist() == [False, False, True, True, False, True]
    assert exact_duplicates(rows()).tolist() == []
    assert exact_duplicates(rows(1)).tolist() == [False]


Pairs = list[tuple[int, int]]
PAIRS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)))  # few, so that halves alone are often equal


def of_pairs(pairs: Pairs) -> np.ndarray:
    hashes = np.zeros((len(pairs), 16), np.uint8)
    if pairs:
        hashes[:, [3, 12]] = np.array(pairs)
    return hashes


@given(PAIRS, PAIRS)
def test_what_is_known_is_what_a_set_says(known, asked):
    assert Known(of_pairs(known)).holds(of_pairs(asked)).tolist() == [pair in known for pair in asked]


@given(PAIRS)
def test_exact_duplicates_are_what_a_set_says(pairs):
    hashes = of_pairs(pairs)
    seen: set[tuple[int, int]] = set()
    expected = [pair in seen or seen.add(pair) is not None for pair in pairs]
    assert exact_duplicates(hashes).tolist() == expected


def test_near_duplicates_are_found_and_others_are_not():
    first = " ".join(f"word{number} stands here" for number in range(40))
    changed = first.replace("word7 ", "w0rd7 ")
    other = " ".join(f"{number} things are elsewhere" for number in range(100, 140))
    chinese = "竹熊每周从不断增长的语料重新训练语言模型,并且只在更好的时候才发布它。" * 3
    texts = [first, other, changed, chinese, first, chinese.replace("发布", "推出", 1), "", "ab", "ab"]
    expected = [False, False, True, False, True, True, False, False, True]
    assert near_duplicates(sketch(texts), 0.8).tolist() == expected
    assert near_duplicates(sketch([first, changed]), 1.0).tolist() == [False, False]


def test_without_datasketch_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(CorpusError, match="near-duplicates"):
        sketch(["a"])
