"""What older readers need is said, and transformers 5 reads the same model and tokenizer as before."""

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.support.tiny_models import save_full_model, save_tokenizer
from training.models.transformers4 import complete_config, complete_tokenizer, write_for_transformers4

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def test_the_rotary_base_is_not_left_to_a_default():
    config = complete_config({"dtype": "bfloat16", "rope_parameters": LLAMA3})
    assert config["torch_dtype"] == "bfloat16" and config["rope_theta"] == 500.0
    assert config["rope_scaling"] == {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    assert config["rope_parameters"] == LLAMA3
    plain = complete_config({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    assert (plain["rope_theta"], plain["rope_scaling"]) == (1e6, None)


def test_what_is_said_already_stays():
    old = {"torch_dtype": "float16", "rope_theta": 10000.0, "rope_scaling": None}
    assert complete_config(old) == old
    by_layer = {"rope_parameters": {"full_attention": LLAMA3, "sliding_attention": LLAMA3}}
    assert complete_config(by_layer) == by_layer
    assert complete_tokenizer({"tokenizer_class": "LlamaTokenizerFast"}) == {"tokenizer_class": "LlamaTokenizerFast"}


def test_transformers_5_reads_the_same(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|a|>", "<|b|>"]})
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=1024, rope_parameters=LLAMA3, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    write_for_transformers4(tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<|a|>", "<|b|>"]
    ids = torch.arange(60)[None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read("x<|a|>y").input_ids == tokenizer("x<|a|>y").input_ids
    assert read.all_special_tokens == tokenizer.all_special_tokens
    before = (tmp_path / "config.json").read_text()
    write_for_transformers4(tmp_path)
    assert (tmp_path / "config.json").read_text() == before


def test_a_directory_without_configuration_is_left_alone(tmp_path):
    save_full_model(tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()  # as for an adapter
    write_for_transformers4(tmp_path / "model")
    assert not (tmp_path / "model" / "config.json").exists()
