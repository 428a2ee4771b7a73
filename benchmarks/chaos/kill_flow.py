"""SIGKILL of any process of a whole run, the flow itself among them, in every stage: records to registration.

In: a seed, which draws the way of training and, in each stage, the process and the moment. Out: a `Round`: the run
heals, or ends and says why without a traceback; no process outlives it; in the end the same command has made one
version, with the losses, gradient norms and weights of the run undisturbed. Cost: three minutes.
"""

import contextlib
import random
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.chaos.findings import Round
from benchmarks.chaos.kill_ranks import ENGINES
from benchmarks.chaos.victims import MARK, left_over
from benchmarks.chaos.whole_runs import OURS, Runs, conclude, end, happens, judge, stages, undisturbed
from training import run_files
from training.launch.processes import is_alive, marked

AFTER_SECONDS = 1.0  # at most, after a stage has begun
FLOW = "train.py"


def kill_flow(seed: int, ground: Path) -> Round:
    """A kill a stage; where a run has come to its end all the same, it is judged, and another one begins."""
    draw, found = random.Random(seed), Round()
    way = list(ENGINES)[seed % len(ENGINES)]
    settings = _settings(way, ground)
    whole = undisturbed(ground, f"whole-{way}", **settings)

    def new_runs(number: int) -> Runs:
        (ground / f"{way}-{seed}-{number}").mkdir()
        return Runs(ground, ground / f"{way}-{seed}-{number}", **settings)

    runs = new_runs(0)
    for number, stage in enumerate(stages(runs, draw), 1):
        process = runs.start()
        if happens(stages(runs, draw)[stage], process):
            time.sleep(draw.uniform(0, AFTER_SECONDS))
        victim = _kill_one(draw)
        found.tried += bool(victim)
        what = f"{way}, {stage}: {victim or 'nobody'} killed"
        code = end(process)
        judge(runs, what, code, found)
        if left := left_over(OURS):
            found.found("orphaned", f"{what}: {left}")
        if code == 0:
            conclude(runs, whole, found)
            runs = new_runs(number)
    conclude(runs, whole, found)
    return found


def _settings(way: str, ground: Path) -> dict[str, Any]:
    """Adapters need a model that exists: that of a run of ours."""
    chosen = ENGINES[way]
    if "use_lora" not in chosen:
        return chosen
    base = undisturbed(ground, "whole-zero2", zero_stage=2)
    return {**chosen, "ckpt_path": str(base.run / run_files.MODEL)}


def _kill_one(draw: random.Random) -> str:
    """SIGKILL; what it was. Half of the time it is the flow, or others that nobody watches would be hit too seldom."""
    alive = [process for process in marked(MARK, OURS) if is_alive(process.pid)]
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):
        flows = [process for process in alive if FLOW in process.cmdline()]
        chosen = draw.choice(flows if draw.random() < 0.5 else alive)
        words = chosen.cmdline()
        chosen.kill()
        return next((word for word in words if "." in word and "/" not in word), words[0])
    return ""
