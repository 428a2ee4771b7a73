"""Errors in what the user configured: all problems at once, each with key, value, limit and the nearest valid name."""

from data_prep.errors import PandaError, did_you_mean

__all__ = ["ConfigError", "did_you_mean"]


class ConfigError(PandaError):
    """One or more problems in flags, overrides or a configuration file."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        head = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"configuration: {head}\n" + "\n".join(f"  - {problem}" for problem in problems))
