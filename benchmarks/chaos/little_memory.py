"""Memory that ends in every stage of a whole run: the kernel kills what it likes; then there is some, and it goes on.

In: a seed, which draws how much there is when a stage has begun. Out: a `Round`: each time the command ends, and says
why where it is not killed itself, without a traceback; in the end one version, as of the run undisturbed. The run lives
in a control group whose limit is moved (version 1 or 2; needs the right to make one). Cost: two minutes.
"""

import contextlib
import os
import random
from pathlib import Path

from benchmarks.chaos.findings import Round
from benchmarks.chaos.victims import left_over
from benchmarks.chaos.whole_runs import OURS, Runs, conclude, end, happens, judge, stages, undisturbed

GROUPS = Path("/sys/fs/cgroup")
LEFT_MIB = (0, 20, 100)  # after the stage has begun
IN_GROUP = 'echo $$ > "$0" && exec "$@"'


class Group:
    """A control group of this name, while it is open."""

    def __init__(self, name: str):
        is_old = (GROUPS / "memory").is_dir()
        self.path = (GROUPS / "memory" if is_old else GROUPS) / name
        self.limit, self.used, self.none = (
            ("memory.limit_in_bytes", "total_rss ", "-1") if is_old else ("memory.max", "anon ", "max")
        )

    def leave(self, mebibytes: int) -> None:
        """Let so much more be held than is now, beside what is kept of files, which goes first."""
        lines = (self.path / "memory.stat").read_text().splitlines()
        held = next(int(line.split()[1]) for line in lines if line.startswith(self.used))
        with contextlib.suppress(OSError):  # so much cannot be taken from it: it has grown meanwhile
            (self.path / self.limit).write_text(str(held + (mebibytes << 20)))

    def free(self) -> None:
        (self.path / self.limit).write_text(self.none)

    def num_kills(self) -> int:
        """How many processes the kernel has killed in it."""
        lines = [line.split() for file in ("memory.oom_control", "memory.events") if (self.path / file).exists()
                 for line in (self.path / file).read_text().splitlines()]  # fmt: skip
        return next(int(number) for name, number in lines if name == "oom_kill")

    def __enter__(self) -> "Group":
        self.path.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        self.path.rmdir()


def little_memory(seed: int, ground: Path) -> Round:
    """Ten stages, and then the end."""
    draw, found = random.Random(seed), Round()
    whole = undisturbed(ground)
    (ground / f"memory-{seed}").mkdir()
    runs = Runs(ground, ground / f"memory-{seed}")
    with Group(f"panda-chaos-{os.getpid()}") as group:
        for stage, has_begun in stages(runs, draw).items():
            killed, left = group.num_kills(), draw.choice(LEFT_MIB)
            what = f"{stage}, {left} MiB left"
            process = runs.start("sh", "-c", IN_GROUP, str(group.path / "cgroup.procs"))
            if happens(has_begun, process):
                group.leave(left)
            code = end(process)
            group.free()
            killed = group.num_kills() - killed
            found.tried += killed
            judge(runs, f"{what}, {killed} killed", code, found)
            if alive := left_over(OURS):
                found.found("orphaned", f"{what}: {alive}")
    conclude(runs, whole, found)
    return found
