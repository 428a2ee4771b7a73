"""Losses of targets: which hidden states are used, isolation of packed segments, gradients of padding."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data_prep.plan.reader import Batch
from training.models.loss import CausalLMLoss, has_plain_head, micro_batch
from training.trainer.packing_check import pack, random_segments

VOCABULARY = 61


def tiny(model_type: str = "llama", **changes) -> CausalLMLoss:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        model_type, **{**sizes, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "pad_token_id": 0, **changes}
    )
    return CausalLMLoss(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).eval()


def literal_batch() -> Batch:
    """The row drawn in `data_prep.plan.reader`, and an all-padding row."""
    return Batch(
        input_ids=np.array([[5, 6, 7, 8, 1, 9, 10, 0, 0], [0] * 9]),
        labels=np.array([[-100, -100, 7, 8, 1, -100, 10, -100, -100], [-100] * 9]),
        position_ids=np.array([[0, 1, 2, 3, 4, 0, 1, 0, 1], list(range(9))]),
        sources=np.array([[0, 0, 0, 0, 0, 1, 1, -1, -1], [-1] * 9], dtype=np.int8),
    )


def test_positions_that_predict_a_target():
    batch = micro_batch(literal_batch(), [3, -1])
    assert batch.predictors.tolist() == [1, 2, 3, 5]
    assert batch.targets.tolist() == [7, 8, 1, 10]
    assert batch.sources.tolist() == [0, 0, 0, 1]
    assert batch.rows == (3, -1)


def test_losses_are_those_of_the_models_own_loss():
    model, arrays = tiny(), literal_batch()
    batch = micro_batch(arrays, [0, -1])
    own = model.model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        labels=torch.from_numpy(arrays.labels),
    ).loss
    torch.testing.assert_close(model(batch, "each").mean(), own)
    torch.testing.assert_close(model(batch)[0] / 4, own)
    torch.testing.assert_close(model(batch)[1], model(batch, "each"))
    torch.testing.assert_close(model(batch, "reference").mean(), own)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "gpt_neox"])
@pytest.mark.parametrize("rows", [1, 2])
def test_packed_equals_unpacked_in_losses_and_gradients(model_type, rows):
    model, segments = tiny(model_type), random_segments(VOCABULARY)
    packed = pack([segments] * rows)
    losses = model(packed, "each")
    alone = torch.cat([model(pack([[segment]]), "each") for segment in segments] * rows)
    torch.testing.assert_close(losses, alone, rtol=1e-4, atol=1e-5)
    together = gradients(model, [packed])
    separate = gradients(model, [pack([[segment]]) for segment in segments] * rows)
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, separate[name], rtol=1e-4, atol=1e-5)
    assert max(gradient.abs().max() for gradient in together.values()) > 0.1


def test_the_isolation_test_is_not_vacuous():
    """Positions that do not restart, as in a row that is one document, give other losses."""
    model, segments = tiny(), random_segments(VOCABULARY)
    packed = pack([segments])
    packed.position_ids.copy_(torch.arange(packed.input_ids.shape[1]))
    alone = torch.cat([model(pack([[segment]]), "each") for segment in segments])
    assert (model(packed, "each") - alone).abs().max() > 1e-3


def gradients(model: CausalLMLoss, batches: list) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for batch in batches:
        model(batch)[0].backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_an_all_padding_micro_batch_contributes_exactly_nothing():
    model = tiny()
    arrays = literal_batch()
    padding = Batch(*(getattr(arrays, name)[1:] for name in ("input_ids", "labels", "position_ids", "sources")))
    loss, each = model(micro_batch(padding, [-1]))
    loss.backward()
    assert loss.item() == 0.0 and each.shape == (0,)
    assert all(parameter.grad is not None for parameter in model.parameters()), "an engine would wait for this rank"
    assert all(parameter.grad.abs().max() == 0 for parameter in model.parameters())


def test_gradients_of_the_loss_equal_those_through_all_logits():
    model, arrays = tiny(tie_word_embeddings=True), literal_batch()
    batch = micro_batch(arrays, [0, -1])
    ours = gradients(model, [batch])
    model.zero_grad()
    logits = model.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    shifted = torch.from_numpy(arrays.labels)[:, 1:].flatten()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), shifted, reduction="sum").backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_rows_laid_end_to_end_as_for_flash_attention_give_the_same():
    model = tiny()
    batch = micro_batch(literal_batch(), [0, -1])
    each, reference = model(batch, "each"), model(batch, "reference")
    model.one_row = True
    torch.testing.assert_close(model(batch, "each"), each)
    torch.testing.assert_close(model(batch, "reference"), reference)


def test_models_that_do_more_in_their_head_use_it():
    capped = tiny("gemma2", head_dim=8, final_logit_softcapping=1.0)
    assert capped.head is None
    assert not has_plain_head(capped.model)
    batch = micro_batch(literal_batch(), [0, -1])
    total, each = capped(batch)
    torch.testing.assert_close(total, each.sum())
    assert torch.equal(each, capped(batch, "reference"))
    padding = pack([[np.array([3])]])
    total, each = capped(padding)
    assert total.item() == 0.0 and each.shape == (0,)
