"""Seconds from launch to the first optimizer step, against importing torch, deepspeed and transformers once.

In: nothing. Out: medians and their ratio. Both start from a fresh interpreter and take turns; the run is a tiny model
on two ranks, started as the flow starts it.

    python -m benchmarks.start_up --repeats 5
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.tiny import write_run
from training.launch.events import Event
from training.launch.launcher import launch
from training.settings import TrainSettings

IMPORTS = "import torch, deepspeed, transformers"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    imports, starts = [], []
    for _ in range(given.repeats):
        imports.append(seconds_of_imports())
        starts.append(seconds_to_first_step())
    ratio = statistics.median(starts) / statistics.median(imports)
    print(
        f"imports {statistics.median(imports):.2f} s, launch to first step {statistics.median(starts):.2f} s, "
        f"ratio {ratio:.2f} (goal <= 1.3)"
    )


def seconds_of_imports() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True)
    return time.perf_counter() - began


def seconds_to_first_step() -> float:
    run_dir = write_run(Path(tempfile.mkdtemp(prefix="panda-start-")), max_steps=1, plan_dir=None)
    first: list[float] = []

    def on_event(event: Event) -> None:
        if event["event"] == "step":
            first.append(time.perf_counter())

    began = time.perf_counter()
    report = launch(run_dir, TrainSettings(num_processes=2), on_event, lambda text: None)
    if not first:
        raise RuntimeError(f"no step was made: {report}")
    return first[0] - began


if __name__ == "__main__":
    main()
