"""Text -> ids, fast and proven: `fastokens` where it gives the ids of `tokenizers`, else `tokenizers` itself.

In: a list of texts. Out: their ids, flat. `tokenizers` defines the ids. The fast engine is an accelerator behind a
proof: it must reproduce a set of difficult strings before it is used at all, and in every call a sample of the texts is
encoded by both; on any difference, and on any text it refuses, the whole call is done again by `tokenizers`.
Cost: `tokenizers` 1.7 million tokens/s on two cores; fastokens 10-40 times that; the sample adds 2 % of the former.
Memory: both remember words. `tokenizers` 50,000 of them (50 MiB; its default of 10,000 is 11-17 % slower on natural
text); fastokens up to 400 MiB of them where new words keep coming, so it is loaded again after `FORGET_AFTER_TOKENS`.
"""

import itertools
import logging
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer, models

logger = logging.getLogger(__name__)

REFERENCE, FAST = "tokenizers", "fastokens"
SAMPLE_EVERY = 64  # texts; at least SAMPLE_MIN of a call are compared
SAMPLE_MIN = 8
SAMPLE_MAX_CHARACTERS = 20_000  # a longer text is not in the sample unless all are
WORDS_REMEMBERED = 50_000
FORGET_AFTER_TOKENS = 50_000_000  # about 130 MB of text; loading takes 3 % of the time that these take
CHUNK_CHARACTERS = 1_000_000  # texts given to `tokenizers` at once: its Encoding objects take ~100 bytes a token
DIFFICULT = [
    "", " ", "  ", "\n", "\n\n \n", "\t\r\n", "a", " a", "a ", "  a  b ", "don't I'LL we've", "x" * 300, " " * 300,
    "1234567890 3.14 1,000", "中文，没有空格。", "日本語とカタカナ", "한국어", "العربية", "ไทย", "e\u0301 é ﬁ Å",
    "😀👩‍👩‍👧‍👦🏳️‍🌈", "\u200b\u00a0\u3000\ufeff", "\x00\x01\x7f", "<s></s><|endoftext|><unk>[PAD]", "∑∫√ ½ ² Ⅷ",
    "def f(x):\n    return x  # ok\n", "http://a.b/c?d=e&f=%20", "ÀÉÎõü ß ſ İ ı", "\U0010ffff \ue000",
    "...!!!???---___",
]  # fmt: skip


@dataclass(frozen=True)
class Encoded:
    """Ids of text ``i`` are ``ids[offsets[i]:offsets[i + 1]]``."""

    ids: np.ndarray  # (num_tokens,) int32
    offsets: np.ndarray  # (num_texts + 1,) int64
    engine: str


class Engine:
    """Encodes lists of texts, special tokens recognised, none added. Make it with `load_engine`."""

    def __init__(self, core: Tokenizer, fast: Any):
        self.core = core
        self.fast = fast
        self.tokens_seen = 0  # by `fast`

    def encode(self, texts: list[str]) -> Encoded:
        """Ids of ``texts``; which engine gave them is in the result."""
        if self.fast is not None and texts:
            self._forget()
            encoded = _encode_fast(self.fast, texts)
            if encoded is not None and agrees(self.core, texts, encoded):
                self.tokens_seen += len(encoded.ids)
                return encoded
            logger.warning(
                "fastokens cannot encode these %d texts as tokenizers does; tokenizers does them", len(texts)
            )
        return encode_reference(self.core, texts)

    def _forget(self) -> None:
        """Load the fast engine again before the words it remembers are too many."""
        if self.tokens_seen > FORGET_AFTER_TOKENS:
            self.fast = None  # free the old one first
            self.fast = _load_fast(self.core)
            self.tokens_seen = 0


def load_engine(core: Tokenizer, setting: Literal["auto", "reference"]) -> Engine:
    """The engine of the setting ``tokenizer_engine``; `auto` falls back to `tokenizers`."""
    fast = _load_fast(core) if setting == "auto" else None
    if fast is None and isinstance(core.model, (models.BPE, models.Unigram)):  # the others remember nothing
        core.model._resize_cache(WORDS_REMEMBERED)
    return Engine(core, fast)


def encode_reference(core: Tokenizer, texts: list[str]) -> Encoded:
    """Ids by `tokenizers`."""
    parts: list[np.ndarray] = [np.zeros(0, np.int32)]
    lengths: list[int] = []
    for chunk in _chunks(texts):
        ids, chunk_lengths = _encode_chunk(core, chunk)
        parts.append(ids)
        lengths += chunk_lengths
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return Encoded(np.concatenate(parts), offsets, REFERENCE)


def _encode_chunk(core: Tokenizer, texts: list[str]) -> tuple[np.ndarray, list[int]]:
    """Flat ids and the number of each text's; the Encoding objects are gone before the next are made."""
    encodings = core.encode_batch_fast(texts, add_special_tokens=False)
    ids = itertools.chain.from_iterable(encoding.ids for encoding in encodings)  # a list at a time
    return np.fromiter(ids, dtype=np.int32), [len(encoding) for encoding in encodings]


def agrees(core: Tokenizer, texts: list[str], encoded: Encoded) -> bool:
    """Whether `tokenizers` gives the same ids on a sample: every `SAMPLE_EVERY`-th text, at least `SAMPLE_MIN`."""
    sample = _sample(texts)
    reference = encode_reference(core, [texts[i] for i in sample])
    ours = [encoded.ids[encoded.offsets[i] : encoded.offsets[i + 1]] for i in sample]
    return np.array_equal(np.concatenate(ours), reference.ids) and [len(ids) for ids in ours] == list(
        np.diff(reference.offsets)
    )


def _sample(texts: list[str]) -> list[int]:
    step = max(1, min(SAMPLE_EVERY, len(texts) // SAMPLE_MIN))
    short = [i for i in range(0, len(texts), step) if len(texts[i]) <= SAMPLE_MAX_CHARACTERS]
    return short or [min(range(len(texts)), key=lambda i: len(texts[i]))]


def _load_fast(core: Tokenizer) -> Any:
    try:
        import fastokens

        fast = fastokens.Tokenizer.from_json_str(core.to_str())
    except (ImportError, ValueError, RuntimeError) as error:
        logger.info("fastokens does not support this tokenizer (%s); tokenizers is used", error)
        return None
    added = [f"a{token.content} {token.content}b" for token in core.get_added_tokens_decoder().values()]
    encoded = _encode_fast(fast, DIFFICULT + added)
    same = encoded is not None and _equal(encoded, encode_reference(core, DIFFICULT + added))
    if not same:
        logger.info("fastokens gives other ids than tokenizers on difficult strings; tokenizers is used")
    return fast if same else None


def _encode_fast(fast: Any, texts: list[str]) -> Encoded | None:
    try:
        ids, offsets = fast.encode_batch_flat(texts)
    except (ValueError, RuntimeError) as error:  # e.g. a byte the vocabulary lacks
        logger.info("fastokens refuses a text: %s", error)
        return None
    return Encoded(np.frombuffer(ids, dtype=np.int32), np.frombuffer(offsets, dtype=np.int64), FAST)


def _equal(one: Encoded, other: Encoded) -> bool:
    return np.array_equal(one.offsets, other.offsets) and np.array_equal(one.ids, other.ids)


def _chunks(texts: list[str]) -> list[list[str]]:
    ends, characters = [0], 0
    for i, text in enumerate(texts):
        characters += len(text)
        if characters >= CHUNK_CHARACTERS:
            ends.append(i + 1)
            characters = 0
    ends.append(len(texts))
    return [texts[a:b] for a, b in itertools.pairwise(ends) if a < b]
