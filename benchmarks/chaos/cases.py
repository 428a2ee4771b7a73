"""The cases, and how they take turns.

In: names, a seed, how many minutes. Out: the rows of the table and every finding. A case is a function of a seed and
of a folder that all rounds share, so that what is only compared with is made once. Cost: the minutes.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.chaos import fuzz
from benchmarks.chaos.clock import clock
from benchmarks.chaos.damage import damage_cache
from benchmarks.chaos.findings import Round, Row
from benchmarks.chaos.full_disk import full_disk
from benchmarks.chaos.goodput import goodput
from benchmarks.chaos.hostile import bombs, configurations, own_code
from benchmarks.chaos.kill_cluster import kill_cluster
from benchmarks.chaos.kill_flow import kill_flow
from benchmarks.chaos.kill_gc import kill_gc
from benchmarks.chaos.kill_preparation import kill_preparation
from benchmarks.chaos.kill_ranks import kill_ranks
from benchmarks.chaos.kill_stack import kill_stack
from benchmarks.chaos.little_memory import little_memory
from benchmarks.chaos.outage import outage, postgresql_outage
from benchmarks.chaos.readers import READERS

Case = Callable[[int, Path], Round]
FUZZ_SECONDS = 30


def fuzz_case(seed: int, ground: Path) -> Round:
    """One reader a seed, grown by coverage; without atheris all of them, mutated."""
    if fuzz.has_atheris():
        return fuzz.grown(list(READERS)[seed % len(READERS)], seed, FUZZ_SECONDS)
    return fuzz.feed(seed, Path(tempfile.mkdtemp(dir=ground)))


CASES: dict[str, Case] = {
    "kill-ranks": kill_ranks,
    "kill-preparation": kill_preparation,
    "kill-gc": kill_gc,
    "damage": damage_cache,
    "bombs": bombs,
    "own-code": own_code,
    "settings": configurations,
    "fuzz": fuzz_case,
}
"""Name -> what is broken. In the order of the table."""

LONG: dict[str, Case] = {
    "clock": clock,
    "little-memory": little_memory,
    "full-disk": full_disk,
    "kill-flow": kill_flow,
    "kill-cluster": kill_cluster,
    "goodput": goodput,
    "outage": outage,
    "postgresql-outage": postgresql_outage,
    "kill-stack": kill_stack,
}
"""Cases of many minutes: played where they are named."""


def rounds(names: list[str], seed: int) -> Iterator[tuple[str, int]]:
    """(case, seed), for ever: each case in turn, then all with the next seed."""
    while True:
        yield from ((name, seed) for name in names)
        seed += 1


def play(
    names: list[str], seed: int, minutes: float, most: int | None, say: Callable[[str], None]
) -> tuple[dict[str, Row], list[tuple[str, int, tuple[str, str]]]]:
    """Rounds until the time is up, or `most` of each case; (rows, findings with case and seed)."""
    rows: dict[str, Row] = {name: Row() for name in names}
    found: list[tuple[str, int, tuple[str, str]]] = []
    deadline = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="panda-chaos-") as folder:
        for number, (name, one_seed) in enumerate(rounds(names, seed)):
            if time.monotonic() > deadline or (most is not None and number >= most * len(names)):
                break
            ground = Path(folder, name)
            ground.mkdir(exist_ok=True)
            began = time.monotonic()
            result = (CASES | LONG)[name](one_seed, ground)
            rows[name].add(result, time.monotonic() - began)
            found += [(name, one_seed, finding) for finding in result.findings]
            say(f"{name} seed {one_seed}: {result.tried} tried, {len(result.findings)} found")
            for kind, what in result.findings:
                say(f"    {kind}: {what}")
    return rows, found
