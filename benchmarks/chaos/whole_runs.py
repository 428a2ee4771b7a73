"""The same small training again and again, whole, by `train.py`: what is done to it in one of its stages must not show.

In: a folder for corpus, logs and Prefect, and one for all that a run writes. Out: processes, whether a stage has begun,
and what is wrong with what a run has left beside one that was left alone. Cost: 20 s a run on two cores.
"""

import contextlib
import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.chaos.findings import Round
from benchmarks.chaos.kill_ranks import model_of, of_steps
from benchmarks.chaos.victims import MARK, left_over
from data_prep import store
from training import run_files

ROOT = Path(__file__).parents[2]
SECONDS = 300  # for a run of eight steps, on a machine that does other work
PATIENCE = 6  # for longer ones
NAME = "whole-run"
OURS = f"{NAME}-{os.getpid()}"  # the mark of processes: two of us may run at once
TRAINING = {
    "model": "panda-tiny", "max_steps": 8, "save_steps": 2, "keep_last": 2, "num_processes": 2, "zero_stage": 2,
    "max_seq_length": 64, "validation_fraction": 0.1, "prepare_workers": 1, "run_name": "run",
    "pretraining_data_dir": None, "registered_model_name": NAME,
}  # fmt: skip


class Runs:
    """The same training, in one directory; `more`: settings that differ from those of the other runs."""

    def __init__(self, ground: Path, where: Path, project: Path = ROOT, **more: Any):
        self.where, self.log, self.project = where, ground / f"{where.name}.log", project
        self.run = where / "outputs" / "run"
        self.prefect = str(ground / "prefect")
        values = {"output_dir": str(where / "outputs"), "cache_dir": str(where / "cache")}
        values["instruction_tuning_data_dir"] = str(ground / "corpus")
        self.conf = ground / f"{where.name}.json"  # JSON is YAML
        self.conf.write_text(json.dumps({**TRAINING, **values, **more}))

    def start(self, *prefix: str) -> subprocess.Popen:
        """The same command, by another that runs it, with `--resume` as soon as there is a run."""
        resume = ["--resume"] if (self.run / run_files.CONFIG).exists() else []
        command = [*prefix, sys.executable, "train.py", "--conf_path", str(self.conf), *resume]
        environment = {**os.environ, "PREFECT_HOME": self.prefect, MARK: OURS}
        with self.log.open("w") as log:
            return subprocess.Popen(command, cwd=self.project, env=environment, stdout=log, stderr=log)

    def printed(self) -> str:
        """All that the last one printed."""
        return self.log.read_text(errors="replace")

    def said(self) -> str:
        """The end of what the last one printed."""
        return self.printed()[-700:]


def stages(runs: Runs, draw: random.Random) -> dict[str, Callable[[], Any]]:
    """Stage -> whether it has begun, in their order."""
    cache, run = runs.where / "cache", runs.run
    lines = draw.randrange(1, 4)

    def num_lines() -> int:
        path = run / run_files.METRICS
        return path.read_bytes().count(b"\n") if path.exists() else 0

    return {
        "records": lambda: any(cache.glob("records/*")),
        "tokens": lambda: any(cache.glob("tokens/*")),
        "plans": lambda: any(cache.glob("plans/*")),
        "config": (run / run_files.CONFIG).exists,
        "log": lambda: num_lines() >= lines,
        "checkpoint": lambda: any(run.glob("checkpoints/.step-*/*")),
        "model": lambda: (run / ".model").exists() or (run / run_files.MODEL).exists(),
        "evaluate": (run / run_files.TRAINED).exists,
        "register": (run / run_files.EVALUATION).exists,
        "report": lambda: num_versions(runs) > 0,
    }


def undisturbed(ground: Path, name: str = "whole", **more: Any) -> Runs:
    """The corpus, and the same training to its end; made once."""
    whole = Runs(ground, ground / name, **more)
    if not (ground / "corpus").exists():
        (ground / "corpus").mkdir()
        records = [{"input": f"question {number}", "target": f"answer {number} " * 4} for number in range(300)]
        (ground / "corpus" / "a.json").write_text(json.dumps(records))
    if not (whole.run / run_files.SUMMARY).exists():
        assert end(whole.start(), PATIENCE * SECONDS) == 0, whole.said()
    return whole


def happens(has_begun: Callable[[], Any], process: subprocess.Popen) -> bool:
    """Whether it does before the process ends."""
    deadline = time.monotonic() + SECONDS
    while not has_begun():
        if process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def end(process: subprocess.Popen, seconds: float = SECONDS) -> int | None:
    """Its exit code; None where it had to be killed."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def num_versions(runs: Runs) -> int:
    """How many versions the registry has."""
    database = runs.where / "outputs" / "mlflow.db"
    if not database.exists():
        return 0
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        try:
            return int(connection.execute("select count(*) from model_versions").fetchone()[0])
        except sqlite3.OperationalError:  # the tables are not there yet, or locked
            return 0


def judge(runs: Runs, what: str, code: int | None, found: Round) -> None:
    """A run that something was done to ends, says why without a traceback, and leaves nothing damaged."""
    found.expect(code is not None, "lost", f"{what}: it hangs: {runs.said()}")
    if code:
        first = runs.printed().partition("Traceback")[2][:1500]
        found.expect(not first, "untyped", f"{what}: {first}")
    print(f"    {what}: {code}: {runs.said()[-300:]}", file=sys.stderr, flush=True)
    damaged = store.verify_cache(runs.where / "cache").damaged
    found.expect(not damaged, "wrong", f"{what}: {list(damaged)[:3]}")


def conclude(runs: Runs, whole: Runs, found: Round) -> None:
    """Left alone the same command ends, as if nothing had been; nothing is left over."""
    if code := end(runs.start()):
        found.found("lost", f"left alone it ended with {code}: {runs.said()}")
    else:
        compare(runs, whole, found)
    if left := left_over(OURS):
        found.found("orphaned", f"{left}")


def compare(runs: Runs, whole: Runs, found: Round) -> None:
    versions = num_versions(runs)
    found.expect(versions == 1, "wrong" if versions else "lost", f"{versions} versions")
    ours, expected = of_steps(runs.run), of_steps(whole.run)
    found.expect(ours == expected, "wrong", f"losses differ: {ours[-1:]} {expected[-1:]}")
    found.expect(model_of(runs.run) == model_of(whole.run), "wrong", "the model has other bytes")
    rest = [str(path) for path in runs.where.rglob(".*") if path.name.startswith((".building", ".step", ".model"))]
    found.expect(not rest, "orphaned", f"{rest} is left over")
