"""DeepSpeed ZeRO 0 to 3 behind the `Engine` interface.

In: a `CausalLMLoss`, settings, ranks. Out: an `Engine`. DeepSpeed divides gradients by the number of ranks (undone
through `averaging`) and, unless told otherwise, by the accumulation steps (told otherwise); the last micro-batch of a
step is announced, because the last step of an epoch has fewer of them than the configuration says.

bfloat16: ZeRO 1 to 3 keep the model in bfloat16 and a sharded float32 copy, and add up and reduce gradients in float32
(DeepSpeed by itself does it in bfloat16, which loses 0.1 to 3 % over 64 micro-batches); ZeRO 0 keeps trainable weights
in float32 and computes under autocast, so that optimizers that need whole parameters (LAMB, Adafactor, 8-bit) see them.

Start-up: importing deepspeed would import mlflow (1.2 s), and joining would compile an operator that only inference
uses (30 to 40 s the first time); neither happens here.
"""

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from training.devices import any_device, compute_dtype, uses_bf16
from training.distributed import Ranks
from training.engines.engine import WEIGHT, set_learning_rate, trainable
from training.engines.optimizers import build_optimizer, restored_states
from training.launch.heartbeat import Heartbeat
from training.lean_imports import UNUSED, without
from training.models.deferred import Values, check_filled, make_shardable
from training.models.loss import CausalLMLoss
from training.settings import TrainSettings

REDUCE_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's own default


def import_deepspeed() -> ModuleType:
    """DeepSpeed, without mlflow, torch's compiler and the just-in-time build of its shared-memory operator."""
    os.environ.setdefault("DS_ACCELERATOR", any_device().type)
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    with without(*UNUSED):
        import deepspeed
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]  # see the head
    return deepspeed


def zero_config(settings: TrainSettings, ranks: Ranks, num_trained: int) -> dict[str, Any]:
    """The DeepSpeed configuration: pure, so that it can be looked at and tested."""
    stage = settings.zero_stage
    # The bucket is allocated whole, however little is trained: 1 GB of bfloat16 for the smallest adapter.
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": min(REDUCE_BUCKET_ELEMENTS, num_trained)}
    if stage and settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if stage == 3 and settings.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 10_000  # norms and biases stay whole: gathering them costs more
    return {
        "train_micro_batch_size_per_gpu": settings.per_gpu_train_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "gradient_clipping": settings.max_grad_norm if stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the CPU: nothing to compile
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "bf16": {"enabled": bool(stage) and uses_bf16(settings, ranks.device), "check_grad_overflow": True},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def effective(settings: TrainSettings, ranks: Ranks) -> TrainSettings:
    """The stage that is run for the one asked for.

    On one rank ZeRO shards nothing but still copies weights and gradients every step: stage 0 gives the same. Not with
    offload, which lives in ZeRO, nor in bfloat16, where the stages differ in what they keep; there stage 1 is run as 2,
    because stage 1 with float32 gradients is another optimizer in DeepSpeed, which keeps them whole on every rank.
    """
    if uses_bf16(settings, ranks.device):
        return settings.model_copy(update={"zero_stage": 2}) if settings.zero_stage == 1 else settings
    alone = ranks.world_size == 1 and not (settings.offload_optimizer or settings.offload_parameters)
    return settings.model_copy(update={"zero_stage": 0}) if alone else settings


def partition(
    module: nn.Module, config: dict[str, Any], dtype: torch.dtype, device: torch.device, values: Values
) -> None:
    """ZeRO 3: read, cast, move and shard the weights one by one, each rank by itself.

    DeepSpeed by itself first moves the whole model to a GPU, and sends every weight from rank 0 to the others.
    """
    from deepspeed.runtime.zero.partition_parameters import Init

    zero = Init(config_dict_or_path=config, dtype=dtype)
    make_shardable(values, device)
    parameters: list[Any] = list(module.parameters())
    alive = Heartbeat("loading the model", len(parameters), "tensors")
    for done, parameter in enumerate(parameters):
        alive(done)
        if parameter in values:
            values.fill_one(parameter, device)
        parameter.data = parameter.data.to(device, dtype if parameter.is_floating_point() else None)
        zero._convert_to_deepspeed_param(parameter)
        parameter.partition()
    Init(module=module, config_dict_or_path=config, dtype=dtype)  # what is not about parameters
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)


@dataclass
class DeepSpeedEngine:
    """See `training.engines.engine.Engine`."""

    module: CausalLMLoss
    ranks: Ranks
    engine: Any
    base: torch.optim.Optimizer  # the optimizer below DeepSpeed's, which holds the states
    stage: int
    max_grad_norm: float
    autocast: torch.dtype | None

    @classmethod
    def build(
        cls, module: CausalLMLoss, settings: TrainSettings, ranks: Ranks, values: Values | None = None
    ) -> "DeepSpeedEngine":
        """Wrap the model; `values`: of what is still empty, read straight to the device. DeepSpeed shards it."""
        values = Values() if values is None else values
        deepspeed = import_deepspeed()
        settings = effective(settings, ranks)
        deepspeed.init_distributed(dist_backend="nccl" if ranks.device.type == "cuda" else "gloo", verbose=False)
        num_trained = sum(parameter.numel() for _, parameter in trainable(module))
        config = zero_config(settings, ranks, num_trained)
        if settings.zero_stage == 3:
            partition(module, config, compute_dtype(settings, ranks.device), ranks.device, values)
        values.fill(ranks.device, Heartbeat("loading the model", len(values), "tensors"))
        check_filled(module)
        base = build_optimizer(module.named_parameters(), settings)
        engine, *_ = deepspeed.initialize(model=module, optimizer=base, config=config)
        if ranks.world_size == 1 and not settings.zero_stage:
            engine.enable_backward_allreduce = False  # it would copy all gradients to a buffer and back
        return cls(
            module=module,
            ranks=ranks,
            engine=engine,
            base=base,
            stage=settings.zero_stage,
            max_grad_norm=settings.max_grad_norm,
            autocast=torch.bfloat16 if uses_bf16(settings, ranks.device) and not settings.zero_stage else None,
        )

    @property
    def averaging(self) -> float:
        return float(self.ranks.world_size)

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        with torch.autocast(self.ranks.device.type, self.autocast, enabled=self.autocast is not None):
            return self.engine(*arguments, **options)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        set_learning_rate(self.base, learning_rate)
        if not self.stage:
            return self._plain_step()
        self.engine.step()
        return float(self.engine.get_global_grad_norm())  # inf when DeepSpeed refused to update

    def _plain_step(self) -> float:
        """ZeRO 0: DeepSpeed has reduced the gradients and looks at nothing; the norm is ours to take."""
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters.values(), self.max_grad_norm or math.inf))
        if math.isfinite(norm):
            self.engine.step()
        return norm

    def trained(self) -> list[str]:
        return list(self._parameters)

    def read(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        if self.stage and self.base.state:
            self._link_states()
        for name, parameter in self._parameters.items():
            yield name, {key: value.cpu() for key, value in self._states(parameter)}

    @cached_property
    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(trainable(self.module))

    def _states(self, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if not self.stage:
            yield WEIGHT, parameter.detach()
            yield from ((key, torch.as_tensor(value)) for key, value in self.base.state[parameter].items())
            return
        yield WEIGHT, safe_get_full_fp32_param(parameter)
        shard_state: dict[str, Any] = next(iter(self.base.state.values()), {})
        for key, value in shard_state.items():
            if torch.is_tensor(value) and value.dim():
                yield key, safe_get_full_optimizer_state(parameter, key)
            else:
                yield key, torch.as_tensor(value)

    def write(self, name: str, state: dict[str, Tensor]) -> None:
        parameter = self._parameters[name]
        if not self.stage:
            self._write_plain(parameter, state)
            return
        self._allocate_states(state)
        for key, value in state.items():
            if value.dim() or key == WEIGHT:
                self._write_shard(parameter, value.to(self.ranks.device), None if key == WEIGHT else key)
        self._refresh_compute_copy(parameter, state[WEIGHT].to(self.ranks.device))

    def _write_plain(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            parameter.copy_(state[WEIGHT])
        device = self.ranks.device
        self.base.state[parameter] = restored_states(state, self.base, device, lambda value: value.to(device))

    def _allocate_states(self, state: dict[str, Tensor]) -> None:
        """Give every flat shard the states that a first update would create, and tell DeepSpeed about them."""
        if self.base.state:
            return
        zero = self.engine.optimizer
        for shard in zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups:
            self.base.state[shard] = restored_states(state, self.base, shard.device, partial(_zeros, shard))
        self._link_states()

    def _link_states(self) -> None:
        """Make DeepSpeed see the states of all groups: by itself it looks after the update of the first one only."""
        if self.stage < 3:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _write_shard(self, parameter: Any, value: Tensor, key: str | None) -> None:
        if self.stage < 3:
            parameter.set_full_hp_param(value, key)
            return
        optimizer = self.engine.optimizer
        length, rank = parameter.ds_tensor.ds_numel, self.ranks.rank
        missing = length * self.ranks.world_size - value.numel()  # the last rank's piece is padded
        padded = torch.nn.functional.pad(value.flatten(), (0, missing))
        optimizer.set_local_hp_param(padded[rank * length : (rank + 1) * length], parameter, key)

    def _refresh_compute_copy(self, parameter: nn.Parameter, value: Tensor) -> None:
        """The weights that the forward pass reads are a second copy of the float32 shards."""
        with torch.no_grad():
            if self.stage < 3:
                parameter.copy_(value)
                return
            from deepspeed.runtime.zero.partition_parameters import GatheredParameters

            with GatheredParameters([parameter], modifier_rank=0):
                if self.ranks.is_first:
                    parameter.copy_(value)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        for name, value in self.module.model.state_dict(keep_vars=True).items():
            with GatheredParameters([value] if self.stage == 3 and hasattr(value, "ds_id") else []):
                yield name, value.detach().cpu().clone()


def _zeros(shard: Tensor, state: Tensor) -> Tensor:
    """A flat shard's state before the states of its parameters are written into it."""
    return torch.zeros_like(shard)
