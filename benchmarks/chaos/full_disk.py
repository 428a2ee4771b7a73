"""A disk that fills in every stage of a whole run; then there is room, and the same command goes on.

In: a seed, which draws how much still fits when a stage has begun. Out: a `Round`: each time an error that says what to
do and no traceback, nothing half valid on the disk; in the end one version, with the losses, gradient norms and weights
of the run undisturbed. The disk is a file system in memory whose limit is moved (`mount -o remount,size=`), in a mount
namespace of its own, so that it needs no rights where the kernel lets users have those. Cost: a minute and a half.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

from benchmarks.chaos.findings import Round
from benchmarks.chaos.whole_runs import ROOT, Runs, conclude, end, happens, judge, stages, undisturbed

MEGABYTES = 200
FITS_KIB = (0, 4, 40, 200)  # after the stage has begun


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
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "full-disk", str(path)], check=True)

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


def play(seed: int, ground: Path) -> Round:
    """Inside the namespace."""
    draw, found = random.Random(seed), Round()
    whole = undisturbed(ground)
    disk = Disk(ground / f"disk-{seed}")
    runs = Runs(ground, disk.path)
    for stage, has_begun in stages(runs, draw).items():
        process, fits = runs.start(), draw.choice(FITS_KIB)
        what = f"{stage}, {fits} KiB left"
        if happens(has_begun, process):
            disk.leave(fits)
            found.tried += 1
        code = end(process)
        disk.free()
        judge(runs, what, code, found)
        if code:
            advised = "make room" in runs.printed() or "free space" in runs.printed()
            found.expect(advised, "untyped", f"{what}: nothing of the disk is said: {runs.said()}")
    conclude(runs, whole, found)
    return found


if __name__ == "__main__":
    outcome = play(int(sys.argv[1]), Path(sys.argv[2]))
    print(json.dumps({"tried": outcome.tried, "findings": outcome.findings}))
