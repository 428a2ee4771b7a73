"""PyTorch FSDP2 (`fully_shard`) behind the `Engine` interface.

In: a `CausalLMLoss`, settings, ranks. Out: an `Engine`. Every decoder layer is a unit, the rest is the root unit:
weights are gathered for a layer at a time, gradients and optimizer states exist only as shards. FSDP2 averages
gradients over the ranks (undone through `averaging`). bfloat16: shards are float32, layers compute in bfloat16,
gradients are summed in float32. Those of an adapter are kept whole until the last micro-batch of a step and reduced
once; those of a whole model would not fit beside it, so every micro-batch reduces them. Optimizers see `DTensor`s,
whose norms are global, so LAMB works. Frozen 4-bit weights are sharded as bytes. Cost: each rank reads its shards from
the files; a 4-bit weight is quantised whole by every rank, which keeps its part.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from training.devices import uses_bf16
from training.distributed import Ranks
from training.engines.engine import WEIGHT, decoder_layers, set_learning_rate, trainable
from training.engines.optimizers import build_optimizer, restored_states, whole
from training.launch.heartbeat import Heartbeat
from training.models.deferred import Value, Values, check_filled, make_shardable, replace
from training.models.loss import CausalLMLoss
from training.settings import TrainSettings


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
        shard(module, settings, ranks, Values() if values is None else values)
        optimizer = build_optimizer(module.named_parameters(), settings)
        return cls(
            module, ranks, optimizer, settings.max_grad_norm, dict(trainable(module)), holds_gradients=settings.use_lora
        )

    @property
    def averaging(self) -> float:
        return float(self.ranks.world_size)

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        result = self.module(*arguments, **options)
        if not torch.is_grad_enabled():  # the root unit stays gathered for a backward pass that will not come
            self.module.reshard()  # type: ignore[operator]  # `fully_shard` has made it an FSDPModule
        return result

    def backward(self, loss: Tensor, last: bool) -> None:
        self.module.set_requires_gradient_sync(last or not self.holds_gradients)  # type: ignore[operator]  # as above
        loss.backward()

    def step(self, learning_rate: float) -> float:
        set_learning_rate(self.optimizer, learning_rate)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm or math.inf)
        total = float(whole(norm))
        if math.isfinite(total):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def trained(self) -> list[str]:
        return list(self.parameters)

    def read(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, parameter in self.parameters.items():
            states = {WEIGHT: parameter.detach(), **self.optimizer.state[parameter]}
            yield name, {key: whole(torch.as_tensor(value)).cpu() for key, value in states.items()}

    def write(self, name: str, state: dict[str, Tensor]) -> None:
        parameter = self.parameters[name]
        with torch.no_grad():
            parameter.copy_(_like(state[WEIGHT], parameter))
        self.optimizer.state[parameter] = restored_states(
            state, self.optimizer, parameter.device, lambda value: _like(value, parameter)
        )

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self.module.model.state_dict().items():
            yield name, whole(value.detach()).cpu().clone()


def shard(module: CausalLMLoss, settings: TrainSettings, ranks: Ranks, values: Values) -> None:
    """`fully_shard` the model in place, and fill its shards."""
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    precision = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if uses_bf16(settings, ranks.device)
        else MixedPrecisionPolicy()
    )
    make_shardable(values, ranks.device)
    missing = values.by_name(module)
    for layer in decoder_layers(module):
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(module, mesh=mesh, mp_policy=precision)
    alive = Heartbeat("loading the model", len(missing), "tensors")
    for done, (name, parameter) in enumerate(list(module.named_parameters())):
        alive(done)
        if name in missing:
            _fill_shard(parameter, missing.pop(name), ranks)
    values.clear()
    check_filled(module)


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


def _like(value: Tensor, parameter: Any) -> Tensor:
    """This rank's shard of a whole tensor, cut as the parameter is; every rank has the whole, nothing is sent."""
    moved = value.to(parameter.device)
    return distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None)
