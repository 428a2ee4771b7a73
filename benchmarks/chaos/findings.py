"""What a round of chaos has found, and the table of all rounds.

In: what was tried and what came of it. Out: `Round`; a table. Four things may not happen, whatever is broken:

    lost      a record, a step, a version or a file that was there is gone, or work that was done is done again
    wrong     something damaged or half done was used, or the result differs from that of an undisturbed run
    orphaned  a process, a lock or a temporary file is left over
    untyped   an error that is no `PandaError`: a person would see a traceback instead of what to do
"""

import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from data_prep.errors import PandaError

KINDS = ("lost", "wrong", "orphaned", "untyped")


@dataclass
class Round:
    """One case with one seed: how often something was broken, and what was not as it should be."""

    tried: int = 0
    findings: list[tuple[str, str]] = field(default_factory=list)  # (one of KINDS, what)

    def found(self, kind: str, what: str) -> None:
        """Note a fault."""
        assert kind in KINDS, kind
        self.findings.append((kind, what))

    def expect(self, holds: object, kind: str, what: str) -> None:
        """Note a fault unless something holds."""
        if not holds:
            self.found(kind, what)

    def typed(self, what: str, function: Callable[[], Any], refused: Callable[[], Any] = lambda: None) -> Any:
        """The function's result; None after an error that says what to do. Any other error is a finding."""
        try:
            return function()
        except PandaError as error:
            self.expect(str(error).strip(), "untyped", f"{what}: an error without a message")
            return refused()
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{last.filename.rpartition('/')[2]}:{last.lineno}"
            self.found("untyped", f"{what}: {type(error).__name__} at {place}: {str(error)[:160]}")
            return None


@dataclass
class Row:
    """The rounds of one case."""

    rounds: int = 0
    tried: int = 0
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    def add(self, one: Round, seconds: float) -> None:
        self.rounds += 1
        self.tried += one.tried
        self.seconds += seconds
        for kind, _ in one.findings:
            self.counts[kind] += 1


def table(rows: dict[str, Row]) -> str:
    """Cases below each other, and the sum. `survived` = tried less what was found."""
    total = Row(counts=defaultdict(int))
    lines = [f"{'case':<22}{'seeds':>6}{'tried':>9}{'survived':>9}" + "".join(f"{kind:>9}" for kind in KINDS) + "  s"]
    for name, row in rows.items():
        lines.append(_line(name, row))
        total.rounds, total.tried, total.seconds = (
            total.rounds + row.rounds, total.tried + row.tried, total.seconds + row.seconds
        )  # fmt: skip
        for kind in KINDS:
            total.counts[kind] += row.counts[kind]
    return "\n".join([*lines, _line("all", total)])


def _line(name: str, row: Row) -> str:
    survived = row.tried - min(row.tried, sum(row.counts.values()))
    return (
        f"{name:<22}{row.rounds:>6}{row.tried:>9}{survived:>9}"
        + "".join(f"{row.counts[kind]:>9}" for kind in KINDS)
        + f"  {row.seconds:.0f}"
    )


def failures(found: Iterable[tuple[str, int, tuple[str, str]]]) -> str:
    """Each finding with the command that shows it again."""
    return "\n".join(
        f"{kind}: {what}\n    python -m benchmarks.chaos --case {case} --seed {seed} --rounds 1"
        for case, seed, (kind, what) in found
    )
