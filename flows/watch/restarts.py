"""Deployed runs that crashed are started again: the same flow run, with its parameters, from its newest checkpoint.

In: a client of the Prefect server. Out: states. A crash is what Prefect's retries do not cover: process, worker or
machine lost. How often is the setting `max_restarts` of the run; the history of its states is the count and keeps every
reason, and the last crash of too many ends as `CrashedTooOften`. Which directory a run goes on with, RUN/owner.json
says. A run declared dead because the server was away, whose process lives here, is running again: nothing is lost. One
that was being cancelled is cancelled, also where the worker has not heard of it, and where nobody worked on it at the
time. Task runs that nobody works on any more end with their run. Cost: three requests a look, two more and a composed
configuration a crash.
"""

import logging
import signal
from datetime import timedelta
from typing import Any
from uuid import UUID

import psutil
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events.filters import EventFilter
from prefect.states import Cancelled, Crashed, Failed, Running, Scheduled
from prefect.types._datetime import now
from prefect.utilities.urls import url_for

from configs.settings import UnattendedSettings
from flows.parts.notify import SILENT, tell, who_is_told
from flows.stack.prefect_server import environment
from flows.stack.services import HEARTBEAT
from training.launch.processes import is_alive, marked, signal_all

FLOWS = ("panda-train", "panda-prepare", "panda-evaluate")
RESTARTING, GAVE_UP = "AwaitingRestart", "CrashedTooOften"
RUN_ID = "PREFECT__FLOW_RUN_ID"
REMEMBERED = timedelta(days=7)  # an older crash is no longer anybody's business
PAUSES = (5, 30, 120, 600)  # seconds before each restart, the last one for all further ones
UNHEARD = timedelta(seconds=90)  # a worker has killed what it is to cancel after 30, and a heart beats every 30
SETTLED = timedelta(seconds=60)  # after its end, news of a run's tasks may still be on their way
TAKES_OVER = {StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.COMPLETED, StateType.FAILED,
              StateType.CRASHED}  # fmt: skip

logger = logging.getLogger(__name__)


def look(client: SyncPrefectClient, asked: set[UUID]) -> None:
    """Start again what has crashed, and end what has ended. `asked`: the runs that `end_cancelled` has asked to end."""
    for run in crashed(client):
        heal(client, run)
    for run in being_cancelled(client):
        end_cancelled(client, run, asked)
    end_tasks_of_ended_runs(client)


def crashed(client: SyncPrefectClient) -> list[FlowRun]:
    """Our deployed runs that have crashed, and whose crash is not too old."""
    wanted = FlowRunFilter.model_validate({
        "deployment_id": {"is_null_": False},
        "state": {"type": {"any_": [StateType.CRASHED]}},
        "end_time": {"after_": now("UTC") - REMEMBERED},
    })  # fmt: skip
    return client.read_flow_runs(
        flow_filter=FlowFilter.model_validate({"name": {"any_": list(FLOWS)}}),
        flow_run_filter=wanted,
        sort=FlowRunSort.START_TIME_DESC,
    )


def being_cancelled(client: SyncPrefectClient) -> list[FlowRun]:
    """Our deployed runs that somebody wants to end."""
    wanted = FlowRunFilter.model_validate({
        "deployment_id": {"is_null_": False},
        "state": {"type": {"any_": [StateType.CANCELLING]}},
    })  # fmt: skip
    return client.read_flow_runs(
        flow_filter=FlowFilter.model_validate({"name": {"any_": list(FLOWS)}}), flow_run_filter=wanted
    )


def end_cancelled(client: SyncPrefectClient, run: FlowRun, asked: set[UUID]) -> None:
    """A worker hears of a cancellation once, and not at all when its connection is down in that moment.

    Then the process of the flow, if it is here, is asked as the worker would ask it; later it is killed. Of a run that
    waits for its restart, or begins it, a worker does not say that it is cancelled: it has started once.
    """
    assert run.state, "it was found by its state"
    silent = now("UTC") - run.state.timestamp
    if silent < UNHEARD or (run.id in asked and silent < 2 * UNHEARD):
        return
    processes = [process for process in marked(RUN_ID, str(run.id)) if is_alive(process.pid)]
    for process in filter(_is_engine, processes):
        signal_all([process.pid], signal.SIGKILL if run.id in asked else signal.SIGTERM)
        logger.warning("%s: cancelled %.0f s ago, and still there: ending it", run.name, silent.total_seconds())
    asked.add(run.id)
    if not processes and not is_heard_of(client, run):
        message = f"cancelled; nobody has worked on it for {UNHEARD.total_seconds():.0f} s"
        client.set_flow_run_state(run.id, Cancelled(message=message), force=True)
        logger.info("%s: %s", run.name, message)


def is_heard_of(client: SyncPrefectClient, run: FlowRun) -> bool:
    """Whether it has shown, in the last time, that it lives: it may be on another machine."""
    wanted = EventFilter.model_validate({
        "occurred": {"since": now("UTC") - UNHEARD},
        "event": {"name": [HEARTBEAT]},
        "resource": {"id": [f"prefect.flow-run.{run.id}"]},
    })  # fmt: skip
    return bool(client.read_events(wanted, limit=1).events)


def heal(client: SyncPrefectClient, run: FlowRun) -> None:
    """What is to be done about one crash; nothing as long as processes of it live."""
    assert run.state, "it was found by its state"
    processes = [process for process in marked(RUN_ID, str(run.id)) if is_alive(process.pid)]
    if processes:
        if was_only_silent(run.state, processes):
            message = "it had been alive all the time, but the server did not hear of it"
            client.set_flow_run_state(run.id, Running(message=message), force=True)
            logger.info("%s: %s", run.name, message)
        return
    states = sorted(client.read_flow_run_states(run.id), key=lambda state: state.timestamp)
    if was_being_cancelled(states):
        message = f"cancelled; it did not end by itself in time: {run.state.message}"
        client.set_flow_run_state(run.id, Cancelled(message=message), force=True)
        logger.info("%s: %s", run.name, message)
        return
    settings = unattended(run.parameters or {}, str(run.id))
    limit = settings.max_restarts
    if not limit or is_taken_over(client, run):
        return
    done = sum(state.name == RESTARTING for state in states)
    if done >= limit:
        message = f"it has crashed {done + 1} times; max_restarts is {limit}. The last time: {run.state.message}"
        client.set_flow_run_state(run.id, Failed(name=GAVE_UP, message=message), force=True)
        if settings.notify:
            tell(settings.notify, f"{run.name}: {GAVE_UP}", f"{message}\n\n{url_for('flow-run', obj_id=run.id)}")
    else:
        pause = PAUSES[min(done, len(PAUSES) - 1)]
        message = f"restart {done + 1} of {limit} after a crash: {run.state.message}"
        due = now("UTC") + timedelta(seconds=pause)
        client.set_flow_run_state(run.id, Scheduled(scheduled_time=due, name=RESTARTING, message=message))
    logger.info("%s: %s", run.name, message)


def was_being_cancelled(states: list[State[Any]]) -> bool:
    """Whether a person had asked for the end before it came: Prefect kills what takes longer, and calls it a crash."""
    before = [state.type for state in states if state.type is not StateType.CRASHED]
    return bool(before) and before[-1] is StateType.CANCELLING


def was_only_silent(state: State[Any], processes: list[psutil.Process]) -> bool:
    """Whether the server has judged by silence alone, and the process of the flow goes on (ending takes 30 s)."""
    engines = [process for process in processes if _is_engine(process)]
    by_silence = (state.message or "").startswith(SILENT)
    return bool(engines) and by_silence and now("UTC") - state.timestamp > timedelta(seconds=30)


def _is_engine(process: psutil.Process) -> bool:
    try:
        return any("prefect" in word and "engine" in word for word in process.cmdline())
    except psutil.Error:
        return False


def unattended(parameters: dict[str, Any], run_id: str) -> UnattendedSettings:
    """What is set for a run with these parameters, read as those of a run that a server asks for."""
    with environment({RUN_ID: run_id}):
        return who_is_told(parameters, logger)


def is_taken_over(client: SyncPrefectClient, run: FlowRun) -> bool:
    """Whether a later run of the deployment does the same work; that one goes on with the directory."""
    if run.start_time is None:
        return False
    later = FlowRunFilter.model_validate({
        "deployment_id": {"any_": [run.deployment_id]},
        "start_time": {"after_": run.start_time},
        "state": {"type": {"any_": list(TAKES_OVER)}},
    })  # fmt: skip
    found = client.read_flow_runs(flow_run_filter=later)
    return any(other.id != run.id and other.parameters == run.parameters for other in found)


def end_tasks_of_ended_runs(client: SyncPrefectClient) -> None:
    """Nobody works any more on tasks that are `Running` or `Retrying` in a run that has ended."""
    ended = FlowRunFilter.model_validate({
        "deployment_id": {"is_null_": False},
        "state": {"type": {"any_": list(TERMINAL_STATES)}},
        "end_time": {"before_": now("UTC") - SETTLED, "after_": now("UTC") - REMEMBERED},
    })  # fmt: skip
    open_states = [StateType.PENDING, StateType.RUNNING, StateType.SCHEDULED]
    tasks = client.read_task_runs(
        flow_filter=FlowFilter.model_validate({"name": {"any_": list(FLOWS)}}),
        flow_run_filter=ended,
        task_run_filter=TaskRunFilter.model_validate({"state": {"type": {"any_": open_states}}}),
    )
    for task in tasks:
        client.set_task_run_state(task.id, Crashed(message="its run has ended"), force=True)
