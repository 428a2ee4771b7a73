"""A model written by the ranks that hold it is the one that transformers writes."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from training.errors import ModelError
from training.models import weight_files
from training.models.shards import Piece

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}


def model_of(model_type: str, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES, **changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def tensors(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def part(value, rank, num_ranks):
    """What a rank holds of a tensor; the last ones maybe nothing."""
    flat, size = value.reshape(-1), -(-value.numel() // num_ranks)
    return Piece(flat[rank * size : (rank + 1) * size], rank * size, tuple(value.shape))


@pytest.mark.parametrize("file_bytes", [1 << 30, 20_000])
@pytest.mark.parametrize(
    ("model_type", "changes"), [("llama", {}), ("gpt_neox", {}), ("mixtral", EXPERTS)], ids=["llama", "neox", "renamed"]
)
def test_ranks_write_the_same_files_as_transformers(tmp_path, monkeypatch, model_type, changes, file_bytes):
    """Mixtral's experts lie together in the model, and one by one in its files. The ranks come in any order."""
    monkeypatch.setattr(weight_files, "FILE_BYTES", file_bytes)
    model, ours = model_of(model_type, **changes), tmp_path / "ours"

    def held(rank):
        return [(name, part(value, rank, 3)) for name, value in model.state_dict().items()]

    room = weight_files.begin(model, held(0), ours)
    assert sum(weight_files.write_pieces(ours, held(rank)) for rank in (2, 0, 1)) == room
    weight_files.finish(model, ours)
    model.save_pretrained(tmp_path / "theirs")
    written, theirs = tensors(ours), tensors(tmp_path / "theirs")
    assert written.keys() == theirs.keys() and all(torch.equal(written[name], theirs[name]) for name in theirs)
    several = file_bytes == 20_000
    assert (len(list(ours.glob("model-*.safetensors"))) > 2) is several
    assert {path.name for path in ours.iterdir() if path.suffix == ".json"} == {
        "config.json", "generation_config.json", *(["model.safetensors.index.json"] if several else []),
    }  # fmt: skip
    if several:
        index = json.loads((ours / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == theirs.keys()
    loaded = AutoModelForCausalLM.from_pretrained(ours)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())


def test_numbers_of_another_type_than_the_files_are_refused(tmp_path):
    model = model_of("llama")
    name, value = next(iter(model.state_dict().items()))
    weight_files.begin(model, [(name, part(value, 0, 1))], tmp_path)
    with pytest.raises(ModelError, match=rf"{name} is torch.bfloat16 on this rank, F32 in the file"):
        weight_files.write_pieces(tmp_path, [(name, part(value.bfloat16(), 0, 1))])
