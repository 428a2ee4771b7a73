"""A rank of a real training that counts its memory and what it sends, phase by phase, as a rehearsal does.

``python -m tests.support.tallied --config RUN/config.yaml`` is `training.worker` with `Tally` around it. Out: what the
worker writes, and RUN/tally-RANK.json: for each phase bytes held before it, at its peak and sent; and the anonymous
memory of the process at its peak, less what it had before the model was loaded.
"""

import argparse
import functools
import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.plans import example, write_plan
from tests.support.tiny import write_run

NUM_ROWS, NUM_VALIDATION = 16, 8


def full_rows(root: Path, num_tokens: int, num_segments: int, num_rows: int = NUM_ROWS) -> Path:
    """A plan of full rows, as a rehearsal has them: equal segments, of which all but the first token is a target."""
    length = num_tokens // num_segments
    examples = [example([3], [4 + (i + j) % 40 for j in range(length - 1)]) for i in range(8)]
    rows = [[((row + i) % 8, 0, length) for i in range(num_segments)] for row in range(num_rows)]
    return write_plan(root, examples, max_seq_length=num_tokens, rows=rows, validation=rows[:NUM_VALIDATION])


def write_tallied_run(root: Path, name: str, model_dir: Path, num_tokens: int, num_segments: int, **settings) -> Path:
    """A run directory over full rows: three steps with FSDP2."""
    plan_dir = full_rows(root / "cache", num_tokens, num_segments)
    values = {"max_steps": 3, "strategy": "fsdp", "num_workers": 0, "warmup_steps": 0, **settings}
    return write_run(root, name, model_dir=model_dir, plan_dir=plan_dir, **values)


def anonymous_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


class Sampler(threading.Thread):
    """The largest anonymous memory since `restart`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def restart(self) -> None:
        self.peak = anonymous_bytes()

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, anonymous_bytes())
            time.sleep(0.02)


@contextmanager
def watched(phases: dict[str, dict[str, float]], tally: Any, sampler: Sampler, name: str) -> Iterator[None]:
    """Add a phase to `phases`; of a phase that comes several times the last one stays."""
    gc.collect()
    tally.restart()
    sampler.restart()
    held = tally.held
    yield
    phases[name] = {"held": held, "peak": tally.peak, "sent": tally.sent, "anonymous": sampler.peak}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    run_dir = parser.parse_args().config.parent

    from training import worker
    from training.distributed import this_rank
    from training.planning.tally import Tally
    from training.trainer import loop, run

    ranks = this_rank()
    tally, sampler = Tally(ranks.world_size), Sampler()
    phases: dict[str, dict[str, float]] = {}

    def tallied(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            with watched(phases, tally, sampler, name):
                return function(*arguments, **options)

        return call

    run.build_run = tallied("load", run.build_run)
    loop.one_step = tallied("step", loop.one_step)
    evaluate = tallied("evaluate", loop.evaluate)

    def evaluate_alone(run: Any, *arguments: Any) -> Any:
        """Not beside a checkpoint that is still being written, whose copy is memory too."""
        run.saver.wait()
        return evaluate(run, *arguments)

    loop.evaluate = evaluate_alone
    baseline = anonymous_bytes()
    sampler.start()
    with tally:
        worker.main()
    tallies = {name: phase | {"anonymous": phase["anonymous"] - baseline} for name, phase in phases.items()}
    (run_dir / f"tally-{ranks.rank}.json").write_text(json.dumps(tallies))


if __name__ == "__main__":
    main()
