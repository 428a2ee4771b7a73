"""Task of the gate: compare the new version with the champion and the base, move the aliases, show why.

In: the tracked run, its settings, the registered version. Out: the verdict with its tables, also RUN/gate.json and tags
of the version. A comparison that fails costs the promotion, never the run: the model is trained and registered.
"""

import json
import logging
from pathlib import Path
from typing import Any

from configs.settings import PandaSettings
from tasks.reporting import show_gate
from tasks.stage import stage
from training.comparison.job import write_job
from training.errors import MlflowAway
from training.launch import launcher
from training.launch.exits import ExitReason
from training.registry.promotion import job_of, settle
from training.registry.register import patiently
from training.registry.versions import GATE_TAG, Registry
from training.settings import GateSettings, TrainSettings
from training.tracking.run import TrackedRun

COMPARE = "training.compare"

logger = logging.getLogger(__name__)


def verdict_in_words(result: dict[str, Any]) -> str:
    """Champion or not, and why."""
    return f"{'is the champion' if result['promoted'] else 'stays challenger'}: {'; '.join(result['reasons'])}"


@stage("gate", says=verdict_in_words)
def gate(tracked: TrackedRun, settings: PandaSettings, model: dict[str, Any]) -> dict[str, Any]:
    """Decide about the version of the register stage.

    :raises MlflowAway: it is registered but could not be compared; the message says how to go on.
    """
    try:
        return decide(tracked, settings, model)
    except MlflowAway as error:
        raise MlflowAway(
            f"{model['uri']} is registered but not compared: {error}; when it is back, go on with --resume "
            f"--run_name {tracked.run_dir.name}"
        ) from error


def decide(tracked: TrackedRun, settings: PandaSettings, model: dict[str, Any]) -> dict[str, Any]:
    """Compare, settle, write down; a verdict that is there already stands."""
    registry = Registry(tracked.uri)
    version = patiently(lambda: registry.resolve(model["uri"]))
    stored = tracked.run_dir / "gate.json"
    if GATE_TAG in version.tags and stored.exists():  # a resumed run
        return without_answers(json.loads(stored.read_text(encoding="utf-8")))
    limits = GateSettings.of(settings).model_dump()
    write_job(patiently(lambda: job_of(registry, version, tracked.run_dir, limits)), tracked.run_dir)
    result = _compare(tracked.run_dir, TrainSettings.of(settings))
    patiently(lambda: settle(registry, version, result))
    logger.info("%s %s", version.uri, verdict_in_words(result))
    stored.write_text(json.dumps(result, ensure_ascii=False, indent=1), encoding="utf-8")
    show_gate(result)
    return without_answers(result)


def without_answers(result: dict[str, Any]) -> dict[str, Any]:
    """The verdict as the summary holds it; the models' answers stay in RUN/gate.json."""
    return {name: value for name, value in result.items() if name != "answers"}


def _compare(run_dir: Path, settings: TrainSettings) -> dict[str, Any]:
    report = launcher.evaluate(run_dir, settings, logger.info, COMPARE)
    if report.reason is ExitReason.completed:
        return json.loads((run_dir / "gate.json").read_text(encoding="utf-8"))
    if report.reason is ExitReason.cancelled:
        raise KeyboardInterrupt
    logger.error("%s", report.details)
    reason = f"the comparison ended: {report.reason.value}: {report.message}"
    return {"promoted": False, "reasons": [reason], "slices": [], "checks": []}
