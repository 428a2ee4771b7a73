"""The tokenizer: load one from a directory, or train one from the corpus.

In: a Hugging Face tokenizer directory (``tokenizer.json``; anything else is converted once through transformers). Out:
`LoadedTokenizer`: the `tokenizers` object, which defines the ids, and the few ids that training must know.

eos is looked up where Hugging Face writes it: ``tokenizer_config.json``, ``special_tokens_map.json``, then as an id in
``generation_config.json`` and ``config.json``. bos is whatever generation puts before a prompt, and nothing else.
Cost: loading 0.1 s for 49k entries; training 2 s a 10 MB.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep import store
from data_prep.errors import TokenizerError

TOKENIZER_FILE = "tokenizer.json"
_SLOW_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "merges.txt", "vocab.txt")
_ID_FILES = ("generation_config.json", "config.json")
_CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
DEFAULT_VOCAB_SIZE = 8192


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer and what training must know about it."""

    path: Path
    core: Tokenizer
    fingerprint: str  # changes with every id that an example could get
    eos_id: int
    stop_ids: frozenset[int]  # every id at which generation stops, eos_id among them
    bos_ids: tuple[int, ...]  # what generation puts before a prompt; empty for most byte-level tokenizers
    special_ids: dict[str, int]  # special added tokens: text -> id
    special_names: dict[str, str]  # bos_token, eos_token, ...: what a chat template may name
    chat_template: str | None

    @property
    def pad_id(self) -> int:
        """The id that fills rows: eos, harmless because padding is known by position."""
        return self.eos_id

    def special_text(self, token_id: int) -> str:
        """The text of a token, as a template writes it."""
        return self.core.id_to_token(token_id) or ""


def load_tokenizer(directory: Path, cache_dir: Path | None = None) -> LoadedTokenizer:
    """Load a tokenizer directory; a conversion is kept below ``cache_dir``.

    :raises TokenizerError: nothing to load, or it has no eos token.
    """
    directory = Path(directory)
    tokenizer_file = _tokenizer_file(directory, cache_dir)
    core = _read(tokenizer_file)
    config = _config(directory)
    stop_ids = _stop_ids(directory, core, config)
    bos_ids = _bos_ids(core, config)
    special = {token.content: i for i, token in core.get_added_tokens_decoder().items() if token.special}
    return LoadedTokenizer(
        path=directory,
        core=core,
        fingerprint=store.fingerprint(file=store.hash_file(tokenizer_file), eos=stop_ids, bos=bos_ids),
        eos_id=stop_ids[0],
        stop_ids=frozenset(stop_ids),
        bos_ids=tuple(bos_ids),
        special_ids=special,
        special_names={name: text for name in _NAMES if isinstance(text := _token_text(config.get(name)), str)},
        chat_template=_chat_template(directory, config),
    )


def ids_of(core: Tokenizer, tokens: Iterable[str]) -> list[int]:
    """Ids of whole tokens; of those that it does not know none."""
    return [known for token in tokens if (known := core.token_to_id(token)) is not None]


def train_tokenizer(records: Any, vocab_size: int, cache_dir: Path) -> Path:
    """Train a byte-level BPE on all texts of the records; the same records give the same bytes.

    :returns: a Hugging Face tokenizer directory below ``cache_dir``, reused when the records are unchanged.
    """

    def make(building: Path) -> dict[str, Any]:
        core = _train(records.texts(), vocab_size)
        _save(core, building)
        return {"vocab_size": core.get_vocab_size()}

    return store.build(Path(cache_dir) / "tokenizers", trained_fingerprint(records, vocab_size), make).path


def write_untrained(directory: Path) -> None:
    """A tokenizer that knows single bytes and the special tokens of `train_tokenizer`: what there is before records."""
    _save(_train(iter(()), 0), directory)


def vocab_size_of(architecture: Mapping[str, Any] | None) -> int:
    """Entries of the tokenizer trained for a model from scratch: as many as its configuration says, if it does."""
    return int((architecture or {}).get("vocab_size", 0)) or DEFAULT_VOCAB_SIZE


def trained_fingerprint(records: Any, vocab_size: int) -> str:
    """What a trained tokenizer depends on."""
    return store.fingerprint(
        kind="byte-level-bpe", vocab_size=vocab_size, records=[u.fingerprint for u in records.units]
    )


def _train(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return core


def _save(core: Tokenizer, directory: Path) -> None:
    (directory / TOKENIZER_FILE).write_text(core.to_str(pretty=True), encoding="utf-8")  # a full disk is an OSError
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def _tokenizer_file(directory: Path, cache_dir: Path | None) -> Path:
    if (directory / TOKENIZER_FILE).is_file():
        return directory / TOKENIZER_FILE
    slow = [directory / name for name in _SLOW_FILES if (directory / name).is_file()]
    if not slow:
        found = sorted(os.listdir(directory))[:10] if directory.is_dir() else "no such directory"
        raise TokenizerError(
            f"{directory}: no tokenizer here ({TOKENIZER_FILE} or one of {', '.join(_SLOW_FILES)}); found: {found}. "
            "Give the directory of a tokenizer or of a checkpoint that contains one"
        )
    if cache_dir is None:
        raise TokenizerError(f"{directory}: {slow[0].name} must be converted first; give load_tokenizer a cache_dir")
    inputs = [*slow, *(directory / name for name in _CONFIG_FILES if (directory / name).is_file())]
    fp = store.fingerprint(kind="converted", files={path.name: store.hash_file(path) for path in inputs})
    return store.build(Path(cache_dir) / "tokenizers", fp, lambda d: _convert(directory, d)).path / TOKENIZER_FILE


def _convert(directory: Path, building: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer  # seconds to import, and only old checkpoints need it

    try:
        loaded = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        loaded.backend_tokenizer.save(str(building / TOKENIZER_FILE))
    except (AttributeError, ImportError, KeyError, OSError, TypeError, ValueError) as error:
        raise TokenizerError(f"{directory}: transformers cannot convert this tokenizer: {error}") from error
    return {"converted_from": str(type(loaded).__name__)}


def _read(path: Path) -> Tokenizer:
    try:
        core = Tokenizer.from_file(str(path))
        core.encode("a")  # one without its unknown token can be read, but not used
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(f"{path}: not a tokenizer that `tokenizers` can read: {error}") from error
    core.no_truncation()
    core.no_padding()
    return core


def _config(directory: Path) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name in reversed(_CONFIG_FILES):
        merged |= _json(directory / name)
    return merged


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path}: a JSON object is expected, not {str(content)[:80]}")
    return content


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise TokenizerError(f"a special token is a text or an object with one, not {str(value)[:80]}")
    return text


def _stop_ids(directory: Path, core: Tokenizer, config: dict[str, Any]) -> list[int]:
    """eos first, then the other ids at which generation stops."""
    ids: list[int] = []
    eos = core.token_to_id(_token_text(config.get("eos_token")) or "")
    if eos is not None:
        ids.append(eos)
    for name in _ID_FILES:
        declared = _json(directory / name).get("eos_token_id")
        ids += declared if isinstance(declared, list) else [] if declared is None else [declared]
    if wrong := [one for one in ids if not isinstance(one, int) or one < 0]:
        raise TokenizerError(f"{directory}: eos_token_id {wrong[0]!r} is no token id; see {', '.join(_ID_FILES)}")
    if not ids:
        raise TokenizerError(
            f"{directory}: no eos token, so a trained model would never stop. Looked for eos_token in "
            f"{', '.join(_CONFIG_FILES)} and eos_token_id in {', '.join(_ID_FILES)}; add one of them"
        )
    return list(dict.fromkeys(ids))


def _bos_ids(core: Tokenizer, config: dict[str, Any]) -> list[int]:
    """The ids that generation puts before a prompt: what the tokenizer adds by itself, or is told to add."""
    if config.get("add_bos_token") is False:
        return []
    plain, full = core.encode("a", add_special_tokens=False).ids, core.encode("a").ids
    added = full[: next(i for i in range(len(full) + 1) if full[i : i + len(plain)] == plain)]
    if not added and config.get("add_bos_token"):
        bos = core.token_to_id(_token_text(config.get("bos_token")) or "")
        return [] if bos is None else [bos]
    return added


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    declared = config.get("chat_template")
    if isinstance(declared, list):  # several named ones
        return next((entry["template"] for entry in declared if entry.get("name") == "default"), None)
    return declared
