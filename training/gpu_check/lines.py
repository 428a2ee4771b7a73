"""The lines of the table and how they come about: a check that fails says why and stops no other.

In: checks, each a name and a function. Out: `Line`s: pass, fail, or not available with the reason. Cost: none.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Status = Literal["pass", "fail", "not available"]

log = logging.getLogger(__name__)


class NotAvailable(Exception):
    """This machine has not what a check is about."""


@dataclass(frozen=True)
class Found:
    """What a check measured, what that is compared with, and whether it is as it should be."""

    measured: str
    beside: str = ""
    good: bool = True


@dataclass(frozen=True)
class Line:
    """A line of the table."""

    name: str
    status: Status
    measured: str
    beside: str = ""


def line_of(name: str, check: Callable[[], Found]) -> Line:
    """Make a check, whatever comes of it."""
    log.info("%s ...", name)
    try:
        found = check()
    except NotAvailable as reason:
        return Line(name, "not available", str(reason))
    except Exception as error:  # whatever is wrong with one thing, the others are still to be known
        log.debug("%s", name, exc_info=True)
        first = (str(error).strip().splitlines() or [""])[0]
        return Line(name, "fail", f"{type(error).__name__}: {first}"[:300])
    return Line(name, "pass" if found.good else "fail", found.measured, found.beside)
