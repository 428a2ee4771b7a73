"""What has moved between two corpora: a person would notice it, and so does this.

In: the profiles of an earlier and of this corpus, and what is new in this one. Out: `Finding`s, the largest change of
each measure, with the slice that moved and rows of this corpus that show it. Each source is compared with itself, a new
one with those of its kind: as a whole, and its new records alone, since a broken feed is diluted in what was there
before. What is found is both certain (exact tests, `CHANCE` of all of them together) and large enough to matter
(`Measure.least`). Tests know of single records only: a feed whose records resemble each other in a new way, such as
a new subject, moves for certain, and only the size of its change keeps it from being found.
Cost: 0.1 s. Nothing is read but rows of what was found.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from data_prep.inspection.profile import BUCKETS, DUPLICATE, SCRIPTS, SHOWN, Counts, Profile, Sample

CHANCE = 0.005  # of finding anything where nothing has changed
MIN_RECORDS = 30
MIN_TO_LEARN = 100  # records from which is learnt what prompts are like
GREW = 0.9  # of the earlier records are there: then the difference of two counts is that of the new records
MAX_COUNTED = 4096  # counts of more records are tested as if they were of so many
NOTHING = Counts(0, {}, 0, {})
RIDGE = 0.1


@dataclass(frozen=True)
class Measure:
    """What is looked at, and the least change that is told: of a share, a distribution, the area under a curve."""

    name: str
    least: float


PROMPTS, ANSWERS = Measure("length of prompts", 0.15), Measure("length of answers", 0.15)
TARGETS = Measure("share of targets", 0.15)
SCRIPT = Measure("scripts of answers", 0.1)
ENDINGS = Measure("answers that do not end", 0.1)
BROKEN = Measure("broken encoding", 0.03)
OPENINGS = Measure("beginnings of prompts", 0.1)
REPEATED = Measure("one answer to many prompts", 0.05)
EXCHANGED = Measure("answers that read like prompts", 0.2)
WORDING = Measure("wording", 0.15)  # 0.65 of the area under the curve
DUPLICATES, REJECTED = Measure("duplicates", 0.05), Measure("rejected records", 0.05)
SOURCES = Measure("records of a source", 0.2)


@dataclass(frozen=True)
class Finding:
    """One change. `before` and `now` are shares, medians or, of wording, how well a classifier tells both apart."""

    measure: str
    slice: str
    says: str
    before: float
    now: float
    effect: float
    chance: float
    rows: list[int]  # of the ledger of this corpus
    bars: dict[str, tuple[float, float]]  # label -> shares before and now


@dataclass(frozen=True)
class _Slice:
    name: str
    before: Sample
    now: Sample


@dataclass(frozen=True)
class _Tested:
    """A finding if it is large and certain enough; so many ``tests`` could have been made where this one was."""

    finding: Finding
    least: float
    tests: int = 1


def compare(before: Profile, now: Profile, new: Sample) -> list[Finding]:
    """The largest change of each measure, the largest first.

    :param new: described records of this corpus that the earlier one did not have.
    """
    tested = [*_counts(before, now)]
    for pair in _slices(before, now, new):
        tested += [*_numbers(pair), *_shares(pair), *_exchanged(pair), *_wording(pair)]
    found: dict[str, Finding] = {}
    for one in tested:
        finding = replace(one.finding, chance=min(1.0, one.finding.chance * one.tests * len(tested)))
        largest = found.get(finding.measure)
        large = finding.effect >= one.least and finding.chance <= CHANCE
        if large and (largest is None or finding.effect > largest.effect):
            found[finding.measure] = finding
    return sorted(found.values(), key=lambda finding: -finding.effect)


def _slices(before: Profile, now: Profile, new: Sample) -> Iterator[_Slice]:
    """Pairs of samples that ought to look alike."""
    for number, source in enumerate(now.sources):
        is_old = source in before.counts
        kind = source.partition("/")[0]
        alike = [i for i, name in enumerate(before.sources) if (name == source if is_old else _is_of(name, kind))]
        earlier = before.sample[np.isin(before.sample.source, alike)]
        if is_old:
            yield from _large_enough(_Slice(source, earlier, now.sample[now.sample.source == number]))
        fresh = new[new.source == number]
        name = f"new records of {source}" if is_old else f"{source}, which is new, beside other {kind} records"
        yield from _large_enough(_Slice(name, earlier, fresh))


def _is_of(source: str, kind: str) -> bool:
    return source.partition("/")[0] == kind


def _large_enough(one: _Slice) -> list[_Slice]:
    return [one] if min(len(one.before), len(one.now)) >= MIN_RECORDS else []


def _numbers(one: _Slice) -> Iterator[_Tested]:
    """Distributions of lengths, by the largest distance of their cumulative shares."""
    yield from _distribution(PROMPTS, one, "bytes", lambda sample: sample.prompt_bytes)
    yield from _distribution(ANSWERS, one, "bytes", lambda sample: sample.answer_bytes)
    yield from _distribution(TARGETS, one, "of the bytes", _share_of_targets)


def _share_of_targets(sample: Sample) -> np.ndarray:
    return sample.answer_bytes / np.maximum(sample.prompt_bytes + sample.answer_bytes, 1)


def _distribution(measure: Measure, one: _Slice, unit: str, value: Callable[[Sample], np.ndarray]) -> Iterator[_Tested]:
    before, now = np.sort(value(one.before)), np.sort(value(one.now))
    at = np.unique(np.concatenate([before, now]))
    below = [np.searchsorted(values, at, "right") / len(values) for values in (before, now)]
    where = int(np.abs(below[1] - below[0]).argmax())
    more_below = bool(below[1][where] > below[0][where])
    distance = float(abs(below[1][where] - below[0][where]))
    values = value(one.now)
    rows = one.now.row[(values <= at[where]) == more_below]
    medians = float(np.median(before)), float(np.median(now))
    says = f"the median was {medians[0]:,.4g} {unit} and is {medians[1]:,.4g}"
    chance = chance_of_distance(distance, len(before), len(now))
    bars = _histograms(before, now)
    yield _Tested(_found(measure, one, says, medians, distance, chance, rows, bars), measure.least)


def _histograms(before: np.ndarray, now: np.ndarray) -> dict[str, tuple[float, float]]:
    """Shares between twelfths of both."""
    edges = np.unique(np.quantile(np.concatenate([before, now]), np.linspace(0, 1, 13)[1:]))
    places = [
        np.bincount(np.searchsorted(edges, values), minlength=len(edges)) / len(values) for values in (before, now)
    ]
    return {f"≤ {edge:,.4g}": (float(a), float(b)) for edge, a, b in zip(edges, *places, strict=True)}


def chance_of_distance(distance: float, num_before: int, num_now: int) -> float:
    """Kolmogorov and Smirnov's, as Stephens corrects it for small samples."""
    from scipy.special import kolmogorov

    root = np.sqrt(num_before * num_now / (num_before + num_now))
    return float(kolmogorov((root + 0.12 + 0.11 / root) * distance))


def _shares(one: _Slice) -> Iterator[_Tested]:
    """Records of each kind, and with each fault."""
    yield _share(ENDINGS, one, lambda sample: ~sample.is_complete, "of the answers end in the middle of something")
    yield _share(BROKEN, one, lambda sample: sample.is_broken, "of the records were read in a wrong encoding")
    scripts = [(code, f"of the answers are written in {name}") for code, name in enumerate(SCRIPTS)]
    yield from _categories(SCRIPT, one, lambda sample: sample.script, dict(scripts))
    yield from _categories(OPENINGS, one, lambda sample: sample.opening, "of the prompts begin alike")
    yield from _categories(REPEATED, one, lambda sample: sample.answer, "of the answers are the same")


def _categories(
    measure: Measure, one: _Slice, value: Callable[[Sample], np.ndarray], says: dict[int, str] | str
) -> Iterator[_Tested]:
    """The share of each value that is frequent before or now."""
    num = len(np.unique(np.concatenate([value(one.before), value(one.now)])))
    for name in sorted(_frequent(value(one.before), measure) | _frequent(value(one.now), measure)):
        text = says[name] if isinstance(says, dict) else says
        chosen = partial(_equals, value=value, name=name)
        yield replace(_share(measure, one, chosen, text), tests=num)


def _frequent(values: np.ndarray, measure: Measure) -> set[int]:
    names, counts = np.unique(values, return_counts=True)
    return set(names[counts >= max(2, measure.least * len(values))].tolist())


def _equals(sample: Sample, value: Callable[[Sample], np.ndarray], name: int) -> np.ndarray:
    return value(sample) == name


def _share(measure: Measure, one: _Slice, has: Callable[[Sample], np.ndarray], says: str) -> _Tested:
    before, now = has(one.before), has(one.now)
    shares = float(before.mean()), float(now.mean())
    chance = chance_of_shares(int(before.sum()), len(before), int(now.sum()), len(now))
    rows = one.now.row[now if shares[1] > shares[0] else ~now]
    text = f"{shares[1]:.1%} {says}, before {shares[0]:.1%}"
    bars = {measure.name: shares}
    return _Tested(_found(measure, one, text, shares, abs(shares[1] - shares[0]), chance, rows, bars), measure.least)


def chance_of_shares(some_before: int, num_before: int, some_now: int, num_now: int) -> float:
    """Fisher's exact test."""
    from scipy.stats import fisher_exact

    columns = [_scaled(some_before, num_before), _scaled(some_now, num_now)]
    return float(fisher_exact([[some, num - some] for some, num in columns]).pvalue)


def _scaled(some: int, num: int) -> tuple[int, int]:
    return (some, num) if num <= MAX_COUNTED else (round(some * MAX_COUNTED / num), MAX_COUNTED)


def _exchanged(one: _Slice) -> Iterator[_Tested]:
    """Whether answers are more like prompts than their own prompts are, learnt from one half of the earlier records."""
    before, now = (sample[(sample.prompt_bytes > 0) & (sample.answer_bytes > 0)] for sample in (one.before, one.now))
    taught = _is_first_half(before.key)
    asked, known = before[~taught], before[taught]
    now = now[~_is_first_half(now.key)]  # of the other half, for what was learnt from is known by heart
    if len(known) < MIN_TO_LEARN or min(len(asked), len(now)) < MIN_RECORDS:
        return
    direction = _direction(_prompt_side(known), _answer_side(known))
    pair = replace(one, before=asked, now=now)
    yield _share(EXCHANGED, pair, partial(_reads_exchanged, direction=direction), "of the answers read like prompts")


def _is_first_half(keys: np.ndarray) -> np.ndarray:
    return keys % np.uint64(2) == 0


def _reads_exchanged(sample: Sample, direction: np.ndarray) -> np.ndarray:
    return (_answer_side(sample) - _prompt_side(sample)) @ direction < 0


def _prompt_side(sample: Sample) -> np.ndarray:
    return np.column_stack([_normal(sample.grams[:, :BUCKETS]), np.log1p(sample.prompt_bytes) / 10])


def _answer_side(sample: Sample) -> np.ndarray:
    return np.column_stack([_normal(sample.grams[:, BUCKETS:]), np.log1p(sample.answer_bytes) / 10])


def _normal(counts: np.ndarray) -> np.ndarray:
    """Roots of shares: ``(n, m) float64`` of length 1, whatever the length of the text."""
    return np.sqrt(counts / np.maximum(counts.sum(axis=1, keepdims=True, dtype=np.float64), 1))


def _direction(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Fisher's discriminant: along it, those of the second sample are higher."""
    spread = np.cov(low, rowvar=False) + np.cov(high, rowvar=False)
    ridge = RIDGE * np.trace(spread) / len(spread) + 1e-9
    return np.linalg.solve(spread + ridge * np.eye(len(spread)), high.mean(axis=0) - low.mean(axis=0))


def _wording(one: _Slice) -> Iterator[_Tested]:
    """How well a classifier that has learnt from one half tells the other half apart."""
    if min(len(one.before), len(one.now)) < MIN_TO_LEARN:
        return
    sides = [np.hstack([_normal(s.grams[:, :BUCKETS]), _normal(s.grams[:, BUCKETS:])]) for s in (one.before, one.now)]
    firsts = [_is_first_half(sample.key) for sample in (one.before, one.now)]
    scores = [np.zeros(len(side)) for side in sides]
    areas = []
    for learns in (True, False):
        direction = _direction(*(side[first == learns] for side, first in zip(sides, firsts, strict=True)))
        for side, first, score in zip(sides, firsts, scores, strict=True):
            score[first != learns] = side[first != learns] @ direction
        areas.append(area_under(*(score[first != learns] for score, first in zip(scores, firsts, strict=True))))
    area, chance = float(np.mean(areas)), chance_of_area(float(np.mean(areas)), *map(len, scores))
    rows = one.now.row[np.argsort(-scores[1])]
    says = f"a classifier of runs of three bytes puts a record of now above one of before in {area:.0%} of pairs"
    bars = {"told apart": (0.5, area)}
    yield _Tested(_found(WORDING, one, says, (0.5, area), area - 0.5, chance, rows, bars), WORDING.least)


def area_under(low: np.ndarray, high: np.ndarray) -> float:
    """How often one of the second is above one of the first."""
    order = np.sort(low)
    above = (np.searchsorted(order, high, "left") + np.searchsorted(order, high, "right")) / 2
    return float(above.mean() / len(low))


def chance_of_area(area: float, num_before: int, num_now: int) -> float:
    """Mann and Whitney's test."""
    deviation = math.sqrt((num_before + num_now + 1) / (12 * num_before * num_now))
    return math.erfc(abs(area - 0.5) / deviation / math.sqrt(2))


def _counts(before: Profile, now: Profile) -> Iterator[_Tested]:
    """What is counted of all records: those of a source that are gone, duplicates, rejected ones."""
    for source, then in before.counts.items():
        here = now.counts.get(source, NOTHING)
        yield _lost(source, then, here)
        if here.records:
            yield from _counted(source, then, here)
            if _share_kept(before, now) >= GREW:
                yield from _counted(f"new records of {source}", then, _difference(here, then))


def _lost(source: str, then: Counts, here: Counts) -> _Tested:
    lost = max(then.different - here.different, 0)
    deviation = math.sqrt(max(then.different + here.different, 1))
    says = f"{here.different:,} usable records, before {then.different:,}"
    numbers, effect = (float(then.different), float(here.different)), lost / max(then.different, 1)
    bars = {"before": (1.0, 0.0), "now": (0.0, 1 - effect)}
    chance = math.erfc(lost / deviation / math.sqrt(2)) if then.different >= MIN_RECORDS else 1.0
    return _Tested(Finding(SOURCES.name, source, says, *numbers, effect, chance, [], bars), SOURCES.least)


def _counted(name: str, then: Counts, here: Counts) -> Iterator[_Tested]:
    if min(then.records, here.records) < MIN_RECORDS:
        return
    for reason in (DUPLICATE, *sorted({*then.rejected, *here.rejected})):
        measure, says = REJECTED, f"are rejected: {reason}"
        if reason == DUPLICATE:
            measure, says = DUPLICATES, "have the content of an earlier one"
        yield _rate(measure, name, says, _of(then, reason), _of(here, reason), here.rows.get(reason, []))


def _of(counts: Counts, reason: str) -> tuple[int, int]:
    return counts.of_reason(reason), counts.records


def _share_kept(before: Profile, now: Profile) -> float:
    """Of the earlier records."""
    bound = np.uint64(min(before.known_bound, now.known_bound))
    earlier, here = before.known[before.known < bound], now.known[now.known < bound]
    return float(np.isin(earlier, here).mean()) if len(earlier) else 0.0


def _difference(now: Counts, before: Counts) -> Counts:
    """What has come in between; nothing where anything is fewer than it was."""
    rejected = {
        reason: now.rejected.get(reason, 0) - before.rejected.get(reason, 0)
        for reason in {*now.rejected, *before.rejected}
    }
    more = Counts(now.records - before.records, rejected, now.duplicates - before.duplicates, now.rows)
    return more if min(more.different, more.duplicates, *rejected.values(), 0) >= 0 else NOTHING


def _rate(  # noqa: PLR0913, PLR0917  # what a finding says
    measure: Measure, name: str, says: str, before: tuple[int, int], now: tuple[int, int], rows: list[int]
) -> _Tested:
    shares = before[0] / before[1], now[0] / now[1]
    text = f"{shares[1]:.1%} of the records {says}, before {shares[0]:.1%}"
    chance, bars = chance_of_shares(*before, *now), {says: shares}
    finding = Finding(measure.name, name, text, *shares, abs(shares[1] - shares[0]), chance, rows, bars)
    return _Tested(finding, measure.least)


def _found(  # noqa: PLR0913, PLR0917  # the fields of a finding
    measure: Measure, one: _Slice, says: str, numbers: tuple[float, float], effect: float, chance: float,
    rows: np.ndarray, bars: dict[str, tuple[float, float]],
) -> Finding:  # fmt: skip
    return Finding(measure.name, one.name, says, *numbers, effect, chance, rows[:SHOWN].tolist(), bars)
