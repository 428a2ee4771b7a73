"""A person decides: whether a version that has passed the gate becomes the champion, whether a corpus is trained on.

In: settings, and what there is to decide about. Out: the answer, None where nobody is asked. The run waits in the
Prefect UI, and stays alive while it does (state Paused): a sleeping process, no GPU, for training is over or has not
begun. Killed, it is gone on with: an answer that was given holds, in whatever flow run; else it is asked again, in the
new one. Cost: a request each 5 s.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
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
from tasks.reporting import addresses, alarm_markdown
from training import run_files
from training.comparison import approval
from training.comparison.approval import APPROVED, NO_ANSWER, REFUSED, WAITING, Approval
from training.comparison.job import Answered, GateResult
from training.cost import marks
from training.run_files import CorpusAlarm, Losses
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


class CorpusDecision(RunInput):
    """The same about a corpus that has changed."""

    approve: Annotated[bool, WithJsonSchema({"enum": [True, False]})] = Field(
        description="true: the run trains on this corpus. false: it ends."
    )
    comment: str = Field("", description="Kept with the run, whatever the answer is.")


def ask(settings: PandaSettings, tracked: TrackedRun, verdict: GateResult, losses: Losses) -> Answered | None:
    """Wait for the answer, if the gate says that there is something to decide."""
    waits = not verdict.get("settled") and "approval" in verdict and verdict["approval"]["answer"] == WAITING
    if not (settings.require_approval and waits):
        return None
    version, champion = verdict["candidate"], verdict.get("champion")
    where = {"Prefect run": _address(), **addresses(tracked, version)}
    question = _Question(version, approval.question(verdict, losses, where), Decision)
    return _decided(settings, question, tracked.run_dir / run_files.APPROVAL, champion)


def ask_about_corpus(settings: PandaSettings, run_dir: Path, alarm: CorpusAlarm) -> Answered:
    """Wait for the answer whether this corpus is trained on."""
    text = f"Train {run_dir.name} on this corpus?\n\n{alarm_markdown(alarm)}\nPrefect run: {_address()}"
    question = _Question(f"the corpus of {run_dir.name}", text, CorpusDecision)
    return _decided(settings, question, run_dir / run_files.CORPUS_APPROVAL, alarm["compared_with"])


@dataclass(frozen=True)
class _Question:
    about: str
    text: str
    form: type[RunInput]


def _decided(settings: PandaSettings, question: _Question, path: Path, champion: str | None) -> Answered:
    """The answer that was given before, also to a run that was killed; else a person is asked."""
    asked = approval.read(path, question.about, champion)
    answered = asked and _answer_to(asked)
    if answered:
        logger.info("%s was decided before: %s", question.about, approval.in_words(answered.as_verdict))
    else:
        answered = _ask(settings, question, path, champion)
    approval.write(path, answered)
    return answered.as_verdict


def _address() -> str:
    return str(flow_run.ui_url or flow_run.id)


def _ask(settings: PandaSettings, question: _Question, path: Path, champion: str | None) -> Approval:
    asked = Approval(question.about, champion, str(flow_run.id), uuid4().hex)
    approval.write(path, asked)
    hours = f"{settings.approval_timeout_hours:g} h"
    logger.info("%s waits for approval, for %s: %s", question.about, hours, _address())
    if settings.notify:
        tell(
            settings.notify,
            f"{question.about} waits for approval",
            f"{question.text}\n\nWithout an answer in {hours}: no.",
        )
    marks.turn_to(path.parent, marks.WAITING)
    answered = _wait(asked, question, settings.approval_timeout_hours * 3600)
    if answered.answer == NO_ANSWER:
        answered = replace(answered, comment=f"in {hours}")
    logger.info("%s: %s", question.about, approval.in_words(answered.as_verdict))
    return answered


def _wait(asked: Approval, question: _Question, seconds: float) -> Approval:
    """The answer, or that there was none in time."""
    form = question.form.with_initial_data(description=question.text)
    try:
        with timeout(seconds):
            given: Any = pause_flow_run(
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
