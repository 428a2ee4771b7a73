"""Errors a user can cause and mend. Each message names the thing, the value, the limit and the fix; none needs a traceback."""


class PandaError(ValueError):
    """Base of all errors that are shown as one clear line (or list) instead of a traceback."""


class CorpusError(PandaError):
    """The corpus cannot be used: missing, empty, or too much of it is rejected."""


class TokenizerError(PandaError):
    """The tokenizer is missing, or cannot express what training needs (for example it has no eos token)."""


class StoreError(PandaError):
    """Prepared data is damaged, of another format version, or violates conservation."""
