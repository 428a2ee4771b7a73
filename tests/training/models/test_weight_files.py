"""A model written one tensor at a time is the one that transformers writes."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from training.models import weight_files
from training.models.weight_files import write_streamed

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}


def model_of(model_type: str, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES, **changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def tensors(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("file_bytes", [1 << 30, 20_000])
@pytest.mark.parametrize(
    ("model_type", "changes"), [("llama", {}), ("gpt_neox", {}), ("mixtral", EXPERTS)], ids=["llama", "neox", "renamed"]
)
def test_the_same_files_as_transformers(tmp_path, monkeypatch, model_type, changes, file_bytes):
    """Mixtral's experts lie together in the model, and one by one in its files."""
    monkeypatch.setattr(weight_files, "FILE_BYTES", file_bytes)
    model = model_of(model_type, **changes)
    asked = []

    def weights():
        for name, value in model.state_dict().items():
            asked.append(name)
            yield name, value.clone()

    write_streamed(model, weights(), tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert asked == list(model.state_dict())
    several = file_bytes == 20_000
    assert (len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2) is several
    assert {path.name for path in (tmp_path / "ours").iterdir() if path.suffix == ".json"} == {
        "config.json", "generation_config.json", *(["model.safetensors.index.json"] if several else []),
    }  # fmt: skip
    if several:
        index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == theirs.keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
