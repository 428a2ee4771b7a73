"""A training step of N ranks on one machine without weights: memory of a rank and what it sends, phase by phase.

``python -m training.planning.rehearsal`` reads a `Rehearsal` as JSON on stdin and writes `PlayedPhase`s on stdout.
torch's fake tensors (shapes and no memory) go through the model, FSDP2, the optimizer and the output layer of this
project as real ones would; a fake process group stands for the other ranks. Every operation is seen by `Tally`. The
rank is rank 0, whose shards are the largest.

What is taken for granted: each rank reads only its own slices of the weights; checkpoints are copies of a rank's own
shards in CPU memory; ranks write their shards of a model, and gather an adapter. On GPUs attention saves what the
kernel would (`model_shape.stand_in`), because fake tensors here are the CPU's; frozen 4-bit weights are a stand-in of
the same bytes. Cost: 15 s of imports and some seconds for each ten layers.
"""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from training.devices import load_dtype
from training.distributed import Ranks
from training.engines import fsdp
from training.engines.optimizers import whole
from training.models import attention
from training.models.adapter import add_adapter
from training.models.loss import CausalLMLoss, MicroBatch
from training.planning.memory import NF4_BYTES
from training.planning.model_shape import STAND_IN, config_from, kernel_of, stand_in
from training.planning.rehearsal_job import PlayedPhase, Rehearsal
from training.planning.tally import Tally
from training.settings import TrainSettings

A_NUMBER = 1.0  # what a fake tensor answers that is asked for one


class _OneRank(Ranks):
    """Rank 0 of many that are not there: what it says is what all say."""

    def _reduced(self, values: tuple[float, ...], operation: Any) -> list[float]:
        return list(values)


def rehearse(wanted: Rehearsal) -> list[PlayedPhase]:
    """Load, train a step, evaluate, save a checkpoint, write the model."""
    settings = TrainSettings.model_validate(wanted.settings).model_copy(update={"strategy": "fsdp"})
    ranks = _OneRank(0, 0, wanted.ranks, torch.device("cpu"))
    with _alone(ranks), _attention(settings, wanted), _units(wanted):
        model = _model(settings, wanted, ranks)
        with FakeTensorMode(allow_non_fake_inputs=True), Tally(wanted.ranks, number=A_NUMBER) as tally:
            _to_empty(model, ranks.device)
            engine = fsdp.FsdpEngine.build(CausalLMLoss(model.train()), settings, ranks)
            return _Play(engine, settings, wanted, tally).phases()


@dataclass
class _Play:
    """The phases, in the order of a run."""

    engine: fsdp.FsdpEngine
    settings: TrainSettings
    wanted: Rehearsal
    tally: Tally

    def phases(self) -> list[PlayedPhase]:
        return [self.load(), self.step(), self.evaluate(), self.save(), self.export()]

    def _phase(self, name: str, per: str, held: int, host: int = 0, sent: float | None = None) -> PlayedPhase:
        """What the tally has seen since it was restarted; what a CPU rank needs beside the device, it needs on it."""
        beside = 0 if self.wanted.is_gpu else host
        sent = self.tally.sent if sent is None else sent
        return PlayedPhase(name, held, self.tally.peak + beside, host - beside, round(sent), per)

    def load(self) -> PlayedPhase:
        self.tally.restart()
        return self._phase("load", "run", self.tally.held, host=_largest_slice(self.engine))

    def step(self) -> PlayedPhase:
        """Two micro-batches and the update of a step that is not the first one; sent is what all of them send."""
        _make_states(self.engine)
        self.tally.restart()
        held = self.tally.held
        first = self._micro_batch(last=False)
        self._micro_batch(last=True)
        self.engine.step(self.settings.learning_rate)
        more = (self.settings.gradient_accumulation_steps - 2) * first
        return self._phase("step", "step", held, sent=self.tally.sent + more)

    def _micro_batch(self, last: bool) -> float:
        """Forward and backward; returns what is sent."""
        before = self.tally.sent
        loss, _ = self.engine.forward(_batch(self.settings.per_gpu_train_batch_size, self.wanted))
        self.engine.backward(loss * self.engine.averaging, last=last)
        return self.tally.sent - before

    def evaluate(self) -> PlayedPhase:
        self.tally.restart()
        held = self.tally.held
        self.engine.module.eval()
        with torch.no_grad():
            self.engine.forward(_batch(self.settings.per_gpu_eval_batch_size, self.wanted), "each")
        self.engine.module.train()
        return self._phase("evaluate", "micro-batch", held)

    def save(self) -> PlayedPhase:
        self.tally.restart()
        return self._phase("save", "checkpoint", self.tally.held, host=_checkpoint_bytes(self.engine))

    def export(self) -> PlayedPhase:
        """Of an adapter every tensor whole for a moment, on the device and on the CPU; of a model a copy of a shard."""
        self.tally.restart()
        held = self.tally.held
        if self.settings.use_lora:
            host = max(whole(parameter.detach()).nbytes for parameter in self.engine.parameters.values())
        else:
            shards = (_local(parameter) for parameter in self.engine.module.parameters())
            host = max(shard.nbytes for shard in shards) if self.wanted.is_gpu else 0
        return self._phase("export", "run", held, host=host)


def _model(settings: TrainSettings, wanted: Rehearsal, ranks: Ranks) -> nn.Module:
    """The model on the meta device, as it is trained."""
    config = config_from(Path(wanted.model_dir) if wanted.model_dir else None, settings.architecture)
    kind = STAND_IN if wanted.is_gpu or settings.attention != "auto" else None
    with torch.device("meta"):
        dtype = load_dtype(settings, ranks.device)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kind)
        if kind is None and attention.fits(model.config):
            attention.use(model)
        causal = model
        causal.config.use_cache = False
        if settings.use_lora:
            model = add_adapter(model, settings, rows=range(len(settings.add_tokens or ())))
        if settings.use_quant:
            _quantise(model, causal)
    if settings.gradient_checkpointing:
        causal.activation_checkpointing_enable({"use_reentrant": False})
    return model


def _to_empty(model: nn.Module, device: torch.device) -> None:
    """torch's `to_empty`, which parts what is tied; also what peft has tied."""
    places = [(part, name, parameter) for part in model.modules() for name, parameter in part._parameters.items()]
    model.to_empty(device=device)
    first: dict[Any, Any] = {}
    for part, name, parameter in places:
        part._parameters[name] = first.setdefault(parameter, part._parameters[name])


@contextmanager
def _alone(ranks: Ranks) -> Iterator[None]:
    """A process group of which only this rank is there; its mesh is made of real numbers."""
    dist.init_process_group("fake", rank=ranks.rank, world_size=ranks.world_size, store=FakeStore())
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    try:
        with patch.object(fsdp, "init_device_mesh", lambda *_: mesh):
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _units(wanted: Rehearsal) -> Iterator[None]:
    """Only ranks on CPUs take layers apart; for `fully_shard` all tensors here are a CPU's."""
    with patch.object(fsdp, "_parts", lambda *_: ()) if wanted.is_gpu else nullcontext():
        yield


@contextmanager
def _attention(settings: TrainSettings, wanted: Rehearsal) -> Iterator[None]:
    """On a CPU what is computed there, a segment at a time; else what keeps what the kernel keeps.

    Fake positions have no zeros to find segments by: they are equally long here.
    """
    lengths = [len(part) for part in torch.arange(wanted.num_tokens).tensor_split(wanted.num_segments)]
    config = config_from(Path(wanted.model_dir) if wanted.model_dir else None, settings.architecture)
    with ExitStack() as stack:
        stack.enter_context(stand_in(kernel_of(settings, config), packed=wanted.num_segments > 1))
        stack.enter_context(
            patch.object(attention, "segment_sizes", lambda ids: lengths * (ids.numel() // wanted.num_tokens))
        )
        yield


def _batch(rows: int, wanted: Rehearsal) -> MicroBatch:
    """Full rows of which all that can be a target is one."""
    ids = torch.zeros(rows, wanted.num_tokens, dtype=torch.int64)
    targets = torch.zeros(rows * (wanted.num_tokens - wanted.num_segments), dtype=torch.int64)
    segments = np.zeros(len(targets), np.int64)
    return MicroBatch(tuple(range(rows)), ids, ids.clone(), targets, targets.clone(), targets.clone(), segments)


def _make_states(engine: fsdp.FsdpEngine) -> None:
    """The optimizer's states, as a first step leaves them."""
    for parameter in engine.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    engine.step(0.0)


def _local(value: Any) -> Tensor:
    return value._local_tensor if hasattr(value, "_local_tensor") else value


def _largest_slice(engine: fsdp.FsdpEngine) -> int:
    """What is read at a time: the largest shard; a matrix that is quantised whole, in the type of the computation."""
    slices = [_local(parameter).nbytes for parameter in engine.module.parameters()]
    parts = [part for part in engine.module.modules() if isinstance(part, _QuantisedLinear)]
    quantised = [part.in_features * part.out_features * 2 for part in parts]
    return max(slices + quantised)


def _checkpoint_bytes(engine: fsdp.FsdpEngine) -> int:
    """A copy of this rank's trained weights and their states."""
    states = [value for parameter in engine.parameters.values() for value in engine.optimizer.state[parameter].values()]
    return sum(_local(value).nbytes for value in [*engine.parameters.values(), *states] if torch.is_tensor(value))


class _FourBits(torch.autograd.Function):
    """``inputs @ weight.T`` with a weight that exists in 16 bits only while it is multiplied by, in both directions."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, packed: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.size, ctx.packed = size, packed
        return inputs @ inputs.new_empty(size).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad @ grad.new_empty(ctx.size), None, None


class _QuantisedLinear(nn.Linear):
    """Its weight is nibbles, kept in elements of 16 bits as FSDP wants them; its constants every rank has.

    `W_q` and `dequantize` are for DoRA, as in `training.models.four_bits`.
    """

    @property
    def W_q(self) -> Tensor:  # HQQ's name
        return self.weight

    def dequantize(self) -> Tensor:
        return self.weight.new_empty(self.out_features, self.in_features)

    def forward(self, inputs: Tensor) -> Tensor:
        return _FourBits.apply(inputs, self.weight, (self.out_features, self.in_features))


def _quantise(model: nn.Module, causal: Any) -> None:
    """All linear layers but the head and the adapter's."""
    for name, part in list(model.named_modules()):
        if type(part) is nn.Linear and part is not causal.get_output_embeddings() and "lora_" not in name:
            num_bytes = part.weight.numel() // 2
            part.weight = nn.Parameter(torch.empty(num_bytes // 2, 1, dtype=torch.bfloat16), requires_grad=False)
            constants = math.ceil(2 * num_bytes * (NF4_BYTES - 0.5))
            part.register_buffer("constants", torch.empty(constants, dtype=torch.uint8))
            part.__class__ = _QuantisedLinear


def main() -> None:
    wanted = Rehearsal(**json.load(sys.stdin))
    phases = rehearse(wanted)
    print(json.dumps([asdict(phase) for phase in phases]))


if __name__ == "__main__":
    main()
