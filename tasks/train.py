"""Task of training: launches the ranks, relays their progress, and turns the exit reason into an error that says it.

In: the run directory with its ``config.yaml``. Out: the worker's summary (RUN/train.json) as a dict.
The task runs in the flow's main thread, where Prefect delivers a cancellation; the launcher then ends every rank.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.errors import PandaError
from tasks.progress import StageProgress
from tasks.stage import stage
from training.launch import ExitReport, launch
from training.settings import TrainSettings

logger = logging.getLogger(__name__)


class TrainingFailed(PandaError):
    """Training ended with another reason than `completed`."""

    def __init__(self, report: ExitReport):
        self.report = report
        super().__init__(f"training ended: {report.reason.value} ({report.source}): {report.message}")


@stage("train")
def train(run_dir: Path, settings: TrainSettings, on_step: Callable[[], None]) -> dict[str, Any]:
    """Run the training worker on every rank; `on_step` is called after each optimizer step."""
    progress = StageProgress("training")

    def on_event(event: dict[str, Any]) -> None:
        if event.get("event") == "step":
            progress("train", event["step"], event["steps"], "steps", f"loss {event['loss']:.4f}")
            on_step()

    report = launch(run_dir, settings, on_event, logger.info, resume=settings.resume)
    if report.reason.value != "completed":
        if report.details:
            logger.error("%s", report.details)
        raise TrainingFailed(report)
    return json.loads((run_dir / "train.json").read_text(encoding="utf-8"))
