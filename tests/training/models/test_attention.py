"""Attention by segment equals sdpa with its mask, in losses and gradients, for every kind of model listed."""

import pytest
import torch

from tests.training.models.test_loss import VOCABULARY, gradients, literal_batch, tiny
from training.models import attention
from training.models.loss import causal_model, micro_batch
from training.trainer.packing_check import pack, random_segments

EXTRA = {"mistral": {"sliding_window": None}, "phi3": {"pad_token_id": 0}, "smollm3": {"pad_token_id": 0}}


@pytest.mark.parametrize("model_type", sorted(attention.PLAIN))
def test_equals_sdpa(model_type):
    model = tiny(model_type, **EXTRA.get(model_type, {}))
    assert attention.fits(causal_model(model.model).config)
    batches = [pack([random_segments(VOCABULARY)] * 2), micro_batch(literal_batch(), [0, -1])]
    expected = [model(batch, "each") for batch in batches], gradients(model, batches)
    attention.use(model.model)
    assert model.model.config._attn_implementation == attention.NAME
    torch.testing.assert_close([model(batch, "each") for batch in batches], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(model, batches), expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "changes"), [("mistral", {"sliding_window": 8}), ("gemma2", {"head_dim": 8}), ("gpt_neox", {})]
)
def test_models_whose_attention_is_not_plain_keep_their_own(model_type, changes):
    assert not attention.fits(tiny(model_type, **changes).model.config)


def test_sizes():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])
    assert attention.segment_sizes(positions) == [3, 2, 5, 1, 1, 3]


def test_the_saved_configuration_does_not_name_it(tmp_path):
    model = tiny().model
    attention.use(model)
    model.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()
