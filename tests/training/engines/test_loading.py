"""Models whose ranks read only their part of the files give the losses of the whole model; on two ranks, for real."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support import tiny
from tests.support.tiny import VOCABULARY, write_tokenizer
from tests.support.tiny_models import save_adapter
from training.distributed import Ranks
from training.engines.inference import load_for_inference
from training.models.loss import CausalLMLoss
from training.settings import TrainSettings
from training.trainer.packing_check import pack, random_segments

pytestmark = pytest.mark.distributed

SMALL = {"vocab_size": VOCABULARY, "max_position_embeddings": 128}
LLAMA = {**SMALL, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = {
    "llama": ("llama", {**LLAMA, "num_key_value_heads": 2}),
    "tied": ("llama", {**LLAMA, "num_hidden_layers": 1, "tie_word_embeddings": True}),
    "odd": ("llama", {**LLAMA, "vocab_size": VOCABULARY + 5, "num_hidden_layers": 1}),  # no whole number of rows a rank
    "qwen2": ("qwen2", {**LLAMA, "num_key_value_heads": 2}),  # biases
    "gpt2": ("gpt2", {"vocab_size": VOCABULARY, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "gemma": (
        "gemma",
        {**LLAMA, "num_key_value_heads": 4, "head_dim": 16, "pad_token_id": 0},
    ),  # a factor of the embedding beside the weights
}
LORA = {"use_lora": True, "lora_r": 4, "lora_dropout": 0.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, dict]:
    """Base, deployed model and settings by name."""
    root = tmp_path_factory.mktemp("loading")
    models = {}
    for name, (kind, sizes) in KINDS.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(root / name)
        models[name] = {"base": str(root / name), "deployed": str(root / name), "settings": {}}
    save_adapter(root / "llama", root / "adapter")
    models["lora"] = {"base": str(root / "llama"), "deployed": str(root / "adapter"), "settings": LORA}
    models["4 bits"] = {**models["lora"], "settings": {**LORA, "use_quant": True}}
    models["4 bits of gpt2"] = {"base": str(root / "gpt2"), "deployed": None, "settings": {**LORA, "use_quant": True}}
    scratch = {"architecture": {"model_type": "llama", **LLAMA}}
    models["from scratch"] = {"base": None, "deployed": None, "settings": scratch}
    tokenizer = str(write_tokenizer(root / "tokenizer"))
    return {name: {**model, "tokenizer": tokenizer} for name, model in models.items()}


@pytest.fixture(scope="module")
def found(models, tmp_path_factory) -> dict:
    """Losses by model and way, of one start of two ranks."""
    root = tmp_path_factory.mktemp("ranks")
    (root / "config.yaml").write_text(yaml.safe_dump({"models": models}))
    codes = tiny.wait(tiny.start(root, 2, module="tests.support.loading"), seconds=200)
    assert codes == [0, 0], tiny.logs(root)
    return json.loads((root / "losses.json").read_text())


def losses_of(model: torch.nn.Module) -> list[float]:
    with torch.no_grad():
        return CausalLMLoss(model.eval())(pack([random_segments(VOCABULARY)]), "each").tolist()


@pytest.mark.parametrize("name", [*KINDS, "lora"])
def test_every_way_gives_the_losses_of_the_whole_model(models, found, name):
    whole = AutoModelForCausalLM.from_pretrained(models[name]["base"], dtype=torch.float32)
    expected = dict.fromkeys(("zero2", "zero3", "fsdp"), losses_of(whole))
    expected["inference"] = losses_of(
        PeftModel.from_pretrained(whole, models[name]["deployed"]) if name == "lora" else whole
    )
    assert {way: result["losses"] for way, result in found[name].items()} == {
        way: pytest.approx(losses, rel=1e-5) for way, losses in expected.items()
    }


def test_an_adapter_on_4_bits_answers_alike_whole_and_sharded(models, found):
    settings = TrainSettings(**models["4 bits"]["settings"])
    alone = Ranks(0, 0, 1, torch.device("cpu"))
    module = load_for_inference(Path(models["4 bits"]["deployed"]), settings, alone)
    with torch.no_grad():
        expected = module(pack([random_segments(VOCABULARY)]), "each").tolist()
    assert found["4 bits"]["inference"]["losses"] == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(found["lora"]["inference"]["losses"], rel=1e-5), "they are in 4 bits"


@pytest.mark.parametrize("name", ["4 bits", "4 bits of gpt2", "from scratch"])
def test_sharded_and_whole_weights_give_the_same_losses(found, name):
    for way in ("zero3", "fsdp"):
        assert found[name][way]["losses"] == pytest.approx(found[name]["zero2"]["losses"], rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "lora", "4 bits", "4 bits of gpt2"])
def test_a_rank_of_two_holds_half_of_the_weights(found, name):
    whole = found[name]["zero2"]["bytes"]
    for way in ("zero3", "fsdp"):
        assert found[name][way]["bytes"] == pytest.approx(whole / 2, rel=0.02), way
