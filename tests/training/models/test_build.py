"""Loading, adapting, quantising, saving; on a tiny model and, marked slow, on a real pretrained one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import tiny
from tests.support.plans import example, write_plan
from tests.support.smollm2 import smollm2
from tests.support.tiny import ARCHITECTURE, EOS, VOCABULARY, write_tokenizer
from tests.training.models.test_loss import gradients
from training.errors import ModelError
from training.models.build import load_deployed, load_model, save_model
from training.models.loss import CausalLMLoss
from training.settings import TrainSettings
from training.trainer.packing_check import pack, random_segments

FLOAT32 = torch.float32
WIDE = {**ARCHITECTURE, "hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    return str(write_tokenizer(tmp_path_factory.mktemp("model") / "tokenizer"))


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory) -> str:
    """A saved model from scratch."""
    model = load_model(TrainSettings(architecture=WIDE), None, tokenizer, FLOAT32)
    directory = tmp_path_factory.mktemp("base") / "model"
    save_model(model, model.state_dict(), tokenizer, directory)
    return str(directory)


def lora(**settings) -> TrainSettings:
    return TrainSettings(**{"use_lora": True, "lora_r": 4, "lora_dropout": 0.0, **settings})


def test_from_scratch_takes_vocabulary_and_special_tokens_from_the_tokenizer(tokenizer):
    model = load_model(TrainSettings(architecture={**WIDE, "vocab_size": 9999}), None, tokenizer, FLOAT32)
    assert (model.config.vocab_size, model.config.eos_token_id) == (VOCABULARY, EOS)
    assert model.training


def test_the_seed_decides_the_weights(tokenizer):
    def first(seed: int) -> torch.Tensor:
        model = load_model(TrainSettings(architecture=WIDE, seed=seed), None, tokenizer, FLOAT32)
        return next(model.parameters()).flatten()[:5]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_saved_and_loaded_is_the_same_model(base, tokenizer):
    segments = pack([random_segments(VOCABULARY)])
    one = CausalLMLoss(load_model(TrainSettings(), base, tokenizer, FLOAT32).eval())
    other = CausalLMLoss(load_deployed(Path(base)))
    torch.testing.assert_close(one(segments, "each"), other(segments, "each"), rtol=1e-5, atol=1e-5)
    assert {file.suffix for file in Path(base).iterdir()} == {".json", ".safetensors"}, "no pickle"


def test_an_adapter_is_on_all_linear_layers_but_the_head(base, tokenizer):
    model = load_model(lora(), base, tokenizer, FLOAT32)
    trained = {name.split(".lora_")[0].rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    some = load_model(lora(lora_target_modules=["q_proj"]), base, tokenizer, FLOAT32)
    assert all("q_proj" in name for name, p in some.named_parameters() if p.requires_grad)
    with pytest.raises(ModelError, match="lora_target_modules"):
        load_model(lora(lora_target_modules=["nothing"]), base, tokenizer, FLOAT32)


def test_an_adapter_is_saved_alone_and_comes_back(base, tokenizer, tmp_path):
    model = load_model(lora(), base, tokenizer, FLOAT32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    save_model(model, model.state_dict(), tokenizer, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < Path(
        base, "model.safetensors"
    ).stat().st_size
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    segments = pack([random_segments(VOCABULARY)])
    expected = CausalLMLoss(model.eval())(segments, "each")
    torch.testing.assert_close(CausalLMLoss(load_deployed(tmp_path / "adapter"))(segments, "each"), expected)
    assert not torch.allclose(CausalLMLoss(load_deployed(Path(base)))(segments, "each"), expected)


def test_empty_tensors_are_never_deployed(base, tokenizer, tmp_path):
    model = load_model(TrainSettings(), base, tokenizer, FLOAT32)
    sharded = {name: torch.empty(0) if "norm" in name else value for name, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"tensors are empty"):
        save_model(model, sharded, tokenizer, tmp_path / "model")


def dequantised(model: torch.nn.Module) -> torch.nn.Module:
    """The same weights as plain float32 layers: what a 4-bit layer computes with."""
    import bitsandbytes

    for name, part in list(model.named_modules()):
        if isinstance(part, bitsandbytes.nn.Linear4bit):
            plain = torch.nn.Linear(part.in_features, part.out_features, bias=False)
            weight = bitsandbytes.functional.dequantize_4bit(part.weight.data, part.weight.quant_state)
            plain.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, plain)
    return model


def test_gradients_pass_4_bit_layers_also_after_an_evaluation(base, tokenizer):
    """bitsandbytes' kernel for AVX512-BF16 repacks weights in evaluation, and then cuts the graph silently."""
    settings = lora(use_quant=True)
    quantised = CausalLMLoss(load_model(settings, base, tokenizer, FLOAT32))
    segments = pack([random_segments(VOCABULARY)])
    with torch.no_grad():
        quantised.eval()(segments)
    ours = trained_gradients(quantised.train(), segments)
    plain = CausalLMLoss(dequantised(load_model(settings, base, tokenizer, FLOAT32)))
    expected = trained_gradients(plain, segments)
    assert ours.keys() == expected.keys()
    assert any("layers.0" in name and gradient.abs().max() > 1e-4 for name, gradient in ours.items())
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4)


def trained_gradients(model: CausalLMLoss, batch) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model(batch)[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2])
def test_packed_equals_unpacked_on_a_pretrained_model(rows):
    """Real text on SmolLM2-135M (grouped-query attention): losses and gradients of packed rows, per segment."""
    directory = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = ["Paris is the capital of France.", "def add(a, b):\n    return a + b", "长城是中国古代的伟大工程。" * 3]
    segments = [np.array(tokenizer(text)["input_ids"]) for text in texts]
    model = CausalLMLoss(AutoModelForCausalLM.from_pretrained(directory, dtype=FLOAT32).eval())
    with torch.no_grad():
        packed = model(pack([segments] * rows), "each")
        alone = torch.cat([model(pack([[segment]]), "each") for segment in segments] * rows)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    together = gradients(model, [pack([segments] * rows)])
    separate = gradients(model, [pack([[segment]]) for segment in segments] * rows)
    for name, gradient in together.items():
        scale = separate[name].abs().max()
        torch.testing.assert_close(gradient / scale, separate[name] / scale, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_lora_checkpoint_of_a_pretrained_model_is_small(tmp_path):
    """One real step on SmolLM2; weights and both moments of an adapter of rank 4 are below 5 % of the base."""
    directory = smollm2()
    plan = write_plan(tmp_path / "cache", [example([5, 6], [7, 8, 9]), example([10], [11, 12])], max_seq_length=8)
    settings = {"use_lora": True, "lora_r": 4, "max_steps": 1, "gradient_accumulation_steps": 1}
    run = tiny.write_run(tmp_path, model_dir=directory, plan_dir=plan, **settings)
    tiny.train(run, 1)
    written = sum(file.stat().st_size for file in (run / "checkpoints" / "step-000001").iterdir())
    assert written < 0.05 * (directory / "model.safetensors").stat().st_size
