"""The gate: may a new version become the champion? Paired statistics, no model in sight.

In: for each record the summed loss of its target under candidate, champion and base, for each prompt what the answers
are like, and the items of benchmarks. Out: a `Verdict` with its reasons and tables. Losses are summed over a whole
target and divided by the candidate's number of target tokens, so that models with different tokenizers can be compared
as well. All models answer for the same records, so their differences are what is judged.

A version is promoted by one test: the gain on this corpus' held-out records is certain (`intervals.CONFIDENCE`). So the
others, which only forbid, make no promotion for nothing more likely. They are many: slices, neutral texts, records of
the champion's time, checks of the answers, metrics, benchmarks. What they find counts if it is certain for all of them
together (`intervals.certain_together`), and larger than what the settings allow. Cost: 0.2 s for 1,000 records.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np

from training.comparison.intervals import Interval, certain_together, interval, sign_test
from training.settings import GateSettings

MIN_RECORDS = 30  # to promote: of these a fault in a tenth of all texts hits at least one in 96 of 100 cases
ALL = "all"
NEUTRAL = "neutral"  # the slices of texts that no corpus is made of
BEFORE = "before"  # those of the records that were held out for the champion
KNOWN = 0.6  # of what a mere guess costs: who needs more knows too little of neutral texts to forget it
CHECKS = {
    "ends": "answers that end",
    "not_empty": "answers that are not empty",
    "no_repetition": "answers that do not repeat themselves without end",
    "exact": "short targets answered exactly",
}


@dataclass(frozen=True)
class Scores:
    """What one model makes of the n records, the prompts among them, and the items of benchmarks."""

    losses: np.ndarray  # (n,) float64, summed over the target tokens of a record, nats
    tokens: np.ndarray  # (n,) int64, target tokens of this model's tokenizer
    checks: dict[str, np.ndarray]  # check -> (num_prompts,) float64: 1 good, 0 bad, nan where it does not apply
    metrics: dict[str, np.ndarray] = field(default_factory=dict)  # metric or benchmark -> a value for each item


def nothing_asked() -> Scores:
    """The scores of a model where no record is held out."""
    return Scores(np.zeros(0), np.zeros(0, dtype=np.int64), {})


@dataclass(frozen=True)
class Elsewhere:
    """Records beside those of this corpus: neutral texts, and what was held out for the champion."""

    slices: dict[str, np.ndarray]
    guesses: np.ndarray  # (n,) float64, nats: of a reader of a neutral text who only knows how often each character is

    @property
    def records(self) -> np.ndarray:
        """All of them, ``(m,) int64``."""
        return np.concatenate([np.zeros(0, dtype=np.int64), *self.slices.values()])


@dataclass(frozen=True)
class Measure:
    """What a metric's or benchmark's values mean, and how much worse the mean may certainly become."""

    higher_is_better: bool
    max_regression: float


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
    chance: float  # of so low a gain when both models are alike; 1 where the slice cannot tell


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


class MetricRow(TypedDict):
    """The mean of a metric or benchmark over its items, and the gain: above 0 the candidate is better."""

    against: str
    metric: str
    items: int
    value: float
    reference_value: float
    gain: float
    low: float | None
    high: float | None
    chance: float


@dataclass(frozen=True)
class Verdict:
    """Whether the candidate may become the champion, why, and the numbers behind it."""

    promoted: bool
    reasons: list[str]
    reference: str | None  # what was decisive: the champion, else the base
    slices: list[SliceRow] = field(default_factory=list)
    checks: list[CheckRow] = field(default_factory=list)
    metrics: list[MetricRow] = field(default_factory=list)


@dataclass(frozen=True)
class Loss:
    """Something that has become worse: how likely by chance, whether by more than is allowed, in words."""

    chance: float
    beyond_limit: bool
    words: str


NOWHERE = Elsewhere({}, np.zeros(0))


def reach_verdict(  # noqa: PLR0913, PLR0917  # what was asked, and what it means
    settings: GateSettings,
    slices: dict[str, np.ndarray],
    candidate: Scores,
    others: dict[str, tuple[str, Scores]],
    num_excluded: int = 0,
    elsewhere: Elsewhere = NOWHERE,
    measures: dict[str, Measure] | None = None,
) -> Verdict:
    """Compare with each of `others` (role -> name, scores); the champion decides, without one the base.

    Neutral texts are compared with both: a champion may have forgotten a little of what the base knew, and the
    next version a little more.

    :param num_excluded: held-out records that are left out, because the champion was trained on them.
    """
    rows = [row for role, (_, scores) in others.items() for row in compare(role, slices, candidate, scores, elsewhere)]
    checks = [row for role, (_, scores) in others.items() for row in compare_checks(role, candidate, scores)]
    metrics = [
        row for role, (_, scores) in others.items() for row in compare_metrics(role, candidate, scores, measures or {})
    ]
    decisive = next((role for role in ("champion", "base") if role in others), None)
    faults = unusable(candidate)
    if decisive is None:
        return Verdict(not faults, faults or [first_version(candidate)], None, rows)
    names = {role: f"{role} {name}" for role, (name, _) in others.items()}
    mine = [row for row in rows if row["against"] == decisive]
    whole = next((row for row in mine if row["slice"] == ALL), None)
    if whole is None:
        faults += nothing_held_out(num_excluded)
    else:
        faults += too_little_gain(settings, names[decisive], whole)
    losses = [
        *(slice_loss(settings, names[row["against"]], row) for row in rows if is_judged(row, decisive)),
        *(check_loss(names[decisive], row) for row in checks if row["against"] == decisive),
        *(metric_loss(names[decisive], row, measures or {}) for row in metrics if row["against"] == decisive),
    ]
    faults += certain_losses(losses)
    gained = whole and f"better than the {names[decisive]} by {interval_of(whole)} nats per target token"
    return Verdict(not faults, faults or [str(gained)], names[decisive], rows, checks, metrics)


def compare(
    role: str, slices: dict[str, np.ndarray], candidate: Scores, other: Scores, elsewhere: Elsewhere = NOWHERE
) -> list[SliceRow]:
    """One table row per slice, first the whole of what this corpus has held out."""
    own = np.setdiff1d(np.arange(len(candidate.losses)), elsewhere.records)
    everything = {ALL: own} if len(own) else {}
    rows = [_compare_slice(role, name, records, candidate, other) for name, records in {**everything, **slices}.items()]
    for name, records in elsewhere.slices.items():
        row = _compare_slice(role, name, records, candidate, other)
        if name.startswith(NEUTRAL) and not other.losses[records].sum() < KNOWN * elsewhere.guesses[records].sum():
            row["chance"] = 1.0  # it knew nothing of such texts, so there is nothing to forget
        rows.append(row)
    return rows


def _compare_slice(role: str, name: str, records: np.ndarray, candidate: Scores, other: Scores) -> SliceRow:
    tokens = np.maximum(candidate.tokens[records], 1)
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
        "chance": gained.chance,
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


def compare_metrics(role: str, candidate: Scores, other: Scores, measures: dict[str, Measure]) -> list[MetricRow]:
    """One table row per metric or benchmark that both models were asked."""
    rows: list[MetricRow] = []
    for name in (name for name in measures if name in candidate.metrics and name in other.metrics):
        both = ~(np.isnan(candidate.metrics[name]) | np.isnan(other.metrics[name]))
        mine, theirs = candidate.metrics[name][both], other.metrics[name][both]
        if not both.any():
            continue
        gained = mine - theirs if measures[name].higher_is_better else theirs - mine
        found = interval(gained, np.ones(len(gained)))
        right_or_wrong = bool(np.isin(np.concatenate([mine, theirs]), (0.0, 1.0)).all())
        better, worse = int((gained > 0).sum()), int((gained < 0).sum())
        rows.append({
            "against": role, "metric": name, "items": len(gained), "value": float(mine.mean()),
            "reference_value": float(theirs.mean()), "gain": found.gain, "low": found.low, "high": found.high,
            "chance": sign_test(better, worse) if right_or_wrong else found.chance,
        })  # fmt: skip
    return rows


def interval_of(row: SliceRow | MetricRow) -> Interval:
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


def nothing_held_out(num_excluded: int) -> list[str]:
    """Why nothing can be compared."""
    if num_excluded:
        return [f"the champion was trained on all {num_excluded} held-out records, so nothing can be compared"]
    return ["no record is held out (validation_fraction), so nothing can be compared"]


def too_little_gain(settings: GateSettings, name: str, whole: SliceRow) -> list[str]:
    """Why the gain on all held-out records is not certain; empty when it is."""
    if whole["records"] < MIN_RECORDS:
        return [
            f"only {whole['records']} held-out records can be compared and {MIN_RECORDS} are needed to be confident; "
            "hold out more (validation_fraction, gate_records), or decide by hand: panda promote"
        ]
    if whole["low"] is not None and whole["low"] > settings.promote_min_gain:
        return []
    return [
        f"not better than the {name} with confidence: gain {interval_of(whole)} nats per target token on "
        f"{whole['records']} records; its lower bound must be above promote_min_gain={settings.promote_min_gain}"
    ]


def is_judged(row: SliceRow, decisive: str) -> bool:
    """Whether a loss on these records forbids a promotion: with the decisive model, on neutral texts with any."""
    return row["slice"] != ALL and (row["against"] == decisive or row["slice"].startswith(NEUTRAL))


def slice_loss(settings: GateSettings, name: str, row: SliceRow) -> Loss:
    """The loss on a slice of this corpus, of neutral texts, or of what was held out for the champion."""
    elsewhere = row["slice"].partition("/")[0] in (NEUTRAL, BEFORE)
    limit = "max_regression" if elsewhere else "max_slice_regression"
    allowed = getattr(settings, limit)
    return Loss(
        row["chance"],
        row["gain"] < -allowed,
        f"{'has forgotten: ' if elsewhere else ''}worse than the {name} on {row['slice']}: gain {interval_of(row)} on "
        f"{row['records']} records, more than {limit}={allowed} allows",
    )


def check_loss(name: str, row: CheckRow) -> Loss:
    """A check of the answers is failed more often."""
    return Loss(
        row["chance"],
        row["worse"] > row["better"],
        f"{CHECKS[row['check']]}: {row['share']:.0%} instead of the {row['reference_share']:.0%} of the {name} "
        f"({row['worse']} worse, {row['better']} better of {row['prompts']} prompts)",
    )


def metric_loss(name: str, row: MetricRow, measures: dict[str, Measure]) -> Loss:
    """A metric or benchmark has become worse."""
    allowed = measures[row["metric"]].max_regression
    return Loss(
        row["chance"],
        row["gain"] < -allowed,
        f"worse than the {name} by {row['metric']}: {row['value']:.4f} instead of {row['reference_value']:.4f} on "
        f"{row['items']} items, more than its max_regression={allowed} allows",
    )


def certain_losses(losses: Iterable[Loss]) -> list[str]:
    """Those that are certain, together, and beyond what is allowed."""
    found = list(losses)
    certain = certain_together([loss.chance for loss in found])
    return [loss.words for loss, sure in zip(found, certain, strict=True) if sure and loss.beyond_limit]
