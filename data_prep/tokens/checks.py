"""The proof that examples say what the records say: always on, cheap enough not to be an option.

In: the examples of a unit and the texts they were made from. Out: counts for the manifest. On all examples, as arrays:
every target ends in a token at which generation stops, run lengths add up, no id is outside the vocabulary. On a
sample: the target ids decode to exactly the target text. A violation stops the preparation.
Cost: 2 ns a token, and decoding `SAMPLE` targets a unit.
"""

import re
from typing import Any

import numpy as np

from data_prep.errors import StoreError, TokenizerError
from data_prep.tokenizer import LoadedTokenizer
from data_prep.tokens.examples import Tokenized, special_pattern
from data_prep.tokens.token_shard import TokenShard

SAMPLE = 16


def prove(made: Tokenized, tokenizer: LoadedTokenizer) -> dict[str, Any]:
    """Check the examples of a unit.

    :raises StoreError: they are not what they must be.
    :raises TokenizerError: the tokenizer loses text.
    """
    shard = made.shard
    targets = np.flatnonzero(made.runs.targets)
    run_ends = np.cumsum(made.lengths)
    _check_shape(shard, tokenizer, int(run_ends[-1]) if len(run_ends) else 0)
    last_ids = shard.ids[run_ends[targets] - 1]
    wrong = np.flatnonzero(~np.isin(last_ids, list(tokenizer.stop_ids)))
    if len(wrong):
        raise StoreError(f"target {int(wrong[0])} of a unit ends in id {last_ids[wrong[0]]}, where nothing stops")
    special = re.compile(special_pattern(tokenizer.special_ids) or r"(?!)")  # some decoders put spaces around these
    checkable = [
        int(run) for run in spread(targets) if run not in made.runs.alone and not special.search(made.runs.texts[run])
    ]
    for run in checkable:
        ids = shard.ids[run_ends[run] - made.lengths[run] : run_ends[run] - 1]
        _check_text(ids, str(made.runs.texts[run]), tokenizer)
    target_tokens = int(made.lengths[targets].sum())
    return {
        "targets": len(targets),
        "targets_ending_in_stop": len(targets),
        "targets_decoded_equal": len(checkable),
        "target_ratio": round(target_tokens / len(shard.ids), 6) if len(shard.ids) else 0.0,
        "examples_without_target": int((np.diff(shard.span_offsets) == 0).sum()),
    }


def _check_shape(shard: TokenShard, tokenizer: LoadedTokenizer, tokens_of_runs: int) -> None:
    if not len(shard.ids) == shard.offsets[-1] == tokens_of_runs:
        raise StoreError(
            f"{len(shard.ids)} ids, {shard.offsets[-1]} in examples, {tokens_of_runs} in runs: must be equal"
        )
    vocab_size = tokenizer.core.get_vocab_size(with_added_tokens=True)
    if len(shard.ids) and (shard.ids.min() < 0 or shard.ids.max() >= max(vocab_size, *tokenizer.stop_ids) + 1):
        raise StoreError(f"ids {shard.ids.min()} to {shard.ids.max()} outside the vocabulary of {vocab_size}")


def _check_text(ids: np.ndarray, text: str, tokenizer: LoadedTokenizer) -> None:
    decoded = tokenizer.core.decode(ids.tolist(), skip_special_tokens=False)
    normalizer = tokenizer.core.normalizer
    if decoded == text or (normalizer is not None and decoded == normalizer.normalize_str(text)):
        return
    if decoded.lstrip(" ") == text.lstrip(" "):  # SentencePiece-like decoders strip leading spaces
        return
    at = next((i for i, (a, b) in enumerate(zip(decoded, text, strict=False)) if a != b), min(len(decoded), len(text)))
    raise TokenizerError(
        f"{tokenizer.path}: the tokenizer loses text: {text[at : at + 40]!r} becomes {decoded[at : at + 40]!r}. "
        "Use a tokenizer that covers the corpus (byte-level or with byte fallback)"
    )


def spread(targets: np.ndarray) -> np.ndarray:
    """`SAMPLE` of some numbers, evenly spread."""
    return targets[np.linspace(0, len(targets) - 1, min(SAMPLE, len(targets))).astype(np.int64)]
