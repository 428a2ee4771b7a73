"""4-bit weights: quantised one tensor at a time, and products with them that survive sharding.

In: a layer of bitsandbytes whose weight is empty, and how to read that weight. Out: the packed weight, as bitsandbytes
keeps it, or as a plain parameter of bytes that an engine may cut into pieces, with `ShardedLinear4bit` in place of the
layer. The constants of a weight (a byte for each 64 numbers) stay whole on every rank: 1/32 of the packed weights.

bitsandbytes' own layer cannot be cut: its weight is a class of tensors that loses its constants when an engine makes
new tensors of it, and its product holds the gathered weight from the forward pass to the backward pass. Ours holds the
parameter, which the engine fills again before the backward pass. Cost: the weight is unpacked twice a step.

Importing this module imports bitsandbytes, up to 20 s on a cold disk.
"""

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

Options = dict[str, Any]  # how a weight is to be quantised, as an empty one says


def quantised(
    options: Options, read: Callable[[], Tensor], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, QuantState]:
    """The packed weight of a layer, ``(bytes, 1) uint8``, and its constants. Memory: the weight once in `dtype`."""
    return quantize_4bit(
        read().to(device, dtype).contiguous(),
        blocksize=options["blocksize"],
        compress_statistics=options["compress_statistics"],
        quant_type=options["quant_type"],
        quant_storage=torch.uint8,
    )


def rounded(options: Options, read: Callable[[], Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a layer multiplies by: its weight to 4 bits and back."""
    return dequantize_4bit(*quantised(options, read, dtype, device))


def whole_weight(layer: Linear4bit, read: Callable[[], Tensor], dtype: torch.dtype, device: torch.device) -> Params4bit:
    """The weight of a layer as bitsandbytes keeps it."""
    options = dict(vars(layer.weight))
    packed, layer.quant_state = quantised(options, read, dtype, device)
    done = {"quant_state": layer.quant_state, "bnb_quantized": True}
    return Params4bit(packed, requires_grad=False, **{**options, **done})


def shardable(
    parameter: nn.Parameter, layer: Linear4bit, read: Callable[[], Tensor], dtype: torch.dtype, device: torch.device
) -> Callable[[], Tensor]:
    """Make a layer's empty weight an empty parameter of bytes; returns what reads these."""

    def read_packed() -> Tensor:
        packed, layer.quant_state = quantised(options, read, dtype, device)
        return packed

    options = dict(vars(parameter))
    num_bytes = (layer.in_features * layer.out_features + 1) // 2
    empty = nn.Parameter(torch.empty(num_bytes, 1, dtype=torch.uint8, device="meta"), requires_grad=False)
    torch.utils.swap_tensors(parameter, empty)
    layer.__class__ = ShardedLinear4bit
    return read_packed


class ShardedLinear4bit(Linear4bit):
    """A layer whose weight is a plain parameter of bytes, whole only while the engine has gathered it.

    For DoRA peft looks at the weight itself. It knows bitsandbytes' own kind of tensor, which this is not, and any
    layer that has `W_q` and `dequantize`, as those of HQQ have: so has this one.
    """

    @property
    def W_q(self) -> Tensor:  # HQQ's name
        return self.weight

    def dequantize(self) -> Tensor:
        return _unpacked(self.weight, self.quant_state, self.compute_dtype)  # type: ignore[arg-type]  # it has been read

    def forward(self, x: Tensor) -> Tensor:
        product = _Product.apply(x.to(self.compute_dtype), self.weight, self.quant_state)
        if self.bias is not None:
            product = product + self.bias.to(product.dtype)
        return product.to(x.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: nn.Parameter, state: QuantState) -> Tensor:
        ctx.weight, ctx.state = weight, state  # not saved by autograd, which would keep the gathered numbers
        return x @ _unpacked(weight, state, x.dtype).t()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ _unpacked(ctx.weight, ctx.state, gradient.dtype), None, None


def _unpacked(weight: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    return dequantize_4bit(weight.detach(), state).to(dtype)
