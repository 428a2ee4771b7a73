"""What a run would do, need and take, as typed values: what `panda plan` shows, and its JSON.

In: settings; the memory of a GPU and the speed, if one wants to say. Out: `RunPlan`. Nothing is trained, no weights are
loaded. Cost: hashing the corpus, 5 s of imports, a second of arithmetic; `exact`: about 10 s, a minute and a half for
65B, in a process of its own, so that this one imports nothing heavier and everything is freed.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.cli import plain_text
from configs.errors import ConfigError
from configs.settings import PandaSettings
from data_prep.plan.order import rows_of_step, steps_per_epoch
from data_prep.plan.reader import open_plan
from flows.cli.estimate import DataEstimate, estimate_data
from flows.parts.preflight import nothing_to_start_from
from training.launch import commands
from training.models.hub import base_checkpoint, description
from training.planning import compatibility
from training.planning.hardware import GB, Hardware, first_gpu
from training.planning.rehearsal_job import PlayedPhase, Rehearsal
from training.settings import TIME_TO_SAVE, TrackingSettings, TrainSettings
from training.tracking.throughput import Speed, newest_config, past_disk_speed, past_speed

if TYPE_CHECKING:  # these import torch
    from transformers import PreTrainedConfig

    from training.planning.memory import Memory
    from training.planning.phases import Fitting, Phase, Values

DEFAULT_CPU_RANKS = 2
REHEARSAL_SECONDS = 900


@dataclass(frozen=True)
class Asked:
    """What a plan is made for, besides the settings; None = as it is here."""

    gpu_memory_gb: float | None = None
    tokens_per_second: float | None = None
    host_memory_gb: float | None = None  # of a machine
    exact: bool = False

    @classmethod
    def of(cls, switches: Any) -> "Asked":
        return cls(**{field.name: getattr(switches, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class Base:
    """The checkpoint that training starts from, None from scratch; whether what describes it is here."""

    checkpoint: str | None
    here: bool


@dataclass(frozen=True)
class Course:
    """Steps, tokens and padding of the whole training; exact when the pack plan is."""

    rows_per_step: int
    steps_per_epoch: int
    steps: int
    epochs: float
    tokens: int
    target_tokens: int | None
    padding: float | None


@dataclass(frozen=True)
class Needs:
    """What the model and its training take on a rank and on the disk; the cheapest changes, where that is too much."""

    parameters: int
    trainable: int
    memory: "Memory"
    activations_other: float  # with gradient checkpointing switched the other way
    phases: "list[Phase]"
    change: "Fitting | None"
    adapter: "Fitting | None"  # the cheapest change that trains an adapter
    disk_bytes: int


@dataclass(frozen=True)
class CheckpointCost:
    """Seconds to write one at the speed of an earlier one, whether a stop leaves that time; None = not known."""

    bytes: int
    seconds: float | None = None
    source: str | None = None
    in_time: bool | None = None


@dataclass(frozen=True)
class RunPlan:
    """The whole plan. `needs` are not known while the model's configuration is out of reach."""

    settings: PandaSettings
    base: Base
    target: Hardware
    data: DataEstimate
    course: Course
    problems: list[str]  # settings that do not work together
    needs: Needs | None
    checkpoint: CheckpointCost | None
    exact: list[PlayedPhase] | None  # None = not asked for
    speed: Speed | None

    @property
    def hours(self) -> float | None:
        return self.course.tokens / self.speed.tokens_per_second / 3600 if self.speed else None

    @property
    def device_hours(self) -> float | None:
        """Of all ranks together, in training."""
        return None if self.hours is None else self.hours * self.target.ranks

    @property
    def price(self) -> float | None:
        """Of these hours, in `currency`; None where no price is given."""
        rate, hours = self.settings.price_per_gpu_hour, self.device_hours
        return None if rate is None or hours is None else rate * hours


def make_plan(settings: PandaSettings, asked: Asked = Asked()) -> RunPlan:
    """Look at the data, the model and earlier runs."""
    if nothing := nothing_to_start_from(settings):
        raise ConfigError(nothing)
    checkpoint = base_checkpoint(settings)
    described = description(settings)
    train = TrainSettings.of(settings)
    target = target_of(train, asked.gpu_memory_gb, asked.host_memory_gb)
    runs, given = Path(settings.output_dir), asked.tokens_per_second
    data = estimate_data(settings, described, newest_config(runs))
    config = _configuration(settings, described)
    known = None if checkpoint is None else config.to_dict() if config else {}
    needs = _needs(settings, train, target, config, known) if config else None
    return RunPlan(
        settings=settings,
        base=Base(checkpoint, described is not None or checkpoint is None),
        target=target,
        data=data,
        course=course_of(data, train, target, settings.packing),
        problems=compatibility.problems(train, known, settings.packing, settings.max_seq_length),
        needs=needs,
        checkpoint=_checkpoint(needs.trainable, settings) if needs else None,
        exact=_rehearsed(settings, train, target, described) if asked.exact and config else None,
        speed=Speed(given, "as given") if given else past_speed(runs, train, TrackingSettings.of(settings)),
    )


def target_of(settings: TrainSettings, gpu_memory_gb: float | None, host_memory_gb: float | None = None) -> Hardware:
    """GPUs when there are some or their memory is given, else the CPU processes that would run here."""
    num_gpus, machines = commands.num_gpus(), settings.nodes
    is_gpu = bool(gpu_memory_gb or num_gpus)
    ranks = settings.num_processes or num_gpus or (1 if is_gpu else DEFAULT_CPU_RANKS)
    here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks
    if not is_gpu:
        return Hardware(ranks * machines, False, settings.precision == "bf16", here, machines=machines)
    host = host_memory_gb * GB / ranks if host_memory_gb else None if gpu_memory_gb else here
    memory, has_bf16 = (gpu_memory_gb * GB, True) if gpu_memory_gb else first_gpu()
    bf16 = has_bf16 if settings.precision == "auto" else settings.precision == "bf16"
    return Hardware(ranks * machines, True, bf16, memory, host, machines)


def _checkpoint(num_trained: int, settings: PandaSettings) -> CheckpointCost:
    from training.planning.memory import CHECKPOINT_BYTES

    size, disk = num_trained * CHECKPOINT_BYTES, past_disk_speed(Path(settings.output_dir))
    if disk is None:
        return CheckpointCost(size)
    seconds = size / disk.bytes_per_second
    return CheckpointCost(size, seconds, disk.source, seconds < TIME_TO_SAVE * settings.stop_deadline_seconds)


def course_of(data: DataEstimate, settings: TrainSettings, target: Hardware, packing: bool) -> Course:
    """The training that the rows, the settings and the number of ranks make."""
    rows_per_step = settings.rows_per_step(target.ranks)
    per_epoch = steps_per_epoch(data.rows, rows_per_step)
    steps = settings.total_steps(per_epoch)
    epochs = steps / per_epoch if per_epoch else 0.0
    return Course(
        rows_per_step=rows_per_step,
        steps_per_epoch=per_epoch,
        steps=steps,
        epochs=epochs,
        tokens=round(data.tokens * epochs),
        target_tokens=None if data.target_tokens is None else round(data.target_tokens * epochs),
        padding=_padding(data, settings, target.ranks, packing),
    )


def _padding(data: DataEstimate, settings: TrainSettings, num_ranks: int, packing: bool) -> float | None:
    """Share of the tokens computed that are padding: every row is padded to the longest of its micro-batch.

    Before there is a plan, that of packed rows is that of the plan, and of others it is not known.
    """
    if data.plan_dir is None or not data.rows:
        return 1 - data.utilisation if packing else None
    micro_batch = settings.per_gpu_train_batch_size
    order = rows_of_step(data.rows, data.rows, settings.seed, 0, 0)
    lengths = open_plan(data.plan_dir, "train").row_tokens[order].astype(np.int64)
    widths = np.pad(lengths, (0, -len(lengths) % micro_batch)).reshape(-1, micro_batch).max(axis=1)
    empty = -len(widths) % num_ranks  # micro-batches of ranks that have none left: one token wide
    return 1 - float(lengths.sum() / (micro_batch * (widths.sum() + empty)))


def _configuration(settings: PandaSettings, described: Path | None) -> "PreTrainedConfig | None":
    """The model's; None while it is out of reach."""
    if described is None and settings.architecture is None:
        return None
    from training.planning.model_shape import config_from

    return config_from(described, settings.architecture)


def _needs(
    settings: PandaSettings,
    train: TrainSettings,
    target: Hardware,
    config: "PreTrainedConfig",
    known: dict[str, Any] | None,
) -> Needs:
    """:param known: the configuration as plain JSON; None = from scratch."""
    import torch

    from training.planning import memory, phases
    from training.planning.model_shape import ModelShape, measure

    @lru_cache
    def shape_of(lora: bool, quant: bool) -> ModelShape:
        changed = train.model_copy(update={"use_lora": lora, "use_quant": quant})
        dtype = torch.bfloat16 if target.bf16 else torch.float32
        return measure(config, changed, settings.max_seq_length, dtype, settings.packing)

    def shapes(changed: TrainSettings) -> ModelShape:
        return shape_of(changed.use_lora, changed.use_quant)

    shape = shapes(train)
    other = train.model_copy(update={"gradient_checkpointing": not train.gradient_checkpointing})
    change = adapter = None
    if phases.too_large(shape, train, target):
        wanted = (target, known, settings.packing)
        change = phases.fitting_change(shapes, train, *wanted)
        lora: Values = {"use_lora": True}
        found = None if train.use_lora else phases.fitting_change(shapes, train.model_copy(update=lora), *wanted)
        adapter = replace(found, settings=lora | found.settings) if found else None
    saved = shape.trainable if train.use_lora else shape.parameters
    return Needs(
        parameters=shape.parameters,
        trainable=shape.trainable,
        memory=memory.estimate(shape, train, target),
        activations_other=memory.activations(shape, other),
        phases=phases.phases(shape, train, target),
        change=change,
        adapter=adapter,
        disk_bytes=memory.disk_bytes(shape.trainable, saved, train),
    )


def _rehearsed(
    settings: PandaSettings, train: TrainSettings, target: Hardware, described: Path | None
) -> list[PlayedPhase]:
    """A training step of all ranks with FSDP2, played on this machine without weights, phase by phase."""
    played = train.model_copy(update={"precision": "bf16" if target.bf16 else "float32"})
    model_dir = str(described) if described else None
    wanted = Rehearsal(played.model_dump(mode="json"), model_dir, target.ranks, target.is_gpu, settings.max_seq_length)
    command, job = [sys.executable, "-m", "training.planning.rehearsal"], json.dumps(asdict(wanted))
    done = subprocess.run(command, input=job, capture_output=True, text=True, timeout=REHEARSAL_SECONDS, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError([f"--exact: this model could not be rehearsed with fake tensors: {reason}"])
    return [PlayedPhase(**phase) for phase in json.loads(done.stdout)]


def as_json(plan: RunPlan) -> dict[str, Any]:
    """The plan as plain values; its keys are documented in docs/guide.md."""
    target = plan.target
    return {
        "model": plan.settings.model,
        "base": asdict(plan.base),
        "target": asdict(target) | {"words": target.words},
        "stages": [asdict(stage) | {"reused": stage.reused} for stage in plan.data.stages],
        "data": _data_as_json(plan.data),
        "course": asdict(plan.course),
        "problems": plan.problems,
        **_needs_as_json(plan.needs, target),
        "checkpoint": asdict(plan.checkpoint) if plan.checkpoint else None,
        "exact": None if plan.exact is None else _exact_as_json(plan.exact, target),
        "speed": asdict(plan.speed) if plan.speed else None,
        "hours": plan.hours,
        "device_hours": plan.device_hours,
        "price": plan.price,
    }


def _data_as_json(data: DataEstimate) -> dict[str, Any]:
    values = asdict(data)
    del values["stages"]
    return values | {"plan_dir": str(data.plan_dir) if data.plan_dir else None, "report": data.report or {}}


def _needs_as_json(needs: Needs | None, target: Hardware) -> dict[str, Any]:
    """Keys at the top of the object; null while nothing is known."""
    if needs is None:
        return dict.fromkeys((
            "parameters", "trainable", "memory", "phases", "fits", "change", "adapter", "disk_bytes"
        ))  # fmt: skip
    more = {"total": needs.memory.total, "activations_other": needs.activations_other}
    return {
        "parameters": needs.parameters,
        "trainable": needs.trainable,
        "memory": asdict(needs.memory) | more,
        "phases": [asdict(phase) | {"fits": phase.fits(target)} for phase in needs.phases],
        "fits": all(phase.fits(target) for phase in needs.phases),
        "change": _change_as_json(needs.change),
        "adapter": _change_as_json(needs.adapter),
        "disk_bytes": needs.disk_bytes,
    }


def _change_as_json(change: "Fitting | None") -> dict[str, Any] | None:
    if change is None:
        return None
    values, needed = change.settings, change.memory
    return {"settings": values, "flags": flags(values), "total": needed.total, "host": needed.host}


def flags(values: "Values") -> str:
    """Settings as one would type them."""
    return " ".join(f"--{name} {plain_text(value)}" for name, value in values.items())


def _exact_as_json(phases: list[PlayedPhase], target: Hardware) -> dict[str, Any]:
    totals = {phase.name: target.with_overhead(phase.peak) for phase in phases}
    too_large = [name for name, total in totals.items() if not target.fits(total)]
    played = [asdict(phase) | {"total": totals[phase.name]} for phase in phases]
    return {"strategy": "fsdp", "phases": played, "fits": not too_large, "does_not_fit": too_large}
