"""SIGKILL of `python train.py` in every stage of the flow, gone on with until it is done: one version, the same losses.

In: a seed, which draws how long after the beginning of a stage the kill comes. Out: a `Round`: a run killed in each
stage has the losses of the run undisturbed, one MLflow run, one version, and it is the champion; ranks, temporary
Prefect server and supervisor are gone after each kill. Cost: half a minute of CPU a start.
"""

import contextlib
import os
import random
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.chaos.findings import Round
from benchmarks.chaos.kill_ranks import of_steps
from benchmarks.chaos.victims import end, kill, left_over, start, train_flow, wait_until
from data_prep.sample import write_sample

SETTINGS = [
    "--model", "panda-tiny", "--max_seq_length", "128", "--max_steps", "6", "--save_steps", "2", "--run_name", "life",
    "architecture.num_hidden_layers=1", "architecture.vocab_size=1024",
]  # fmt: skip
STAGES: dict[str, Callable[[Path], Any]] = {
    "records": lambda folder: (folder / "cache" / "records").exists(),
    "plan": lambda folder: (folder / "cache" / "plans").exists(),
    "train": lambda folder: (folder / "outputs/life/metrics.jsonl").exists(),
    "evaluate": lambda folder: (folder / "outputs/life/train.json").exists(),
    "register": lambda folder: (folder / "outputs/life/evaluation.json").exists(),
    "gate": lambda folder: _num_versions(folder) > 0,
    "promote": lambda folder: (folder / "outputs/life/gate.json").exists(),
}


def kill_flow(seed: int, ground: Path) -> Round:
    """One life, killed once in each stage."""
    draw, found = random.Random(seed), Round()
    whole = ground / "whole"
    if not whole.exists():
        write_sample(whole / "dataset")
        assert _end(whole, "whole") == 0, _log(whole)
    folder, mark = ground / f"life-{seed}", f"flow-{seed}"
    shutil.copytree(whole / "dataset", folder / "dataset")
    for stage, begun in STAGES.items():
        process = _start(folder, mark)
        if wait_until(lambda begun=begun: begun(folder), [process]):
            time.sleep(draw.uniform(0, 2))
        found.tried += kill([process])
        if left := left_over(mark):
            found.found("orphaned", f"killed in {stage}: {left}")
    if not (folder / "outputs/life/summary.json").exists() and (code := _end(folder, mark)):
        found.found("lost", f"gone on with, it ended with {code}: {_log(folder)}")
        return found
    same = of_steps(folder / "outputs/life") == of_steps(whole / "outputs/life")
    found.expect(same, "wrong", "the losses are not those of the run undisturbed")
    versions, runs = _num_versions(folder), _count(folder, "select count(*) from runs where status = 'FINISHED'")
    found.expect(versions == 1, "lost" if versions < 1 else "wrong", f"{versions} versions")
    found.expect(runs == 1, "wrong", f"{runs} finished MLflow runs")
    champions = _count(folder, "select count(*) from registered_model_aliases where alias = 'champion'")
    found.expect(champions == 1, "wrong", f"{champions} champions")
    shutil.rmtree(folder)
    return found


def _start(folder: Path, mark: str) -> Any:
    resume = ["--resume"] if (folder / "outputs/life/config.yaml").exists() else []
    home = str(folder / "prefect")
    log = folder / "log"
    nowhere = "http://127.0.0.1:9/api"  # so that a temporary server starts, which is to be gone afterwards as well
    return start(
        train_flow, [*SETTINGS, *resume], folder, log=log, mark=mark, PREFECT_HOME=home, PREFECT_API_URL=nowhere
    )


def _end(folder: Path, mark: str) -> int | None:
    return end([_start(folder, mark)])[0]


def _log(folder: Path) -> str:
    return (folder / "log").read_text(errors="replace")[-600:]


def _num_versions(folder: Path) -> int:
    return _count(folder, "select count(*) from model_versions where current_stage != 'Deleted_Internal'")


def _count(folder: Path, query: str) -> int:
    """A number from MLflow's database; 0 as long as it has no such table."""
    path = folder / "outputs" / "mlflow.db"
    if not os.path.exists(path):
        return 0
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)) as database:
        try:
            return int(database.execute(query).fetchone()[0])
        except sqlite3.OperationalError:
            return 0
