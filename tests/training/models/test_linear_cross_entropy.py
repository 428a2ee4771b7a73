"""The chunked loss equals the plain one, in value and in gradients."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from training.models.loss import CHUNK_ELEMENTS, cross_entropies, summed_cross_entropy

HIDDEN, VOCABULARY = 8, 21


def make(num_targets: int):
    torch.manual_seed(0)
    hidden = torch.randn(num_targets, HIDDEN, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, requires_grad=True)
    return hidden, weight, torch.randint(0, VOCABULARY, (num_targets,))


@pytest.mark.parametrize("chunk_elements", [1, VOCABULARY * 4, VOCABULARY * 5, 1 << 24])
@pytest.mark.parametrize("num_targets", [1, 4, 13])
def test_loss_and_gradients_equal_those_of_the_plain_loss(monkeypatch, chunk_elements, num_targets):
    monkeypatch.setattr("training.models.loss.CHUNK_ELEMENTS", chunk_elements)
    hidden, weight, targets = make(num_targets)
    plain = cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    expected = torch.autograd.grad(plain * 3, (hidden, weight))
    loss, losses = summed_cross_entropy(hidden, weight, targets)
    gradients = torch.autograd.grad(loss * 3, (hidden, weight))
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses, cross_entropies(hidden.detach(), weight.detach(), targets))
    assert not losses.requires_grad
    torch.testing.assert_close(losses.sum(), plain)


def test_no_targets_is_exactly_zero_with_zero_gradients():
    hidden, weight, targets = make(0)
    loss, _ = summed_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.item() == 0.0
    assert weight.grad.abs().max() == 0.0


def test_a_frozen_weight_gets_no_gradient_buffer():
    hidden, weight, targets = make(5)
    frozen = weight.detach()
    loss, _ = summed_cross_entropy(hidden, frozen, targets)
    assert loss.grad_fn.saved_tensors[1] is None
    loss.backward()
    assert hidden.grad.abs().max() > 0


def test_logits_of_all_targets_never_exist_at_once():
    """128 k words, 4,096 targets: all logits would be 2 GiB; the largest tensor made stays below 2 chunks."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    hidden = torch.randn(4096, 4, requires_grad=True)
    weight = torch.randn(128_000, 4)
    with Watch():
        summed_cross_entropy(hidden, weight, torch.zeros(4096, dtype=torch.int64))[0].backward()
    assert 0 < largest <= 2 * CHUNK_ELEMENTS


def test_chunks_are_added_up_in_float32(monkeypatch):
    """64 chunks of the same bfloat16 numbers: exactly 64 times one of them."""
    monkeypatch.setattr("training.models.loss.CHUNK_ELEMENTS", VOCABULARY * 4)
    hidden, weight, targets = (value.detach() for value in make(4))
    weight = weight.bfloat16().requires_grad_()
    gradients = [
        torch.autograd.grad(
            summed_cross_entropy(hidden.bfloat16().repeat(times, 1), weight, targets.repeat(times))[0], weight
        )[0]
        for times in (1, 64)
    ]
    assert torch.equal(gradients[1], gradients[0] * 64)


def test_bfloat16_loss_is_computed_in_float32():
    hidden, weight, targets = make(6)
    loss, _ = summed_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cross_entropy(hidden @ weight.t(), targets, reduction="sum"), rtol=0.02, atol=0.1)
