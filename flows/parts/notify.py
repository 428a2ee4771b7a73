"""Tell people: through the Prefect notification block that the setting `notify` names.

In: a flow run and its state, or a subject and text. Out: a message (webhook, Slack, mail, ...). A receiver that is down
is a warning in the log of the run, one that is slow is waited for `PATIENCE_SECONDS`; neither fails a run. Hooks run
where the flow cannot: in a process of the worker when the flow's is gone. All they know is the parameters of the run,
so they compose the configuration again; where that is what was wrong, they take the values as they stand.
Of a run that is lost with its worker no process is left to tell: the Prefect server does, by an automation of the
deployment that the run makes when it begins. Cost: one request; 0.4 s of composing in a hook.
"""

import logging
import re
import threading
from contextvars import copy_context
from typing import Any
from uuid import UUID

from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.logging.loggers import flow_run_logger
from prefect.runtime import deployment
from prefect.runtime import flow_run as this_run
from prefect.utilities.urls import url_for
from pydantic import ValidationError

from configs.load import given_value
from configs.settings import UnattendedSettings
from data_prep.errors import PandaError
from flows.parts import policy
from flows.parts.form import read
from flows.parts.permission import check_parameters
from flows.stack.deployments import ensure_automation
from training.tracking.redact import redact_text, what_it_says

PATIENCE_SECONDS = 10.0
OURS = ("notify", "notify_after_skips", "notify_after_days", "max_restarts")
SILENT = "No heartbeat for"  # how the message of such a state begins
_ADDRESS = re.compile(r"(https?://)(?:[^\s/'\"]*@)?([^\s/'\"]+)[^\s'\"]*")

logger = logging.getLogger(__name__)
Log = logging.Logger | logging.LoggerAdapter


def on_bad_end(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:
    """Flow hook: failed, crashed, cancelled."""
    log = flow_run_logger(flow_run, flow)
    try:
        block = who_is_told(flow_run.parameters or {}, log).notify
        if block:
            ended = "Cancelled" if state.is_cancelling() else state.name
            text = f"{state.message or ended}\n\n{url_for('flow-run', obj_id=flow_run.id) or flow_run.id}"
            tell(block, f"{flow.name} {_title(flow_run)}: {ended}", text, log)
    except Exception as error:
        log.warning("nobody was told: %s", what_it_says(error))


def on_early_end(parameters: dict[str, Any], name: str, message: str) -> None:
    """The flow says that it ended before its last stage: as nobody approved, or as the n-th skipped run in a row."""
    try:
        if name == "NotApproved":
            _tell_of(parameters, f"{this_run.flow_name} {this_run.name}: {name}", message)
        elif name in policy.SKIPPED and policy.is_scheduled():
            _tell_of_skips(parameters, message)
    except Exception as error:
        logger.warning("nobody was told: %s", what_it_says(error))


def _tell_of(parameters: dict[str, Any], subject: str, message: str) -> None:
    block = who_is_told(parameters, logger).notify
    if block:
        tell(block, subject, f"{message}\n\n{this_run.ui_url}")


def _tell_of_skips(parameters: dict[str, Any], message: str) -> None:
    people = who_is_told(parameters, logger)
    if not people.notify:
        return
    num = policy.skips_in_a_row()
    if num % people.notify_after_skips == 0:
        runs = "scheduled run was" if num == 1 else "scheduled runs in a row were"
        subject = f"{this_run.flow_name}: {num} {runs} skipped"
        tell(people.notify, subject, f"the last one, {this_run.name}: {message}\n\n{this_run.ui_url}")


def who_is_told(parameters: dict[str, Any], log: Log) -> UnattendedSettings:
    """`notify` and what belongs to it, wherever it was set: parameter, override, the user's YAML, the run gone on with.

    Of a configuration that is wrong as a whole, the values that can be read.
    """
    try:
        return UnattendedSettings.of(read(parameters, goes_on=True).settings)
    except PandaError:
        return _as_far_as_it_goes(parameters, log)


def _as_far_as_it_goes(parameters: dict[str, Any], log: Log) -> UnattendedSettings:
    found: dict[str, Any] = {}
    try:
        check_parameters({name: value for name, value in parameters.items() if value is not None})
    except PandaError:  # what such parameters name is not read
        parameters = {name: value for name, value in parameters.items() if name in OURS}
    for name in OURS:
        try:
            value = given_value(name, parameters, parameters.get("overrides"), parameters.get("conf_path"))
            if value is not None:
                found |= UnattendedSettings(**{name: value}).model_dump(include={name})
        except (PandaError, ValidationError) as error:
            log.warning("whom to tell cannot be read: %s", what_it_says(error))
    return UnattendedSettings(**found)


def _title(flow_run: FlowRun) -> str:
    """Its name now: a worker has read it before the run gave itself one."""
    with get_client(sync_client=True) as client:
        return client.read_flow_run(flow_run.id).name


def tell(block: str, subject: str, body: str, log: Log = logger) -> None:
    """Send one message, without passwords of addresses in it."""
    message = (block, redact_text(subject), redact_text(body), log)
    sending = threading.Thread(target=copy_context().run, args=(_send, *message), daemon=True)
    sending.start()
    sending.join(PATIENCE_SECONDS)
    if sending.is_alive():
        log.warning("notify=%r: no answer for %.0f s; the run goes on", block, PATIENCE_SECONDS)


def _send(block: str, subject: str, body: str, log: Log) -> None:
    try:
        import prefect.blocks.notifications  # noqa: F401  # half a second, and Block.load has to know their types

        Block.load(block, _sync=True).notify(body, subject=subject)  # type: ignore[call-arg, union-attr]  # Block.load may be async
    except Exception as error:
        log.warning("notify=%r: %r was not told: %s: %s", block, subject, type(error).__name__, without_paths(error))
    else:
        log.info("notify=%r: told %r", block, subject)


def without_paths(error: Exception) -> str:
    """What an error says; of addresses only the host, for the rest of a webhook's address is its password."""
    return _ADDRESS.sub(r"\1\2/***", what_it_says(error))


def tell_of_lost(block: str | None) -> None:
    """The deployment's automation, as this run wants it; a run of the command line has none."""
    if deployment.id is None:
        return
    name = f"panda: lost runs of {this_run.flow_name}/{deployment.name} are told"
    try:
        with get_client(sync_client=True) as client:
            if block:
                ensure_automation(client, _automation(name, block))
            else:
                for automation in client.read_automations_by_name(name):
                    client.delete_automation(automation.id)
    except Exception as error:
        logger.warning("nobody will be told if this run is lost with its worker: %s", without_paths(error))


def _automation(name: str, block: str) -> AutomationCore:
    import prefect.blocks.notifications  # noqa: F401  # Block.load has to know their types

    document: UUID = Block.load(block, _sync=True)._block_document_id  # type: ignore[call-arg, union-attr, assignment]  # may be async
    return AutomationCore(
        name=name,
        description=f"Tells {block} of runs whose process and worker are gone.",
        trigger=EventTrigger(
            expect={"prefect.flow-run.Crashed"},
            match={"prefect.resource.id": "prefect.flow-run.*", "prefect.state-message": f"{SILENT}*"},
            match_related={
                "prefect.resource.role": "deployment",
                "prefect.resource.id": f"prefect.deployment.{deployment.id}",
            },
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[
            SendNotification(
                block_document_id=document,
                subject="{{ flow.name }} {{ flow_run.name }}: Crashed",
                body="{{ flow_run.state.message }}\n\n{{ flow_run|ui_url }}",
            )
        ],
    )
