"""Attention over packed rows, one segment at a time: on a CPU the work that a mask would throw away is not done.

In: queries, keys, values of rows whose `position_ids` restart at every segment. Out: what causal attention within each
segment gives. transformers' sdpa builds a mask of length x length for a packed row and computes all of it; a row of
2,048 tokens in 20 segments needs a twentieth. Segments are isolated by construction here, no mask exists. On GPUs
FlashAttention does this better. Cost: one call of torch's attention a segment and layer, about 50 us each.

For models whose attention is plain: no window, no bias, no soft cap, no sinks (`fits`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

NAME = "segments"


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """``(rows, heads, length, size)`` each -> ``(rows, length, heads, size)``."""
    assert attention_mask is None, "segments are known from position_ids"
    sizes = segment_sizes(options["position_ids"])
    scale, dropout = options.get("scaling"), options.get("dropout", 0.0)
    pieces = [_flat(tensor).split(sizes, dim=1) for tensor in (query, key, value)]
    grouped = query.shape[1] != key.shape[1]
    outputs = [
        nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped
        )[0]
        for q, k, v in zip(*pieces, strict=True)
    ]
    joined = torch.cat(outputs, dim=1).transpose(0, 1)  # (rows * length, heads, size)
    return joined.reshape(query.shape[0], query.shape[2], query.shape[1], -1), None


def _flat(tensor: Tensor) -> Tensor:
    """Rows laid end to end: ``(heads, rows * length, size)``."""
    return tensor.transpose(0, 1).flatten(1, 2)


def segment_sizes(position_ids: Tensor) -> list[int]:
    """Lengths of the segments of all rows, in order; each begins at a 0 and a row never shares one with the next."""
    starts = (position_ids.flatten() == 0).nonzero().flatten().tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], position_ids.numel()], strict=True)]


def fits(config: PreTrainedConfig) -> bool:
    """True for models whose layers are all plain causal attention that transformers runs through sdpa."""
    layers = getattr(config, "layer_types", None) or []
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return (
        config._attn_implementation == "sdpa"
        and not windowed
        and all(layer == "full_attention" for layer in layers)
        and config.model_type in PLAIN
    )


PLAIN = frozenset(("llama", "qwen2", "qwen3", "mistral", "olmo", "olmo2", "granite", "phi3", "smollm3"))
"""Kinds of models that were compared with sdpa (`tests/training/models/test_attention.py`)."""


def use(model: PreTrainedModel) -> None:
    """Switch a model to this attention."""
    AttentionInterface.register(NAME, attention)
    model.set_attn_implementation(NAME)
