"""What orchestration costs: seconds of a run in which every data stage is cached, beyond those stages.

That is the time from the command to the first stage, and from the last one to the prompt.

In: a configuration whose data are prepared (--conf_path). Out: a table on stdout; with --server the runs report to a
Prefect server that is up (PREFECT_API_URL), without it each starts its temporary one. Run it on a quiet machine:

    python -m benchmarks.overhead --conf_path configs/demo.yaml
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from flows.server import answers, api_url

ROOT = Path(__file__).parent.parent
NOBODY = "http://127.0.0.1:9/api"  # the discard port: no server there


def main() -> None:
    """Run a few times, print the median."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--conf_path", required=True)
    parser.add_argument("--server", action="store_true", help="With the Prefect server at PREFECT_API_URL.")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    if options.server and not answers(api_url()):
        sys.exit(f"no Prefect server at {api_url()}")
    runs = sorted(prepare_only(options) for _ in range(options.repeat))
    total, stages = runs[len(runs) // 2]
    where = "server up" if options.server else "temporary server"
    print(
        f"{where}: {total:.1f} s for the command, {stages:.1f} s of it in cached stages: {total - stages:.1f} s beyond"
    )


def prepare_only(options: argparse.Namespace) -> tuple[float, float]:
    """(Wall-clock seconds of `train.py --until_stage plan`, seconds of its stages)."""
    started = time.monotonic()
    done = subprocess.run(command(options), env=environment(options), capture_output=True, text=True, check=True)
    seconds = time.monotonic() - started
    return seconds, sum(json.loads(done.stdout.splitlines()[-1])["seconds"].values())


def command(options: argparse.Namespace) -> list[str]:
    """The run that is measured."""
    train = [sys.executable, str(ROOT / "train.py"), "--json", "--verbose"]
    return [*train, "--until_stage", "plan", "--conf_path", options.conf_path]


def environment(options: argparse.Namespace) -> dict[str, str]:
    """With or without a server."""
    return dict(os.environ) if options.server else {**os.environ, "PREFECT_API_URL": NOBODY}


if __name__ == "__main__":
    main()
