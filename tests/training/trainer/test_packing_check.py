"""The check at start-up lets isolated models pass and refuses the others."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.smollm2 import smollm2
from tests.training.models.test_loss import VOCABULARY, tiny
from training.distributed import Ranks
from training.errors import ModelError
from training.models.loss import CausalLMLoss
from training.trainer.packing_check import Checked, check

RANKS = Ranks(0, 0, 1, torch.device("cpu"))


def facts(packing: bool = True, micro_batch: int = 1, dtype: torch.dtype = torch.float32) -> Checked:
    return Checked(VOCABULARY, packing, micro_batch, dtype)


def from_scratch(model_type: str, **sizes) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=VOCABULARY, **sizes)
    return AutoModelForCausalLM.from_config(config)


def mamba() -> torch.nn.Module:
    return from_scratch("mamba", hidden_size=32, num_hidden_layers=2, state_size=4)


def mixtral() -> torch.nn.Module:
    return from_scratch(
        "mixtral", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip


def bloom() -> torch.nn.Module:
    """Positions are in its attention: it takes no `position_ids`, and what a segment sees does not end at its start."""
    return from_scratch("bloom", hidden_size=64, n_layer=2, n_head=4)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_an_attention_model_passes(micro_batch):
    check(tiny(), facts(micro_batch=micro_batch), RANKS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_pass(dtype):
    """Their matrix products depend on how many tokens each expert gets: that must not look like a leak."""
    check(CausalLMLoss(mixtral().to(dtype)).eval(), facts(micro_batch=2, dtype=dtype), RANKS)


@pytest.mark.slow
def test_a_pretrained_model_passes_in_bfloat16():
    """Thirty layers of rounding: alone, a token's loss differs by up to 0.2 from the same in a packed row."""
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.bfloat16)
    vocabulary = model.config.vocab_size
    check(CausalLMLoss(model).eval(), Checked(vocabulary, packing=True, micro_batch=2, dtype=torch.bfloat16), RANKS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [mamba, bloom])
def test_a_model_that_mixes_segments_is_refused_when_rows_are_packed(build, dtype):
    model = CausalLMLoss(build().to(dtype)).eval()
    with pytest.raises(ModelError, match=r"not isolated.*--packing false"):
        check(model, facts(dtype=dtype), RANKS)
    check(model, facts(packing=False, dtype=dtype), RANKS)


def test_a_head_that_does_more_is_noticed():
    model = tiny()
    model.head.register_forward_pre_hook(lambda head, inputs: (inputs[0] * 2, *inputs[1:]) if inputs[1:] else None)
    with pytest.raises(ModelError, match="output layer does more"):
        check(model, facts(), RANKS)
