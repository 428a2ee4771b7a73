"""The verdict of the gate on made-up losses: better, worse, uncertain, a slice that suffers, answers that go bad."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.gate_coverage import made_up, samples, the_gate
from training.comparison.heldout import language_of
from training.comparison.intervals import certain_together, interval, sign_test
from training.comparison.scores import is_runaway
from training.comparison.statistics import (
    MIN_RECORDS,
    Elsewhere,
    Measure,
    Scores,
    nothing_asked,
    reach_verdict,
)
from training.settings import GateSettings

NUM = 200
TOKENS = np.full(NUM, 10)
SLICES = {"instruction/cjk": np.arange(0, 100), "instruction/other": np.arange(100, NUM)}
SETTINGS = GateSettings(promote_min_gain=0.01, max_slice_regression=0.05)
GOOD = {"ends": np.ones(16), "not_empty": np.ones(16), "no_repetition": np.ones(16), "exact": np.full(16, np.nan)}


def noise(scale: float, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, NUM)


def scores(per_token, checks=None) -> Scores:
    """A model with these losses per target token."""
    return Scores(np.broadcast_to(per_token, NUM) * TOKENS, TOKENS, checks or GOOD)


def verdict(candidate: Scores, champion: Scores, settings: GateSettings = SETTINGS):
    return reach_verdict(settings, SLICES, candidate, {"champion": ("models:/m/1", champion)})


def test_a_certain_gain_is_promoted():
    common = noise(1.0)  # hard and easy records are so for both: pairing takes that out
    result = verdict(scores(2.0 + common + noise(0.05, 2)), scores(2.1 + common))
    assert result.promoted and "better than the champion models:/m/1 by +0.1" in result.reasons[0]
    whole = result.slices[0]
    assert whole["slice"] == "all" and 0.08 < whole["low"] < whole["gain"] < whole["high"] < 0.11
    assert {row["slice"] for row in result.slices} == {"all", *SLICES}


def test_without_pairing_the_same_gain_would_be_lost_in_the_noise():
    spread = interval(noise(1.0, 3) - noise(1.0, 4), np.ones(NUM))
    assert spread.high - spread.low > 0.3


@pytest.mark.parametrize("gain", [-0.1, 0.0, 0.005])
def test_no_gain_or_too_small_a_gain_stays_challenger(gain):
    result = verdict(scores(2.0 - gain + noise(0.01)), scores(2.0))
    assert not result.promoted and "lower bound must be above promote_min_gain=0.01" in result.reasons[0]


def test_an_uncertain_gain_stays_challenger():
    result = verdict(scores(1.98 + noise(1.0)), scores(2.0))
    assert not result.promoted and len(result.reasons) == 1


def test_a_slice_that_certainly_suffers_forbids_the_promotion():
    losses = np.full(NUM, 1.5)
    losses[:100] = 2.1
    result = verdict(scores(losses + noise(0.01)), scores(2.0))
    assert not result.promoted
    assert result.reasons[0].startswith("worse than the champion models:/m/1 on instruction/cjk: gain -0.09")
    tolerant = GateSettings(promote_min_gain=0.01, max_slice_regression=0.2)
    assert verdict(scores(losses + noise(0.01)), scores(2.0), tolerant).promoted


def test_a_slice_of_few_records_is_shown_but_not_judged():
    losses = np.full(NUM, 1.5)
    losses[:5] = 4.0
    others = {"champion": ("m", scores(2.0))}
    result = reach_verdict(SETTINGS, {"rare/other": np.arange(5)}, scores(losses), others)
    assert result.promoted and [row["slice"] for row in result.slices] == ["all", "rare/other"]


def test_few_records_promote_nothing_and_the_reason_says_so():
    def judged(num: int):
        candidate, champion = (Scores(np.full(num, loss), TOKENS[:num], GOOD) for loss in (1.0, 6.0))
        return reach_verdict(SETTINGS, {}, candidate, {"champion": ("m", champion)})

    few = judged(MIN_RECORDS - 1)
    assert not few.promoted and few.reasons[0].startswith("only 29 held-out records can be compared and 30 are needed")
    assert judged(MIN_RECORDS).promoted
    assert judged(5).slices[0]["low"] is None  # no interval is made up


def test_the_interval_is_that_of_the_books():
    """Near the t-interval for bell-shaped differences, and longer at the side of a long tail."""
    generator = np.random.default_rng(7)
    bell = generator.normal(0.1, 1.0, 100)
    found = interval(bell, np.ones(100))
    half = 2.365 * bell.std(ddof=1) / 10
    assert found.gain == pytest.approx(bell.mean())
    assert (found.low, found.high) == pytest.approx((found.gain - half, found.gain + half), abs=0.05)
    tail = interval(-generator.lognormal(0, 1, 50), np.ones(50))
    assert tail.gain - tail.low > 1.3 * (tail.high - tail.gain)
    scaled = interval(3 * bell, np.full(100, 3.0))  # three times the tokens, the same loss per token
    assert (scaled.low, scaled.high) == pytest.approx((found.low, found.high))


def test_equal_differences_leave_open_what_nobody_has_seen():
    few, many = (interval(np.full(num, 2.0), np.full(num, 4.0)) for num in (20, 400))
    assert (few.gain, few.high, many.high) == pytest.approx((0.5, 0.5, 0.5))
    assert 0.2 < few.low < 0.4 and 0.48 < many.low < 0.5
    one = interval(np.eye(20)[0], np.ones(20))  # all but one are equal: many draws have no error
    assert one.low <= 0 < one.high < 1e6


@pytest.mark.parametrize(
    ("better", "worse", "chance"), [(0, 0, 1.0), (0, 6, 1 / 64), (1, 3, 5 / 16), (4, 4, 163 / 256)]
)
def test_sign_test(better, worse, chance):
    assert sign_test(better, worse) == pytest.approx(chance)


def test_answers_that_certainly_go_bad_forbid_the_promotion():
    bad = {**GOOD, "ends": np.array([0.0] * 8 + [1.0] * 8)}
    result = verdict(scores(1.5 + noise(0.01), bad), scores(2.0))
    assert not result.promoted and "answers that end: 50% instead of the 100%" in result.reasons[0]
    one = {**GOOD, "ends": np.array([0.0] + [1.0] * 15)}
    assert verdict(scores(1.5 + noise(0.01), one), scores(2.0)).promoted


def test_champion_before_base_and_base_before_nothing():
    candidate, better, worse = scores(2.0 + noise(0.01)), scores(1.5), scores(3.0)
    assert not reach_verdict(SETTINGS, SLICES, candidate, {"base": ("b", worse), "champion": ("c", better)}).promoted
    both = reach_verdict(SETTINGS, SLICES, candidate, {"base": ("b", better), "champion": ("c", worse)})
    assert both.promoted and {row["against"] for row in both.slices} == {"champion", "base"}
    assert not reach_verdict(SETTINGS, SLICES, candidate, {"base": ("b", better)}).promoted
    assert reach_verdict(SETTINGS, SLICES, candidate, {}).promoted


def test_what_no_version_may_be():
    empty = scores(2.0, {**GOOD, "not_empty": np.zeros(16)})
    assert reach_verdict(SETTINGS, SLICES, empty, {}).reasons == ["all of its 16 answers are empty"]
    broken = scores(np.where(np.arange(NUM) == 7, np.nan, 1.0))
    assert "not finite" in verdict(broken, scores(2.0)).reasons[0]


def test_nothing_held_out_promotes_nothing_over_a_champion():
    result = reach_verdict(SETTINGS, {}, nothing_asked(), {"champion": ("c", nothing_asked())})
    assert not result.promoted and "no record is held out" in result.reasons[0]
    excluded = reach_verdict(SETTINGS, {}, nothing_asked(), {"champion": ("c", nothing_asked())}, num_excluded=7)
    assert excluded.reasons == ["the champion was trained on all 7 held-out records, so nothing can be compared"]


def test_a_first_version_that_was_not_asked_says_so():
    result = reach_verdict(SETTINGS, {}, nothing_asked(), {})
    assert result.promoted and "as no record is held out (validation_fraction) it was not asked" in result.reasons[0]
    assert "not asked" not in reach_verdict(SETTINGS, SLICES, scores(2.0), {}).reasons[0]


def test_tokenizers_may_differ():
    """The champion needs twice the tokens for the same texts; what counts is the loss of the whole text."""
    champion = Scores(np.full(NUM, 21.0), TOKENS * 2, GOOD)  # 1.05 per token of its own
    result = verdict(scores(2.0 + noise(0.01)), champion)
    assert result.promoted and result.slices[0]["reference_loss"] == pytest.approx(2.1)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([7] * 24, True),
        ([1, 2, 3] * 8, True),
        ([9, 9, *range(40), *[5, 6] * 12], True),
        (list(range(16)) * 3, True),
        ([7] * 23, False),
        (list(range(60)), False),
        ([7] * 30 + [1], False),
    ],
)
def test_runaway_repetition(ids, expected):
    assert is_runaway(ids) is expected


@pytest.mark.parametrize(
    ("text", "language"),
    [("你好，世界", "cjk"), ("hello", "other"), ("用 Python 写一个函数 def f(x): return x", "cjk"), ("", "other"),
     ("This is 一 word in a long English sentence.", "other"), ("カタカナ", "cjk"), ("한국어", "cjk")],
)  # fmt: skip
def test_language(text, language):
    assert language_of([text]) == language


@pytest.mark.parametrize("population", ["5 % much worse", "long tail of losses", "bell-shaped"])
def test_promotions_for_nothing_are_rare(population):
    """1,000 comparisons of 30 records each without any true gain: the percentile interval promotes up to 28 %."""
    some = made_up(population, np.random.default_rng(1))
    low = np.concatenate([the_gate(one)[0] for one in samples(some, 30, 1000)])
    assert (low > 0).mean() <= 0.01


def test_several_losses_are_certain_together():
    assert certain_together([]) == []
    assert certain_together([0.04]) == [True] and certain_together([0.04, 0.9]) == [False, False]
    assert certain_together([0.024, 0.04, 0.0001]) == [True, True, True]  # 0.05 / 3, / 2, / 1 in order
    assert certain_together([0.03, 0.04, 0.0001]) == [False, False, True]


ELSEWHERE = Elsewhere({"neutral/other": np.arange(160, NUM)}, np.full(NUM, 40.0))  # 4 nats per token


def judged_elsewhere(losses, champion=2.0, base=None, settings: GateSettings = SETTINGS, where=ELSEWHERE):
    others = {"champion": ("c", scores(champion)), **({"base": ("b", scores(base))} if base is not None else {})}
    return reach_verdict(settings, {}, scores(losses), others, 0, where)


def forgetful(own: float, other: float) -> np.ndarray:
    return np.where(np.arange(NUM) < 160, own, other) + noise(0.01)


def test_what_has_forgotten_is_not_promoted():
    result = judged_elsewhere(forgetful(1.5, 2.2))
    assert not result.promoted and len(result.reasons) == 1
    assert result.reasons[0].startswith("has forgotten: worse than the champion c on neutral/other: gain -0.20")
    assert "40 records, more than max_regression=0.05 allows" in result.reasons[0]
    assert result.slices[0]["slice"] == "all" and result.slices[0]["records"] == 160  # neutral texts promote nobody
    assert judged_elsewhere(forgetful(1.5, 2.03)).promoted
    assert judged_elsewhere(forgetful(1.5, 2.2), settings=GateSettings(max_regression=0.3)).promoted
    assert not judged_elsewhere(forgetful(2.0, 1.0)).promoted


def test_a_base_remembers_what_champions_forget_little_by_little():
    assert judged_elsewhere(forgetful(1.5, 2.04), base=2.0).promoted
    drifted = judged_elsewhere(forgetful(1.5, 2.04), base=forgetful(2.0, 1.9))
    assert [reason.partition(" on ")[0] for reason in drifted.reasons] == ["has forgotten: worse than the base b"]


def test_who_knew_nothing_forgets_nothing():
    """A model from scratch is surer, and more wrong, about texts unlike its own: every training makes that worse."""
    unknown = Elsewhere(ELSEWHERE.slices, np.full(NUM, 19.0))
    result = judged_elsewhere(forgetful(1.5, 2.2), where=unknown)
    assert result.promoted and result.slices[1]["chance"] == 1


MEASURES = {"errors": Measure(higher_is_better=False, max_regression=0.1), "benchmark quiz": Measure(True, 0.0)}


def measured(errors: float, right: int) -> Scores:
    values = {"errors": errors + noise(0.01)[:16], "benchmark quiz": np.arange(40) < right}
    return Scores(scores(1.5).losses + noise(0.01), TOKENS, GOOD, {n: v.astype(float) for n, v in values.items()})


def test_metrics_and_benchmarks_have_a_direction_and_a_limit():
    def judged(errors: float, right: int):
        champion = replace(measured(1.0, 30), losses=scores(2.0).losses)
        return reach_verdict(SETTINGS, {}, measured(errors, right), {"champion": ("c", champion)}, measures=MEASURES)

    assert judged(0.5, 35).promoted and judged(1.05, 29).promoted
    worse = judged(1.5, 20)
    assert worse.reasons == [
        "worse than the champion c by errors: 1.5013 instead of 1.0013 on 16 items, more than its "
        "max_regression=0.1 allows",
        "worse than the champion c by benchmark quiz: 0.5000 instead of 0.7500 on 40 items, more than its "
        "max_regression=0.0 allows",
    ]
    assert [row["metric"] for row in worse.metrics] == list(MEASURES) and worse.metrics[0]["gain"] < 0
