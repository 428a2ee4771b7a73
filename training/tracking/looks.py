"""What is only to be looked at: a sample text, a plot, a table, a link, a card. Its failure is a warning.

In: a block (or a function) that makes something for people to see. Out: nothing when it fails; a model that is trained
is worth more than its picture. Cancellation passes. Cost: none.
"""

import contextlib
import logging
from collections.abc import Iterator

from training.tracking.redact import what_it_says

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def only_a_look(what: str) -> Iterator[None]:
    """Go on without `what` when making it fails; the traceback is logged at level DEBUG."""
    try:
        yield
    except Exception as error:
        logger.warning("going on without %s: %s", what, what_it_says(error))
        logger.debug("%s", what, exc_info=True)
