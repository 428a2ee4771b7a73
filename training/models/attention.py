"""Attention over packed rows, one segment at a time: the work that a mask would throw away is not done.

In: queries, keys, values of rows whose `position_ids` restart at every segment. Out: what causal attention within each
segment gives. transformers' sdpa builds a mask of length x length for a packed row and computes all of it; a row of
2,048 tokens in 20 segments needs a twentieth. Segments are isolated by construction here, no mask exists. Cost: one
call of torch's attention a segment and layer, about 50 us each. On GPUs one call for all segments: torch has a kernel
for sequences of any lengths (FlashAttention's, but without the package `flash_attn`, in 16 bits only).

For models whose attention is plain: no window, no bias, no soft cap, no sinks (`fits`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import varlen
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

NAME = "segments"


@torch.compiler.disable  # lengths of segments are data: the rest of a layer is compiled, this would be again and again
def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """``(rows, heads, length, size)`` each -> ``(rows, length, heads, size)``."""
    assert attention_mask is None, "segments are known from position_ids"
    positions, dropout = options["position_ids"], options.get("dropout", 0.0)
    common: dict[str, Any] = {"scale": options.get("scaling"), "enable_gqa": query.shape[1] != key.shape[1]}
    q, k, v = (tensor.transpose(0, 1).flatten(1, 2) for tensor in (query, key, value))  # (heads, tokens, size)
    if has_kernel(query) and not dropout:
        joined = _in_one_call(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), positions, **common)
    else:
        attend, sizes = nn.functional.scaled_dot_product_attention, segment_sizes(positions)
        outputs = [
            attend(q[None], k[None], v[None], dropout_p=dropout, is_causal=True, **common)[0]
            for q, k, v in zip(q.split(sizes, 1), k.split(sizes, 1), v.split(sizes, 1), strict=True)
        ]
        joined = torch.cat(outputs, dim=1).transpose(0, 1)  # (tokens, heads, size)
    return joined.reshape(query.shape[0], query.shape[2], query.shape[1], -1), None


def has_kernel(query: Tensor) -> bool:
    """Whether torch's kernel for sequences of any lengths takes this."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0


def _in_one_call(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, **common: Any) -> Tensor:
    """``(tokens, heads, size)`` each -> the same; causal is a window of everything before and nothing after."""
    bounds = segment_bounds(positions)
    longest = positions.shape[-1]  # an upper bound: the true one would make the CPU wait for the GPU
    result: Any = varlen.varlen_attn(  # a tuple, were more asked for
        query, key, value, bounds, bounds, longest, longest, window_size=(-1, 0), **common
    )
    return result


def segment_bounds(position_ids: Tensor) -> Tensor:
    """Where segments begin in rows laid end to end, and the end of the last: ``(segments + 1,) int32``.

    Kept with the positions, which are the same object in every layer: finding the zeros makes the CPU wait for the GPU.
    """
    known = getattr(position_ids, "segment_bounds", None)
    if known is None:
        starts = (position_ids.flatten() == 0).nonzero().flatten()
        known = nn.functional.pad(starts, (0, 1), value=position_ids.numel()).to(torch.int32)
        position_ids.segment_bounds = known  # type: ignore[attr-defined]  # an attribute of ours
    return known


def segment_sizes(position_ids: Tensor) -> list[int]:
    """Lengths of the segments of all rows, in order; each begins at a 0 and a row never shares one with the next."""
    return segment_bounds(position_ids).diff().tolist()


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
