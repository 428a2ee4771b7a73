"""A checkpoint whose model code comes with it: a Llama under a name that transformers does not know."""

import json
from pathlib import Path

from tests.support.tiny_models import save_full_model

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own-llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}


def save_own_model(directory: Path) -> None:
    """The tiny Llama of the tests, with its code."""
    save_full_model(directory)
    path = directory / "config.json"
    changed = {"model_type": "own-llama", "architectures": ["OwnForCausalLM"], "auto_map": MAP}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    (directory / "own.py").write_text(CODE)
