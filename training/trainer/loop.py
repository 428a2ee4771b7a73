"""The training loop: steps, evaluation, checkpoints, until all steps are done or someone asks to stop.

In: a `Run` (engine, batches, ranks, settings), signals to any rank. Out: the `Progress` at the end; metrics,
evaluations, checkpoints on disk. The loop owns no algorithm: rows come from `batches.py`, the step from `step.py`,
sharding from the engine. SIGTERM and SIGINT mean: write a checkpoint, where there is time for one, and go, all ranks at
the same micro-batch of a step or an evaluation. Cost
beside the steps: one small all-reduce (0.1 to 0.3 ms) a micro-batch; without it a rank that stops would leave the
others waiting in a collective, and the end of a step of many micro-batches could come after the deadline.
"""

import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from data_prep.plan.reader import Plan
from training import run_files
from training.cost import budget
from training.cost.budget import Budget
from training.cost.marks import EVALUATE, SAVE, TRAIN, WARM_UP, mark
from training.cost.words import duration
from training.distributed import Ranks
from training.engines.engine import Engine
from training.launch.events import emit, step_done
from training.launch.exits import OWNED, NonFiniteError, TrainingStopped
from training.launch.heartbeat import Heartbeat
from training.models.loss import MicroBatch
from training.run_files import HeldOut, Spike, StepRecord
from training.settings import TIME_TO_SAVE, TrainSettings
from training.trainer import checkpoint, evaluation
from training.trainer.batches import BatchSchedule, prefetch
from training.trainer.checkpoint import Progress
from training.trainer.metrics import Clock, Flops, JsonLines, memory_peak_bytes
from training.trainer.saver import Saver, Writing
from training.trainer.schedule import Factor
from training.trainer.spikes import (
    NO_LIMITS,
    Limits,
    Usual,
    culprits,
    in_words,
    limits_after,
    names,
    spike_of,
    usual_after,
    with_step,
)
from training.trainer.step import NotFinite, StepResult, StepWork, train_step

NUM_RECORDS_SHOWN = 5

log = logging.getLogger(__name__)


class StopSignal:
    """Whether this run has been asked to end, and how long ago."""

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self._signalled_at: float | None = None
        self._together = False

    def listen(self) -> None:
        """Catch the signals from now on; a second one changes nothing."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def obey_together(self) -> None:
        """From now on a signal waits for `requested`. Before, a rank that gets one leaves: it has nothing to save."""
        self._together = True

    def _remember(self, number: int, frame: FrameType | None) -> None:
        first = self._signalled_at is None
        self._signalled_at = self._signalled_at or time.monotonic()
        if first and not self._together:
            raise TrainingStopped("stopped before the first step; nothing is lost")

    def requested(self) -> bool:
        """True on all ranks once any rank has been signalled. All ranks together."""
        return bool(self._ranks.max(float(self._signalled_at is not None))[0])

    def seconds_ago(self) -> float:
        """Since the first rank was signalled. All ranks together."""
        return self._ranks.max(time.monotonic() - self._signalled_at if self._signalled_at else 0.0)[0]


@dataclass
class Run:
    """Everything a step needs; made once by the worker."""

    settings: TrainSettings
    ranks: Ranks
    engine: Engine
    batch_schedule: BatchSchedule
    validation: Plan
    factor: Factor
    stop: StopSignal
    saver: Saver
    directory: Path
    flops: Flops
    peak_flops: float | None
    callbacks: list[Callable[[StepRecord], Any]] = field(default_factory=list)

    @property
    def checkpoints(self) -> Path:
        return self.directory / run_files.CHECKPOINTS

    @property
    def save_steps(self) -> int:
        """`save_steps`, or ten times in a run."""
        return self.settings.save_steps or max(1, math.ceil(self.batch_schedule.total_steps / 10))

    def turn_to(self, part: str, step: int) -> None:
        """Say in time.jsonl what begins now, after so many steps."""
        if self.ranks.is_first:
            mark(self.directory, {"time": time.time(), "part": part, "step": step})

    def work(self, step: int, limits: Limits = NO_LIMITS, usual: Usual | None = None) -> StepWork:
        """What a step has to do."""
        micro_batch = self.settings.per_gpu_train_batch_size
        return StepWork(
            step=step,
            seed=self.settings.seed,
            num_micro_steps=len(
                self.batch_schedule.micro_batches(step, self.ranks.rank, self.ranks.world_size, micro_batch)
            ),
            target_tokens=self.batch_schedule.target_tokens(step),
            learning_rate=self.settings.learning_rate * self.factor(step),
            limits=limits,
            usual=usual,
        )


def train(run: Run, progress: Progress) -> Progress:
    """Train from where `progress` is to the last step, or until held-out loss stops falling."""
    names = (run_files.METRICS, run_files.EVALUATIONS, run_files.SPIKES, run_files.STANDING_OUT)
    metrics, evaluations, *found = [
        JsonLines(run.directory / name, progress.step) if run.ranks.is_first else None for name in names
    ]
    batches = _micro_batches(run, progress.step)
    run.stop.obey_together()
    if not progress.step and not progress.eval_before:
        progress.eval_before = evaluate(run, progress, evaluations)
    hours, progress.stopped = run.settings.max_gpu_hours, ""
    limit = Budget.of(run.directory, hours, run.ranks.world_size) if hours else None
    first_step = progress.step + 1
    run.turn_to(WARM_UP, progress.step)
    while progress.step < run.batch_schedule.total_steps and not _stopped(run, progress, limit):
        limits = _limits(run, progress)
        record, result = one_step(run, progress, batches, limits)
        if progress.step == first_step:
            run.turn_to(TRAIN, progress.step)
        if metrics is not None:
            _report(run, progress, record, metrics)
        _look_at(run, progress, result, limits, found)
        if _after_step(run, progress, evaluations):
            break
    return progress


def _micro_batches(run: Run, first_step: int) -> Iterator[MicroBatch]:
    """This rank's micro-batches from a step on, on its device."""
    settings, ranks = run.settings, run.ranks
    wanted = run.batch_schedule.wanted(first_step, ranks.rank, ranks.world_size, settings.per_gpu_train_batch_size)
    loaded = prefetch(run.batch_schedule.plan, wanted, settings.num_workers, settings.prefetch_factor)
    return (batch.to(ranks.device) for batch in loaded)


def _limits(run: Run, progress: Progress) -> Limits:
    """Above these the next step is a spike."""
    if run.settings.on_spike == "off":
        return NO_LIMITS
    schedule = run.batch_schedule
    return limits_after(progress.recent, len(schedule.rows(progress.step)) / schedule.rows_per_step)


def one_step(
    run: Run, progress: Progress, batches: Iterator[MicroBatch], limits: Limits = NO_LIMITS
) -> tuple[StepRecord, StepResult]:
    """One optimizer step; `progress` moves on; returns what is measured, and what else is known of it."""
    began, clock = time.perf_counter(), Clock(run.ranks.device)
    usual = None if run.settings.on_spike == "off" else usual_after(progress.recent, progress.segments)
    work = run.work(progress.step, limits if run.settings.on_spike in ("skip", "rewind") else NO_LIMITS, usual)
    try:
        result = train_step(run.engine, batches, work, clock, _watch(run, progress, work.num_micro_steps))
    except NotFinite as error:
        raise _explain(error, run, progress.step) from error
    rows = run.batch_schedule.rows(progress.step)
    tokens, seconds = int(run.batch_schedule.plan.row_tokens[rows].sum()), time.perf_counter() - began
    progress.add(result.loss, result.grad_norm, tokens, work.target_tokens, seconds)
    if result.looked:
        progress.segments = with_step(progress.segments, result.looked.counts)
    record: StepRecord = {
        "step": progress.step,
        "epoch": progress.step / run.batch_schedule.steps_per_epoch,
        "loss": result.loss,
        "learning_rate": work.learning_rate,
        "grad_norm": result.grad_norm,
        "rows": len(rows),
        "tokens": tokens,
        "target_tokens": work.target_tokens,
        "padding": 1 - tokens / result.num_computed,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "target_tokens_per_second": work.target_tokens / seconds,
        **clock.take(),
        "memory_peak_bytes": memory_peak_bytes(run.ranks.device),
    }
    if run.peak_flops is not None:
        flops = run.flops.of(record["tokens_per_second"], record["target_tokens_per_second"])
        record["mfu"] = flops / (run.peak_flops * run.ranks.world_size)
    return record, result


def _watch(run: Run, progress: Progress, num_micro_steps: int) -> Callable[[int], None]:
    """Called before every micro-batch: obeys a request to stop, and shows that a long step is alive."""
    alive = Heartbeat("step", num_micro_steps, "micro-batches")

    def before(index: int) -> None:
        obey(run, progress)
        alive(index)

    return before


def _explain(error: NotFinite, run: Run, step: int) -> NonFiniteError:
    """The error for people: step, rank, source records."""
    if not error.rows:
        time.sleep(1)  # let the rank that knows the records speak first
        return NonFiniteError(f"step {step + 1}: {error.what} is not finite; no update was made")
    origins = [origin for row in error.rows if row >= 0 for origin in run.batch_schedule.plan.origins(row)]
    shown = ", ".join(f"{file}:{line}" for file, line in origins[:NUM_RECORDS_SHOWN])
    more = f" and {len(origins) - NUM_RECORDS_SHOWN} more" if len(origins) > NUM_RECORDS_SHOWN else ""
    return NonFiniteError(
        f"step {step + 1}: {error.what} is {error.value} on rank {run.ranks.rank}, which trained on {shown}{more}; "
        "no update was made. Look at these records, or lower learning_rate or max_grad_norm"
    )


def obey(run: Run, progress: Progress) -> None:
    """Raise where a checkpoint could not be written, or where the run is to stop. All ranks together."""
    run.saver.check()
    if run.stop.requested():
        leave(run, progress)


def leave(run: Run, progress: Progress) -> None:
    """Write a checkpoint of the last whole step, if there is time, and end the run as cancelled."""
    began, step, deadline = time.monotonic(), progress.step, run.settings.stop_deadline_seconds
    if not step:
        raise TrainingStopped("stopped before the first step was done; nothing is lost")
    left = deadline * TIME_TO_SAVE - run.stop.seconds_ago()
    rest, needed = run.saver.seconds_until(step)
    if needed <= left:
        save(run, progress)
        run.saver.wait()
        seconds = time.monotonic() - began
        raise TrainingStopped(f"stopped after step {step}; {checkpoint.name_of(step)} is there after {seconds:.1f} s")
    if rest <= left:
        run.saver.wait()
    kept = run.saver.newest_step
    raise TrainingStopped(
        f"stopped after step {step}, with no time for a checkpoint: it would take about {needed:.0f} s, and "
        f"{max(left, 0):.0f} s are left of stop_deadline_seconds={deadline:g}. {step - kept} steps are lost: the "
        f"newest checkpoint is that of step {kept}"
    )


def _look_at(
    run: Run, progress: Progress, result: StepResult, limits: Limits, files: Sequence[JsonLines | None]
) -> None:
    """Name the records of the last step that stand out; answer it where it was a spike. All ranks together."""
    spikes, standing_out = files
    step, looked, records = progress.step, result.looked, []
    is_spike = limits.exceeded_by(result.loss, result.grad_norm)
    if looked and (is_spike or looked.num_standing_out):
        schedule, chosen = run.batch_schedule, looked.usual.exceeded_by(looked.segments, is_spike)
        records = culprits(schedule.plan, schedule.rows(step - 1), looked.segments.where(chosen), run.ranks)
    if is_spike:
        spike = spike_of(step, result.loss, result.grad_norm, limits, records)
        _answer_spike(run, progress, spike)
        if spikes is not None:
            spikes.write(**spike)
            log.warning("a spike in step %d: %s; %s", step, spike["says"], names(records))
    elif records and standing_out is not None:
        standing_out.write(step=step, records=records)
        log.info("step %d: %s", step, names(records))


def _answer_spike(run: Run, progress: Progress, spike: Spike) -> None:
    """Do as `on_spike` says. All ranks together."""
    step, back_to = spike["step"], _checkpoint_to_go_back_to(run)
    progress.spikes += 1
    if back_to:
        spike |= {"done": "rewound", "back_to": back_to}
        directory = run.checkpoints / checkpoint.name_of(back_to)
        progress.steps_without_update = checkpoint.read_progress(directory).steps_without_update + step - back_to
        checkpoint.load(run.engine, directory)
    elif run.settings.on_spike != "warn":
        spike["done"] = "skipped"
        progress.steps_without_update += 1
    spike["says"] = in_words(spike)


def _checkpoint_to_go_back_to(run: Run) -> int:
    """The step of the newest checkpoint, once it is complete; 0 = there is none, or none is asked for."""
    if run.settings.on_spike != "rewind":
        return 0
    run.saver.wait()
    return run.saver.newest_step


def _after_step(run: Run, progress: Progress, evaluations: JsonLines | None) -> bool:
    """Evaluate and save when due; True ends the run early."""
    settings, step = run.settings, progress.step
    last = step == run.batch_schedule.total_steps
    early = False
    if settings.eval_steps and step % settings.eval_steps == 0 and not last:
        result = evaluate(run, progress, evaluations)
        early = _early_stop(run, progress, result)
    if last or early or step % run.save_steps == 0:
        save(run, progress)
    return early


def _stopped(run: Run, progress: Progress, limit: Budget | None) -> bool:
    """Whether `max_gpu_hours` ends training here; then the checkpoint is begun. All ranks together.

    Without a step there would be nothing to register, so one is made in any case.
    """
    if limit is None or not progress.step:
        return False
    _, until_saved = run.saver.seconds_until(progress.step)
    last = limit.is_last(progress.step, time.monotonic(), progress.seconds / progress.step, until_saved)
    if not run.ranks.max(float(last and run.ranks.is_first))[0]:
        return False
    progress.stopped = budget.in_words(progress.step, run.batch_schedule.total_steps, limit.hours)
    if run.ranks.is_first:
        limit.stop(progress.step)
        log.info("%s", progress.stopped)
    save(run, progress)
    return True


def _early_stop(run: Run, progress: Progress, result: HeldOut) -> bool:
    """Remember the best held-out loss; True when it has not fallen for `early_stop_patience` evaluations."""
    if evaluation.ALL not in result:
        return False
    loss = result[evaluation.ALL]["loss"]
    if progress.best_loss is None or loss < progress.best_loss:
        progress.best_loss, progress.best_step, progress.evaluations_without_gain = loss, progress.step, 0
        if run.settings.keep_best:
            save(run, progress)
        return False
    progress.evaluations_without_gain += 1
    patience = run.settings.early_stop_patience
    return bool(patience) and progress.evaluations_without_gain >= patience


def evaluate(run: Run, progress: Progress, evaluations: JsonLines | None) -> HeldOut:
    """Held-out loss per source now; {} when nothing is held out."""
    if not run.validation.num_rows:
        return {}

    def losses(batch: MicroBatch) -> Tensor:
        obey(run, progress)
        return run.engine.forward(batch, "each")

    run.turn_to(EVALUATE, progress.step)
    module = run.engine.module
    module.eval()
    batch_size = run.settings.per_gpu_eval_batch_size
    result = evaluation.held_out_losses(losses, run.validation, batch_size, run.ranks)
    module.train()
    run.turn_to(TRAIN, progress.step)
    total = result.get(evaluation.ALL)
    if evaluations is not None and total:
        evaluations.write(step=progress.step, eval_loss=total["loss"], perplexity=total["perplexity"], sources=result)
        emit({"event": "evaluation", "after_step": progress.step, "eval_loss": total["loss"], "sources": result})
        log.info("held out after step %d: loss %.4f", progress.step, total["loss"])
    return result


def evaluate_sample(run: Run) -> HeldOut:
    """Held-out loss of a sample of rows, for whoever reads the weights back; {} when nothing is held out."""
    if not run.validation.num_rows:
        return {}
    run.engine.module.eval()
    rows, batch_size = evaluation.sample_rows(run.validation.num_rows), run.settings.per_gpu_eval_batch_size
    return evaluation.held_out_losses(
        lambda batch: run.engine.forward(batch, "each"), run.validation, batch_size, run.ranks, rows
    )


def save(run: Run, progress: Progress) -> None:
    """Begin a checkpoint; when it is complete, those that are no longer wanted are deleted."""
    best = progress.best_step if run.settings.keep_best else None

    def complete(writing: Writing) -> None:
        checkpoint.prune(run.checkpoints, run.settings.keep_last, best)
        emit(
            {
                "event": "checkpoint",
                "after_step": writing.step,
                "path": str(writing.final),
                "seconds": writing.seconds,
                "stall_seconds": writing.stall_seconds,
            }
        )

    run.turn_to(SAVE, progress.step)
    run.saver.save(run.engine, progress, complete)
    run.turn_to(TRAIN, progress.step)


def _report(run: Run, progress: Progress, record: StepRecord, metrics: JsonLines) -> None:
    """A line in metrics.jsonl, an event for the launcher, a progress line for people."""
    metrics.write(**record)
    total = run.batch_schedule.total_steps
    eta = (total - progress.step) * progress.seconds / progress.step
    emit(step_done(total, eta, record))
    for callback in run.callbacks:
        callback(record)
    if os.environ.get(OWNED):  # the launcher tells people, from the event
        return
    log.info(
        "step %d/%d loss %.4f lr %.2e norm %.3f, %.0f target tokens/s, ETA %s",
        progress.step, total, record["loss"], record["learning_rate"], record["grad_norm"],
        record["target_tokens_per_second"], duration(eta),
    )  # fmt: skip
