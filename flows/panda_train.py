"""The flow `panda-train`: validate and shard -> tokenize -> plan packing -> train -> evaluate -> register -> gate.

In: the configuration as parameters (all optional; the YAML files give the rest). Out: the summary of the run, which is
also RUN/summary.json. The flow is order and meaning of failures; every stage is a task of its own, skips itself when
its work is there, and can be read in `tasks/`. No `from __future__ import annotations` here: `flow.serve` fails on it.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State
from prefect.runtime import deployment, flow_run
from prefect.states import Cancelled

from configs.settings import PandaSettings
from data_prep import in_use
from data_prep.errors import CorpusError, PandaError, disk_errors
from flows.parts import approval, flow_states, overview, policy, run_dir
from flows.parts.champion import champion_if_there, champion_of, registry_of, with_replay
from flows.parts.flow_states import EarlyExit
from flows.parts.form import add_result, configure, flow_of_settings, run_title
from flows.parts.lifetime import begin
from flows.parts.notify import on_bad_end, on_early_end, tell, tell_of_lost
from flows.parts.run_dir import AFTER_DATA, RunDir, Summary
from flows.parts.stages import Prepared, prepare_data, prepared_before, run_metadata, until, version_tags
from flows.report import page
from tasks import assets, spikes
from tasks.account import Stopwatch
from tasks.alarm import look_at_corpus
from tasks.gate import gate, promote
from tasks.register import model_name, register_model, sample_prompt
from tasks.reporting import alarm_in_words, alarm_markdown, show_links, spikes_markdown
from tasks.train import evaluate, evaluated_before, train, trained_before
from training import run_files
from training.comparison.approval import APPROVED, NO_ANSWER, REFUSED, in_words
from training.cost.account import settle
from training.launch import ownership
from training.registry.lineage import parent_of
from training.registry.register import with_retries
from training.registry.versions import Registry
from training.run_files import CorpusAlarm, Registered
from training.settings import CostSettings, TrackingSettings, TrainSettings
from training.tracking import run as tracking
from training.tracking.looks import only_a_look
from training.tracking.run import TrackedRun
from training.tracking.tags import PARENT_TAG, STOPPED_TAG

logger = logging.getLogger(__name__)


def panda_train(**parameters: Any) -> State[Any]:
    """Replaced below: the form and the reference are made from the settings classes."""
    begin()
    try:
        late = policy.came_too_late()
        if late:
            on_early_end(parameters, "SkippedStillRunning", late)
            return Cancelled(name="SkippedStillRunning", message=late)
        settings = configure(parameters).settings
        tell_of_lost(settings.notify)
        with disk_errors():
            return finished(run_stages(settings))
    except EarlyExit as early:
        if "gate" not in early.summary:
            overview.show(early.summary)
        on_early_end(parameters, early.name, str(early))
        return finished(early.summary)
    except flow_states.ERRORS as error:
        return flow_states.ended_by(error)


def finished(summary: Summary) -> State[Any]:
    """The final state; the run's name says what came of it."""
    add_result(summary)
    return flow_states.completed(summary)


def run_stages(settings: PandaSettings) -> Summary:
    """All stages in order; returns the summary."""
    watch = Stopwatch()
    done = run_dir.finished_by(of_deployment(), settings)
    if done:
        return done
    with contextlib.ExitStack() as in_cache:  # until config.yaml says what of the cache this run needs
        in_cache.enter_context(in_use.using(Path(settings.cache_dir)))
        return _in_run_dir(settings, watch, in_cache)


def _in_run_dir(settings: PandaSettings, watch: Stopwatch, in_cache: contextlib.ExitStack) -> Summary:
    """The data, then a directory for the run, then the stages that need one."""
    if settings.from_stage in AFTER_DATA:
        run = run_dir.create(settings.model_copy(update={"resume": True}))
        prepared, resume, is_new = prepared_before(run), True, False
    else:
        settings = with_replay(settings)
        prepared = prepare_data(settings, watch)
        until(settings, "plan", {"data": prepared.plan.report, "seconds": watch.seconds})
        interrupted = interrupted_run(settings, prepared)
        skip = None if interrupted else policy.nothing_new(settings, prepared)
        if skip:
            raise EarlyExit("SkippedNoNewData", skip, {"data": prepared.plan.report, "seconds": watch.seconds})
        run, resume, is_new = interrupted or run_dir.create(settings), bool(settings.resume or interrupted), True
    is_restart = run_dir.is_of(run, of_deployment())
    with ownership.owning(run.path, of_deployment()), watch.writing_in(run.path, is_restart):
        if is_new:
            run_dir.write_config(run, settings, {"run_dir": run.path, **prepared.paths})
        in_cache.close()
        return train_in(run, settings, prepared, resume, watch)


def train_in(run: RunDir, settings: PandaSettings, prepared: Prepared, resume: bool, watch: Stopwatch) -> Summary:
    """The stages that need a run directory, which says in the end what became of them."""
    try:
        alarm = watch_corpus(settings, run, prepared)
        summary = flow_states.with_outcome(train_and_register(settings, run, prepared, resume, watch, alarm))
    except EarlyExit as early:
        if early.name == "NotApproved":  # decided: no other run is to go on with it
            run_dir.write_summary(run, early.summary)
        raise
    except PandaError as error:
        run_dir.write_outcome(run, flow_states.reason_of(error), str(error))
        raise
    run_dir.write_summary(run, summary)
    num_new = spikes.put_into_quarantine(run.path, settings.quarantine)
    if num_new:
        logger.warning("%s: %d records more, which the next preparation leaves out", settings.quarantine, num_new)
    return summary


def watch_corpus(settings: PandaSettings, run: RunDir, prepared: Prepared) -> CorpusAlarm | None:
    """Compare the corpus with the champion's, and do as `corpus_alarm` says; a version that is there needs no alarm.

    :raises CorpusError: `corpus_alarm=stop`, and it has changed.
    """
    if settings.corpus_alarm == "off" or not starts_by(settings, "train"):
        return None
    was_told = (run.path / run_files.CORPUS_ALARM).exists()  # by an execution of this run that was killed
    plan_dir = Path(prepared.plan.path)
    if settings.corpus_alarm == "warn":  # what it costs when it fails, or MLflow is away, is the warning
        alarm = None
        with only_a_look("the corpus alarm"):
            alarm = look_at_corpus(run.path, plan_dir, registry_of(settings), champion_if_there(settings))
    else:
        alarm = look_at_corpus(run.path, plan_dir, registry_of(settings), champion_of(settings))
    if not alarm or not alarm["findings"]:
        return alarm
    subject = f"{run.name}: the corpus has changed since {alarm['compared_with']}"
    found = f"{subject}: {alarm_in_words(alarm)}"
    logger.warning("%s; lines to look at: %s", found, run.path / run_files.CORPUS_ALARM)
    if settings.corpus_alarm == "stop":
        again = f"--resume --run_name {run.name} --corpus_alarm warn"
        raise CorpusError(f"corpus_alarm=stop: {found}; to train on it nevertheless: {again}")
    if settings.corpus_alarm == "approve":
        answer = approval.ask_about_corpus(settings, run.path, alarm)
        if answer["answer"] != APPROVED:
            summary: Summary = {"run_dir": str(run.path), "data": prepared.plan.report, "corpus_alarm": alarm}
            raise EarlyExit("NotApproved", f"{found}; {in_words(answer)}", summary)
    elif settings.notify and not was_told:
        tell(settings.notify, subject, f"{alarm_markdown(alarm)}\n{flow_run.ui_url}")
    return alarm


def interrupted_run(settings: PandaSettings, prepared: Prepared) -> RunDir | None:
    """What a deployment goes on with by itself, also when its version is registered and only the gate is missing."""
    again = run_dir.started_again(of_deployment(), settings, Path(prepared.plan.path))
    if again:
        return again
    unattended = deployment.id is not None and not settings.run_name
    return run_dir.unfinished(settings, Path(prepared.plan.path)) if unattended else None


def of_deployment() -> str:
    """The id of a run that may be started again; empty for one of the command line."""
    return str(flow_run.id) if deployment.id else ""


def train_and_register(  # noqa: PLR0913, PLR0917  # what the stages before it have left
    settings: PandaSettings,
    run: RunDir,
    prepared: Prepared,
    resume: bool,
    watch: Stopwatch,
    alarm: CorpusAlarm | None,
) -> Summary:
    """The stages that need a run directory, in one MLflow run."""
    summary: Summary = {"run_dir": str(run.path), "prefect_flow_run_id": str(flow_run.id)}
    summary |= {"data": prepared.plan.report}
    summary |= {"corpus_alarm": alarm} if alarm else {}
    known = run_metadata(settings, prepared.corpus, prepared.plan)
    links: dict[str, str] = {}
    tracked_run = tracking.open_run(TrackingSettings.of(settings), run.path, known)
    cost = CostSettings.of(settings)
    with tracked_run as tracked, page.written(run.path, summary, links), accounted(run.path, cost, summary):
        with watch("train"):
            if starts_by(settings, "train"):
                trained = train(run.path, TrainSettings.of(settings), resume, settings.metrics_port)
            else:
                trained = trained_before(run.path)
        summary |= {"mlflow_run_id": tracked.run_id, "training": trained, "seconds": watch.seconds}
        found, others = spikes.show(run.path)
        summary |= {"spikes": found, "standing_out": others}
        if stopped := trained.get("stopped"):
            known.tags[STOPPED_TAG] = stopped
            tracked.tag({STOPPED_TAG: stopped})
        until(settings, "train", summary)
        with watch("evaluate"):
            if starts_by(settings, "evaluate"):
                losses = evaluate(run.path, TrainSettings.of(settings), trained)
            else:
                losses = evaluated_before(run.path, trained)
        summary |= {"losses": losses}
        until(settings, "evaluate", summary)
        with watch("register"):
            version = register(settings, tracked, prepared, version_tags(known, losses))
        summary |= {"model": version, "mlflow_run_id": tracked.run_id}
        links |= show_links(run.path, tracked, version) or {}
        until(settings, "register", summary)
        with watch("gate"):
            verdict = gate(tracked, settings, version)
        answer = approval.ask(settings, tracked, verdict, losses)
        if not verdict.pop("settled", False):
            with watch("promote"):
                verdict = promote(tracked, version["uri"], answer)
        summary |= {"gate": verdict}
        add_account(run.path, cost, summary)
        overview.show(summary, links)
        overview.tell_mlflow(tracked, summary, links)
    become = "is the champion now" if verdict["promoted"] else "stays challenger"
    subject, reasons = f"{version['name']} version {version['version']} {become}", "\n".join(verdict["reasons"])
    if "approval" in verdict and verdict["approval"]["answer"] in (REFUSED, NO_ANSWER):
        raise EarlyExit("NotApproved", f"{subject}: {verdict['reasons'][0]}; {run.path}", summary)
    if settings.notify:
        also = f"\n\nSpikes in training:\n\n{spikes_markdown(found, [])}" if found else ""
        tell(settings.notify, subject, f"{reasons}{also}\n\n{flow_run.ui_url}")
    return summary


@contextlib.contextmanager
def accounted(run_dir: Path, cost: CostSettings, summary: Summary) -> Iterator[None]:
    """At the end of the block, however it ends, the summary has the account."""
    try:
        yield
    finally:
        if "account" not in summary:
            add_account(run_dir, cost, summary)


@only_a_look("the account of time")
def add_account(run_dir: Path, cost: CostSettings, summary: Summary) -> None:
    """Where the time has gone until now."""
    summary["account"] = settle(run_dir, cost)


def starts_by(settings: PandaSettings, stage: str) -> bool:
    """Whether `from_stage` asks for this stage or an earlier one; without it, everything runs."""
    start = settings.from_stage
    return start not in AFTER_DATA or AFTER_DATA.index(start) <= AFTER_DATA.index(stage)


def register(settings: PandaSettings, tracked: TrackedRun, prepared: Prepared, tags: dict[str, str]) -> Registered:
    """The register stage, with a prompt of the held-out records to try the model on."""
    start = str(prepared.model_dir) if prepared.model_dir else None
    parent = with_retries(lambda: parent_of(Registry(tracked.uri), start))
    tags |= {PARENT_TAG: parent} if parent else {}
    prompt = sample_prompt(Path(prepared.plan.path), prepared.tokenizer_dir, Path(settings.cache_dir))
    version = register_model(tracked, model_name(settings.registered_model_name, settings.model), tags, prompt)
    assets.version_registered(version, prepared.plan)
    return version


panda_train = flow_of_settings(
    panda_train,
    name="panda-train",
    flow_run_name=run_title,
    persist_result=False,
    on_failure=[on_bad_end],
    on_crashed=[on_bad_end],
    on_cancellation=[on_bad_end],
)
