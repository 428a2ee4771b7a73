"""How often the gate's interval is wrong: its coverage by the number of held-out records, beside other intervals.

In: made-up populations of records (target tokens of log-normal length, median 60; a loss difference per token) whose
true gain is exactly 0, or the differences of real runs (--records RUN/report/gate_records.jsonl), moved to a gain of 0
and drawn with replacement. Out: a table: how many of the 95 % intervals lay above 0 (a promotion without a reason) and
below 0 (a regression that is none), 2.5 % each if they kept their word, and how wide they were beside the percentile
interval.

    python -m benchmarks.gate_coverage --repeat 2000

Cost: two minutes.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from training.comparison import statistics

SIZES = (10, 20, 30, 50, 100, 400)
NUM_POPULATION = 200_000
TAILS = np.array([1 - statistics.CONFIDENCE, 1 + statistics.CONFIDENCE]) / 2
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
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    other = "champion" if "champion" in lines[0]["loss"] else "base"
    differences = np.array([line["loss"][other] - line["loss"]["candidate"] for line in lines])
    return centred(differences, np.array([float(line["target_tokens"]) for line in lines]))


def centred(differences: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same spread with a true gain of 0."""
    return differences - tokens * differences.sum() / tokens.sum(), tokens


@dataclass(frozen=True)
class Sample:
    """The records of one comparison, and the draws from them."""

    differences: np.ndarray  # (n,) float64
    tokens: np.ndarray  # (n,) float64
    sums: np.ndarray  # (5,) see gate.terms_of
    drawn: np.ndarray  # (NUM_DRAWS, 5)

    @property
    def means(self) -> np.ndarray:
        """The gains of the draws, ``(NUM_DRAWS,) float64``."""
        return self.drawn[:, 0] / self.drawn[:, 1]


def percentile(sample: Sample) -> np.ndarray:
    """The middle 95 % of the drawn means (Efron 1979)."""
    return np.quantile(sample.means, TAILS)


def accelerated(sample: Sample) -> np.ndarray:
    """BCa: bias-corrected and accelerated (Efron 1987)."""
    total, weight = sample.sums[:2]
    bias = stats.norm.ppf(
        np.clip((sample.means < total / weight).mean(), 1 / statistics.NUM_DRAWS, 1 - 1 / statistics.NUM_DRAWS)
    )
    left_out = (total - sample.differences) / (weight - sample.tokens)
    influence = left_out.mean() - left_out
    acceleration = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
    shifted = bias + stats.norm.ppf(TAILS)
    return np.quantile(sample.means, stats.norm.cdf(bias + shifted / (1 - acceleration * shifted)))


def student(sample: Sample) -> np.ndarray:
    """Student's t with the linearised standard error."""
    num = len(sample.tokens)
    gain, error = statistics.mean_and_error(sample.sums, num)
    return gain + stats.t.ppf(TAILS, num - 1) * error


def bootstrap_t(sample: Sample) -> np.ndarray:
    """The gate's own."""
    found = statistics.studentised(sample.sums, sample.drawn, len(sample.tokens))
    return np.array([found.low, found.high], dtype=float)


INTERVALS = {"percentile": percentile, "BCa": accelerated, "Student's t": student, "bootstrap-t": bootstrap_t}


def measure(population: tuple[np.ndarray, np.ndarray], num: int, repeat: int) -> list[str]:
    """For each kind of interval: percent above 0, percent below 0, width beside the percentile interval."""
    bounds = np.array([[kind(one) for kind in INTERVALS.values()] for one in samples(population, num, repeat)])
    above, below = (bounds[..., 0] > 0).mean(0), (bounds[..., 1] < 0).mean(0)
    width = np.median(bounds[..., 1] - bounds[..., 0], axis=0)
    return [f"{100 * a:.1f} / {100 * b:.1f}, {w:.2f}" for a, b, w in zip(above, below, width / width[0], strict=True)]


def samples(population: tuple[np.ndarray, np.ndarray], num: int, repeat: int) -> Iterator[Sample]:
    """Comparisons on `num` records each; the gate draws alike for the same number of records, so do we."""
    generator = np.random.default_rng(num)
    counts = np.concatenate(list(statistics.draws(num))).astype(np.float64)
    for _ in range(repeat):
        chosen = generator.integers(0, len(population[0]), num)
        differences, tokens = population[0][chosen], population[1][chosen]
        terms = statistics.terms_of(differences, tokens)
        yield Sample(differences, tokens, terms.sum(0), counts @ terms)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=2000)
    parser.add_argument("--records", type=Path, nargs="*", default=[], help="gate_records.jsonl of runs")
    options = parser.parse_args()
    populations = {name: made_up(name, np.random.default_rng(1)) for name in POPULATIONS}
    populations |= {str(path): recorded(path) for path in options.records}
    print("| differences | records | " + " | ".join(INTERVALS) + " |\n" + "| --- " * (2 + len(INTERVALS)) + "|")
    for name, population in populations.items():
        for num in SIZES:
            print(f"| {name} | {num} | {' | '.join(measure(population, num, options.repeat))} |", flush=True)


if __name__ == "__main__":
    main()
