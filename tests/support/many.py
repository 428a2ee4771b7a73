"""Ranks that do several runs one after another, so that a test pays for the imports once.

Started like the worker; ``config.yaml`` holds `runs`: a list of {run_dir, resume, copy}. `copy` = {from, drop}: first
copy another run directory without some of its checkpoints, as if it had been killed after the one before.
"""

import argparse
import shutil
from pathlib import Path

import yaml

from training.distributed import join, leave, this_rank
from training.launch.exits import run_rank
from training.launch.run_config import read_config
from training.trainer.run import train_run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    runs = yaml.safe_load(parser.parse_args().config.read_text())["runs"]
    ranks = this_rank()
    join(ranks)
    for run in runs:
        if run.get("copy") and ranks.is_first:
            copy(Path(run["copy"]["from"]), Path(run["run_dir"]), run["copy"]["drop"])
        ranks.barrier()
        config = read_config(Path(run["run_dir"], "config.yaml"))
        train_run(config, ranks, run.get("resume", False))
    leave()


def copy(source: Path, target: Path, drop: list[str]) -> None:
    for name in ("checkpoints", "metrics.jsonl", "evaluations.jsonl"):
        place = shutil.copytree if (source / name).is_dir() else shutil.copy
        place(source / name, target / name)
    for name in drop:
        shutil.rmtree(target / "checkpoints" / name)


if __name__ == "__main__":
    run_rank(main)
