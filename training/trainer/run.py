"""A rank's part of a run, from the loaded model to the deployed one: everything around the loop.

In: `RunConfig`, ranks that have met. Out, in RUN: schedule.json, metrics.jsonl, evaluations.jsonl, checkpoints/,
model/, train.json; events of rank 0. Cost: loading, checks of a few tokens, the loop, an evaluation, writing the model.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from data_prep.plan.reader import open_plan
from data_prep.targets import load_target
from data_prep.tokenizer import load_tokenizer
from data_prep.tokens.templates import served_template
from training import run_files
from training.cost.marks import EVALUATE, LOAD, SAVE, mark
from training.devices import compute_dtype, load_dtype
from training.distributed import Ranks
from training.engines.build import build_engine
from training.errors import CheckpointError, ModelError
from training.launch import ownership
from training.launch.events import emit, training_done
from training.launch.exits import DataError, TrainingStopped
from training.launch.heartbeat import Heartbeat
from training.launch.run_config import RunConfig
from training.lean_imports import UNUSED, without
from training.models import build, weight_files
from training.models.loss import CausalLMLoss, causal_model
from training.models.principal import write_as_plain
from training.planning.memory import disk_bytes
from training.trainer import checkpoint, loop, metrics, packing_check
from training.trainer.batches import batch_schedule
from training.trainer.checkpoint import Progress
from training.trainer.loop import Run, StopSignal
from training.trainer.metrics import num_elements
from training.trainer.saver import Saver, wait_until_seen
from training.trainer.schedule import schedule

SCHEDULE = "schedule.json"
"""What a run that has no checkpoint yet keeps when it is resumed, whatever its ranks are then."""

log = logging.getLogger(__name__)
T = TypeVar("T")


def train_run(config: RunConfig, ranks: Ranks, resume: bool) -> None:
    """Train, evaluate, save the model, say how it went. All ranks together."""
    if ranks.is_first:
        gpus = ranks.device.type == "cuda"
        mark(config.run_dir, {"time": time.time(), "part": LOAD, "devices": ranks.world_size, "gpus": gpus})
    newest = checkpoint.newest(config.run_dir / run_files.CHECKPOINTS, ranks)
    if newest and not resume:
        raise CheckpointError(f"{newest} is there already: --resume goes on from it; or choose another run directory")
    progress = checkpoint.read_progress(newest) if newest else Progress()
    progress.rows_per_step = progress.rows_per_step or (_rows_at_start(config, ranks) if resume else 0)
    run = build_run(config, ranks, progress)
    if newest:
        checkpoint.load(run.engine, newest)
        run.saver.newest_step, run.saver.seconds = progress.step, checkpoint.seconds_of(newest)
        log.info("resumed from %s", newest)
    if ranks.is_first:
        if resume:
            mark(config.run_dir, {"time": time.time(), "resumed_from": progress.step})
        run_files.write_json(config.run_dir / SCHEDULE, {"rows_per_step": progress.rows_per_step})
        steps = run.batch_schedule.total_steps
        checkpoint.discard_after(run.checkpoints, progress.step)
        emit({"event": "start", "after_step": progress.step, "steps": steps, "resumed": bool(newest)})
    try:
        progress = loop.train(run, progress)
        finish(config, run, progress)
    except TrainingStopped:
        raise
    except Exception:
        run.saver.settle(config.settings.stop_deadline_seconds)
        raise


def _rows_at_start(config: RunConfig, ranks: Ranks) -> int:
    """Rows of a step that the run began with, as rank 0 reads them; 0 when it has not begun."""
    path = config.run_dir / SCHEDULE
    known = json.loads(path.read_text())["rows_per_step"] if ranks.is_first and path.is_file() else 0
    return int(ranks.max(float(known))[0])


def build_run(config: RunConfig, ranks: Ranks, progress: Progress) -> Run:
    """Load the model, wrap it in its engine, prove that it isolates segments, lay out the batches."""
    settings = config.settings
    with without(*UNUSED):  # pyarrow looks for pandas when it converts for the first time
        plan = open_plan(config.plan_dir, "train")
    if not plan.num_rows:
        raise DataError(f"{config.plan_dir}: no rows to train on; every record was rejected, dropped or held out")
    batches = batch_schedule(plan, settings, ranks.world_size, progress.rows_per_step or None)
    progress.rows_per_step = batches.rows_per_step
    stop = StopSignal(ranks)
    stop.listen()
    dtype = load_dtype(settings, ranks.device)
    model, values = build.empty_model(settings, config.model_dir, config.tokenizer_dir, dtype)
    causal = causal_model(model)
    vocabulary, flops = build.num_embeddings(causal), metrics.flops_of(causal)
    if ranks.is_first:
        _check_disk(config, model)
    engine = build_engine(CausalLMLoss(model), settings, ranks, values)
    engine.module.eval()
    checked = packing_check.Checked(
        vocabulary, config.packing, settings.per_gpu_train_batch_size, compute_dtype(settings, ranks.device)
    )
    packing_check.check(engine.forward, checked, ranks)
    engine.module.train()
    return Run(
        settings=settings,
        ranks=ranks,
        engine=engine,
        batch_schedule=batches,
        validation=open_plan(config.plan_dir, "validation"),
        factor=schedule(settings, batches.total_steps),
        stop=stop,
        saver=Saver(config.run_dir / run_files.CHECKPOINTS, ranks),
        directory=config.run_dir,
        flops=flops,
        peak_flops=metrics.peak_flops(ranks.device),
        callbacks=[load_target(node, "callbacks") for node in settings.callbacks or ()],
    )


def _check_disk(config: RunConfig, model: nn.Module) -> None:
    """Predict what checkpoints and model take, before the first step."""
    trained = sum(num_elements(p) for p in model.parameters() if p.requires_grad)
    saved = trained if config.settings.use_lora else sum(num_elements(p) for p in model.parameters())
    root = config.run_dir / run_files.CHECKPOINTS
    root.mkdir(parents=True, exist_ok=True)
    checkpoint.check_disk(root, disk_bytes(trained, saved, config.settings))


def finish(config: RunConfig, run: Run, progress: Progress) -> None:
    """Deploy the last or best weights, evaluate them, write the summary."""
    run.turn_to(SAVE, progress.step)
    if config.settings.keep_best and progress.best_step is not None:
        run.saver.wait()
        checkpoint.load(run.engine, run.checkpoints / checkpoint.name_of(progress.best_step))
    path = config.run_dir / run_files.EVALUATIONS
    evaluations = metrics.JsonLines(path, progress.step - 1) if run.ranks.is_first else None
    after = loop.evaluate(run, progress, evaluations)
    run.turn_to(EVALUATE, progress.step)
    sample = loop.evaluate_sample(run)
    run.turn_to(SAVE, progress.step)
    save_model(config, run, progress)
    run.saver.wait()
    if run.ranks.is_first:
        summary = {
            "steps": progress.step,
            **{key: value for key, value in asdict(progress).items() if key not in ("step", "recent", "segments")},
            "eval_after": after,
            "eval_sample": sample,
            "total_steps": run.batch_schedule.total_steps,
            "exit_reason": "completed",
            "finished": time.time(),
        }
        run_files.write_json(config.run_dir / run_files.TRAINED, summary)
        emit(training_done(summary))


def save_model(config: RunConfig, run: Run, progress: Progress) -> None:
    """RUN/model, written beside and renamed when all of it is on the disk. All ranks together."""
    final, temporary = config.run_dir / run_files.MODEL, config.run_dir / ".model"
    if run.ranks.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
    (_write_adapter if run.settings.use_lora else _write_weights)(run, progress, temporary)
    if run.ranks.is_first:
        build.save_companions(run.engine.module.model, config.tokenizer_dir, temporary)
        save_chat_template(config, temporary)
        ownership.check(config.run_dir)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        emit({"event": "model", "path": str(final)})
    run.ranks.barrier()


def _write_adapter(run: Run, progress: Progress, directory: Path) -> None:
    """All ranks gather it, rank 0 writes it."""
    gathered = _watched(run, progress, run.engine.gathered(), len(run.engine.trained()))
    weights = {name: value for name, value in gathered if run.ranks.is_first}
    if run.ranks.is_first:
        run.engine.module.model.save_pretrained(directory, state_dict=weights)  # type: ignore[operator]  # peft's
        if run.settings.init_lora_weights == "pissa":
            model: Any = run.engine.module.model
            write_as_plain(model, directory, Heartbeat("writing the adapter", len(model.principal), "layers"))


def _write_weights(run: Run, progress: Progress, directory: Path) -> None:
    """Every rank writes what it holds.

    :raises ModelError: fewer numbers were written than the files have room for.
    """
    model = run.engine.module.model
    room = weight_files.begin(model, run.engine.held(), directory) if run.ranks.is_first else 0
    run.ranks.barrier()
    wait_until_seen(directory, run.ranks)
    pieces = _watched(run, progress, run.engine.held(), len(model.state_dict()))
    written = weight_files.write_pieces(directory, pieces)
    missing = run.ranks.sum(float(room - written))[0]
    if missing:
        raise ModelError(f"{directory}: {missing:.0f} bytes of the weights were written by no rank")
    if run.ranks.is_first:
        weight_files.finish(model, directory)


def _watched(run: Run, progress: Progress, weights: Iterator[tuple[str, T]], count: int) -> Iterator[tuple[str, T]]:
    """The weights one by one; a stop is obeyed between two of them. All ranks together."""
    alive = Heartbeat("writing the model", count, "tensors")
    for done, weight in enumerate(weights):
        loop.obey(run, progress)
        alive(done)
        yield weight


def save_chat_template(config: RunConfig, directory: Path) -> None:
    """The prompt template of training becomes the model's chat template: it is asked as it was trained."""
    text = served_template(config.template, load_tokenizer(directory))
    if text:
        (directory / "chat_template.jinja").write_text(text, encoding="utf-8")
