"""SIGKILL of all ranks while a checkpoint is being written, many times: what is found afterwards, and are losses equal.

In: `--kills 30 --ranks 2`. Out: a table, one line a kill: the steps of the run, what lay half written, the checkpoint
that was gone on from; then whether every loss is, bit by bit, that of the same run undisturbed. The disk is throttled
(`benchmarks.throttled`), so that a writer is there to be killed, and each kill comes at a random moment of the writing.
Cost: the start of the ranks a kill, some seconds.

    python -m benchmarks.kill_while_writing --kills 30
"""

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path

from benchmarks.throttled import RATE
from tests.support import tiny

BYTES_PER_SECOND = 250_000  # a checkpoint of the tiny model takes a second
SAVE_STEPS = 2


def main() -> None:
    """Kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    os.environ[RATE] = str(BYTES_PER_SECOND)
    with tempfile.TemporaryDirectory(prefix="panda-kills-") as folder:
        steps = SAVE_STEPS * (2 * arguments.kills + 10)
        settings = {"max_steps": steps, "save_steps": SAVE_STEPS, "keep_last": 2, "strategy": "fsdp"}
        whole, killed = (tiny.write_run(Path(folder), name, **settings) for name in ("whole", "killed"))
        print(" kill  steps  half written      left there  newest valid", flush=True)
        for number in range(arguments.kills):
            kill_once(killed, arguments.ranks, number)
        tiny.train(killed, arguments.ranks, "--resume")
        tiny.train(whole, arguments.ranks)
        ours, expected = (of_steps(run) for run in (killed, whole))
    same = sum(left == right for left, right in zip(ours, expected, strict=True))
    print(f"{same} of {len(expected)} steps have the same loss and gradient norm, bit by bit")


def kill_once(run: Path, ranks: int, number: int) -> None:
    """Go on from what is there, kill while a new checkpoint is half written, say what lies there."""
    before = newest_complete(run)
    processes = tiny.start(run, ranks, *(["--resume"] if before else []), module="benchmarks.throttled")
    found = wait_for_writing(run, before, processes)
    time.sleep(random.Random(number).uniform(0, 0.9))
    for process in processes:
        process.kill()
    tiny.wait(processes)
    left = [path for path in run.glob("checkpoints/.step-*") if path.is_dir()]
    names = sorted(file.name[:11] for path in left for file in path.iterdir())
    text = f"{found:>14}  {len(names)} files" if left else f"{found:>14}  it was complete"
    done = len((run / "metrics.jsonl").read_text().splitlines())
    print(f"{number + 1:5}  {done:5}  {text:>28}  step {newest_complete(run)}", flush=True)


def wait_for_writing(run: Path, before: int, processes: list) -> str:
    """Until a checkpoint is half written and one more than before is complete, so that the run gets on."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        writing = [path.parent.name for path in run.glob("checkpoints/.step-*/state-*")]
        if writing and newest_complete(run) > before:
            return max(writing)[1:12]
        if any(process.poll() for process in processes):
            break
        time.sleep(0.01)
    raise SystemExit(tiny.logs(run))


def newest_complete(run: Path) -> int:
    """The step of the newest directory that says it is complete; 0 = none. Resuming checks its hashes."""
    steps = [json.loads(path.read_text())["progress"]["step"] for path in run.glob("checkpoints/step-*/complete.json")]
    return max(steps, default=0)


def of_steps(run: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    return [(line["loss"], line["grad_norm"]) for line in tiny.metrics(run)]


if __name__ == "__main__":
    main()
