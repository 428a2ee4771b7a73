"""PyTorch FSDP2 (`fully_shard`) behind the `Engine` interface.

In: a `CausalLMLoss`, settings, ranks. Out: an `Engine`. Every decoder layer is a unit (on a CPU, every part of a large
one), so are embedding and output layer unless they are tied, and the rest is the root unit: weights are gathered for a
unit at a time, gradients and optimizer states exist only as shards. FSDP2 averages gradients over the ranks (undone
through `averaging`). bfloat16: shards are float32, layers compute in bfloat16, gradients are summed in float32. Those
of an adapter are kept whole until the last micro-batch of a step and reduced once; those of a whole model (or of whole
modules beside an adapter) would not fit beside it, so every micro-batch reduces them. Optimizers see `DTensor`s, whose
norms are global, so LAMB works. Frozen 4-bit weights are sharded as bytes. Cost: each rank reads its shards from the
files; a 4-bit weight is quantised whole by every rank, which keeps its part.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from training.devices import give_back_after, give_back_memory, uses_bf16
from training.distributed import Ranks
from training.engines.engine import (
    WEIGHT,
    Stored,
    decoder_layers,
    saved,
    set_learning_rate,
    share,
    trainable,
)
from training.engines.optimizers import build_optimizer, restored_states, whole
from training.launch.heartbeat import Heartbeat
from training.models.attention import PLAIN
from training.models.deferred import Value, Values, check_filled, make_shardable, replace
from training.models.loss import CausalLMLoss, causal_model, layers_of
from training.models.shards import Piece
from training.settings import TrainSettings

PARTS = 64  # a unit on a CPU is at most such a part of the model
LEAST_PART = 4_000_000  # numbers; smaller units save nothing that counts


@dataclass
class FsdpEngine:
    """See `training.engines.engine.Engine`."""

    module: CausalLMLoss
    ranks: Ranks
    optimizer: torch.optim.Optimizer
    max_grad_norm: float
    parameters: dict[str, nn.Parameter]  # the shards; between forward and backward the module has whole weights instead
    holds_gradients: bool  # whole ones, between the micro-batches of a step

    @classmethod
    def build(
        cls, module: CausalLMLoss, settings: TrainSettings, ranks: Ranks, values: Values | None = None
    ) -> "FsdpEngine":
        """Shard the model in place; each rank reads its shards of `values`, of what is still empty."""
        precision = (
            MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            if uses_bf16(settings, ranks.device)
            else MixedPrecisionPolicy()
        )
        shard(module, ranks, Values() if values is None else values, precision)
        give_back_after(decoder_layers(module), ranks.device)
        optimizer = build_optimizer(module.named_parameters(), settings)
        return cls(
            module, ranks, optimizer, settings.max_grad_norm, dict(trainable(module)),
            holds_gradients=settings.use_lora and not settings.modules_to_save,
        )  # fmt: skip

    @property
    def averaging(self) -> float:
        return float(self.ranks.world_size)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        result = self.module(*arguments, **options)
        if not torch.is_grad_enabled():  # the root unit stays gathered for a backward pass that will not come
            self.module.reshard()  # type: ignore[operator]  # `fully_shard` has made it an FSDPModule
        return result

    def backward(self, loss: Tensor, last: bool) -> None:
        self.module.set_requires_gradient_sync(last or not self.holds_gradients)  # type: ignore[operator]  # as above
        loss.backward()

    def step(self, learning_rate: float, limit: float = math.inf) -> float:
        set_learning_rate(self.optimizer, learning_rate)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm or math.inf)
        total = float(whole(norm))
        if math.isfinite(total) and total <= limit:
            self.optimizer.step()
        self.optimizer.zero_grad()
        give_back_memory(self.ranks.device)
        return total

    def trained(self) -> list[str]:
        return list(self.parameters)

    def read(self) -> Iterator[tuple[str, dict[str, Piece]]]:
        for name, parameter in self.parameters.items():
            states = {WEIGHT: parameter.detach(), **self.optimizer.state.get(parameter, {})}
            yield name, {key: self._piece(torch.as_tensor(value), parameter) for key, value in states.items()}

    def _piece(self, value: Any, parameter: Any) -> Piece:
        """This rank's rows of what is cut as the parameter is; its share of anything else."""
        if getattr(value, "placements", None) != parameter.placements or value.shape != parameter.shape:
            return share(whole(value), self.ranks)
        return Piece(value.to_local().reshape(-1), self._first_number(parameter), tuple(value.shape))

    def _first_number(self, parameter: Any) -> int:
        """Where this rank's rows begin in the flattened parameter; every rank has as many, but for the last ones."""
        rows = parameter.shape[0]
        first = min(self.ranks.rank * math.ceil(rows / self.ranks.world_size), rows)
        return first * (parameter.numel() // max(rows, 1))

    def write(self, name: str, states: Mapping[str, Stored]) -> None:
        parameter = self.parameters[name]
        with torch.no_grad():
            parameter.copy_(self._placed(states[WEIGHT], parameter))
        self.optimizer.state[parameter] = restored_states(
            states, self.optimizer, parameter.device, lambda stored: self._placed(stored, parameter)
        )

    def _placed(self, stored: Stored, parameter: Any) -> Tensor:
        """A state on the device, cut as the parameter is; nothing is sent, every rank reads what it keeps."""
        if stored.shape != tuple(parameter.shape):
            moved = stored.whole().to(parameter.device)
            return distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None)
        local = parameter.to_local()
        mine = stored.part(self._first_number(parameter), local.numel()).to(parameter.device).view(local.shape)
        return DTensor.from_local(
            mine, parameter.device_mesh, parameter.placements,
            run_check=False, shape=parameter.shape, stride=parameter.stride(),
        )  # fmt: skip

    def held(self) -> Iterator[tuple[str, Piece]]:
        for name, value in saved(self.module):
            sharded = isinstance(value, DTensor)
            yield name, self._piece(value.detach(), value) if sharded else share(value, self.ranks)

    def gathered(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in saved(self.module):
            if value.requires_grad:
                yield name, whole(value.detach()).cpu().clone()


def shard(module: CausalLMLoss, ranks: Ranks, values: Values, precision: MixedPrecisionPolicy) -> None:
    """`fully_shard` the model in place, and fill its shards with the values of what is still empty in it."""
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    make_shardable(values, ranks.device)
    missing = values.by_name(module)
    for unit in (*_parts(module, ranks.device), *decoder_layers(module), *_untied_ends(module)):
        fully_shard(unit, mesh=mesh, mp_policy=precision)
        if ranks.device.type == "cpu":  # nothing overlaps there, so that gathering the next one early is memory only
            unit.set_modules_to_backward_prefetch([unit])  # type: ignore[operator]  # an FSDPModule now
    fully_shard(module, mesh=mesh, mp_policy=precision)
    alive = Heartbeat("loading the model", len(missing), "tensors")
    for done, (name, parameter) in enumerate(list(module.named_parameters())):
        alive(done)
        if name in missing:
            _fill_shard(parameter, missing.pop(name), ranks)
    values.clear()
    check_filled(module)


def _parts(module: CausalLMLoss, device: torch.device) -> Iterator[nn.Module]:
    """On a CPU the parts of layers that are much of the model, as units of their own.

    Gathering takes four times the memory of a unit there (with gloo's own copy, and that of the unit before), and
    overlaps with nothing. For models whose parts are all called as modules, as FSDP wants them.
    """
    if device.type != "cpu" or causal_model(module.model).config.model_type not in PLAIN:
        return
    limit = max(LEAST_PART, sum(parameter.numel() for parameter in module.parameters()) // PARTS)
    for layer in decoder_layers(module):
        yield from _smaller(layer, limit)


def _smaller(module: nn.Module, limit: int) -> Iterator[nn.Module]:
    """The modules of one that has more numbers than the limit, taken apart until each has no more or is one matrix.

    Norms stay with the layer, and the adapters of a matrix that is taken out; but those of DoRA look at their matrix.
    """
    if sum(parameter.numel() for parameter in module.parameters()) <= limit:
        return
    for child in module.children():
        if getattr(child, "lora_magnitude_vector", None):
            yield child
        elif any(parameter.dim() > 1 for parameter in child.parameters()) and not isinstance(child, nn.ModuleDict):
            yield from list(_smaller(child, limit)) or [child]


def _untied_ends(module: CausalLMLoss) -> list[nn.Module]:
    """Embedding and output layer, as units of their own: whole only while they are needed. Tied ones are the root's."""
    causal = causal_model(module.model)
    embeddings, heads = layers_of(causal.get_input_embeddings()), layers_of(causal.get_output_embeddings())
    if module.head is None or heads[-1].weight is embeddings[-1].weight:  # None: computed by the model itself
        return []
    return [*embeddings, *heads]


def _fill_shard(parameter: Any, value: Value, ranks: Ranks) -> None:
    """Put this rank's rows of a value into its shard of an empty parameter."""
    rows = value.read().chunk(ranks.world_size)  # as `fully_shard` cuts
    empty = parameter.to_local()
    local = torch.empty(empty.shape, dtype=empty.dtype, device=ranks.device)
    if ranks.rank < len(rows):
        local.copy_(rows[ranks.rank])
    shard = DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
        stride=parameter.stride(),
    )  # fmt: skip
    replace(parameter, shard)
