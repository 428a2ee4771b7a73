"""Errors a user can cause and mend.

Each message names the thing, the value, the limit and the fix, without a traceback.
"""

import difflib
from collections.abc import Iterable


class PandaError(Exception):
    """Base of all errors that are shown as one clear line (or list) instead of a traceback."""


class CorpusError(PandaError):
    """The corpus cannot be used: missing, empty, or too much of it is rejected."""


class NoCorpusError(CorpusError):
    """There is no corpus, and none was asked for: the default directories are absent, or switched off."""


class TokenizerError(PandaError):
    """The tokenizer is missing, or cannot express what training needs (for example it has no eos token)."""


class StoreError(PandaError):
    """Prepared data is damaged, of another format version, or violates conservation."""


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`"; did you mean X?"`, or an empty string when nothing is near."""
    by_lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {prefix}{by_lower[near[0]]}?" if near else ""
