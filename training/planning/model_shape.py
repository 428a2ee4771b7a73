"""What a model weighs, found without weights: its parameters and what autograd would keep of a forward pass.

In: the model's configuration and the training settings. Out: `ModelShape`. The model is built on torch's meta device,
where tensors have shapes and no memory, and one row is run through it; what autograd saves is added up. Attention is
replaced by a function that saves what the real kernels save, because the meta device would choose another kernel.
Cost: importing transformers (~4 s), then about a second for 65B.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from training.models.adapter import add_adapter
from training.models.build import config_of
from training.models.loss import causal_model, has_plain_head, output_layer
from training.settings import TrainSettings

STAND_IN = "panda_shape"


@dataclass(frozen=True)
class ModelShape:
    """Counts are parameters (shared ones once), sizes are bytes of one row of `num_tokens` tokens."""

    parameters: int
    trainable: int
    quantised: int  # of them in 4 bits
    num_layers: int
    largest_layer: int  # parameters of the largest decoder layer
    largest_matrix: int  # parameters of the largest linear layer inside the decoder
    vocabulary: int
    hidden_size: int
    trains_head: bool
    plain_head: bool  # logits exist for one chunk of targets at a time
    num_tokens: int
    saved_bytes: int  # what autograd keeps of the whole decoder
    checkpoint_bytes: int  # what it keeps with gradient checkpointing: the input of every layer

    @property
    def layer_bytes(self) -> int:
        """What autograd keeps of one layer."""
        return self.saved_bytes // max(1, self.num_layers)


def config_from(model_dir: Path | None, architecture: dict[str, Any] | None) -> PreTrainedConfig:
    """The model's configuration: that of the checkpoint, else the one the settings state."""
    if model_dir is not None and (model_dir / "config.json").is_file():
        return AutoConfig.for_model(**json.loads((model_dir / "config.json").read_text(encoding="utf-8")))
    return config_of(dict(architecture or {}))


def measure(
    config: PreTrainedConfig, settings: TrainSettings, num_tokens: int, dtype: torch.dtype, packed: bool
) -> ModelShape:
    """Build the model on the meta device and run a row of `num_tokens` tokens through it."""
    with torch.device("meta"), stand_in(kernel_of(settings, config), packed):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=STAND_IN)
        model.config.use_cache = False
        quantised = _linear_parameters(model) if settings.use_quant else 0
        if settings.use_lora:
            model = add_adapter(model, settings, rows=range(len(settings.add_tokens or ())))
            if settings.strategy == "fsdp" or settings.zero_stage:  # which compute with adapters in the model's type
                model.to(dtype)
        causal: Any = causal_model(model)
        saved = _saved_by_autograd(model, num_tokens)
    layers = _layers(causal)
    head = output_layer(causal)
    return ModelShape(
        parameters=_count(model),
        trainable=_count(model, lambda parameter: parameter.requires_grad),
        quantised=quantised,
        num_layers=len(layers),
        largest_layer=max(_count(layer) for layer in layers),
        largest_matrix=max(_linear_sizes(layers)),
        vocabulary=head.weight.shape[0],
        hidden_size=head.weight.shape[1],
        trains_head=any(parameter.requires_grad for parameter in head.parameters()),
        plain_head=has_plain_head(causal),
        num_tokens=num_tokens,
        saved_bytes=saved,
        checkpoint_bytes=len(layers) * num_tokens * head.weight.shape[1] * dtype.itemsize,
    )


def kernel_of(settings: TrainSettings, config: PreTrainedConfig) -> str:
    """How attention is computed; `segments` is ours, and saves what FlashAttention saves."""
    if settings.attention != "auto":
        return settings.attention
    return "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"


def _saved_by_autograd(model: Any, num_tokens: int) -> int:
    """Bytes of the distinct tensors that autograd holds after the decoder's forward pass, parameters apart."""
    own = {_identity(tensor) for tensor in (*model.parameters(), *model.buffers())}
    held: WeakSet[_Saved] = WeakSet()  # without what autograd has let go of again, as of a graph that was detached

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        held.add(saved)
        return saved

    ids = torch.zeros(1, num_tokens, dtype=torch.long)
    positions = torch.zeros(1, num_tokens, dtype=torch.long)
    model.train()
    if not any(parameter.requires_grad for parameter in model.get_input_embeddings().parameters()):
        model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        causal: Any = causal_model(model)
        output = causal.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False)
    sizes = {_identity(saved.tensor): saved.tensor.untyped_storage().nbytes() for saved in held}
    del output  # which holds the graph
    return sum(size for identity, size in sizes.items() if identity not in own)


@dataclass(frozen=True, eq=False)
class _Saved:
    """A tensor for as long as autograd wants it."""

    tensor: Tensor


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _layers(causal: Any) -> list[nn.Module]:
    """The decoder's layers: its longest list of modules."""
    lists = [list(part) for part in causal.get_decoder().modules() if isinstance(part, nn.ModuleList)]
    return max(lists, key=len)


def _count(module: nn.Module, wanted: Callable[[nn.Parameter], bool] = lambda parameter: True) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if wanted(parameter))


def _is_linear(part: nn.Module) -> bool:
    return type(part) is nn.Linear or type(part).__name__ == "Conv1D"


def _linear_sizes(layers: list[Any]) -> Iterator[int]:
    return (part.weight.numel() for layer in layers for part in layer.modules() if _is_linear(part))


def _linear_parameters(causal: Any) -> int:
    """What bitsandbytes turns into 4 bits: the weights of all linear layers but the head."""
    head = causal.get_output_embeddings()
    return sum(part.weight.numel() for part in causal.modules() if _is_linear(part) and part is not head)


@contextmanager
def stand_in(kernel: str, packed: bool) -> Iterator[None]:
    """Attention under the name STAND_IN that saves what `kernel` saves."""

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        if kernel != "flash_attention_2" and packed:  # a mask forbids grouped keys: they are repeated
            groups = query.shape[1] // key.shape[1]
            key, value = (part.repeat_interleave(groups, dim=1) if groups > 1 else part for part in (key, value))
        return _Attention.apply(query, key, value, kernel, packed), None

    ALL_ATTENTION_FUNCTIONS[STAND_IN] = attention
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS.pop(STAND_IN)


class _Attention(torch.autograd.Function):
    """Shapes of ``(B, heads, T, size)`` queries, keys and values; the output is ``(B, T, heads, size)``."""

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917  # torch gives it, one by one
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, kernel: str, packed: bool
    ) -> Tensor:
        batch, heads, length, _ = query.shape
        ctx.kernel = kernel
        out = query.new_empty(batch, length, heads, value.shape[-1])
        if kernel == "eager":  # probabilities in float32, and again in the type of the model
            scores = query.new_empty(batch, heads, length, length, dtype=torch.float32)
            ctx.save_for_backward(query, key, value, scores, scores.to(query.dtype))
            return out
        normaliser = query.new_empty(batch, heads, length, dtype=torch.float32)
        saved = [query, key, value, normaliser]
        if kernel == "sdpa":  # its output has another layout and is copied; the mask is kept in the type of the model
            saved.append(torch.empty_like(query))
            saved += [query.new_empty(batch, 1, length, length)] if packed else []
        else:
            saved.append(out)
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Gradients of queries, keys and values; eager attention has those of the scores for a moment, twice."""
        query, key, value, *others = ctx.saved_tensors
        scores = [torch.empty_like(other) for other in others if ctx.kernel == "eager"]
        del scores
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None
