"""SIGKILL of all ranks of a training at drawn moments, for every kind of engine; resumed until it is done.

In: a seed, which draws the engine and the moments. Out: a `Round`: losses, gradient norms and the model are those of
the same run undisturbed, bit by bit; no half checkpoint, no process is left. Cost: a second of CPU a start and rank.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.chaos.findings import Round
from benchmarks.chaos.victims import end, kill, left_over, start_ranks, wait_until
from data_prep.store import hash_file
from tests.support import tiny

LORA = {"use_lora": True, "lora_r": 4, "lora_dropout": 0.2, "learning_rate": 0.005}
ENGINES: dict[str, dict[str, Any]] = {
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "fsdp": {"strategy": "fsdp"},
    "lora": {**LORA, "zero_stage": 2},
    "lora-zero3": {**LORA, "zero_stage": 3},
    "qlora": {**LORA, "use_quant": True, "zero_stage": 2},
}
RANKS, STEPS, SAVE_STEPS = 2, 12, 2
MOMENTS = ("start", "step", "checkpoint", "model")


def kill_ranks(seed: int, ground: Path) -> Round:
    """One run, killed at all kinds of moments, in the order in which they come."""
    draw, found = random.Random(seed), Round()
    engine = list(ENGINES)[seed % len(ENGINES)]
    whole = undisturbed(engine, ground)
    run, mark = _write(ground, f"{engine}-{seed}", engine), f"ranks-{seed}"
    started = False
    for moment in MOMENTS:
        processes = start_ranks(run, RANKS, started, mark)
        wait_until(_happened(moment, run, draw), processes)
        found.tried += kill(processes)
        started = started or (run / "schedule.json").exists() or (run / "checkpoints").exists()
        if left := left_over(mark):
            found.found("orphaned", f"{engine}, killed at {moment}: {left}")
    codes = end(start_ranks(run, RANKS, started, mark))
    if codes != [0] * RANKS:
        found.found("lost", f"{engine}: resumed, it ended with {codes}: {tiny.logs(run)[-400:]}")
        return found
    ours, expected = of_steps(run), of_steps(whole)
    same = sum(left == right for left, right in zip(ours, expected, strict=False))
    found.expect(len(ours) == STEPS, "lost", f"{engine}: {len(ours)} of {STEPS} steps are in metrics.jsonl")
    found.expect(same == STEPS, "wrong", f"{engine}: {same} of {STEPS} steps have the losses of the run undisturbed")
    found.expect(model_of(run) == model_of(whole), "wrong", f"{engine}: the model has other bytes")
    rest = [path.name for path in (*run.glob(".*"), *run.glob("checkpoints/.*"))]
    found.expect(not rest, "orphaned", f"{engine}: {rest} is left in the run directory")
    return found


def undisturbed(engine: str, ground: Path) -> Path:
    """The same run to its end; made once."""
    run = ground / f"{engine}-whole"
    if not (run / "train.json").exists():
        _write(ground, run.name, engine)
        codes = end(start_ranks(run, RANKS, False, "whole"))
        assert codes == [0] * RANKS, tiny.logs(run)
    return run


def _write(ground: Path, name: str, engine: str) -> Path:
    settings = {"max_steps": STEPS, "save_steps": SAVE_STEPS, "keep_last": 2, **ENGINES[engine]}
    base = None
    if "use_lora" in settings:
        base = undisturbed("zero0", ground) / "model"
    return tiny.write_run(ground, name, base, **settings)


def _happened(moment: str, run: Path, draw: random.Random) -> Callable[[], Any]:
    """Whether it is time."""
    before = _num_lines(run)
    if moment == "start":
        return (run / "checkpoints").exists
    if moment == "step":
        wanted = before + draw.randrange(1, 5)
        return lambda: _num_lines(run) >= wanted
    if moment == "checkpoint":
        wanted = before + draw.randrange(0, 4)
        return lambda: _num_lines(run) >= wanted and any(run.glob("checkpoints/.step-*/*"))
    return lambda: (run / ".model").exists() or (run / "model").exists()


def _num_lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def of_steps(run: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in tiny.metrics(run)]


def model_of(run: Path) -> dict[str, str]:
    """File -> hash."""
    return {path.name: hash_file(path) for path in sorted((run / "model").iterdir()) if path.suffix == ".safetensors"}
