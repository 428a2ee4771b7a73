"""How often the gate is wrong: its interval by the number of held-out records, beside others; and its whole decision.

In: made-up populations of records (target tokens of log-normal length, median 60; a loss difference per token) whose
true gain is exactly 0, or the differences of real runs (--records RUN/report/gate_records.jsonl), moved to a gain of 0
and drawn with replacement. Out: a table: how many of the 98 % intervals lay above 0 (a promotion without a reason) and
below 0 (a regression that is none), 1 % each if they kept their word, and how wide they were beside the percentile
interval. Then whole decisions (--decisions) about versions that are as good as the champion, or certainly better: how
many of the first are promoted, how many of the second are kept back by a slice, a neutral text or a check.

    python -m benchmarks.gate_coverage --repeat 2000 --decisions 400

Cost: three minutes.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from training.comparison import intervals, statistics
from training.settings import GateSettings

SIZES = (30, 50, 100, 400)
AT_ONCE = 250  # comparisons
DECIDED = ("bell-shaped", "long tail of losses")
NUM_POPULATION = 200_000
TAILS = np.array([1 - intervals.CONFIDENCE, 1 + intervals.CONFIDENCE]) / 2
POPULATIONS: dict[str, Callable[[np.random.Generator, np.ndarray], np.ndarray]] = {
    "bell-shaped": lambda generator, tokens: generator.normal(0, 0.1, len(tokens)),
    "heavy tails": lambda generator, tokens: 0.1 * generator.standard_t(3, len(tokens)),
    "long tail of losses": lambda generator, tokens: -0.1 * generator.lognormal(0, 1, len(tokens)),
    "long tail of gains": lambda generator, tokens: 0.1 * generator.lognormal(0, 1, len(tokens)),
    "5 % much worse": lambda generator, tokens: np.where(generator.random(len(tokens)) < 0.05, -1.0, 0.05),
    "longer is better": lambda generator, tokens: 0.1 * np.log(tokens),
}
"""Name -> the gain per target token of records with these numbers of target tokens, before noise of single tokens."""


def made_up(name: str, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(summed differences, target tokens) of a population, ``(NUM_POPULATION,) float64``."""
    tokens = np.clip(generator.lognormal(np.log(60), 1.0, NUM_POPULATION), 1, 2048).round()
    per_token = POPULATIONS[name](generator, tokens) + generator.normal(0, 0.5, len(tokens)) / np.sqrt(tokens)
    return centred(per_token * tokens, tokens)


def recorded(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The same of a run: its records under candidate and champion, or base."""
    every = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in every if not line["slice"].startswith((statistics.NEUTRAL, statistics.BEFORE))]
    other = "champion" if "champion" in lines[0]["loss"] else "base"
    differences = np.array([line["loss"][other] - line["loss"]["candidate"] for line in lines])
    return centred(differences, np.array([float(line["target_tokens"]) for line in lines]))


def centred(differences: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same spread with a true gain of 0."""
    return differences - tokens * differences.sum() / tokens.sum(), tokens


@dataclass(frozen=True)
class Samples:
    """Comparisons on n records each, and the draws from them."""

    differences: np.ndarray  # (n, comparisons) float64
    tokens: np.ndarray  # (n, comparisons) float64
    sums: np.ndarray  # (comparisons, 5) see intervals.terms_of
    drawn: np.ndarray  # (draws, comparisons, 5)
    spacings: np.ndarray  # (draws, n + 1)

    @property
    def means(self) -> np.ndarray:
        """The gains of the draws, ``(draws, comparisons) float64``."""
        return self.drawn[..., 0] / self.drawn[..., 1]


Bounds = tuple[np.ndarray, np.ndarray]


def percentile(some: Samples) -> Bounds:
    """The middle of the drawn means (Efron 1979)."""
    low, high = np.quantile(some.means, TAILS, axis=0)
    return low, high


def student(some: Samples) -> Bounds:
    """Student's t with the linearised standard error."""
    num = len(some.tokens)
    gain, error = intervals.mean_and_error(some.sums, num)
    low, high = (gain + edge * error for edge in stats.t.ppf(TAILS, num - 1))
    return low, high


def bootstrap_t(some: Samples) -> Bounds:
    """Studentised: both ends of the gate's interval but for what is unseen."""
    _, low, high, _ = intervals.studentised(some.sums, some.drawn, len(some.tokens))
    return low, high


def the_gate(some: Samples) -> Bounds:
    """The gate's own."""
    low, high = bootstrap_t(some)
    return np.minimum(low, intervals.with_one_unseen(some.differences, some.tokens, [some.spacings])), high


KINDS = {"percentile": percentile, "Student's t": student, "bootstrap-t": bootstrap_t, "the gate": the_gate}


def measure(population: tuple[np.ndarray, np.ndarray], num: int, repeat: int) -> list[str]:
    """For each kind of interval: percent above 0, percent below 0, width beside the percentile interval."""
    found = [[kind(some) for kind in KINDS.values()] for some in samples(population, num, repeat)]
    bounds = np.concatenate(found, axis=2)  # (kinds, ends, comparisons)
    above, below = (bounds[:, 0] > 0).mean(1), (bounds[:, 1] < 0).mean(1)
    width = np.median(bounds[:, 1] - bounds[:, 0], axis=1)
    return [f"{100 * a:.1f} / {100 * b:.1f}, {w:.2f}" for a, b, w in zip(above, below, width / width[0], strict=True)]


def samples(population: tuple[np.ndarray, np.ndarray], num: int, repeat: int) -> Iterator[Samples]:
    """Comparisons on `num` records each; the gate draws alike for the same number of records, so do we."""
    generator = np.random.default_rng(num)
    counts = np.concatenate(list(intervals.draws(num))).astype(np.float64)
    spacings = np.concatenate(list(intervals.spacings(num)))
    for first in range(0, repeat, AT_ONCE):
        chosen = generator.integers(0, len(population[0]), (num, min(AT_ONCE, repeat - first)))
        differences, tokens = population[0][chosen], population[1][chosen]
        terms = intervals.terms_of(differences, tokens)
        drawn = (counts @ terms.reshape(num, -1)).reshape(len(counts), *terms.shape[1:])
        yield Samples(differences, tokens, terms.sum(0), drawn, spacings)


def decisions(population: tuple[np.ndarray, np.ndarray], gain: float, repeat: int) -> float:
    """Share of versions that are promoted: four slices of 50 records, 100 neutral texts, 16 answers, one champion."""
    generator = np.random.default_rng(repeat)
    names = ("instruction/other", "instruction/cjk", "pretraining/other", "pretraining/cjk")
    slices = {name: np.arange(50 * i, 50 * (i + 1)) for i, name in enumerate(names)}
    neutral = {"neutral/other": np.arange(200, 260), "neutral/cjk": np.arange(260, 300)}
    elsewhere = statistics.Elsewhere(neutral, np.full(300, np.inf))
    settings = GateSettings(max_slice_regression=0, max_regression=0)  # every certain loss forbids
    promoted = 0
    for _ in range(repeat):
        chosen = generator.integers(0, len(population[0]), 300)
        differences, tokens = population[0][chosen] + gain * population[1][chosen], population[1][chosen]
        checks = ({"ends": (generator.random(16) < 0.7).astype(float)} for _ in range(2))
        candidate = statistics.Scores(3 * tokens - differences, tokens.astype(np.int64), next(checks))
        champion = statistics.Scores(3 * tokens, tokens.astype(np.int64), next(checks))
        others = {"champion": ("m", champion)}
        promoted += statistics.reach_verdict(settings, slices, candidate, others, 0, elsewhere).promoted
    return promoted / repeat


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=2000)
    parser.add_argument("--decisions", type=int, default=0, help="whole decisions of each kind")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--records", type=Path, nargs="*", default=[], help="gate_records.jsonl of runs")
    options = parser.parse_args()
    populations = {name: made_up(name, np.random.default_rng(1)) for name in POPULATIONS}
    populations |= {str(path): recorded(path) for path in options.records}
    print("| differences | records | " + " | ".join(KINDS) + " |\n" + "| --- " * (2 + len(KINDS)) + "|")
    for name, population in populations.items():
        for num in options.sizes:
            print(f"| {name} | {num} | {' | '.join(measure(population, num, options.repeat))} |", flush=True)
    for name in DECIDED if options.decisions else ():
        alike, better = (decisions(populations[name], gain, options.decisions) for gain in (0.0, 0.15))
        print(f"{name}: {alike:.1%} promoted of versions that are alike, {1 - better:.1%} kept back of better ones")


if __name__ == "__main__":
    main()
