"""What every rank runs: ``python -m training.worker --config RUN/config.yaml [--resume]``, by hand also under torchrun.

In: RUN/config.yaml and the environment of a rank (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). Out, in RUN:
metrics.jsonl, evaluations.jsonl, checkpoints/, model/, train.json. Rank 0 prints `PANDA {json}` events on stdout; the
rest is log text. The exit code is one of `training.launch.exits`.
"""

import argparse
import logging
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training import run_files
from training.errors import CheckpointError
from training.launch.exits import DataError, emit, run_rank
from training.launch.run_config import RunConfig, read_config
from training.lean_imports import UNUSED, without
from training.planning import compatibility

log = logging.getLogger("training.worker")


def main() -> None:
    """Command line of a rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="RUN/config.yaml")
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint of this run")
    arguments = parser.parse_args()
    work(read_config(arguments.config), arguments.resume)


def work(config: RunConfig, resume: bool) -> None:
    """Train, evaluate, save the model, say how it went."""
    compatibility.check(config.settings, config.model_dir, config.packing)
    from training.distributed import join, leave, this_rank  # torch from here on

    ranks = this_rank()
    logging.basicConfig(
        level=logging.INFO if ranks.is_first else logging.WARNING,
        format=f"%(asctime)s rank {ranks.rank} %(name)s: %(message)s",
    )
    join(ranks)
    try:
        train_run(config, ranks, resume)
    finally:
        leave()


def train_run(config: RunConfig, ranks: Any, resume: bool) -> None:
    """The work of a rank that has joined the others."""
    from training.trainer import checkpoint, loop

    newest = checkpoint.newest_of_all(config.run_dir / run_files.CHECKPOINTS, ranks)
    if newest and not resume:
        raise CheckpointError(f"{newest} is there already: --resume goes on from it; or choose another run directory")
    progress = checkpoint.read_progress(newest) if newest else checkpoint.Progress()
    run = prepare(config, ranks, progress)
    if newest:
        checkpoint.load(run.engine, newest)
        log.info("resumed from %s", newest)
    if ranks.is_first:
        checkpoint.discard_after(run.checkpoints, progress.step)
    if ranks.is_first:
        emit({"event": "start", "after_step": progress.step, "steps": run.course.total_steps, "resumed": bool(newest)})
    progress = loop.train(run, progress)
    finish(config, run, progress)


def prepare(config: RunConfig, ranks: Any, progress: Any) -> Any:
    """Load the model, wrap it in its engine, prove it isolates segments, lay out the course."""
    with without(*UNUSED):  # not around what may import the user's code
        from data_prep.plan.reader import open_plan
        from training.models import build
        from training.trainer import metrics, packing_check

        plan = open_plan(config.plan_dir, "train")
    from data_prep.targets import load_target
    from training.devices import compute_dtype, load_dtype
    from training.engines.build import build_engine
    from training.models.loss import TargetLoss, causal_model
    from training.trainer.batches import plan_course
    from training.trainer.loop import Run, Stop
    from training.trainer.schedule import schedule

    settings = config.settings
    if not plan.num_rows:
        raise DataError(f"{config.plan_dir}: no rows to train on; every record was rejected, dropped or held out")
    course = plan_course(plan, settings, ranks.world_size, progress.rows_per_step or None)
    progress.rows_per_step = course.rows_per_step
    dtype = compute_dtype(settings, ranks.device)
    stop = Stop(ranks)
    stop.listen()
    causal = build.load_model(settings, config.model_dir, config.tokenizer_dir, load_dtype(settings, ranks.device))
    vocabulary = causal_model(causal).get_input_embeddings().weight.shape[0]
    flops = metrics.flops_per_token(causal_model(causal))
    engine = build_engine(TargetLoss(causal), settings, ranks)
    _check_disk(config, engine, causal, ranks)
    engine.module.eval()
    facts = packing_check.Facts(vocabulary, config.packing, settings.per_gpu_train_batch_size, dtype)
    packing_check.check(engine.forward, facts, ranks)
    engine.module.train()
    return Run(
        settings=settings,
        ranks=ranks,
        engine=engine,
        course=course,
        validation=open_plan(config.plan_dir, "validation"),
        factor=schedule(settings, course.total_steps),
        stop=stop,
        directory=config.run_dir,
        flops_per_token=flops,
        peak_flops=metrics.peak_flops(ranks.device),
        callbacks=[load_target(node, "callbacks") for node in settings.callbacks or ()],
    )


def _check_disk(config: RunConfig, engine: Any, causal: Any, ranks: Any) -> None:
    """Predict what checkpoints and model take, before the first step."""
    from training.trainer import checkpoint
    from training.trainer.metrics import num_elements

    settings = config.settings
    if not ranks.is_first:
        return
    trained = sum(num_elements(p) for p in causal.parameters() if p.requires_grad)
    saved = trained if settings.use_lora else sum(num_elements(p) for p in causal.parameters())
    (config.run_dir / run_files.CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    needed = checkpoint.bytes_needed(trained, 12, settings.keep_last, settings.keep_best) + 4 * saved
    checkpoint.check_disk(config.run_dir / run_files.CHECKPOINTS, needed)


def finish(config: RunConfig, run: Any, progress: Any) -> None:
    """Deploy the last or best weights, evaluate them, write the summary."""
    from training.trainer import checkpoint, loop, metrics

    if config.settings.keep_best and progress.best_step is not None:
        checkpoint.load(run.engine, run.checkpoints / checkpoint.name_of(progress.best_step))
    with_file = metrics.JsonLines(config.run_dir / run_files.EVALUATIONS, progress.step - 1)
    if run.ranks.is_first:
        with with_file as evaluations:
            after = loop.evaluate(run, progress, evaluations)
    else:
        after = loop.evaluate(run, progress, None)
    save_model(config, run)
    if run.ranks.is_first:
        summary = {
            "steps": progress.step,
            **{key: value for key, value in asdict(progress).items() if key != "step"},
            "eval_after": after,
            "exit_reason": "completed",
            "finished": time.time(),
        }
        metrics.write_json(config.run_dir / run_files.TRAINED, summary)
        emit({"event": "done", **summary})


def save_model(config: RunConfig, run: Any) -> None:
    """RUN/model, written beside and renamed. All ranks gather, rank 0 writes."""
    from training.models import build

    final = config.run_dir / run_files.MODEL
    state = {name: value for name, value in run.engine.weights() if run.ranks.is_first}
    if run.ranks.is_first:
        temporary = config.run_dir / ".model"
        shutil.rmtree(temporary, ignore_errors=True)
        build.save_model(run.engine.module.model, state, config.tokenizer_dir, temporary)
        save_chat_template(config, temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        emit({"event": "model", "path": str(final)})
    run.ranks.barrier()


def save_chat_template(config: RunConfig, directory: Path) -> None:
    """The prompt template of training becomes the model's chat template: it is asked as it was trained."""
    from data_prep.tokenizer import load_tokenizer
    from data_prep.tokens.export_template import served_template

    text = served_template(config.template, load_tokenizer(directory))
    if text:
        (directory / "chat_template.jinja").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_rank(main)
