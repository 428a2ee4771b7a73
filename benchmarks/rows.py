"""One line of a benchmark: for people on stdout, and for the one table that `python -m benchmarks` makes.

In: what was measured, ours, and what it is compared with, in one unit and one run. Out: a line on stdout; in a run of
all benchmarks also a line of JSON in the file that the environment names. Cost: none.
"""

import json
import os
from dataclasses import asdict, dataclass

FILE = "PANDA_BENCHMARK_ROWS"


@dataclass(frozen=True)
class Row:
    """Ours beside theirs; the ratio is ours : theirs, so less is better for seconds and bytes."""

    what: str
    ours: float
    against: str
    theirs: float
    unit: str
    at_most: float | None = None  # goals of the ratio
    at_least: float | None = None
    cpu_ratio: float | None = None  # of the seconds of all processors: on a busy machine the one to believe

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs

    @property
    def goal(self) -> str:
        """Empty where there is none."""
        if self.at_most is not None:
            return f"<= {self.at_most:g}"
        return "" if self.at_least is None else f">= {self.at_least:g}"

    @property
    def judged(self) -> float:
        """What a goal is held against: the ratio of the processors' seconds where there is one."""
        return self.ratio if self.cpu_ratio is None else self.cpu_ratio

    @property
    def met(self) -> bool:
        """True also where there is no goal."""
        return (self.at_most is None or self.judged <= self.at_most) and (
            self.at_least is None or self.judged >= self.at_least
        )


def say(row: Row) -> None:
    """Print it, and keep it for the table where one is being made."""
    of_cpu = "" if row.cpu_ratio is None else f" ({row.cpu_ratio:.3f} of CPU)"
    goal = f"  goal {row.goal}" if row.goal else ""
    print(
        f"{row.what:<46} {row.ours:10.4g} {row.unit}, {row.against} {row.theirs:.4g}: {row.ratio:.3f}{of_cpu}{goal}",
        flush=True,
    )
    if FILE in os.environ:
        with open(os.environ[FILE], "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
