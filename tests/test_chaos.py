"""A slice of `make chaos` that takes seconds: cases that break something in this process, each with one seed."""

import logging
from functools import partial

import pytest

from benchmarks.chaos import fuzz
from benchmarks.chaos.damage import damage_cache
from benchmarks.chaos.hostile import bombs, configurations, own_code

SLICE = {
    "damage": (partial(damage_cache, accidents=4), 1),
    "bombs": (bombs, 8),
    "own-code": (own_code, 4),
    "settings": (partial(configurations, number=12), 1),
    "fuzz": (partial(fuzz.feed, inputs=20), 1),
}


@pytest.mark.parametrize("case", SLICE)
def test_nothing_is_lost_wrong_or_untyped(case, tmp_path):
    play, seed = SLICE[case]
    logging.disable(logging.WARNING)  # what is refused says so in the log, a hundred times
    try:
        found = play(seed, tmp_path)
    finally:
        logging.disable(logging.NOTSET)
    assert found.tried and not found.findings
