"""What training waits for when a checkpoint is written to a slow disk.

In: `--megabytes_per_second 50 --ranks 2 --layers 10`. Out: a line a checkpoint: its size; the time from its beginning
until it is complete on the disk, for which training would wait if it wrote by itself (`synchronous`); the time that
it did wait (`stall`: the copy to the CPU, and the end of the checkpoint before); the ratio. Below it, the median step
while a checkpoint was being written and while none was: what the writing costs the steps beside it. The disk is
throttled in the process (`benchmarks.throttled`), all ranks together; fsync is real. Cost: minutes.

    python -m benchmarks.checkpoint_stall
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, say
from benchmarks.throttled import RATE
from tests.support import tiny
from training.launch.events import event_of

LAYER = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 4}


def main() -> None:
    """Train a whole model of about 6.3 million parameters a layer; tell of its checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes_per_second", type=float, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--save_steps", type=int, default=40)
    parser.add_argument("--checkpoints", type=int, default=3)
    arguments = parser.parse_args()
    os.environ[RATE] = str(arguments.megabytes_per_second * 1e6)
    with tempfile.TemporaryDirectory(prefix="panda-stall-") as folder:
        run = tiny.write_run(
            Path(folder), architecture={**tiny.ARCHITECTURE, **LAYER, "num_hidden_layers": arguments.layers},
            max_steps=arguments.save_steps * arguments.checkpoints + arguments.save_steps // 2,
            save_steps=arguments.save_steps, gradient_accumulation_steps=1, learning_rate=1e-4,
        )  # fmt: skip
        codes = tiny.wait(tiny.start(run, arguments.ranks, module="benchmarks.throttled"), seconds=3000)
        assert not any(codes), tiny.logs(run)
        sizes = {path.parent.name: size_of(path) for path in run.glob("checkpoints/*/complete.json")}
        events = [event_of(line) for line in (run / "rank-0.log").read_text().splitlines()]
    show([event for event in events if event], max(sizes.values()))


def size_of(marker: Path) -> int:
    """Bytes of a checkpoint's files."""
    return sum(file["bytes"] for file in json.loads(marker.read_text())["files"].values())


def show(events: list[Any], size: int) -> None:
    """The table; the last checkpoint is left out, as nothing is trained beside it."""
    written = [event for event in events if event["event"] == "checkpoint"][:-1]
    print(f"{size / 1e6:.0f} MB a checkpoint ({size / 12e6:.1f} million trained parameters, AdamW)")
    print("after step  synchronous    stall  ratio")
    for event in written:
        stall, seconds = event["stall_seconds"], event["seconds"]
        print(f"{event['after_step']:10} {seconds:10.2f} s {stall:6.3f} s {100 * stall / seconds:5.2f} %")
    waited, written_in = (statistics.median(event[key] for event in written) for key in ("stall_seconds", "seconds"))
    say(Row(f"stall of a checkpoint of {size / 1e6:.0f} MB", waited, "writing it", written_in, "s", at_most=0.05))
    beside, alone = steps_by_writing(events)
    if beside and alone:
        say(Row("step while writing", statistics.median(beside), "step alone", statistics.median(alone), "s"))


def steps_by_writing(events: list[Any]) -> tuple[list[float], list[float]]:
    """Seconds of the steps during which a checkpoint was under way, and of the others."""
    saved = {event["after_step"] for event in events if event["event"] == "checkpoint"}
    writing = False
    beside: list[float] = []
    alone: list[float] = []
    for event in events:
        if event["event"] == "checkpoint":
            writing = False
        if event["event"] == "step":
            (beside if writing else alone).append(event["seconds"])
            writing = writing or event["step"] in saved
    return beside, alone[1:]  # the first step is slow


if __name__ == "__main__":
    main()
