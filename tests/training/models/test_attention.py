"""Attention by segment equals sdpa with its mask, in losses and gradients, for every kind of model listed."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

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


def one_by_one(query, key, value, *lengths, scale, window_size, enable_gqa):
    """What torch's documentation says of its kernel, which runs on GPUs only."""
    bounds, same, longest, _ = lengths
    assert bounds is same and bounds.dtype == torch.int32 and int(bounds.diff().max()) <= longest
    assert window_size == (-1, 0) and enable_gqa == (query.shape[1] != key.shape[1])
    pieces = zip(
        *(part.transpose(0, 1).split(bounds.diff().tolist(), dim=1) for part in (query, key, value)), strict=True
    )
    attend = torch.nn.functional.scaled_dot_product_attention
    outputs = [attend(*piece, is_causal=True, scale=scale, enable_gqa=enable_gqa) for piece in pieces]
    return torch.cat(outputs, dim=1).transpose(0, 1)


def test_one_call_for_all_segments_gives_the_same(monkeypatch):
    model = tiny("llama")
    attention.use(model.model)
    batches = [pack([random_segments(VOCABULARY)] * 2), micro_batch(literal_batch(), [0, -1])]
    expected = [model(batch, "each") for batch in batches], gradients(model, batches)
    calls = []
    monkeypatch.setattr(attention, "has_kernel", lambda query: True)
    monkeypatch.setattr(attention.varlen, "varlen_attn", lambda *a, **k: calls.append(1) or one_by_one(*a, **k))
    torch.testing.assert_close([model(batch, "each") for batch in batches], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(model, batches), expected[1], rtol=1e-4, atol=1e-5)
    assert len(calls) >= 4


def test_torchs_kernel_takes_what_it_is_given():
    """By its own description of shapes and types; numbers only a GPU can show (`make gpu-check`)."""
    with FakeTensorMode():
        query, key = (torch.empty(2, heads, 5, 16, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
        bounds = torch.empty(4, dtype=torch.int32, device="meta")
        flat = [tensor.transpose(0, 1).flatten(1, 2).transpose(0, 1) for tensor in (query, key, key)]
        out = attention.varlen.varlen_attn(*flat, bounds, bounds, 5, 5, window_size=(-1, 0), enable_gqa=True)
    assert out.shape == (10, 4, 16)


def test_sizes():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])
    assert attention.segment_sizes(positions) == [3, 2, 5, 1, 1, 3]


def test_the_saved_configuration_does_not_name_it(tmp_path):
    model = tiny().model
    attention.use(model)
    model.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()
