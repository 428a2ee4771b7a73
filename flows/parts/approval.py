"""A person decides whether a model is registered: the run waits in the Prefect UI.

In: settings, the numbers to decide on. Out: nothing; `Ended` as NotApproved when the answer is no, or none came in
time. The run stays alive while it waits (state Paused): a sleeping process, no GPU, for training is over.
"""

from typing import Any

from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.utilities.timeout import timeout
from pydantic import Field

from configs.settings import PandaSettings
from flows.parts.flow_states import Ended

POLL_SECONDS = 5
MARGIN_SECONDS = 600  # the server fails a run whose pause is over; before that we end it ourselves, as NotApproved


class Approval(RunInput):
    """The form behind the Resume button."""

    approve: bool = Field(True, description="Register the model. False: it stays in its run directory.")
    comment: str = Field("", description="Kept in the message of the state.")


def ask(settings: PandaSettings, run_dir: str, losses: dict[str, dict[str, float]]) -> None:
    """Wait for the answer."""
    if not settings.require_approval:
        return
    summary: dict[str, Any] = {"run_dir": run_dir, "losses": losses}
    before, after = losses["before"].get("all"), losses["after"].get("all")
    form = Approval.with_initial_data(
        description=f"Held-out loss {before} -> {after}. Register the model of `{run_dir}`?", approve=True
    )
    seconds = round(settings.approval_timeout_hours * 3600)
    try:
        with timeout(seconds):
            answer = pause_flow_run(wait_for_input=form, timeout=seconds + MARGIN_SECONDS, poll_interval=POLL_SECONDS)
    except TimeoutError:
        raise Ended("NotApproved", f"no answer in {settings.approval_timeout_hours} h; {run_dir}", summary) from None
    if not answer.approve:
        raise Ended("NotApproved", f"refused: {answer.comment or 'no comment'}; {run_dir}", summary)
