"""What orchestration costs: seconds of a run in which every data stage is cached, beyond those stages.

In: a configuration whose data are prepared (--conf_path). Out: a line on stdout: seconds from the command to the first
stage, of the whole command, of its stages, and of processor time (its own and that of the server it starts), medians.
With --server the runs report to a Prefect server that is up (PREFECT_API_URL), without it each starts its temporary
one. Run it on a quiet machine:

    python -m benchmarks.overhead --conf_path configs/demo.yaml
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from flows.stack.prefect_home import address
from flows.stack.prefect_server import unusable

ROOT = Path(__file__).parent.parent
FIRST_STAGE = "validate and shard begins"  # said with --verbose
NOBODY = "http://127.0.0.1:9/api"  # the discard port: no server there


def main() -> None:
    """Run a few times, print the median."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--conf_path", required=True)
    parser.add_argument("--server", action="store_true", help="With the Prefect server at PREFECT_API_URL.")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    if options.server and (reason := unusable(address())):
        sys.exit(reason)
    runs = [prepare_only(options) for _ in range(options.repeat)]
    first, total, stages, processor = (statistics.median(column) for column in zip(*runs, strict=True))
    where = "server up" if options.server else "temporary server"
    print(
        f"{where}: {first:.1f} s to the first stage; {total:.1f} s for the command, {stages:.1f} s of it in cached "
        f"stages: {total - stages:.1f} s beyond; {processor:.1f} s of processor time; load {os.getloadavg()[0]:.1f}"
    )


def prepare_only(options: argparse.Namespace) -> tuple[float, float, float, float]:
    """Seconds of `train.py --until_stage plan`: to its first stage, all, of its stages, of processor time."""
    started, processor = time.monotonic(), processor_seconds()
    first = 0.0
    with subprocess.Popen(
        command(options), env=environment(options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stderr, "both are pipes"
        for line in process.stderr:
            if not first and FIRST_STAGE in line:
                first = time.monotonic() - started
        summary = json.loads(process.stdout.read().splitlines()[-1])
    seconds = time.monotonic() - started
    return first, seconds, sum(summary["seconds"].values()), processor_seconds() - processor


def processor_seconds() -> float:
    """Of all children so far, and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def command(options: argparse.Namespace) -> list[str]:
    """The run that is measured."""
    train = [sys.executable, str(ROOT / "train.py"), "--json", "--verbose"]
    return [*train, "--until_stage", "plan", "--conf_path", options.conf_path]


def environment(options: argparse.Namespace) -> dict[str, str]:
    """With or without a server."""
    return dict(os.environ) if options.server else {**os.environ, "PREFECT_API_URL": NOBODY}


if __name__ == "__main__":
    main()
