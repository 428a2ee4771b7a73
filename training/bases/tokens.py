"""New tokens for a checkpoint: its tokenizer keeps them whole, embedding and output layer have a row for each.

In: a checkpoint, tokens. Out: the checkpoint itself where it knows all of them, else a directory made once and kept in
``<cache_dir>/models/<fingerprint of both>/``. Ids of the new ones follow those of the old ones, so a text without them
has the ids it had. Their rows, appended or among the spare ones, start as the mean of all old rows, which leaves the
probabilities of old tokens nearly what they were (https://nlp.stanford.edu/~johnhew/vocab-expansion.html); every other
row is what it was, to the last bit. Cost: the weights are read and written once; memory of the embedding, twice.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer

from data_prep import store
from data_prep.tokenizer import TOKENIZER_FILE, ids_of, load_tokenizer
from training.bases.delta import NOT_COPIED, content_of
from training.errors import CheckpointError

if TYPE_CHECKING:  # torch and transformers are imported when there is something to add
    from torch import Tensor

log = logging.getLogger(__name__)


def with_tokens(folder: Path, tokens: Sequence[str], cache_dir: Path) -> Path:
    """The directory of a checkpoint that has all of these tokens.

    :raises CheckpointError: its embedding is not found.
    """
    if not tokens:
        return folder
    core = load_tokenizer(folder, cache_dir).core
    unknown = [token for token in dict.fromkeys(tokens) if core.token_to_id(token) is None]
    if not unknown:
        return folder
    fingerprint = store.fingerprint(kind="tokens", base=content_of(folder), tokens=unknown)
    return store.build(Path(cache_dir) / "models", fingerprint, lambda made: _write(made, folder, core, unknown)).path


def _write(made: Path, folder: Path, core: Tokenizer, tokens: list[str]) -> dict[str, Any]:
    log.info("adding %d tokens to %s", len(tokens), folder)
    num_old = core.get_vocab_size()
    core.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    ids = ids_of(core, tokens)
    shutil.copytree(folder, made, ignore=shutil.ignore_patterns(*NOT_COPIED), dirs_exist_ok=True)
    (made / TOKENIZER_FILE).write_text(core.to_str(pretty=True), encoding="utf-8")
    num_rows = _write_rows(made, folder, num_old, ids)
    _write_vocabulary(made / "config.json", num_rows)
    return {"base": str(folder.absolute()), "tokens": dict(zip(tokens, ids, strict=True)), "rows": num_rows}


def _write_rows(made: Path, folder: Path, num_old: int, ids: list[int]) -> int:
    """The weights with rows for these ids; returns how many rows there are then."""
    from training.models.shards import rewrite_shards, tensors_of

    tensors = tensors_of(folder)
    grown = _by_vocabulary(folder, list(tensors))
    had = tensors[grown[0]].shape[0]
    num_rows = max(had, ids[-1] + 1)

    def change(name: str, value: "Tensor") -> "Tensor":
        if name not in grown:
            return value
        result = value.new_zeros(num_rows, *value.shape[1:])
        result[:had] = value
        result[ids] = value[:num_old].double().mean(0).to(value.dtype)
        return result

    rewrite_shards(folder, made, change, num_rows=dict.fromkeys(grown, num_rows))
    return num_rows


def _by_vocabulary(folder: Path, names: list[str]) -> list[str]:
    """The tensors of embedding and output layer among those of a checkpoint, which may lack the decoder's prefix."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    ends = [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    places = [f"{name}.{last}" for name, part in model.named_modules() if any(part is end for end in ends)
              for last, _ in part.named_parameters(recurse=False)]  # fmt: skip
    found = [name for name in names if any(f".{place}".endswith(f".{name}") for place in places)]
    if not found:
        raise CheckpointError(f"{folder}: add_tokens finds none of {', '.join(places)} among its tensors")
    return found


def _write_vocabulary(path: Path, num_rows: int) -> None:
    """config.json, with so many rows."""
    config = json.loads(path.read_text(encoding="utf-8"))
    (config.get("text_config") or config)["vocab_size"] = num_rows
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
