"""How much of the time trains, when a rank dies every ten minutes.

In: a seed, which draws the rank and the moments. Out: a `Round`: the run ends by itself as the run undisturbed, and
95 % of its time were steps, those included that had to be made again after a death. The steps of a large model are
simulated by a pause of a second; what a start costs is real, for a small one. Cost: 30 minutes, most of them waiting.
"""

import json
import random
import sys
import time
from pathlib import Path

from benchmarks.chaos.findings import Round
from benchmarks.chaos.kill_stack import PAUSE
from benchmarks.chaos.victims import MARK
from benchmarks.chaos.whole_runs import OURS, Runs, conclude, end, undisturbed
from tests.support.stack import new_project
from training import run_files
from training.cost.marks import REPEATED, TRAIN, WAITING
from training.launch.processes import is_alive, marked

STEPS, SAVE_STEPS = 1500, 30
BETWEEN_SECONDS = (540, 660)
LONGEST_SECONDS = 7200
PRODUCTIVE = 0.95


def goodput(seed: int, ground: Path) -> Round:
    """One run, a rank of which dies until it ends."""
    draw, found = random.Random(seed), Round()
    project = new_project(ground / f"project-{seed}")
    (project / "slow.py").write_text(PAUSE)
    whole = undisturbed(ground, "whole-long", max_steps=STEPS, save_steps=SAVE_STEPS)
    (ground / f"goodput-{seed}").mkdir()
    pause = [{"_target_": "slow.pause", "seconds": 1}]
    runs = Runs(
        ground, ground / f"goodput-{seed}", project, max_steps=STEPS, save_steps=SAVE_STEPS, callbacks=pause
    )  # fmt: skip
    process = runs.start()
    until = time.monotonic() + draw.uniform(*BETWEEN_SECONDS)
    while process.poll() is None and time.monotonic() < until + LONGEST_SECONDS:
        time.sleep(1)
        ranks = [one for one in marked(MARK, OURS) if is_alive(one.pid) and "training.worker" in one.cmdline()]
        if ranks and time.monotonic() > until:
            draw.choice(ranks).kill()
            found.tried += 1
            until = time.monotonic() + draw.uniform(*BETWEEN_SECONDS)
    code = end(process, 1)
    found.expect(code == 0, "lost", f"it ended with {code}: {runs.said()}")
    if code == 0:
        _account(runs, found)
    conclude(runs, whole, found)
    return found


def _account(runs: Runs, found: Round) -> None:
    account = json.loads((runs.run / run_files.ACCOUNT).read_text().splitlines()[-1])
    parts = account["part_seconds"]
    share = (parts[TRAIN] + parts.get(REPEATED, 0.0)) / (account["wall_seconds"] - parts.get(WAITING, 0.0))
    said = f"{share:.1%} steps, {account['goodput']:.1%} steps that lasted; seconds " + json.dumps({
        part: round(seconds) for part, seconds in parts.items()
    })  # fmt: skip
    print(f"    {found.tried} deaths: {said}", file=sys.stderr, flush=True)
    found.expect(share >= PRODUCTIVE, "lost", said)
