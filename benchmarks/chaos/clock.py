"""A clock that is set in every stage of a whole run, forwards and backwards, by a second, an hour, a day, twenty years.

In: a seed, which draws by how much. Out: a `Round`: the run ends as the run undisturbed, no part of its account is
below zero, and started again by the right clock it finds all done. All processes of the run see the clock that is set
(`jumping_clock.c`); the times of files are those of the machine. Cost: a minute; gcc.
"""

import json
import random
import struct
import subprocess
from pathlib import Path

from benchmarks.chaos.findings import Round
from benchmarks.chaos.whole_runs import Runs, conclude, end, happens, stages, undisturbed
from training import run_files

HOUR, DAY = 3600, 86_400
JUMPS = (-20 * 365 * DAY, -DAY, -HOUR, -1, 1, HOUR, DAY, 20 * 365 * DAY)
SOURCE = Path(__file__).with_name("jumping_clock.c")


def clock(seed: int, ground: Path) -> Round:
    """One run, in which the clock is set ten times."""
    draw, found = random.Random(seed), Round()
    whole = undisturbed(ground)
    library, hand = ground / "jumping_clock.so", ground / f"clock-{seed}"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"], check=True)
    _set(hand, 0)
    (ground / f"jumps-{seed}").mkdir()
    runs = Runs(ground, ground / f"jumps-{seed}")
    process = runs.start("env", f"LD_PRELOAD={library}", f"PANDA_CLOCK={hand}")
    for has_begun in stages(runs, draw).values():
        if happens(has_begun, process):
            _set(hand, draw.choice(JUMPS))
            found.tried += 1
    code = end(process)
    found.expect(code == 0, "lost", f"it ended with {code}: {runs.said()}")
    if code == 0:
        account = json.loads((runs.run / run_files.ACCOUNT).read_text().splitlines()[-1])
        below = {part: seconds for part, seconds in account["part_seconds"].items() if seconds < 0}
        found.expect(not below, "wrong", f"seconds below zero: {below}")
    conclude(runs, whole, found)
    return found


def _set(hand: Path, seconds: int) -> None:
    with hand.open("r+b" if hand.exists() else "wb") as file:
        file.write(struct.pack("q", seconds))
