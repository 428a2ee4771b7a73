"""Errors in what the user configured: all problems at once, each with key, value, limit and the nearest valid name."""

import difflib
from collections.abc import Iterable

from data_prep.errors import PandaError


class ConfigError(PandaError):
    """One or more problems in flags, overrides or a configuration file."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        head = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"configuration: {head}\n" + "\n".join(f"  - {problem}" for problem in problems))


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`"; did you mean X?"`, or an empty string when nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {prefix}{near[0]}?" if near else ""
