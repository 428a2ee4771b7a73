"""What every stage of the flow has in common: a Prefect task that ends in a state that tells the truth.

In: a function of one stage. Out: a function that runs it as a Prefect task. A `PandaError` (the user's to mend) becomes
a Failed state that carries the error, without a traceback; one after which trying again helps is raised: Prefect then
retries. Work that was there already ends as `Reused`. Nothing is cached by Prefect: a stage knows by its manifest
whether its work is there, and Prefect's cache does not.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from data_prep.errors import PandaError

logger = logging.getLogger(__name__)


def stage(
    name: str, reused: Callable[[Any], str | None] | None = None, **options: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: `function`, run as the Prefect task `name`.

    :param reused: result -> what was there already, in words, or None when the stage had work to do.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            logger.debug("%s begins", name)
            try:
                result = function(*args, **kwargs)
            except PandaError as error:
                if options.get("retries") and retry_helps(error):
                    raise
                return Failed(message=str(error), data=error)
            said = reused(result) if reused else None
            return Completed(name="Reused", message=said, data=result) if said else result

        as_task = task(name=name, cache_policy=NO_CACHE, persist_result=False, **options)(run)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            returned = as_task(*args, **kwargs)
            return returned.result() if isinstance(returned, State) else returned

        return call

    return decorate


def retry_helps(error: object) -> bool:
    """Whether training reported a reason after which going on from the last checkpoint may well succeed."""
    report = getattr(error, "report", None)
    return report is not None and report.retry_helps
