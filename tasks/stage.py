"""What every stage of the flow has in common: a Prefect task that ends in a state that tells the truth.

In: a function of one stage. Out: a function that runs it as a Prefect task. A `PandaError` (the user's to mend) becomes
a Failed state that carries the error, without a traceback; one after which trying again helps is raised: Prefect then
retries. Work that was there already ends as `Reused`. The state says the numbers of the stage: Prefect logs it as the
stage's last line. Nothing is cached by Prefect: a stage knows by its manifest whether its work is there, and Prefect's
cache does not.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed

from data_prep.errors import PandaError, disk_errors
from tasks.bar import BAR

logger = logging.getLogger(__name__)


def stage(
    name: str, says: Callable[[Any], str], reused: Callable[[Any], bool] = lambda _: False, **options: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: `function`, run as the Prefect task `name`.

    :param says: result -> its numbers, in words.
    :param reused: result -> whether it was there already.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            logger.debug("%s begins", name)
            try:
                with disk_errors():
                    result = function(*args, **kwargs)
            except PandaError as error:
                if options.get("retries") and retry_helps(error):
                    raise
                return Failed(message=str(error), data=error)
            finally:
                BAR.close()
            return Completed(name="Reused" if reused(result) else "Completed", message=says(result), data=result)

        as_task = task(name=name, task_run_name=name, cache_policy=NO_CACHE, persist_result=False, **options)(run)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return as_task(*args, **kwargs).result()

        return call

    return decorate


def retry_helps(error: object) -> bool:
    """Whether training reported a reason after which going on from the last checkpoint may well succeed."""
    report = getattr(error, "report", None)
    return report is not None and report.retry_helps
