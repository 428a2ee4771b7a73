"""A disk that fills in every stage of a whole run; then there is room, and the same command goes on.

In: a seed, which draws how much still fits when a stage has begun. Out: a `Round`: each time an error that says what to
do and no traceback, nothing half valid on the disk; in the end one version, with the losses, gradient norms and weights
of the run undisturbed. The disk is a file system in memory whose limit is moved (`mount -o remount,size=`), in a mount
namespace of its own, so that it needs no rights where the kernel lets users have those. Cost: a minute and a half.
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
MEGABYTES = 200
FITS_KIB = (0, 4, 40, 200)  # after the stage has begun
SECONDS = 300
NAME = "full-disk"
TRAINING = {
    "model": "panda-tiny", "max_steps": 8, "save_steps": 2, "keep_last": 2, "num_processes": 2, "zero_stage": 2,
    "max_seq_length": 64, "validation_fraction": 0.1, "prepare_workers": 1, "run_name": "run",
    "pretraining_data_dir": None, "registered_model_name": NAME,
}  # fmt: skip


def full_disk(seed: int, ground: Path) -> Round:
    """Play it below a mount that nobody else sees."""
    command = ["unshare", "--map-root-user", "--mount", sys.executable, "-m", __name__, str(seed), str(ground)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return Round(**json.loads(done.stdout.splitlines()[-1]))


class Disk:
    """A mounted file system of so many megabytes."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", NAME, str(path)], check=True)

    def leave(self, kib: int) -> None:
        """Let so much more be written, and nothing beyond."""
        limited = False
        while not limited:  # refused where more has been written since it was looked at
            there = os.statvfs(self.path)
            used = (there.f_blocks - there.f_bfree) * there.f_bsize // 1024
            limited = self._limit(f"{max(used + kib, 4)}k")  # 0 is no limit

    def free(self) -> None:
        assert self._limit(f"{MEGABYTES}m")

    def _limit(self, size: str) -> bool:
        command = ["mount", "-o", f"remount,size={size}", str(self.path)]
        return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0


class Runs:
    """The same training again and again, on one disk."""

    def __init__(self, ground: Path, where: Path):
        self.where, self.log = where, ground / f"{where.name}.log"
        self.run = where / "outputs" / "run"
        self.prefect = str(ground / "prefect")
        values = {"output_dir": str(where / "outputs"), "cache_dir": str(where / "cache")}
        values["instruction_tuning_data_dir"] = str(ground / "corpus")
        self.conf = ground / f"{where.name}.json"  # JSON is YAML
        self.conf.write_text(json.dumps({**TRAINING, **values}))

    def start(self) -> subprocess.Popen:
        """The same command, with `--resume` as soon as there is a run."""
        resume = ["--resume"] if (self.run / run_files.CONFIG).exists() else []
        command = [sys.executable, "train.py", "--conf_path", str(self.conf), *resume]
        environment = {**os.environ, "PREFECT_HOME": self.prefect, MARK: NAME}
        with self.log.open("w") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def said(self) -> str:
        """The end of what the last one printed."""
        return self.log.read_text(errors="replace")[-700:]


def moments(runs: Runs, draw: random.Random) -> dict[str, Callable[[], Any]]:
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


def play(seed: int, ground: Path) -> Round:
    """Inside the namespace."""
    draw, found = random.Random(seed), Round()
    whole = _undisturbed(ground)
    disk = Disk(ground / f"disk-{seed}")
    runs = Runs(ground, disk.path)
    for stage, has_begun in moments(runs, draw).items():
        process, fits = runs.start(), draw.choice(FITS_KIB)
        what = f"{stage}, {fits} KiB left"
        if _happens(has_begun, process):
            disk.leave(fits)
            found.tried += 1
        code = _end(process)
        found.expect(code is not None, "lost", f"{what}: it hangs: {runs.said()}")
        if code:
            whole_log = runs.log.read_text(errors="replace")
            first = whole_log.partition("Traceback")[2][:1500]
            found.expect(not first, "untyped", f"{what}: {first}")
            advised = "make room" in whole_log or "free space" in whole_log
            found.expect(advised, "untyped", f"{what}: nothing of the disk is said: {runs.said()}")
        print(f"    {what}: {code}: {runs.said()[-300:]}", file=sys.stderr, flush=True)
        disk.free()
        damaged = store.verify_cache(disk.path / "cache").damaged
        found.expect(not damaged, "wrong", f"{what}: {list(damaged)[:3]}")
    if code := _end(runs.start()):
        found.found("lost", f"with room it ended with {code}: {runs.said()}")
    else:
        _compare(runs, whole, found)
    if left := left_over(NAME):
        found.found("orphaned", f"{left}")
    return found


def _undisturbed(ground: Path) -> Runs:
    """The corpus, and the same training to its end; made once."""
    whole = Runs(ground, ground / "whole")
    if not (ground / "corpus").exists():
        (ground / "corpus").mkdir()
        records = [{"input": f"question {number}", "target": f"answer {number} " * 4} for number in range(300)]
        (ground / "corpus" / "a.json").write_text(json.dumps(records))
    if not (whole.run / run_files.SUMMARY).exists():
        assert _end(whole.start()) == 0, whole.said()
    return whole


def _happens(has_begun: Callable[[], Any], process: subprocess.Popen) -> bool:
    """Whether it does before the process ends."""
    deadline = time.monotonic() + SECONDS
    while not has_begun():
        if process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def _end(process: subprocess.Popen) -> int | None:
    """Its exit code; None where it had to be killed."""
    try:
        return process.wait(SECONDS)
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


def _compare(runs: Runs, whole: Runs, found: Round) -> None:
    versions = num_versions(runs)
    found.expect(versions == 1, "wrong" if versions else "lost", f"{versions} versions")
    ours, expected = of_steps(runs.run), of_steps(whole.run)
    found.expect(ours == expected, "wrong", f"losses differ: {ours[-1:]} {expected[-1:]}")
    found.expect(model_of(runs.run) == model_of(whole.run), "wrong", "the model has other bytes")
    rest = [str(path) for path in runs.where.rglob(".*") if path.name.startswith((".building", ".step", ".model"))]
    found.expect(not rest, "orphaned", f"{rest} is left over")


if __name__ == "__main__":
    outcome = play(int(sys.argv[1]), Path(sys.argv[2]))
    print(json.dumps({"tried": outcome.tried, "findings": outcome.findings}))
