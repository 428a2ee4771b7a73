"""Where training starts: the checkpoint that is named, whole, with a tokenizer that knows the tokens that are added.

In: settings, the cache. Out: its directory, downloaded or made if need be. Cost: that of `delta` and `tokens`, once.
"""

from pathlib import Path

from training.bases.delta import whole_checkpoint
from training.bases.tokens import with_tokens
from training.settings import ModelSettings


def model_directory(settings: ModelSettings, cache_dir: Path) -> Path | None:
    """The directory of weights and tokenizer to start from; None = from scratch."""
    folder = whole_checkpoint(settings, cache_dir)
    return with_tokens(folder, settings.add_tokens or [], cache_dir) if folder else None
