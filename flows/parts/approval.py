"""A person decides whether a version that has passed the gate becomes the champion: the run waits in the Prefect UI.

In: settings, the tracked run, the verdict. Out: the answer for `promote`, None where nobody is asked. The run stays
alive while it waits (state Paused): a sleeping process, no GPU, for training is over. Killed, it is gone on with: an
answer that was given holds, in whatever flow run; else it is asked again, in the new one. Cost: a request each 5 s.
"""

import logging
from dataclasses import replace
from typing import Annotated, Any
from uuid import UUID, uuid4

from prefect.client.orchestration import get_client
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.input.actions import read_flow_run_input
from prefect.input.run_input import keyset_from_base_key
from prefect.runtime import flow_run
from prefect.states import Running
from prefect.utilities.engine import propose_state_sync
from prefect.utilities.timeout import timeout
from pydantic import Field, WithJsonSchema

from configs.settings import PandaSettings
from flows.parts.notify import tell
from tasks.reporting import addresses
from training.comparison import approval
from training.comparison.approval import APPROVED, NO_ANSWER, REFUSED, WAITING, Approval
from training.comparison.job import Answered, GateResult
from training.run_files import Losses
from training.tracking.run import TrackedRun

POLL_SECONDS = 5
MARGIN_SECONDS = 600  # the server fails a run whose pause is over; before that we end it ourselves, as NotApproved

logger = logging.getLogger(__name__)


class Decision(RunInput):
    """The form behind the Resume button. `approve` has no default: resuming without an answer is refused."""

    # A list to choose from: a switch would stand at "no" before anybody has touched it.
    approve: Annotated[bool, WithJsonSchema({"enum": [True, False]})] = Field(
        description="true: the version becomes the champion. false: it stays challenger."
    )
    comment: str = Field("", description="Kept with the version, whatever the answer is.")


def ask(settings: PandaSettings, tracked: TrackedRun, verdict: GateResult, losses: Losses) -> Answered | None:
    """Wait for the answer, if the gate says that there is something to decide."""
    waits = not verdict.get("settled") and "approval" in verdict and verdict["approval"]["answer"] == WAITING
    if not (settings.require_approval and waits):
        return None
    asked = approval.read(tracked.run_dir, verdict)
    answered = asked and _answer_to(asked)
    if answered:
        logger.info("%s was decided before: %s", verdict["candidate"], approval.in_words(answered.as_verdict))
    else:
        answered = _ask(settings, tracked, verdict, losses)
    approval.write(tracked.run_dir, answered)
    return answered.as_verdict


def _ask(settings: PandaSettings, tracked: TrackedRun, verdict: GateResult, losses: Losses) -> Approval:
    version = verdict["candidate"]
    where = {"Prefect run": str(flow_run.ui_url or flow_run.id), **addresses(tracked, version)}
    text = approval.question(verdict, losses, where)
    asked = Approval(version, verdict.get("champion"), str(flow_run.id), uuid4().hex)
    approval.write(tracked.run_dir, asked)
    hours = f"{settings.approval_timeout_hours:g} h"
    logger.info("%s waits for approval, for %s: %s", version, hours, where["Prefect run"])
    if settings.notify:
        tell(settings.notify, f"{version} waits for approval", f"{text}\n\nWithout an answer in {hours}: no.")
    answered = _wait(asked, text, settings.approval_timeout_hours * 3600)
    if answered.answer == NO_ANSWER:
        answered = replace(answered, comment=f"in {hours}")
    logger.info("%s: %s", version, approval.in_words(answered.as_verdict))
    return answered


def _wait(asked: Approval, text: str, seconds: float) -> Approval:
    """The answer, or that there was none in time."""
    form = Decision.with_initial_data(description=text)
    try:
        with timeout(seconds):
            given = pause_flow_run(
                wait_for_input=form, timeout=round(seconds) + MARGIN_SECONDS, poll_interval=POLL_SECONDS, key=asked.key
            )
    except TimeoutError:
        with get_client(sync_client=True) as client:  # the version is settled by a run that runs
            propose_state_sync(client, Running(), flow_run_id=UUID(str(flow_run.id)))
        return _answer_to(asked) or replace(asked, answer=NO_ANSWER)
    return _answered(asked, given.approve, given.comment)


def _answer_to(asked: Approval) -> Approval | None:
    """What was answered: known to the run, or to the server where the run was killed before it heard of it."""
    if asked.answer != WAITING:
        return asked
    response = keyset_from_base_key(f"paused-{asked.key}")["response"]
    given: Any = read_flow_run_input(response, flow_run_id=UUID(asked.flow_run_id))
    return _answered(asked, given["approve"], given.get("comment", "")) if given else None


def _answered(asked: Approval, approve: bool, comment: str) -> Approval:
    return replace(asked, answer=APPROVED if approve else REFUSED, comment=comment)
