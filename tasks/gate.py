"""Tasks of the gate: compare the new version with the champion and the base; then move the aliases, show why.

In: the tracked run, its settings, the registered version. Out: the verdict with its tables, also RUN/gate.json and tags
of the version. Between the two tasks a person may be asked. A comparison that fails costs the promotion, never the run:
the model is trained and registered.
"""

import contextlib
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from configs.settings import PandaSettings
from tasks.reporting import show_gate
from tasks.stage import stage
from training import run_files
from training.comparison import approval
from training.comparison.job import Answered, GateResult, write_job
from training.errors import MlflowAway
from training.launch import launcher, ownership
from training.launch.commands import COMPARE
from training.launch.exits import ExitReason
from training.registry.promotion import job_of, settle, wait_for_approval
from training.registry.register import with_retries
from training.registry.versions import Registry, Version
from training.run_files import Registered
from training.settings import GateSettings, TrainSettings
from training.tracking.run import TrackedRun
from training.tracking.tags import GATE_TAG

logger = logging.getLogger(__name__)
patiently = partial(with_retries, patient=True)


def verdict_in_words(result: GateResult) -> str:
    """Champion or not, and why."""
    return f"{'is the champion' if result['promoted'] else 'stays challenger'}: {'; '.join(result['reasons'])}"


def comparison_in_words(result: GateResult) -> str:
    """Whether it may become the champion, and why."""
    return f"{'passes' if result['promoted'] else 'does not pass'}: {'; '.join(result['reasons'])}"


@stage("gate", says=comparison_in_words)
def gate(tracked: TrackedRun, settings: PandaSettings, model: Registered) -> GateResult:
    """Compare the version of the register stage.

    :raises MlflowAway: it is registered but could not be compared; the message says how to go on.
    """
    with _how_to_go_on(tracked, f"{model['uri']} is registered but not compared"):
        return without_answers(compare(tracked, settings, model))


@stage("promote", says=verdict_in_words)
def promote(tracked: TrackedRun, uri: str, answer: Answered | None) -> GateResult:
    """Do what the comparison in RUN/gate.json, and a person where one was asked, have decided about a version.

    :raises MlflowAway: as in `gate`.
    """
    ownership.check(tracked.run_dir)
    with _how_to_go_on(tracked, f"{uri} is compared but not promoted"):
        return without_answers(decide(tracked, uri, answer))


@contextlib.contextmanager
def _how_to_go_on(tracked: TrackedRun, where: str) -> Iterator[None]:
    try:
        yield
    except MlflowAway as error:
        raise MlflowAway(
            f"{where}: {error}; when it is back, go on with --resume --run_name {tracked.run_dir.name}"
        ) from error


def compare(tracked: TrackedRun, settings: PandaSettings, model: Registered) -> GateResult:
    """Compare and write down; a comparison that is there already and still holds is not made again."""
    registry = Registry(tracked.uri)
    version = patiently(lambda: registry.resolve(model["uri"]))
    before = patiently(lambda: standing(registry, version, tracked.run_dir))
    if before:
        return before
    limits = GateSettings.of(settings).model_dump()
    write_job(patiently(lambda: job_of(registry, version, tracked.run_dir, limits)), tracked.run_dir)
    result: GateResult = {"candidate": version.uri, **_compare(tracked.run_dir, TrainSettings.of(settings))}
    if result["promoted"] and settings.require_approval:
        result["approval"] = {"answer": approval.WAITING, "comment": ""}
        patiently(lambda: wait_for_approval(registry, version, result))
        show_gate(result)
    run_files.write_json(tracked.run_dir / run_files.GATE, result)
    return result


def standing(registry: Registry, version: Version, run_dir: Path) -> GateResult | None:
    """The comparison of an earlier execution of this run: settled, waiting for a person, or killed while settling.

    One that is not settled holds as long as the champion is the one it was compared with.
    """
    path = run_dir / run_files.GATE
    if not path.exists():
        return None
    stored: GateResult = run_files.read_json(path)
    if GATE_TAG in version.tags:
        return {**stored, "settled": True}
    champion = registry.champion(version.name)
    same = stored.get("candidate") == version.uri and stored.get("champion") == (champion.uri if champion else None)
    moved = champion is not None and champion.version == version.version and stored["promoted"]
    return stored if moved or (same and "approval" in stored) else None


def decide(tracked: TrackedRun, uri: str, answer: Answered | None) -> GateResult:
    """Settle what was compared."""
    registry = Registry(tracked.uri)
    version = patiently(lambda: registry.resolve(uri))
    result: GateResult = run_files.read_json(tracked.run_dir / run_files.GATE)
    patiently(lambda: settle(registry, version, result, answer))
    logger.info("%s %s", version.uri, verdict_in_words(result))
    run_files.write_json(tracked.run_dir / run_files.GATE, result)
    show_gate(result)
    return result


def without_answers(result: GateResult) -> GateResult:
    """The result as the summary holds it; the models' answers stay in RUN/gate.json."""
    kept = result.copy()
    kept.pop("answers", None)
    kept.pop("asked", None)
    return kept


def _compare(run_dir: Path, settings: TrainSettings) -> GateResult:
    report = launcher.use(COMPARE, run_dir, settings, logger.info)
    if report.reason is ExitReason.completed:
        return run_files.read_json(run_dir / run_files.GATE)
    if report.reason is ExitReason.cancelled:
        raise KeyboardInterrupt
    logger.error("%s", report.details)
    reason = f"the comparison ended: {report.reason.value}: {report.message}"
    return {"promoted": False, "reasons": [reason], "slices": [], "checks": []}
