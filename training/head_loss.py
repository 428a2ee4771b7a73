"""Cross-entropy of the target tokens without ever holding their logits.

In: hidden states ``(num_targets, hidden)`` of the positions that predict a target, the weight of the output layer
``(vocabulary, hidden)``, the target ids ``(num_targets,) int64``. Out: the summed loss (training) or one loss a token
(evaluation). Logits exist for one chunk of targets at a time, at most `CHUNK_ELEMENTS` numbers.

Training computes the gradients of hidden states and weight in the forward pass, chunk by chunk, because there the
logits are at hand: three matrix products in all, as without chunks; recomputing the logits in the backward pass would
make it four. Cost: one buffer as large as the weight for its gradient, which training needs anyway. Cross-entropy is
float32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24  # 64 MiB of float32 logits: 340 targets of a vocabulary of 49k, 131 of 128k


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each target: ``(num_targets,) float32``; no gradients."""
    losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    for chunk in _chunks(len(targets), len(weight)):
        logits = _logits(hidden[chunk], weight)
        losses[chunk] = torch.nn.functional.cross_entropy(logits, targets[chunk], reduction="none")
    return losses


def summed_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropy over the targets, a scalar float32 that has gradients. Without targets it is 0."""
    return _SummedLoss.apply(hidden, weight, targets)


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for chunk in _chunks(len(targets), len(weight)):
            logits = _logits(hidden[chunk], weight)
            total += _loss_and_gradient(logits, targets[chunk])
            gradient = logits.to(weight.dtype)
            grad_hidden[chunk] = (gradient @ weight).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(gradient.t(), hidden[chunk].to(weight.dtype))
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor) -> tuple[Tensor, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = grad_weight * grad_total.to(grad_weight.dtype)
        return grad_hidden * grad_total.to(grad_hidden.dtype), grad_weight, None


def _chunks(num_targets: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return (slice(start, start + size) for start in range(0, num_targets, size))


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden.to(weight.dtype) @ weight.t()).float()


def _loss_and_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy; ``logits`` become its gradient in place: softmax minus one at the target."""
    rows = torch.arange(len(targets), device=logits.device)
    log_normaliser = logits.logsumexp(dim=1)
    loss = (log_normaliser - logits[rows, targets]).sum()
    logits.sub_(log_normaliser.unsqueeze(1)).exp_()
    logits[rows, targets] -= 1
    return loss
