"""Say it in the old way too: what transformers 4 reads, and with it the servers that still use it (vLLM among them).

In: a model directory that transformers 5 wrote. Out: the same files; config.json and tokenizer_config.json also say in
the words of transformers 4 what has been renamed since. Without them an older reader refuses the tokenizer, and takes
the default for the base of the rotary embedding without a word: another model. transformers 5 reads both alike. Cost:
none.
"""

import json
from pathlib import Path
from typing import Any

TOKENIZER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def write_for_transformers4(directory: Path) -> None:
    """Complete the two files, where they are."""
    for name, complete in (("config.json", complete_config), ("tokenizer_config.json", complete_tokenizer)):
        path = directory / name
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            after = complete(before)
            if after != before:
                path.write_text(json.dumps(after, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def complete_config(config: dict[str, Any]) -> dict[str, Any]:
    """`torch_dtype` beside `dtype`; `rope_theta` and `rope_scaling` beside `rope_parameters`."""
    old = {"torch_dtype": config["dtype"]} if "dtype" in config else {}
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:  # layers of several kinds have a mapping each, which transformers 4 has no words for
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        old |= {"rope_theta": rope["rope_theta"]}
        old |= {"rope_scaling": scaling if scaling.get("rope_type", "default") != "default" else None}
    return {**old, **config}


def complete_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """The class's old name, which is an alias of the new one; further special tokens under their old name."""
    known = dict(config)
    if config.get("tokenizer_class") in TOKENIZER_CLASSES:
        known["tokenizer_class"] = TOKENIZER_CLASSES[config["tokenizer_class"]]
    if isinstance(config.get("extra_special_tokens"), list):
        known["additional_special_tokens"] = known.pop("extra_special_tokens")
    return known
