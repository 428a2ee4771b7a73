"""The gate: may a new version become the champion? Paired statistics, no model in sight.

In: for each held-out record the summed loss of its target under candidate, champion and base, and for each prompt what
the answers are like. Out: a `Verdict` with its reasons and tables. Losses are summed over a whole target and divided by
the candidate's number of target tokens, so that models with different tokenizers can be compared as well.

All models answer for the same records, so their differences are what is judged. The gain per target token has a 95 %
interval from a studentised bootstrap of records (bootstrap-t: Efron & Tibshirani 1993, chapter 12; Hall 1988,
https://doi.org/10.1214/aos/1176350933), which is wider than the percentile interval where few records or a long tail
leave more open (`benchmarks/gate_coverage.py` measures how often it is wrong). Answers are good or bad, so those are
compared by an exact sign test. Cost: 0.1 s for 1,000 records.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np

from training.settings import GateSettings

NUM_DRAWS = 2000
DRAWS_AT_ONCE = 200
CONFIDENCE = 0.95
MIN_RECORDS = 30  # to promote: of these a fault in a tenth of all texts hits at least one in 96 of 100 cases
MIN_SLICE_RECORDS = 10  # below which a slice is shown but not judged: its interval would say little
UNBOUNDED = 1e6  # standard errors
SEED = 20250101
ALL = "all"
CHECKS = {
    "ends": "answers that end",
    "not_empty": "answers that are not empty",
    "no_repetition": "answers that do not repeat themselves without end",
    "exact": "short targets answered exactly",
}


@dataclass(frozen=True)
class Scores:
    """What one model makes of the n held-out records and the prompts among them."""

    losses: np.ndarray  # (n,) float64, summed over the target tokens of a record, nats
    tokens: np.ndarray  # (n,) int64, target tokens of this model's tokenizer
    checks: dict[str, np.ndarray]  # check -> (num_prompts,) float64: 1 good, 0 bad, nan where it does not apply


def nothing_asked() -> Scores:
    """The scores of a model where no record is held out."""
    return Scores(np.zeros(0), np.zeros(0, dtype=np.int64), {})


@dataclass(frozen=True)
class Interval:
    """A mean difference and its confidence interval, None for too few records; above 0 = the candidate is better."""

    gain: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        bounds = "too few records" if self.low is None else f"{self.low:+.4f}, {self.high:+.4f}"
        return f"{self.gain:+.4f} [{bounds}]"


class SliceRow(TypedDict):
    """Losses per target token on a slice of the records, those of candidate and reference, and the gain."""

    against: str  # role of the reference
    slice: str
    records: int
    loss: float
    perplexity: float
    reference_loss: float
    reference_perplexity: float
    gain: float
    low: float | None
    high: float | None


class CheckRow(TypedDict):
    """How often a check of the answers is good, and how often for one of the two models alone."""

    against: str
    check: str
    prompts: int
    share: float
    reference_share: float
    better: int
    worse: int
    chance: float  # of so few better ones when both models are alike


@dataclass(frozen=True)
class Verdict:
    """Whether the candidate may become the champion, why, and the numbers behind it."""

    promoted: bool
    reasons: list[str]
    reference: str | None  # what was decisive: the champion, else the base
    slices: list[SliceRow] = field(default_factory=list)
    checks: list[CheckRow] = field(default_factory=list)


def reach_verdict(
    settings: GateSettings,
    slices: dict[str, np.ndarray],
    candidate: Scores,
    others: dict[str, tuple[str, Scores]],
    num_excluded: int = 0,
) -> Verdict:
    """Compare with each of `others` (role -> name, scores); the champion decides, without one the base.

    :param num_excluded: held-out records that are left out, because the champion was trained on them.
    """
    rows = [row for role, (_, scores) in others.items() for row in compare(role, slices, candidate, scores)]
    checks = [row for role, (_, scores) in others.items() for row in compare_checks(role, candidate, scores)]
    decisive = next((role for role in ("champion", "base") if role in others), None)
    faults = unusable(candidate)
    if decisive is None:
        return Verdict(not faults, faults or [first_version(candidate)], None, rows)
    name = f"{decisive} {others[decisive][0]}"
    faults += nothing_held_out(candidate, num_excluded) or loss_faults(
        settings, name, [row for row in rows if row["against"] == decisive]
    )
    faults += check_faults(name, [row for row in checks if row["against"] == decisive])
    gain = next((interval_of(row) for row in rows if row["against"] == decisive and row["slice"] == ALL), None)
    return Verdict(
        not faults, faults or [f"better than the {name} by {gain} nats per target token"], name, rows, checks
    )


def compare(role: str, slices: dict[str, np.ndarray], candidate: Scores, other: Scores) -> list[SliceRow]:
    """One table row per slice, the whole first."""
    everything = {ALL: np.arange(len(candidate.losses))} if len(candidate.losses) else {}
    return [_compare_slice(role, name, records, candidate, other) for name, records in {**everything, **slices}.items()]


def _compare_slice(role: str, name: str, records: np.ndarray, candidate: Scores, other: Scores) -> SliceRow:
    tokens = candidate.tokens[records]
    mine, theirs = candidate.losses[records], other.losses[records]
    gained = interval(theirs - mine, tokens)
    loss, reference = float(mine.sum() / tokens.sum()), float(theirs.sum() / tokens.sum())
    return {
        "against": role,
        "slice": name,
        "records": len(records),
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "reference_loss": reference,
        "reference_perplexity": math.exp(min(reference, 700)),
        "gain": gained.gain,
        "low": gained.low,
        "high": gained.high,
    }


def compare_checks(role: str, candidate: Scores, other: Scores) -> list[CheckRow]:
    """One table row per check of the answers: shares that are good, and how often each model alone was good."""
    rows: list[CheckRow] = []
    for check, mine in candidate.checks.items():
        theirs = other.checks[check]
        both = ~(np.isnan(mine) | np.isnan(theirs))
        if not both.any():
            continue
        better, worse = int((mine > theirs).sum()), int((mine < theirs).sum())
        rows.append({
            "against": role, "check": check, "prompts": int(both.sum()), "share": float(mine[both].mean()),
            "reference_share": float(theirs[both].mean()), "better": better, "worse": worse,
            "chance": sign_test(better, worse),
        })  # fmt: skip
    return rows


def sign_test(better: int, worse: int) -> float:
    """How likely so few of the differing answers are better when both models are alike (McNemar's exact test)."""
    num = better + worse
    return sum(math.comb(num, k) for k in range(better + 1)) / 2**num


def interval(differences: np.ndarray, weights: np.ndarray) -> Interval:
    """Mean difference per unit of weight and its studentised bootstrap interval; ``(n,)`` float both."""
    num = len(differences)
    if num < MIN_SLICE_RECORDS:
        return Interval(float(differences.sum() / weights.sum()), None, None)
    terms = terms_of(differences, weights)
    return studentised(terms.sum(0), np.concatenate([counts @ terms for counts in draws(num)]), num)


def terms_of(d: np.ndarray, w: np.ndarray) -> np.ndarray:
    """What a record adds to the sums that mean and error are made of, ``(n, 5) float64``."""
    return np.stack([d, w, d * d, d * w, np.square(w)], axis=1).astype(np.float64)


def draws(num: int) -> Iterator[np.ndarray]:
    """How often each of `num` records is in each draw with replacement, ``(DRAWS_AT_ONCE, num) int64`` at a time."""
    generator = np.random.default_rng(SEED)
    for _ in range(NUM_DRAWS // DRAWS_AT_ONCE):
        yield generator.multinomial(num, np.full(num, 1 / num), size=DRAWS_AT_ONCE)


def studentised(sums: np.ndarray, drawn: np.ndarray, num: int) -> Interval:
    """The interval from the ``(5,)`` sums of the terms and those of the draws, ``(NUM_DRAWS, 5)``."""
    gain, error = mean_and_error(sums, num)
    means, errors = mean_and_error(drawn, num)
    with np.errstate(divide="ignore", invalid="ignore"):  # a draw of one record many times has no error
        deviations = np.nan_to_num((means - gain) / errors, nan=0.0, posinf=UNBOUNDED, neginf=-UNBOUNDED)
    most, least = np.quantile(deviations, [(1 + CONFIDENCE) / 2, (1 - CONFIDENCE) / 2])
    return Interval(float(gain), float(gain - most * error), float(gain - least * error))


def mean_and_error(sums: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    """A ratio of sums and its standard error (linearised), from the ``(..., 5)`` sums of the terms of `num` records."""
    d, w, dd, dw, ww = np.moveaxis(sums, -1, 0)
    mean = d / w
    squares = np.maximum(dd - 2 * mean * dw + mean**2 * ww, 0)
    return mean, np.sqrt(squares * num / (num - 1)) / w


def interval_of(row: SliceRow) -> Interval:
    """The interval of a table row."""
    return Interval(row["gain"], row["low"], row["high"])


def unusable(candidate: Scores) -> list[str]:
    """What no version may be, whatever it is compared with."""
    faults = []
    if not np.isfinite(candidate.losses).all():
        faults.append("its held-out loss is not finite")
    answers = candidate.checks.get("not_empty", np.zeros(0))
    if len(answers) and not answers.any():
        faults.append(f"all of its {len(answers)} answers are empty")
    return faults


def first_version(candidate: Scores) -> str:
    """Why a version becomes champion by being there, and whether it was asked at all."""
    asked = (
        "" if len(candidate.losses) else ", and as no record is held out (validation_fraction) it was not asked either"
    )
    return f"the first version: there is nothing to compare it with{asked}"


def nothing_held_out(candidate: Scores, num_excluded: int) -> list[str]:
    """Why nothing can be compared; empty when something can."""
    if len(candidate.losses):
        return []
    if num_excluded:
        return [f"the champion was trained on all {num_excluded} held-out records, so nothing can be compared"]
    return ["no record is held out (validation_fraction), so nothing can be compared"]


def loss_faults(settings: GateSettings, name: str, rows: list[SliceRow]) -> list[str]:
    """Why the losses forbid a promotion; empty when they do not."""
    whole, *slices = rows
    if whole["records"] < MIN_RECORDS:
        return [
            f"only {whole['records']} held-out records can be compared and {MIN_RECORDS} are needed to be confident; "
            "hold out more (validation_fraction, gate_records), or decide by hand: panda promote"
        ]
    faults = []
    if whole["low"] is None or not whole["low"] > settings.promote_min_gain:
        faults.append(
            f"not better than the {name} with confidence: gain {interval_of(whole)} nats per target token on "
            f"{whole['records']} records; its lower bound must be above promote_min_gain={settings.promote_min_gain}"
        )
    faults += [
        f"worse than the {name} on {row['slice']}: gain {interval_of(row)} on {row['records']} records, "
        f"more than max_slice_regression={settings.max_slice_regression} allows"
        for row in slices
        if row["high"] is not None and row["high"] < 0 and row["gain"] < -settings.max_slice_regression
    ]
    return faults


def check_faults(name: str, rows: list[CheckRow]) -> list[str]:
    """Why the answers forbid a promotion: a check is failed more often, with confidence."""
    return [
        f"{CHECKS[row['check']]}: {row['share']:.0%} instead of the {row['reference_share']:.0%} of the {name} "
        f"({row['worse']} worse, {row['better']} better of {row['prompts']} prompts)"
        for row in rows
        if row["chance"] < (1 - CONFIDENCE) / 2
    ]
