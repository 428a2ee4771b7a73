"""Peak anonymous memory of every process that uses a trained model: evaluation, registration, gate, export.

    python -m benchmarks.memory_of_use --ranks 4 --layers 16 --width 1024

In: nothing; a random Llama (0.3 billion float32 weights unless told otherwise) with two adapters, a small plan and an
MLflow database are made in a temporary directory. Out: a table: per stage its wall time, the largest process, all
processes. Anonymous memory is what `/proc/PID/smaps_rollup` says; mapped files are not in it. A process is looked at 20
times a second. Cost: minutes on two cores; 4 bytes a weight on disk, twice.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
EVERY_SECONDS = 0.05


def anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process now; 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    match = re.search(r"^Anonymous:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


@contextmanager
def beside(look: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run `look` in a thread; it returns when its event is set, at the end of the block."""
    done = threading.Event()
    watcher = threading.Thread(target=look, args=(done,), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


@contextmanager
def watched(peaks: dict[str, int]) -> Iterator[None]:
    """Note the peak of this process and of all that it starts, by what they run and their rank."""

    def look(done: threading.Event) -> None:
        this = psutil.Process()
        while not done.wait(EVERY_SECONDS):
            for process in [this, *this.children(recursive=True)]:
                try:
                    words, environment = process.cmdline(), process.environ()
                except psutil.Error:
                    continue
                name = words[words.index("-m") + 1] if "-m" in words and process.pid != this.pid else "this process"
                key = f"{name.rpartition('.')[2]} {environment.get('RANK', '')}".strip()
                peaks[key] = max(peaks.get(key, 0), anonymous_bytes(process.pid))

    with beside(look):
        yield


def main() -> None:
    """Make the model, use it in every way, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--quant", action="store_true", help="the adapters were trained on 4 bits")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), help="export needs register")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="memory-of-use-") as directory:
        root = Path(directory)
        made = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory_of_use_model", str(root), json.dumps(vars(arguments))],
            cwd=ROOT, check=True, capture_output=True, text=True,
        )  # fmt: skip
        size = int(made.stdout.split()[-1])
        print(f"{size / 4e9:.2f} billion weights, {size / 1e9:.2f} GB; {arguments.ranks} ranks; {os.cpu_count()} cores")
        print(f"{'stage':12} {'seconds':>8}  peaks in GB (a quarter of the model and 1 GB: {size / 4e9 + 1:.2f})")
        for stage in arguments.only:
            action, peaks = STAGES[stage], dict[str, int]()
            began = time.monotonic()
            with watched(peaks):
                action(root / "outputs" / "run-1")
            shown = ", ".join(f"{name} {peak / 1e9:.2f}" for name, peak in sorted(peaks.items()))
            print(f"{stage:12} {time.monotonic() - began:8.1f}  {shown}", flush=True)


def evaluate(run_dir: Path) -> None:
    """The stage `evaluate`; there are no numbers of a training, so it computes all rows."""
    _use("training.evaluate", run_dir)


def compare(run_dir: Path) -> None:
    """The stage `gate`: candidate, champion and base."""
    _use("training.compare", run_dir)


def _use(module: str, run_dir: Path) -> None:
    from training.launch import launcher
    from training.launch.run_config import read_config

    report = launcher.use(module, run_dir, read_config(run_dir / "config.yaml").settings, lambda line: None)
    assert report.reason == "completed", report


def register(run_dir: Path) -> None:
    """The stage `register`, with MLflow on SQLite."""
    from training.registry.register import register_run
    from training.settings import TrackingSettings
    from training.tracking.run import RunMetadata, open_run

    with open_run(TrackingSettings(), run_dir, RunMetadata({"model": "random"})) as tracked:
        register_run(tracked, "random", {}, "hello")


def export(run_dir: Path) -> None:
    """`panda export`."""
    verb = [sys.executable, "-m", "flows.cli.main", "export", "random", str(run_dir / "exported")]
    where = ["--output_dir", str(run_dir.parent), "--cache_dir", str(run_dir.parents[1] / "cache")]
    done = subprocess.run([*verb, *where], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


STAGES = {"evaluate": evaluate, "register": register, "gate": compare, "export": export}

if __name__ == "__main__":
    main()
