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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from training.devices import any_device, compute_dtype, give_back_after, give_back_memory, uses_bf16
from training.distributed import Ranks
from training.engines.engine import WEIGHT, Stored, decoder_layers, saved, set_learning_rate, share, trainable
from training.engines.optimizers import build_optimizer, restored_states
from training.launch.heartbeat import Heartbeat
from training.lean_imports import UNUSED, without
from training.models.deferred import Values, check_filled, make_shardable
from training.models.loss import CausalLMLoss
from training.models.shards import Piece
from training.settings import TrainSettings

REDUCE_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's own default


def live_elements(num_parameters: int, is_gpu: bool) -> int:
    """How many gathered weights ZeRO 3 may hold: DeepSpeed's default, a billion, would be all of a small model.

    On a CPU few: nothing is computed while weights are fetched ahead, so that they only take memory.
    """
    few = 20_000_000
    return min(1_000_000_000, max(few, num_parameters // 32)) if is_gpu else few


def import_deepspeed(compiler: bool = False) -> ModuleType:
    """DeepSpeed, without mlflow, the just-in-time build of its shared-memory operator and, mostly, torch's compiler."""
    os.environ.setdefault("DS_ACCELERATOR", any_device().type)
    if not compiler:
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    with without(*UNUSED):
        import deepspeed
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]  # see the head
    return deepspeed


def zero_config(settings: TrainSettings, ranks: Ranks, num_trained: int, num_parameters: int) -> dict[str, Any]:
    """The DeepSpeed configuration: pure, so that it can be looked at and tested."""
    stage = settings.zero_stage
    # The bucket is allocated whole, however little is trained: 1 GB of bfloat16 for the smallest adapter.
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": min(REDUCE_BUCKET_ELEMENTS, num_trained)}
    if stage and settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if stage == 3 and settings.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    if stage == 3:
        is_gpu = ranks.device.type == "cuda"
        live = live_elements(num_parameters, is_gpu)
        zero |= {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": live}
        zero["stage3_prefetch_bucket_size"] = live // 4 if is_gpu else 0
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
        deepspeed = import_deepspeed(compiler=settings.compile)
        settings = effective(settings, ranks)
        deepspeed.init_distributed(dist_backend="nccl" if ranks.device.type == "cuda" else "gloo", verbose=False)
        num_trained = sum(parameter.numel() for _, parameter in trainable(module))
        config = zero_config(settings, ranks, num_trained, sum(parameter.numel() for parameter in module.parameters()))
        if settings.zero_stage == 3:
            partition(module, config, compute_dtype(settings, ranks.device), ranks.device, values)
        values.fill(ranks.device, Heartbeat("loading the model", len(values), "tensors"))
        check_filled(module)
        base = build_optimizer(module.named_parameters(), settings)
        engine, *_ = deepspeed.initialize(model=module, optimizer=base, config=config)
        if settings.zero_stage == 3:
            give_back_after(decoder_layers(module), ranks.device)
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

    def forward(self, *arguments: Any, **options: Any) -> Any:
        with torch.autocast(self.ranks.device.type, self.autocast, enabled=self.autocast is not None):
            return self.engine(*arguments, **options)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float, limit: float = math.inf) -> float:
        set_learning_rate(self.base, learning_rate)
        if not self.stage:
            return self._plain_step(limit)
        with self._limited(limit) as norms:
            self.engine.step()
        if self.stage == 3:
            give_back_memory(self.ranks.device)
        return norms[0] if norms else float(self.engine.get_global_grad_norm())  # inf: DeepSpeed refused to update

    def _plain_step(self, limit: float) -> float:
        """ZeRO 0: DeepSpeed has reduced the gradients and looks at nothing; the norm is ours to take."""
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters.values(), self.max_grad_norm or math.inf))
        if math.isfinite(norm) and norm <= limit:
            self.engine.step()
        else:
            self.base.zero_grad()
        return norm

    @contextmanager
    def _limited(self, limit: float) -> Iterator[list[float]]:
        """ZeRO 1 to 3 take the norm in the middle of their step: one above the limit is infinite to them.

        Then they clear the gradients and leave all else alone. The list gets the norm that was too large.
        """
        above: list[float] = []
        if limit == math.inf:
            yield above
            return
        name = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        original = getattr(self.engine.optimizer, name)

        def limited() -> Any:
            found = original()
            groups = found if self.stage == 3 else [found]
            norm = math.hypot(*(float(group) for group in groups))
            if not limit < norm < math.inf or min(groups) < 0:  # -1 is how DeepSpeed writes a norm that is not finite
                return found
            above.append(norm)
            infinite = torch.full_like(torch.as_tensor(groups[0]), math.inf)
            return [infinite] if self.stage == 3 else infinite

        setattr(self.engine.optimizer, name, limited)
        try:
            yield above
        finally:
            delattr(self.engine.optimizer, name)

    def trained(self) -> list[str]:
        return list(self._parameters)

    def read(self) -> Iterator[tuple[str, dict[str, Piece]]]:
        if self.stage and self.base.state:
            self._link_states()
        kinds: dict[int, Callable[[Any], Iterator[tuple[str, Piece]]]]
        kinds = {0: self._whole_states, 1: self._fragments, 2: self._fragments, 3: self._partitions}
        for name, parameter in self._parameters.items():
            yield name, dict(kinds[self.stage](parameter))

    @cached_property
    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(trainable(self.module))

    def _whole_states(self, parameter: nn.Parameter) -> Iterator[tuple[str, Piece]]:
        """ZeRO 0: every rank has all; each gives a part of it."""
        yield WEIGHT, share(parameter, self.ranks)
        for key, value in self.base.state.get(parameter, {}).items():
            yield key, share(torch.as_tensor(value), self.ranks)

    def _fragments(self, parameter: Any) -> Iterator[tuple[str, Piece]]:
        """ZeRO 1 and 2: a rank's stretch of all parameters, laid end to end, may have none of this one's numbers."""
        yield from self._numbers()
        fragment = parameter._hp_mapping
        if fragment is None:
            return
        start, shape = fragment.lp_fragment_address.start, tuple(parameter.shape)
        yield WEIGHT, Piece(fragment.hp_fragment, start, shape)
        for key, value in (fragment.optim_fragment or {}).items():
            yield key, Piece(value, start, shape)

    def _partitions(self, parameter: Any) -> Iterator[tuple[str, Piece]]:
        """ZeRO 3: every rank has a part of every parameter."""
        yield from self._numbers()
        start, length = self._partition(parameter)
        for key in (None, *self._state_keys()):
            value, _ = self.engine.optimizer._get_fp32_opt_state_partition(parameter, True, key)
            yield key or WEIGHT, Piece(value[:length], start, tuple(parameter.ds_shape))

    def _partition(self, parameter: Any) -> tuple[int, int]:
        """(first number, how many) of this rank; all ranks have as many, the last ones' are padded."""
        size = parameter.ds_tensor.ds_numel
        start = min(size * self.ranks.rank, parameter.ds_numel)
        return start, min(size, parameter.ds_numel - start)

    @property
    def _shard_state(self) -> dict[str, Any]:
        """The states of a flat shard: those of all shards have the same names and numbers."""
        return next(iter(self.base.state.values()), {})

    def _state_keys(self) -> list[str]:
        return [key for key, value in self._shard_state.items() if torch.is_tensor(value) and value.dim()]

    def _numbers(self) -> Iterator[tuple[str, Piece]]:
        """Of a parameter's states those that are no tensors of its shape: the steps made."""
        for key, value in self._shard_state.items():
            if not (torch.is_tensor(value) and value.dim()):
                yield key, share(torch.as_tensor(value), self.ranks)

    def write(self, name: str, states: Mapping[str, Stored]) -> None:
        parameter = self._parameters[name]
        if not self.stage:
            self._write_whole(parameter, states)
            return
        self._allocate_states(states)
        tensors = {
            None if key == WEIGHT else key: stored for key, stored in states.items() if stored.shape or key == WEIGHT
        }
        if self.stage == 3:
            self._write_partition(parameter, tensors)
        else:
            self._write_fragment(parameter, tensors)

    def _write_whole(self, parameter: nn.Parameter, states: Mapping[str, Stored]) -> None:
        with torch.no_grad():
            parameter.copy_(states[WEIGHT].whole())
        device = self.ranks.device
        self.base.state[parameter] = restored_states(
            states, self.base, device, lambda stored: stored.whole().to(device)
        )

    def _allocate_states(self, states: Mapping[str, Stored]) -> None:
        """Give every flat shard the states that a first update would create, and tell DeepSpeed about them.

        Where they are there already, only the numbers among them are put back: they belong to no parameter.
        """
        if self.base.state:
            numbers = {key: stored for key, stored in states.items() if key != WEIGHT and not stored.shape}
            for shard, state in self.base.state.items():
                state.update(restored_states(numbers, self.base, shard.device, partial(_zeros, shard)))
            return
        zero = self.engine.optimizer
        for shard in zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups:
            self.base.state[shard] = restored_states(states, self.base, shard.device, partial(_zeros, shard))
        self._link_states()

    def _link_states(self) -> None:
        """Make DeepSpeed see the states of all groups: by itself it looks after the update of the first one only."""
        if self.stage < 3:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _write_fragment(self, parameter: Any, tensors: Mapping[str | None, Stored]) -> None:
        """The float32 shard, and the weights that the forward pass reads, which every rank has whole."""
        fragment = parameter._hp_mapping
        with torch.no_grad():
            for key, stored in tensors.items() if fragment is not None else ():
                address = fragment.lp_fragment_address
                fragment.get_hp_fragment(key).copy_(stored.part(address.start, address.numel))
            parameter.copy_(tensors[None].whole())

    def _write_partition(self, parameter: Any, tensors: Mapping[str | None, Stored]) -> None:
        """The float32 shard, and that of the weights in the type of the computation."""
        start, length = self._partition(parameter)
        padding = parameter.ds_tensor.ds_numel - length
        for key, stored in tensors.items():
            mine = torch.nn.functional.pad(stored.part(start, length), (0, padding))
            self.engine.optimizer.set_local_hp_param(mine, parameter, key)
            if key is None:
                parameter.partition()  # small ones are kept gathered, with the values of before
                parameter.ds_tensor.data.copy_(mine)

    def held(self) -> Iterator[tuple[str, Piece]]:
        value: Any  # DeepSpeed gives parameters fields of its own
        for name, value in saved(self.module):
            if hasattr(value, "ds_id"):  # ZeRO 3
                start, length = self._partition(value)
                yield name, Piece(value.ds_tensor.detach()[:length], start, tuple(value.ds_shape))
            else:
                yield name, share(value, self.ranks)

    def gathered(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        for name, value in saved(self.module):
            if value.requires_grad:
                with GatheredParameters([value] if hasattr(value, "ds_id") else []):
                    yield name, value.detach().cpu().clone()


def _zeros(shard: Tensor, stored: Stored) -> Tensor:
    """A flat shard's state before the states of its parameters are written into it."""
    return torch.zeros_like(shard)
