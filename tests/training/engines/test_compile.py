"""Compiled layers give the losses and gradients of plain ones."""

import pytest
import torch

from tests.training.models.test_loss import VOCABULARY, gradients, tiny
from training.engines.engine import decoder_layers
from training.models import attention
from training.trainer.packing_check import pack, random_segments

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("by_segment", [True, False], ids=["segments", "mask"])
def test_equal(by_segment):
    model = tiny("llama")
    if by_segment:
        attention.use(model.model)
    batch = pack([random_segments(VOCABULARY)] * 2)
    expected = model(batch, "each"), gradients(model, [batch])
    for layer in decoder_layers(model):
        layer.compile()
    torch.testing.assert_close(model(batch, "each"), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(model, [batch]), expected[1], rtol=1e-4, atol=1e-5)
