"""A causal language model that returns losses of target tokens, and the micro-batch it takes.

In: a transformers model (or a peft wrapper), arrays of the reader. Out: the summed loss of a micro-batch and one loss a
target. Packed segments are isolated because `position_ids` restart and **no attention mask and no cache** is given:
only then does transformers build the block-diagonal mask. The output layer sees only the hidden states that predict a
target (label t is predicted by position t - 1)::

    labels          -100 -100  C   D  </s> -100   Y      hidden states used   1  2  3  5

An all-padding micro-batch has no targets: its loss and all its gradients are exactly 0.

The output layer and its cross-entropy are one function (`summed_cross_entropy`), so that the logits of all targets
never exist at once: only those of a chunk, at most `CHUNK_ELEMENTS` numbers. Training computes the gradients of hidden
states and weight in the forward pass, chunk by chunk, because there the logits are at hand: three matrix products in
all, as without chunks; recomputing the logits in the backward pass would make it four. Cross-entropy is float32. Cost:
one forward pass, and one buffer as large as the head's weight for its gradient, which training needs anyway.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from data_prep.plan.reader import Batch

CHUNK_ELEMENTS = 1 << 24  # 64 MiB of float32 logits: 340 targets of a vocabulary of 49k, 131 of 128k


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of ``hidden @ weight.T`` for training, without ever holding all of these logits.

    :param hidden: ``(num_targets, hidden)``, of the positions that predict a target
    :param weight: ``(vocabulary, hidden)``
    :param targets: ``(num_targets,) int64``
    :returns: float32: the sum, which has gradients and is 0 without targets; one loss a target, which has none
    """
    return _SummedLoss.apply(hidden, weight, targets)


def cross_entropies(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """One loss a target, without gradients: ``(num_targets,) float32``. As `summed_cross_entropy`."""
    losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    for chunk in _chunks(len(targets), len(weight)):
        logits = _logits(hidden[chunk], weight)
        losses[chunk] = torch.nn.functional.cross_entropy(logits, targets[chunk], reduction="none")
    return losses


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for chunk in _chunks(len(targets), len(weight)):
            logits = _logits(hidden[chunk], weight)
            losses[chunk] = _losses_and_gradient(logits, targets[chunk])
            total += losses[chunk].sum()
            gradient = logits.to(weight.dtype)
            grad_hidden[chunk] = (gradient @ weight).to(hidden.dtype)
            if grad_weight is not None:
                _add_product(grad_weight, gradient.t(), hidden[chunk].to(weight.dtype))
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    def backward(ctx, grad_total: Tensor, _: None) -> tuple[Tensor, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # a float32 scalar times bfloat16 is bfloat16, rounded once
        return grad_hidden * grad_total, None if grad_weight is None else grad_weight * grad_total, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` in float32, whatever the factors are in: their product is rounded, the sum is not."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _chunks(num_targets: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return (slice(start, start + size) for start in range(0, num_targets, size))


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden.to(weight.dtype) @ weight.t()).float()


def _losses_and_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropies; ``logits`` become the gradient of their sum in place: softmax minus one at the target."""
    rows = torch.arange(len(targets), device=logits.device)
    log_normaliser = logits.logsumexp(dim=1)
    losses = log_normaliser - logits[rows, targets]
    logits.sub_(log_normaliser.unsqueeze(1)).exp_()
    logits[rows, targets] -= 1
    return losses


Mode = Literal["sum", "each", "reference"]  # reference: each, through the model's own output layer


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of one rank needs. B rows of T tokens, N targets."""

    rows: tuple[int, ...]  # (B,) rows of the plan; -1 = all padding
    input_ids: Tensor  # (B, T) int64
    position_ids: Tensor  # (B, T) int64, restart at every segment
    predictors: Tensor  # (N,) int64, flat index b * T + t of the hidden state that predicts a target
    targets: Tensor  # (N,) int64
    sources: Tensor  # (N,) int64, source of each target
    segments: np.ndarray  # (N,) int64, b * T + the number of the target's segment in its row, from 0

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device (tensors only)."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "MicroBatch":
        """The same in memory from which a GPU copies while it computes."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        names = ("input_ids", "position_ids", "predictors", "targets", "sources")
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        return replace(self, **changed)


def micro_batch(batch: Batch, rows: Iterable[int]) -> MicroBatch:
    """Arrays of the reader as tensors, with the positions of the targets worked out."""
    places = np.flatnonzero(batch.labels != -100)  # never column 0: the first token of a segment is no target
    length = batch.input_ids.shape[1]
    numbers = np.cumsum(batch.position_ids == 0, axis=1) - 1  # of the segment in its row: it begins at position 0
    return MicroBatch(
        rows=tuple(int(row) for row in rows),
        input_ids=torch.from_numpy(batch.input_ids),
        position_ids=torch.from_numpy(batch.position_ids),
        predictors=torch.from_numpy(places - 1),
        targets=torch.from_numpy(batch.labels.ravel()[places]),
        sources=torch.from_numpy(batch.sources.ravel()[places].astype(np.int64)),
        segments=numbers.ravel()[places] + places // length * length,
    )


class CausalLMLoss(nn.Module):
    """A causal language model that returns losses of targets instead of logits.

    With FlashAttention the rows of a micro-batch are laid end to end into one: its kernel for packed sequences is used
    at batch size 1 only, and positions restart at every row anyway.

    `head` is the output layer's weight when the model's logits are nothing but ``hidden @ weight.T``; models that do
    more (bias, soft-capping, scaling, adapter on the head) go through their own forward pass with `logits_to_keep`.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model
        causal = causal_model(model)
        self.one_row = str(causal.config._attn_implementation).startswith("flash")
        self.has_plain_head = has_plain_head(causal)
        for layer in layers_of(causal.get_output_embeddings()) if self.has_plain_head else ():
            layer.__class__ = _head_of(type(layer))  # type: ignore[arg-type]  # a class is hashable

    @property
    def head(self) -> Any:
        """The output layer in use, where the logits are nothing but its product."""
        return output_layer(causal_model(self.model)) if self.has_plain_head else None

    def forward(self, batch: MicroBatch, mode: Mode = "sum") -> Any:
        """Loss of the targets: (sum, one a target), the first of which has gradients: a scalar and ``(N,) float32``.

        With `each` and `reference` the latter alone.
        """
        if mode == "reference" or self.head is None:
            losses = self._through_own_head(batch)
            each = losses.detach()[: len(batch.targets)]
            return (losses.sum(), each) if mode == "sum" else each
        shape = (1, -1) if self.one_row else batch.input_ids.shape
        hidden = causal_model(self.model).get_decoder()(
            input_ids=batch.input_ids.view(shape),
            position_ids=batch.position_ids.view(shape),
            attention_mask=None,
            use_cache=False,
        )
        chosen = hidden.last_hidden_state.flatten(0, 1).index_select(0, batch.predictors)
        return self.head(chosen, batch.targets, mode)

    def _through_own_head(self, batch: MicroBatch) -> Tensor:
        """Each target's loss through the model's own forward pass: logits at the columns that predict in any row.

        Without a target a single 0, which has gradients.
        """
        shape = (1, -1) if self.one_row else batch.input_ids.shape
        length = batch.input_ids.view(shape).shape[1]
        columns, place = torch.unique(batch.predictors % length, return_inverse=True)
        logits = self.model(
            input_ids=batch.input_ids.view(shape),
            position_ids=batch.position_ids.view(shape),
            attention_mask=None,
            use_cache=False,
            logits_to_keep=columns if len(columns) else 1,  # no column at all would mean every column
        ).logits
        if not len(columns):
            return logits.flatten()[:1] * 0  # keeps the graph: every rank has gradients, all 0
        chosen = logits[batch.predictors // length, place].float()
        return nn.functional.cross_entropy(chosen, batch.targets, reduction="none")


class _Head(nn.Linear):
    """The model's output layer, which gives losses too: one module, that engines gather when it is needed."""

    def forward(self, hidden: Tensor, targets: Tensor | None = None, mode: Mode = "sum") -> Any:
        """Logits; with targets their losses."""
        if targets is None:
            return super().forward(hidden)
        return _losses(hidden, self.weight, targets, mode)


def _losses(hidden: Tensor, weight: Tensor, targets: Tensor, mode: Mode) -> Any:
    """What `CausalLMLoss` returns."""
    return (summed_cross_entropy if mode == "sum" else cross_entropies)(hidden, weight, targets)


@cache
def _head_of(kind: type) -> type:
    """An output layer that gives losses too, in place of `kind`: torch's, or peft's that has rows of its own."""
    if kind in (nn.Linear, _Head):
        return _Head

    class HeadWithRows(kind):  # type: ignore[misc, valid-type]  # peft's, which is imported where it is used
        def forward(self, hidden: Tensor, targets: Tensor | None = None, mode: Mode = "sum") -> Any:
            if targets is None:
                return super().forward(hidden)
            weight = self.weight if self.disable_adapters else self.get_merged_weights(self.active_adapters)
            return _losses(hidden, weight, targets, mode)

    return HeadWithRows


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model below a peft wrapper, or the model itself."""
    whole: Any = model
    return whole.get_base_model() if hasattr(whole, "get_base_model") else whole


def output_layer(causal: PreTrainedModel) -> Any:
    """The layer that the logits come from: of an adapter that has one of its own, that one."""
    layer: Any = causal.get_output_embeddings()
    if not hasattr(layer, "modules_to_save"):
        return getattr(layer, "token_adapter", layer)
    active = [] if layer.disable_adapters else layer.active_adapters
    return layer.modules_to_save[active[0]] if active else layer.original_module


def layers_of(layer: Any) -> list[Any]:
    """Embedding or output layer, and those that adapters have in its place; or the one that has rows of its own."""
    if hasattr(layer, "modules_to_save"):
        return [layer.original_module, *layer.modules_to_save.values()]
    return [getattr(layer, "token_adapter", layer)]


LOGIT_EXTRAS = {  # what some models do to logits -> values that do nothing
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "lm_head_multiplier": (None, 1),
}


def has_plain_head(causal: PreTrainedModel) -> bool:
    """True when logits are ``hidden @ weight.T``; `packing_check.check` compares the two ways at start-up as well."""
    head = output_layer(causal)
    extras = [name for name, neutral in LOGIT_EXTRAS.items() if getattr(causal.config, name, None) not in neutral]
    linear = head.base_layer if hasattr(head, "trainable_tokens_delta") else head
    return type(linear) in (nn.Linear, _Head) and linear.bias is None and not extras
