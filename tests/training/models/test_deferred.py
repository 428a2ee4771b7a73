"""Empty models and where their values come from, against what transformers' own loading gives."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from training.errors import ModelError
from training.models.deferred import Values, check_filled, deferring

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def saved(kind: str, directory: Path, **sizes) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(directory)
    return directory


def whole(directory: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


def deferred(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Values]:
    values = Values()
    with deferring(values):
        return whole(directory, dtype), values


def assert_same(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    check_filled(model)
    ours = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    theirs = {**dict(expected.named_parameters()), **dict(expected.named_buffers())}
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name


def change(directory: Path, rename) -> None:
    """Rename the tensors of a checkpoint; None leaves one out."""
    tensors = {rename(name): value for name, value in load_file(directory / "model.safetensors").items()}
    tensors.pop(None, None)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_wait_in_their_files_and_the_rest_is_there(tmp_path, dtype):
    saved("llama", tmp_path, **SIZES)
    model, values = deferred(tmp_path, dtype)
    assert set(values) == set(model.parameters())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    with pytest.raises(ModelError, match="were not loaded"):
        check_filled(model)
    values.fill(CPU)
    assert not values
    assert_same(model, whole(tmp_path, dtype))


def test_weights_that_the_files_lack_are_those_of_the_seed(tmp_path):
    saved("llama", tmp_path, **SIZES)
    change(tmp_path, lambda name: None if name == "lm_head.weight" else name)
    model, values = deferred(tmp_path)
    assert model.lm_head.weight not in values
    values.fill(CPU)
    assert_same(model, whole(tmp_path))


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_that_the_files_have_twice_are_one_if_they_are_equal(tmp_path, equal):
    """As models trained here have them; transformers compares them only where it has read them."""
    saved("llama", tmp_path, **SIZES, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (not equal)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, values = deferred(tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is equal
    values.fill(CPU)
    assert_same(model, whole(tmp_path))


def test_names_of_other_times_are_found(tmp_path):
    """Files of the decoder alone, as those of GPT-2, have no prefix; checkpoints of 2023 carry constants."""
    saved("gpt2", tmp_path, vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    change(tmp_path, lambda name: name.removeprefix("transformer."))
    model, values = deferred(tmp_path)
    assert len(values) == len(list(model.parameters()))
    values.fill(CPU)
    assert_same(model, whole(tmp_path))


def test_joined_tensors_are_loaded_by_transformers_and_a_warning_says_so(tmp_path, caplog):
    saved("mixtral", tmp_path, **SIZES, num_local_experts=2, num_experts_per_tok=1)
    model, values = deferred(tmp_path)
    assert not values
    assert "each rank loads the whole model" in caplog.text
    assert_same(model, whole(tmp_path))
