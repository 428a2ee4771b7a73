"""SIGKILL of `panda gc` at drawn moments of its sweep, the same command again until nothing is left to do.

In: a seed. Out: a `Round`: after each kill every version that is there has its run, configuration and data, and those
in use their weights; in the end just what the policy keeps is there, and nothing half deleted. Cost: two seconds of CPU
a kill.
"""

import glob
import random
import shutil
import time
from pathlib import Path

from benchmarks.chaos import victims
from benchmarks.chaos.findings import Round
from tests.support.registered import MadeProject
from training.launch.processes import free_port

KILLS = 6
SWEEP_SECONDS = 0.08  # about what the sweep takes here, once it has begun


def kill_gc(seed: int, ground: Path) -> Round:
    """Killed a few times between the first deletion and the last."""
    draw, found = random.Random(seed), Round()
    folder, mark = ground / f"project-{seed}", f"gc-{seed}"
    (folder / "outputs").mkdir(parents=True)
    project = MadeProject(folder / "outputs", folder / "cache")
    places = ["--output_dir", str(project.output_dir), "--cache_dir", str(project.cache_dir)]
    words = ["gc", *places, "--keep_versions", "1", "--keep_days", "0", "--yes", "--json"]
    for number in range(KILLS):
        there = _everything(folder)
        process = victims.start(_gc, words, folder, log=folder / "log", mark=mark)
        victims.wait_until(lambda: len(_everything(folder)) < len(there), [process])  # noqa: B023  # called at once
        time.sleep(draw.uniform(0, SWEEP_SECONDS))
        found.tried += victims.kill([process])
        _check(found, project, f"kill {number}")
        found.expect(not (left := victims.left_over(mark)), "orphaned", f"kill {number}: {left}")
    codes = victims.end([victims.start(_gc, words, folder, log=folder / "log", mark=mark) for _ in range(2)])
    found.expect(codes == [0, 0], "lost", f"two sweeps at once ended with {codes}")
    _check(found, project, "the end")
    kept = (project.versions(), project.runs(), project.weights())
    found.expect(kept == ([3, 4, 5, 6, 7], [4, 5, 6, 7, 8], [4, 5, 6, 7]), "lost", f"kept: {kept}")
    half = [path for path in _everything(folder) if ".freed" in path or ".building" in path]
    found.expect(not half, "orphaned", f"half deleted: {half[:3]}")
    shutil.rmtree(folder)
    return found


def _gc(words: list[str], folder: Path) -> None:
    import os

    from flows.cli.main import main

    os.chdir(folder)
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{free_port()}/api"
    os._exit(main(words))


def _check(found: Round, project: MadeProject, when: str) -> None:
    try:
        project.check_whole()
    except Exception as error:
        found.found("lost", f"{when}: {type(error).__name__}: {str(error)[:200]}")


def _everything(folder: Path) -> set[str]:
    """Of a sweep at work: unlike `Path.glob`, this `glob` does not mind a directory that goes meanwhile."""
    return {path for name in ("outputs", "cache") for path in glob.glob(f"{folder}/{name}/*/*", include_hidden=True)}
