"""How certain a difference between two models is: intervals, exact tests, and several of them as one decision.

In: paired differences of records with their weights (target tokens), or how many answers became better and worse. Out:
an `Interval` of the gain per unit of weight, chances, which of several losses are certain together.

Both ends of an interval are those of a studentised bootstrap of records (bootstrap-t: Efron & Tibshirani 1993, chapter
12; Hall 1988, https://doi.org/10.1214/aos/1176350933). No interval knows of a fault that is not among its records, so
the lower end, by which a version is promoted, is also not above a second bound: as many records as there are and one
more that nobody has seen, with a loss of `UNSEEN` or the worst one seen, all weighted at random (Gaffke's bound for the
mean of what is bounded below; see Phan, Thomas & Learned-Miller 2021, https://proceedings.mlr.press/v139/phan21a.html).
`benchmarks/gate_coverage.py` measures how often that is wrong. Cost: 0.2 s for 1,000 records.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

NUM_DRAWS = 2000
DRAWS_AT_ONCE = 200
CONFIDENCE = 0.98
FAMILY_ERROR = 0.05  # of all tests that may forbid a promotion, taken together
MIN_RECORDS = 10  # below which nothing is said: an interval would say little
UNSEEN = -0.5  # nats per target token: what the next record may lose, whatever these say
UNBOUNDED = 1e6  # standard errors
SEED = 20250101


@dataclass(frozen=True)
class Interval:
    """A mean difference and its confidence interval, None for too few records; above 0 = the candidate is better."""

    gain: float
    low: float | None
    high: float | None
    chance: float = 1.0  # of a mean so low, or lower, when there is no true difference

    def __str__(self) -> str:
        bounds = "too few records" if self.low is None else f"{self.low:+.4f}, {self.high:+.4f}"
        return f"{self.gain:+.4f} [{bounds}]"


def interval(differences: np.ndarray, weights: np.ndarray) -> Interval:
    """Mean difference per unit of weight with its interval; ``(n,)`` float both."""
    num = len(differences)
    if num < MIN_RECORDS:
        return Interval(float(differences.sum() / weights.sum()), None, None)
    terms = terms_of(differences, weights)
    found = studentised(terms.sum(0), np.concatenate([counts @ terms for counts in draws(num)]), num)
    gain, low, high, chance = map(float, found)
    return Interval(gain, min(low, float(with_one_unseen(differences, weights, spacings(num)))), high, chance)


def terms_of(d: np.ndarray, w: np.ndarray) -> np.ndarray:
    """What a record adds to the sums that mean and error are made of, ``(n, ..., 5) float64``."""
    return np.stack([d, w, d * d, d * w, np.square(w)], axis=-1).astype(np.float64)


def draws(num: int) -> Iterator[np.ndarray]:
    """How often each of `num` records is in each draw with replacement, ``(DRAWS_AT_ONCE, num) int64`` at a time."""
    generator = np.random.default_rng(SEED)
    for _ in range(NUM_DRAWS // DRAWS_AT_ONCE):
        yield generator.multinomial(num, np.full(num, 1 / num), size=DRAWS_AT_ONCE)


def spacings(num: int) -> Iterator[np.ndarray]:
    """Random weights of `num` records and of one that nobody has seen, ``(DRAWS_AT_ONCE, num + 1)`` at a time."""
    generator = np.random.default_rng(SEED)
    for _ in range(NUM_DRAWS // DRAWS_AT_ONCE):
        yield generator.standard_exponential((DRAWS_AT_ONCE, num + 1))


def studentised(sums: np.ndarray, drawn: np.ndarray, num: int) -> tuple[np.ndarray, ...]:
    """Gain, low, high, chance, from the ``(..., 5)`` sums of the terms and those of the draws, ``(draws, ..., 5)``."""
    gain, error = mean_and_error(sums, num)
    means, errors = mean_and_error(drawn, num)
    with np.errstate(divide="ignore", invalid="ignore"):  # a draw of one record many times has no error
        deviations = _finite((means - gain) / errors)
        here = _finite(gain / error)
    most, least = np.quantile(deviations, [(1 + CONFIDENCE) / 2, (1 - CONFIDENCE) / 2], axis=0)
    chance = (1 + np.count_nonzero(deviations <= here, axis=0)) / (1 + len(deviations))
    return gain, gain - most * error, gain - least * error, chance


def with_one_unseen(differences: np.ndarray, weights: np.ndarray, random_weights: Iterable[np.ndarray]) -> np.ndarray:
    """The mean that these records (the first axis) and one more, as bad as it may be, leave possible."""
    worst = np.minimum(UNSEEN, (differences / weights).min(0))
    weight = np.sqrt(np.square(weights, dtype=np.float64).mean(0))
    d, w = np.concatenate([differences, [worst * weight]]), np.concatenate([weights, [weight]])
    means = np.concatenate([(drawn @ d) / (drawn @ w) for drawn in random_weights])
    return np.quantile(means, (1 - CONFIDENCE) / 2, axis=0)


def _finite(ratios: np.ndarray) -> np.ndarray:
    return np.nan_to_num(ratios, nan=0.0, posinf=UNBOUNDED, neginf=-UNBOUNDED)


def mean_and_error(sums: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    """A ratio of sums and its standard error (linearised), from the ``(..., 5)`` sums of the terms of `num` records."""
    d, w, dd, dw, ww = np.moveaxis(sums, -1, 0)
    mean = d / w
    squares = np.maximum(dd - 2 * mean * dw + mean**2 * ww, 0)
    return mean, np.sqrt(squares * num / (num - 1)) / w


def sign_test(better: int, worse: int) -> float:
    """How likely so few of the differing answers are better when both models are alike (McNemar's exact test)."""
    num = better + worse
    return sum(math.comb(num, k) for k in range(better + 1)) / 2**num


def certain_together(chances: list[float]) -> list[bool]:
    """Which of several losses are certain, when all tests together err in `FAMILY_ERROR` of all cases (Holm 1979)."""
    certain = [False] * len(chances)
    for rank, number in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        if chances[number] > FAMILY_ERROR / (len(chances) - rank):
            break
        certain[number] = True
    return certain
