"""How a run ends, as a Prefect state whose type, name and message tell the truth.

In: the summary, or the error that ended the run. Out: a state. Names: Completed, Prepared, Stopped, Evaluated,
SkippedNoNewData, NotApproved (all of type Completed); SkippedStillRunning, Cancelled; UserError, DataError, NonFinite,
OutOfMemory, LostRank, Infrastructure (of type Failed); Crashed, which is started again. Cost: none.
"""

from typing import Any

import httpx
from prefect.client.schemas.objects import State
from prefect.settings import get_current_settings
from prefect.states import Cancelled, Completed, Crashed, Failed

from data_prep.errors import PandaError
from flows.parts.run_dir import Summary
from tasks.train import losses_in_words
from training.launch.exits import ExitReason, reason_of_error
from training.launch.launcher import ExitReport

NAMES = {
    ExitReason.user_error: "UserError",
    ExitReason.data: "DataError",
    ExitReason.out_of_memory: "OutOfMemory",
    ExitReason.non_finite: "NonFinite",
    ExitReason.lost_rank: "LostRank",
    ExitReason.infrastructure: "Infrastructure",
}


ERRORS = (PandaError, httpx.HTTPError, RuntimeError)
"""What a flow catches, for `ended_by`."""


class EarlyExit(Exception):
    """The run is over before its last stage, and that is no failure: tracking is told so by `report`."""

    report = ExitReport(ExitReason.completed)

    def __init__(self, name: str, message: str, summary: Summary):
        self.name, self.summary = name, summary  # itself: what is added while the run ends is told as well
        summary |= {"outcome": {"name": name, "message": message}}
        super().__init__(message)


def reason_of(error: PandaError) -> ExitReason:
    """The reason training reported, else the one the error stands for."""
    report = getattr(error, "report", None)
    return report.reason if report else reason_of_error(error)


def ended_by(error: Exception) -> State[Any]:
    """One of `ERRORS` as a state: no traceback for what the user can mend, a crash where Prefect's server was away.

    :raises Exception: ``error``, where it is anything else.
    """
    if isinstance(error, PandaError):
        return failed(error)
    why = of_a_server_that_is_away(error)
    if not why:
        raise error
    return Crashed(message=f"{why}; what is finished is kept")


def failed(error: PandaError) -> State[Any]:
    """An error the user is shown as a message."""
    reason = reason_of(error)
    if reason is ExitReason.cancelled:
        return Cancelled(message=str(error), data=error)
    return Failed(name=NAMES[reason], message=str(error), data=error)


def of_a_server_that_is_away(error: Exception) -> str:
    """What to say, where an error says that Prefect's server was, for longer than its client waits; else nothing."""
    away = error if isinstance(error, httpx.HTTPError) else error.__cause__  # of a RuntimeError of Prefect's
    if not isinstance(away, httpx.HTTPError):
        return ""
    if isinstance(away, httpx.HTTPStatusError) and away.response.is_client_error:
        return ""  # there it is, and says that we are wrong
    url = get_current_settings().api.url or ""
    try:
        of_prefect = bool(url) and str(away.request.url).startswith(url)
    except RuntimeError:  # it does not know what was asked
        return ""
    said = str(away).partition("\n")[0] or type(away).__name__
    return f"the Prefect server at {url} went away ({said})" if of_prefect else ""


def with_outcome(summary: Summary, name: str = "Completed", message: str | None = None) -> Summary:
    """The summary, which says itself how the run ended."""
    return {**summary, "outcome": {"name": name, "message": message or _message(summary)}}


def completed(summary: Summary) -> State[Any]:
    """A summary with its outcome is the result of the run."""
    return Completed(**summary["outcome"], data=summary)


def _message(summary: Summary) -> str:
    model = summary["model"]
    return f"{model['name']} version {model['version']}, {losses_in_words(summary['losses'])}"
