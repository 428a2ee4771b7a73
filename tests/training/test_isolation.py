"""The check at start-up lets isolated models pass and refuses the others."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.training.test_target_loss import VOCABULARY, tiny
from training.errors import ModelError
from training.isolation import Facts, check
from training.ranks import Ranks
from training.target_loss import TargetLoss

RANKS = Ranks(0, 0, 1, torch.device("cpu"))


def facts(packing: bool = True, micro_batch: int = 1) -> Facts:
    return Facts(VOCABULARY, packing, micro_batch, torch.float32)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_an_attention_model_passes(micro_batch):
    check(tiny(), facts(micro_batch=micro_batch), RANKS)


def test_a_recurrent_model_is_refused_when_rows_are_packed():
    torch.manual_seed(0)
    config = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY, state_size=4)
    model = TargetLoss(AutoModelForCausalLM.from_config(config)).eval()
    with pytest.raises(ModelError, match=r"not isolated.*--packing false"):
        check(model, facts(), RANKS)
    check(model, facts(packing=False), RANKS)


def test_a_head_that_does_more_is_noticed():
    model = tiny()
    model.head.weight = torch.nn.Parameter(model.head.weight * 2)
    with pytest.raises(ModelError, match="output layer does more"):
        check(model, facts(), RANKS)
