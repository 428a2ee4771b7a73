"""What every stage of the flow has in common: a Prefect task that fails with a message, not with a traceback.

In: a function of one stage. Out: a Prefect task. A `PandaError` (the user's to mend) becomes a Failed state that
carries the error; anything else keeps its traceback. Nothing is cached by Prefect: a stage knows by its manifest
whether its work is there, and Prefect's cache does not.
"""

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Failed

from data_prep.errors import PandaError

logger = logging.getLogger(__name__)


def stage(name: str, **options: Any) -> Callable[[Callable[..., Any]], Task[..., Any]]:
    """Decorator: `function` as the Prefect task `name`."""

    def decorate(function: Callable[..., Any]) -> Task[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.monotonic()
            try:
                result = function(*args, **kwargs)
            except PandaError as error:
                return Failed(message=str(error), data=error)
            logger.info("%s: done in %.1f s%s", name, time.monotonic() - started, _note(result))
            return result

        return task(name=name, cache_policy=NO_CACHE, persist_result=False, **options)(run)

    return decorate


def _note(result: Any) -> str:
    """Whether the work was there already, as far as the result says."""
    built, reused = getattr(result, "built", None), getattr(result, "reused", None)
    if reused is True or (reused and not built):
        return ", reused from an earlier run"
    return f", {reused} of {reused + built} units reused" if reused and built else ""
