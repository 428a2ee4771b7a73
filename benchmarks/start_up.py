"""Seconds from launch to the first optimizer step, against importing torch, deepspeed and transformers once.

In: nothing. Out: medians and their ratio, also of a resumed run from its launch to its first new step. All start from a
fresh interpreter and take turns; the run is a tiny model on two ranks, started as the flow starts it.

    python -m benchmarks.start_up --repeats 5
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from benchmarks.rows import Row, say
from tests.support.tiny import write_run
from training.launch.events import Event
from training.launch.launcher import launch
from training.run_files import CONFIG
from training.settings import TrainSettings

IMPORTS = "import torch, deepspeed, transformers"


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    seconds: dict[str, list[float]] = {"imports": [], "start": [], "resume": []}
    for _ in range(given.repeats):
        run_dir = write_run(Path(tempfile.mkdtemp(prefix="panda-start-")), max_steps=2, save_steps=1, plan_dir=None)
        seconds["imports"].append(seconds_of_imports())
        seconds["start"].append(seconds_to_first_step(run_dir))
        end_later(run_dir)
        seconds["resume"].append(seconds_to_first_step(run_dir, resume=True))
    imports, start, resume = (statistics.median(column) for column in seconds.values())
    say(Row("launch to first step, 2 ranks", start, "imports", imports, "s", at_most=1.3))
    say(Row("resume to first step, 2 ranks", resume, "launch", start, "s", at_most=1.3))


def seconds_of_imports() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True)
    return time.perf_counter() - began


def end_later(run_dir: Path) -> None:
    """One step more than it has made."""
    config = yaml.safe_load((run_dir / CONFIG).read_text())
    (run_dir / CONFIG).write_text(yaml.safe_dump({**config, "max_steps": config["max_steps"] + 1}))


def seconds_to_first_step(run_dir: Path, resume: bool = False) -> float:
    first: list[float] = []

    def on_event(event: Event) -> None:
        if event["event"] == "step" and not first:
            first.append(time.perf_counter())

    began = time.perf_counter()
    report = launch(run_dir, TrainSettings(num_processes=2), on_event, lambda text: None, resume)
    if not first:
        raise RuntimeError(f"no step was made: {report}")
    return first[0] - began


if __name__ == "__main__":
    main()
