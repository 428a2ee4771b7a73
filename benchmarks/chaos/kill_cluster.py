"""Preparation on a Dask cluster: a worker, all workers, the scheduler, or the run itself is killed, in either stage.

In: a seed. Out: a `Round`: a lost worker is made up for by the one that is left or by new ones, a lost scheduler by the
next one at its address; the run ends by itself, or, where it was killed, by the same command, with every byte that a
preparation here makes. Cost: two minutes.
"""

import json
import random
import subprocess
import time
from pathlib import Path

from benchmarks.chaos.findings import Round
from benchmarks.chaos.kill_preparation import contents
from benchmarks.chaos.victims import left_over
from benchmarks.chaos.whole_runs import OURS, ROOT, Runs, end, happens, judge
from tests.support.dask_cluster import Cluster, cluster

FILES, RECORDS = 24, 4000
UP_TO_THE_PLAN = {"until_stage": "plan", "max_seq_length": 128}


def kill_cluster(seed: int, ground: Path) -> Round:
    """Each victim once, each in a preparation of its own."""
    draw, found = random.Random(seed), Round()
    here = _prepared_here(ground)
    for victim in ("worker", "workers", "scheduler", "run"):
        folder = ground / f"{victim}-{seed}"
        folder.mkdir()
        stage, seconds = draw.choice(("records", "tokens")), draw.uniform(0, 2)
        with cluster(folder) as dask:
            runs = _runs(ground, folder / "runs", prepare_cluster=dask.address)
            process = runs.start()
            if happens(lambda: any((runs.where / "cache" / stage).glob("*")), process):  # noqa: B023
                time.sleep(seconds)
                found.tried += process.poll() is None
                _kill(victim, dask, process)
            code = end(process)
            what = f"{victim} killed, {stage} + {seconds:.1f} s"
            judge(runs, what, code, found)
            if victim == "run":
                code = end(runs.start())
        found.expect(code == 0, "lost", f"{what}: {code}: {runs.said()}")
        ours, expected = contents(runs.where / "cache"), contents(here.where / "cache")
        differ = {name for name in ours.keys() | expected.keys() if ours.get(name) != expected.get(name)}
        found.expect(not differ, "wrong", f"{what}: {sorted(differ)[:3]}")
        if left := left_over(OURS):
            found.found("orphaned", f"{what}: {left}")
    return found


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
        dask.scheduler.kill()
        dask.kill()
        dask.start()


def _runs(ground: Path, where: Path, **more: str) -> Runs:
    return Runs(ground, where, ROOT, **UP_TO_THE_PLAN, instruction_tuning_data_dir=str(ground / "corpus"), **more)


def _prepared_here(ground: Path) -> Runs:
    """The same by processes of this machine; made once."""
    here = _runs(ground, ground / "here")
    if not (ground / "corpus").exists():
        (ground / "corpus").mkdir()
        for number in range(FILES):
            records = ({"input": f"question {number} {i}", "target": f"answer {i} " * 12} for i in range(RECORDS))
            (ground / "corpus" / f"{number:02}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
        assert end(here.start()) == 0, here.said()
    return here
