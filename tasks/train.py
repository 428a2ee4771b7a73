"""Tasks of training and evaluation: they launch processes, relay their progress, and say why they ended.

In: the run directory with its ``config.yaml``. Out: the worker's summary (RUN/train.json); held-out losses.
The tasks run in the flow's main thread, where Prefect delivers a cancellation; the launcher then ends every process.
"""

import logging
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import task_run

from data_prep.errors import PandaError
from data_prep.plan.order import steps_per_epoch
from data_prep.plan.reader import open_plan
from tasks.reporting import StageProgress, show_evaluation, show_pictures
from tasks.stage import retry_helps, stage
from training import run_files
from training.cost import marks
from training.cost.account import FIRST_STEPS, forecast
from training.cost.budget import stopped_at
from training.cost.words import in_a_line
from training.launch import launcher, ownership
from training.launch.commands import EVALUATE
from training.launch.events import Event
from training.launch.exits import ExitReason
from training.launch.launcher import ExitReport
from training.launch.run_config import read_config
from training.run_files import HeldOut, Losses, Trained
from training.settings import CostSettings, TrainSettings
from training.tracking.looks import only_a_look
from training.tracking.prometheus import monitored

FAILURES = 3
"""Of the ranks, without a new checkpoint in between: then a person is needed."""
MOST = 100  # retries of one task, which Prefect wants to know

logger = logging.getLogger(__name__)


class TrainingFailed(PandaError):
    """Training or evaluation ended with another reason than `completed`."""

    def __init__(self, what: str, report: ExitReport, run_dir: Path):
        self.report, self.run_dir = report, run_dir
        where = f" ({report.source})" if report.source else ""
        super().__init__(
            f"{what} ended: {report.reason.value}{where}: {report.message}; logs: {run_dir / run_files.LOGS}"
        )


def lost_through_no_fault(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Whether Prefect is to retry: only what `ExitReason.retry_helps` says, never a mistake in data or settings."""
    return retry_helps(state.result(raise_on_failure=False))


def is_worth_another_try(_task: Any, run: TaskRun, state: State[Any]) -> bool:
    """As `lost_through_no_fault`, and while training moves on: weeks on many GPUs see more deaths than a fixed number.

    :param run: of the task; what failed before it began is not counted.
    """
    error = state.result(raise_on_failure=False)
    if not (isinstance(error, TrainingFailed) and retry_helps(error)):
        return False
    began = run.start_time.timestamp() if run.start_time else 0.0
    return failures_since_checkpoint(error.run_dir, began) < FAILURES


def failures_since_checkpoint(run_dir: Path, since: float) -> int:
    """How often the ranks have ended early after the newest checkpoint and the time `since` (seconds of the epoch)."""
    written = [path.stat().st_mtime for path in (run_dir / run_files.CHECKPOINTS).glob("step-*")]
    since = max([since, *written])
    return sum(line.get("part") == marks.DOWN and line["time"] > since for line in marks.read(run_dir))


def _training_in_words(trained: Trained) -> str:
    speed = trained["tokens"] / trained["seconds"] if trained["seconds"] else 0
    steps = f"{trained['steps']:,} steps, {trained['target_tokens']:,} target tokens"
    if trained["first_loss"] is None:  # nothing to do: the checkpoint was at the end already
        return steps
    stopped = f"; {trained['stopped']}" if trained.get("stopped") else ""
    return f"{steps}, loss {trained['first_loss']:.4f} -> {trained['last_loss']:.4f}, {speed:,.0f} tokens/s{stopped}"


def losses_in_words(losses: Losses) -> str:
    """``held-out loss 8.3000 -> 2.1000`` over all sources."""
    before, after = losses["before"].get("all"), losses["after"].get("all")
    if before is None or after is None:
        return "nothing is held out"
    return f"held-out loss {before:.4f} -> {after:.4f}"


@stage("train", says=_training_in_words, retries=MOST, retry_delay_seconds=3, retry_condition_fn=is_worth_another_try)
def train(run_dir: Path, settings: TrainSettings, resume: bool, metrics_port: int | None = None) -> Trained:
    """Run the training worker on every rank until it is done; a retry goes on from the newest checkpoint.

    A run that was trained to its end, and failed later, is not trained, evaluated and saved again.

    :param metrics_port: where Prometheus finds the numbers (`training.tracking.prometheus`).
    """
    ownership.check(run_dir)
    progress = StageProgress("training")
    resume = resume or (task_run.run_count or 1) > 1
    if resume and is_trained(run_dir, settings):
        logger.info("%s was trained to its end before", run_dir.name)
        return trained_before(run_dir)

    def on_event(event: Event) -> None:
        monitor(event)
        if event["event"] == "step":
            progress("train", event["step"], event["steps"], "steps", event["loss"])
            if event["step"] == FIRST_STEPS:
                tell_forecast(run_dir, settings, event["steps"])
        if event["event"] == "alive":
            logger.info("%s: %s of %s %s", event["doing"], event["done"], event["total"], event["unit"])

    with monitored(run_dir.name, metrics_port) as monitor:
        report = launcher.launch(run_dir, settings, on_event, logger.info, resume)
    _require_completed("training", report, run_dir)
    show_pictures(run_dir)
    return run_files.read_json(run_dir / run_files.TRAINED)


@only_a_look("the forecast")
def tell_forecast(run_dir: Path, settings: TrainSettings, num_steps: int) -> None:
    """What all steps will take, and cost."""
    if expected := forecast(run_dir, num_steps, CostSettings.of(settings)):
        logger.info("forecast for %s steps: %s", f"{num_steps:,}", in_a_line(*expected))


@stage("evaluate", says=losses_in_words, retries=1, retry_delay_seconds=10, retry_condition_fn=lost_through_no_fault)
def evaluate(run_dir: Path, settings: TrainSettings, trained: Trained, everything: bool = False) -> Losses:
    """Held-out loss by moment and source, ``{"before": {"all": 8.3}, "after": {...}}``; after = what lies on disk.

    :param everything: compute all rows with the weights on disk, instead of a sample that shows that they are the same.
    """
    arguments = ["--all"] if everything else []
    _require_completed("evaluation", launcher.use(EVALUATE, run_dir, settings, logger.info, *arguments), run_dir)
    losses = evaluated_before(run_dir, trained)
    show_evaluation(losses)
    return losses


def is_trained(run_dir: Path, settings: TrainSettings) -> bool:
    """Whether training has come to its end and left a model, and these settings ask for no other number of steps."""
    path = run_dir / run_files.TRAINED
    if not (path.exists() and (run_dir / run_files.MODEL).is_dir()):
        return False
    trained = run_files.read_json(path)
    if "rows_per_step" not in trained:  # of an older run
        return False
    if trained.get("stopped") and stopped_at(run_dir, settings.max_gpu_hours) is None:  # it has other hours now
        return False
    num_rows = open_plan(read_config(run_dir / run_files.CONFIG).plan_dir, "train").num_rows
    wanted = settings.total_steps(steps_per_epoch(num_rows, trained["rows_per_step"]))
    return wanted == trained.get("total_steps", trained["steps"])


def trained_before(run_dir: Path) -> Trained:
    """What training said in an earlier execution of this run."""
    path = run_dir / run_files.TRAINED
    if not path.exists():
        raise PandaError(
            f"{run_dir} has not been trained to its end (no {run_files.TRAINED}): start at the stage train"
        )
    return run_files.read_json(path)


def evaluated_before(run_dir: Path, trained: Trained) -> Losses:
    """The losses of an earlier execution of this run."""
    path = run_dir / run_files.EVALUATION
    if not path.exists():
        raise PandaError(f"{run_dir} has not been evaluated (no {run_files.EVALUATION}): start at the stage evaluate")
    after = run_files.read_json(path)
    return {"before": _losses(trained["eval_before"]), "after": _losses(after)}


def _require_completed(what: str, report: ExitReport, run_dir: Path) -> None:
    if report.reason is not ExitReason.completed:
        if report.details:
            logger.error("%s", report.details)
        raise TrainingFailed(what, report, run_dir)


def _losses(by_source: HeldOut) -> dict[str, float]:
    return {source: numbers["loss"] for source, numbers in by_source.items()}
