"""The training loop: steps, evaluation, checkpoints, until the course is done or someone asks to stop.

In: a `Run` (engine, course, plans, ranks, settings). Out: the `Progress` at the end; metrics, evaluations, checkpoints on
disk. The loop owns no algorithm: rows come from `course.py`, the step from `step.py`, sharding from the engine.

Dropout is seeded for every micro-batch from (seed, step, its rows), so a resumed run needs no generator state and a
micro-batch drops the same numbers on whatever rank it runs.
"""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from data_prep.reader import Plan
from training import checkpoint, evaluation
from training.checkpoint import Progress
from training.course import Course
from training.engine import Engine
from training.exit import NonFiniteError, TrainingStopped, emit
from training.loader import load_ahead
from training.metrics import Clock, JsonLines, duration, memory_peak_bytes
from training.ranks import Ranks
from training.schedule import Factor
from training.settings import TrainSettings
from training.step import MicroBatch
from training.stop import Stop

SIGN_OF_LIFE_SECONDS = 10.0

log = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything a step needs; made once by the worker."""

    settings: TrainSettings
    ranks: Ranks
    engine: Engine
    course: Course
    validation: Plan
    factor: Factor
    stop: Stop
    directory: Path
    flops_per_token: float
    peak_flops: float | None

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def save_steps(self) -> int:
        """`save_steps`, or ten times in a run."""
        return self.settings.save_steps or max(1, math.ceil(self.course.total_steps / 10))


def train(run: Run, progress: Progress) -> Progress:
    """Train from where `progress` is to the end of the course, or until held-out loss stops falling."""
    with ExitStack() as stack:
        files = [JsonLines(run.directory / name, progress.step) for name in ("metrics.jsonl", "evaluations.jsonl")]
        metrics, evaluations = [stack.enter_context(file) if run.ranks.is_first else None for file in files]
        batches = _micro_batches(run, progress.step)
        if not progress.step and not progress.eval_before:
            progress.eval_before = evaluate(run, progress, evaluations)
        while progress.step < run.course.total_steps:
            record = one_step(run, progress, batches)
            if metrics is not None:
                _report(run, progress, record, metrics)
            if _after_step(run, progress, evaluations):
                break
    return progress


def _micro_batches(run: Run, first_step: int) -> Iterator[MicroBatch]:
    settings, ranks = run.settings, run.ranks
    wanted = run.course.wanted(first_step, ranks.rank, ranks.world_size, settings.per_gpu_train_batch_size)
    return load_ahead(run.course.plan, wanted, settings.num_workers, settings.prefetch_factor)


def one_step(run: Run, progress: Progress, batches: Iterator[MicroBatch]) -> dict[str, Any]:
    """One optimizer step; returns what is measured. Raises before the update when a number is not finite."""
    began, clock = time.perf_counter(), Clock(run.ranks.device)
    step = progress.step
    target_tokens = run.course.target_tokens(step)
    done, losses = _accumulate(run, progress, batches, run.engine.averaging / target_tokens, clock)
    loss = global_loss(losses, done, target_tokens, run, step)
    learning_rate = run.settings.learning_rate * run.factor(step)
    with clock.span("step"):
        grad_norm = run.engine.step(learning_rate)
    if not math.isfinite(grad_norm):
        raise NonFiniteError(
            f"step {step + 1}: the gradient norm is {grad_norm}, the loss {loss:.4f}; no update was made. "
            f"Rank {run.ranks.rank} trained on {_records(run, [row for batch in done for row in batch.rows])}"
        )
    rows = run.course.rows(step)
    tokens = int(run.course.plan.row_tokens[rows].sum())
    computed = run.ranks.sum(float(sum(batch.input_ids.numel() for batch in done)))[0]
    seconds = time.perf_counter() - began
    progress.step += 1
    progress.tokens += tokens
    progress.target_tokens += target_tokens
    progress.seconds += seconds
    progress.first_loss = loss if progress.first_loss is None else progress.first_loss
    progress.last_loss = loss
    return {
        "step": progress.step,
        "epoch": progress.step / run.course.steps_per_epoch,
        "loss": loss,
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        "rows": len(rows),
        "tokens": tokens,
        "target_tokens": target_tokens,
        "padding": 1 - tokens / computed,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "target_tokens_per_second": target_tokens / seconds,
        **clock.take(),
        **_utilisation(run, tokens / seconds),
        "memory_peak_bytes": memory_peak_bytes(run.ranks.device),
    }


def _utilisation(run: Run, tokens_per_second: float) -> dict[str, float]:
    """Model FLOPs utilisation, where the peak of the device is known."""
    if run.peak_flops is None:
        return {}
    return {"mfu": run.flops_per_token * tokens_per_second / (run.peak_flops * run.ranks.world_size)}


def _accumulate(
    run: Run, progress: Progress, batches: Iterator[MicroBatch], scale: float, clock: Clock
) -> tuple[list[MicroBatch], list[Tensor]]:
    """Forward and backward of this rank's micro-batches of a step; raises TrainingStopped after a checkpoint."""
    settings, ranks = run.settings, run.ranks
    num_micro_steps = len(
        run.course.micro_batches(progress.step, ranks.rank, ranks.world_size, settings.per_gpu_train_batch_size)
    )
    done, losses = [], []
    last_sign = time.monotonic()
    for index in range(num_micro_steps):
        if run.stop.requested():
            leave(run, progress)
        with clock.span("data"):
            batch = next(batches).to(ranks.device)
        seed_dropout(settings.seed, progress.step, batch.rows)
        with clock.span("forward"):
            loss = run.engine.forward(batch)
        with clock.span("backward"):
            run.engine.backward(loss * scale, last=index == num_micro_steps - 1)
        done.append(batch)
        losses.append(loss.detach())
        if ranks.is_first and time.monotonic() - last_sign > SIGN_OF_LIFE_SECONDS:
            last_sign = time.monotonic()
            emit({"event": "micro_step", "micro_step": index + 1, "micro_steps": num_micro_steps})
    return done, losses


def seed_dropout(seed: int, step: int, rows: tuple[int, ...]) -> None:
    """Random numbers of a micro-batch depend on (seed, step, rows) and on nothing else."""
    torch.manual_seed(xxhash.xxh3_64_intdigest(repr((seed, step, rows)).encode()) >> 1)


def global_loss(losses: list[Tensor], batches: list[MicroBatch], target_tokens: int, run: Run, step: int) -> float:
    """Loss per target token over all ranks; raises where it is not finite, naming rank and records."""
    sums = [float(loss) for loss in losses]
    bad = next((batch for batch, value in zip(batches, sums, strict=True) if not math.isfinite(value)), None)
    if bad is not None:
        log.error("step %d: loss is not finite on rank %d", step + 1, run.ranks.rank)
    total, culprits = run.ranks.sum(math.fsum(sums) if bad is None else 0.0, float(bad is not None))
    if bad is not None:
        raise NonFiniteError(
            f"step {step + 1}: the loss is not finite on rank {run.ranks.rank} for {_records(run, list(bad.rows))}; "
            "no update was made. Look at these records, or lower learning_rate"
        )
    if culprits:
        time.sleep(1)  # let the rank that knows the records speak first
        raise NonFiniteError(f"step {step + 1}: the loss is not finite on {culprits:.0f} other rank(s); no update was made")
    return total / target_tokens


def _records(run: Run, rows: list[int]) -> str:
    """file:line of the first records behind rows, for messages."""
    origins = [origin for row in rows if row >= 0 for origin in run.course.plan.origins(row)]
    shown = ", ".join(f"{file}:{line}" for file, line in origins[:5])
    return shown + (f" and {len(origins) - 5} more" if len(origins) > 5 else "")


def leave(run: Run, progress: Progress) -> None:
    """Write a checkpoint of the last whole step and end the run as cancelled."""
    began = time.monotonic()
    path = save(run, progress)
    raise TrainingStopped(f"stopped after step {progress.step}; {path.name} written in {time.monotonic() - began:.1f} s")


def _after_step(run: Run, progress: Progress, evaluations: JsonLines | None) -> bool:
    """Evaluate and save when due; True ends the run early."""
    settings, step = run.settings, progress.step
    last = step == run.course.total_steps
    early = False
    if settings.eval_steps and step % settings.eval_steps == 0 and not last:
        result = evaluate(run, progress, evaluations)
        early = _judge(run, progress, result)
    if last or early or step % run.save_steps == 0:
        save(run, progress)
    return early


def _judge(run: Run, progress: Progress, result: dict[str, Any]) -> bool:
    """Remember the best held-out loss; True when it has not fallen for `early_stop_patience` evaluations."""
    loss = result.get(evaluation.ALL, {}).get("loss")
    if loss is None:
        return False
    if progress.best_loss is None or loss < progress.best_loss:
        progress.best_loss, progress.best_step, progress.evaluations_without_gain = loss, progress.step, 0
        if run.settings.keep_best:
            save(run, progress)
        return False
    progress.evaluations_without_gain += 1
    patience = run.settings.early_stop_patience
    return bool(patience) and progress.evaluations_without_gain >= patience


def evaluate(run: Run, progress: Progress, evaluations: JsonLines | None) -> dict[str, Any]:
    """Held-out loss per source now; {} when nothing is held out."""
    if not run.validation.num_rows:
        return {}
    module = run.engine.module
    module.eval()
    result = evaluation.evaluate(
        lambda batch: run.engine.forward(batch, "each"), run.validation, run.settings.per_gpu_eval_batch_size, run.ranks
    )
    module.train()
    total = result.get(evaluation.ALL, {})
    if evaluations is not None and total:
        evaluations.write(step=progress.step, eval_loss=total["loss"], perplexity=total["perplexity"], sources=result)
        emit({"event": "evaluation", "after_step": progress.step, "eval_loss": total["loss"], "sources": result})
        log.info("held out after step %d: loss %.4f, perplexity %.2f", progress.step, total["loss"], total["perplexity"])
    return result


def save(run: Run, progress: Progress) -> Path:
    """Write a checkpoint and delete those that are no longer wanted."""
    began = time.monotonic()
    path = checkpoint.save(run.engine, progress, run.checkpoints, run.ranks)
    if run.ranks.is_first:
        checkpoint.prune(run.checkpoints, run.settings.keep_last, progress.best_step if run.settings.keep_best else None)
        seconds = time.monotonic() - began
        emit({"event": "checkpoint", "after_step": progress.step, "path": str(path), "seconds": seconds})
    return path


def _report(run: Run, progress: Progress, record: dict[str, Any], metrics: JsonLines) -> None:
    """A line in metrics.jsonl, an event for the launcher, a progress line for people."""
    metrics.write(**record)
    total = run.course.total_steps
    eta = (total - progress.step) * progress.seconds / progress.step
    emit({"event": "step", "steps": total, "eta_seconds": eta, **record})
    log.info(
        "step %d/%d loss %.4f lr %.2e norm %.3f, %.0f target tokens/s, ETA %s",
        progress.step, total, record["loss"], record["learning_rate"], record["grad_norm"],
        record["target_tokens_per_second"], duration(eta),
    )  # fmt: skip
