"""Preparation on a Dask cluster: a worker, all workers, the scheduler, or the run itself is killed, in either stage.

In: a seed. Out: a `Round`: a lost worker is made up for by the one that is left or by new ones, a lost scheduler by the
next one at its address; the run ends by itself, or, where it was killed, by the same command, with every byte that a
preparation here makes. Cost: two minutes.
"""

import random
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.chaos.findings import Round
from benchmarks.chaos.kill_preparation import compare, write_corpus
from benchmarks.chaos.victims import left_over
from benchmarks.chaos.whole_runs import OURS, Runs, end, happens, judge
from tests.support.dask_cluster import Cluster, cluster

FILES, RECORDS = 24, 4000
UP_TO_THE_PLAN: dict[str, Any] = {"until_stage": "plan", "max_seq_length": 128}


def kill_cluster(seed: int, ground: Path) -> Round:
    """Each victim once, each in a preparation of its own."""
    draw, found = random.Random(seed), Round()
    here = _prepared_here(ground)
    for victim in ("worker", "workers", "scheduler", "run"):
        folder = ground / f"{victim}-{seed}"
        folder.mkdir()
        with cluster(folder) as dask:
            runs = Runs(ground, folder / "runs", prepare_cluster=dask.address, **UP_TO_THE_PLAN)
            _disturb(runs, dask, victim, draw, found)
        compare(runs.where / "cache", here.where / "cache", found)
        if left := left_over(OURS):
            found.found("orphaned", f"{victim} killed: {left}")
    return found


def _disturb(runs: Runs, dask: Cluster, victim: str, draw: random.Random, found: Round) -> None:
    """One run in which something is killed, to its end."""
    stage, seconds = draw.choice(("records", "tokens")), draw.uniform(0, 2)
    what = f"{victim} killed, {stage} + {seconds:.1f} s"
    process = runs.start()
    if happens(lambda: any((runs.where / "cache" / stage).glob("*")), process):
        time.sleep(seconds)
        found.tried += process.poll() is None
        _kill(victim, dask, process)
    code = end(process)
    judge(runs, what, code, found)
    if victim == "run":
        code = end(runs.start())
    found.expect(code == 0, "lost", f"{what}: {code}: {runs.said()}")


def _kill(victim: str, dask: Cluster, run: subprocess.Popen) -> None:
    """What a machine starts again by itself is started again."""
    if victim == "run":
        run.kill()
    elif victim == "worker":
        dask.workers[0].kill()
    elif victim == "workers":
        for worker in dask.workers:
            worker.kill()
        dask.add_workers()
    else:
        dask.kill()
        dask.start()


def _prepared_here(ground: Path) -> Runs:
    """The same by processes of this machine; made once."""
    here = Runs(ground, ground / "here", **UP_TO_THE_PLAN)
    if not (ground / "corpus").exists():
        write_corpus(ground / "corpus", FILES, RECORDS)
        assert end(here.start()) == 0, here.said()
    return here
