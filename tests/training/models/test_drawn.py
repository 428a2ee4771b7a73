"""A model from scratch is drawn tensor by tensor: the numbers of a seed are those that transformers draws at once."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from training.models import drawn
from training.models.deferred import Values, check_filled

SIZES = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def made(kind: str, tied: bool) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **SIZES, tie_word_embeddings=tied)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", sorted(drawn.KINDS))
def test_the_numbers_of_a_seed(kind, tied):
    torch.manual_seed(3)
    expected, next_number = made(kind, tied), torch.rand(1)
    torch.manual_seed(3)
    values = Values()
    model = drawn.drawn(kind, lambda: made(kind, tied), values)
    assert torch.equal(torch.rand(1), next_number), "what is drawn afterwards is the same too"
    matrices = {name for name, one in model.named_parameters() if one.dim() > 1}
    assert {name for name, one in model.named_parameters() if one.is_meta} >= matrices
    values.fill(torch.device("cpu"))
    check_filled(model)
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(one, expected.state_dict()[name]) for name, one in model.state_dict().items())


def test_no_more_than_one_layer_is_there_at_a_time(monkeypatch):
    """Every module that is drawn is looked at: none before it has kept its numbers."""
    alive = []
    draw = drawn._filled

    def looked_at(model, module, likes):
        alive.append(sum(one.numel() for one in model.parameters() if not one.is_meta and one.dim() > 1))
        return draw(model, module, likes)

    monkeypatch.setattr(drawn, "_filled", looked_at)
    drawn.drawn("llama", lambda: made("llama", False), Values())
    assert len(alive) == 2 * 7 + 2 and not any(alive)


def test_other_kinds_are_made_whole():
    values = Values()
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=4, vocab_size=48)
    model = drawn.drawn("gpt2", lambda: AutoModelForCausalLM.from_config(config), values)
    assert not values and not any(one.is_meta for one in model.parameters())
