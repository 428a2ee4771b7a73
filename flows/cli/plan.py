"""`panda plan` and `train.py --dry_run`: what a run would do, need and take. Nothing is trained, no weights are loaded.

In: the flags of `train.py`; the memory of a GPU and the speed, if one wants to say. Out: a report, or one JSON object;
exit code 2 when the settings do not work together. Cost: hashing the corpus, 5 s of imports, a second of arithmetic.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from configs.cli import CONF_PATH, JSON, PLAN_SWITCHES, VERBOSE, CommandLine, configure, plain_text
from configs.errors import ConfigError
from configs.load import Loaded
from configs.settings import PandaSettings
from data_prep.plan.order import rows_of_step, steps_per_epoch
from data_prep.plan.reader import open_plan
from flows.cli.console import plain_table, stdout_console
from flows.cli.estimate import DataEstimate, estimate_data
from flows.cli.exact import rehearse
from flows.cli.exact import table as exact_table
from flows.cli.run import print_json
from flows.parts.preflight import nothing_to_start_from
from training.launch import commands
from training.models.hub import base_checkpoint, description
from training.planning import compatibility
from training.planning.hardware import GB, Hardware, first_gpu
from training.settings import TIME_TO_SAVE, TrackingSettings, TrainSettings
from training.tracking.throughput import Speed, newest_config, past_disk_speed, past_speed

TEXT = "Tell what a run would do, need and take: stages, rows, steps, memory, disk, hours. Nothing is trained."
DEFAULT_CPU_RANKS = 2


def main(argv: list[str]) -> int:
    """`panda plan`."""
    line, loaded = configure("panda plan", TEXT, argv, [CONF_PATH, JSON, VERBOSE, *PLAN_SWITCHES])
    return run(line, loaded)


def run(line: CommandLine, loaded: Loaded) -> int:
    """Make the plan of a configuration and show it."""
    plan = make_plan(loaded.settings, Asked.of(line.switches))
    if line.switches.json:
        print_json(plan)
    else:
        show(plan, loaded.settings)
    return 2 if plan["problems"] else 0


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


def make_plan(settings: PandaSettings, asked: Asked = Asked()) -> dict[str, Any]:
    """The whole plan as plain values; its keys are documented in docs/guide.md."""
    if nothing := nothing_to_start_from(settings):
        raise ConfigError(nothing)
    checkpoint = base_checkpoint(settings)
    described = description(settings)
    last = newest_config(Path(settings.output_dir))
    train = TrainSettings.of(settings)
    target = target_of(train, asked.gpu_memory_gb, asked.host_memory_gb)
    data = estimate_data(settings, described, last)
    batches = batches_of(data, train, target, settings.packing)
    given, known = asked.tokens_per_second, described or settings.architecture
    speed = Speed(given, "as given") if given else _past_speed(settings, train)
    size = _size(settings, train, target, described)
    return {
        "model": settings.model,
        "base": {"checkpoint": checkpoint, "here": described is not None or checkpoint is None},
        "target": asdict(target) | {"words": target.words},
        "stages": [asdict(stage) | {"reused": stage.reused} for stage in data.stages],
        "data": _data(data),
        "course": batches,
        **size,
        "checkpoint": _checkpoint(size["trainable"], settings),
        "exact": rehearse(settings, target, described) if asked.exact and known else None,
        "speed": asdict(speed) if speed else None,
        "hours": batches["tokens"] / speed.tokens_per_second / 3600 if speed else None,
    }


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


def _checkpoint(num_trained: int | None, settings: PandaSettings) -> dict[str, Any] | None:
    """Bytes of a checkpoint, seconds to write it at the speed of an earlier one, whether a stop leaves that time."""
    from training.planning.memory import CHECKPOINT_BYTES

    if num_trained is None:
        return None
    size, disk = num_trained * CHECKPOINT_BYTES, past_disk_speed(Path(settings.output_dir))
    seconds = size / disk.bytes_per_second if disk else None
    return {
        "bytes": size,
        "seconds": seconds,
        "source": disk.source if disk else None,
        "in_time": seconds < TIME_TO_SAVE * settings.stop_deadline_seconds if seconds else None,
    }


def _past_speed(settings: PandaSettings, train: TrainSettings) -> Speed | None:
    return past_speed(Path(settings.output_dir), train, TrackingSettings.of(settings))


def _data(data: DataEstimate) -> dict[str, Any]:
    values = asdict(data)
    del values["stages"]
    return values | {"plan_dir": str(data.plan_dir) if data.plan_dir else None}


def batches_of(data: DataEstimate, settings: TrainSettings, target: Hardware, packing: bool) -> dict[str, Any]:
    """Steps, tokens and padding of the whole training; exact when the pack plan is."""
    rows_per_step = settings.rows_per_step(target.ranks)
    per_epoch = steps_per_epoch(data.rows, rows_per_step)
    steps = settings.total_steps(per_epoch)
    epochs = steps / per_epoch if per_epoch else 0.0
    return {
        "rows_per_step": rows_per_step,
        "steps_per_epoch": per_epoch,
        "steps": steps,
        "epochs": epochs,
        "tokens": round(data.tokens * epochs),
        "target_tokens": None if data.target_tokens is None else round(data.target_tokens * epochs),
        "padding": _padding(data, settings, target.ranks, packing),
    }


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


def _size(settings: PandaSettings, train: TrainSettings, target: Hardware, described: Path | None) -> dict[str, Any]:
    """Compatibility, memory and disk; memory is unknown for a model whose configuration is out of reach."""
    from training.planning.model_shape import config_from

    unknown = ("parameters", "trainable", "memory", "phases", "fits", "change", "adapter", "disk_bytes")
    nothing = dict.fromkeys(unknown)
    if described is None and settings.architecture is None:
        return {"problems": compatibility.problems(train, {}, settings.packing), **nothing}
    config = config_from(described, settings.architecture)
    known = config.to_dict() if base_checkpoint(settings) else None
    problems = compatibility.problems(train, known, settings.packing, settings.max_seq_length)
    return {"problems": problems, **_needs(settings, train, target, config, known)}


def _needs(
    settings: PandaSettings, train: TrainSettings, target: Hardware, config: Any, known: dict[str, Any] | None
) -> dict[str, Any]:
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
    needed = memory.estimate(shape, train, target)
    other = train.model_copy(update={"gradient_checkpointing": not train.gradient_checkpointing})
    parts = phases.phases(shape, train, target)
    lacking = [phase.name for phase in parts if not phase.fits(target)]
    change = adapter = None
    if lacking:
        wanted = (target, known, settings.packing)
        change = _described(phases.fitting_change(shapes, train, *wanted), {})
        lora = {"use_lora": True}
        adapter = _described(phases.fitting_change(shapes, train.model_copy(update=lora), *wanted), lora)
    saved = shape.trainable if train.use_lora else shape.parameters
    return {
        "parameters": shape.parameters,
        "trainable": shape.trainable,
        "memory": asdict(needed) | {
            "total": needed.total,
            "activations_other": memory.activations(shape, other),
        },
        "phases": [asdict(phase) | {"fits": phase.fits(target)} for phase in parts],
        "fits": not lacking,
        "change": change,
        "adapter": None if train.use_lora else adapter,
        "disk_bytes": memory.disk_bytes(shape.trainable, saved, train),
    }  # fmt: skip


def _described(found: tuple[dict[str, Any], Any] | None, besides: dict[str, Any]) -> dict[str, Any] | None:
    """A change that fits, as plain values."""
    if found is None:
        return None
    values = besides | found[0]
    return {"settings": values, "flags": _flags(values), "total": found[1].total, "host": found[1].host}


def _flags(values: dict[str, Any]) -> str:
    return " ".join(f"--{name} {plain_text(value)}" for name, value in values.items())


PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "update", "engine")


def show(plan: dict[str, Any], settings: PandaSettings) -> None:
    """Stages and why, rows and steps, memory part by part, disk, hours, verdict."""
    console = stdout_console()
    console.print(_table("Stages", _stages(plan)))
    console.print(_table("Training", _training(plan)))
    if plan["memory"]:
        console.print(_table(f"Memory of a rank ({plan['target']['words']})", _memory(plan, settings)))
        console.print(_table("Phases, each on a rank", [_phase(phase) for phase in plan["phases"]]))
    if plan["exact"]:
        console.print(exact_table(plan["exact"], plan["target"]))
    for line in _verdict(plan):
        console.print(line, markup=False)


def _stages(plan: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    for stage in plan["stages"]:
        if stage["reused"]:
            state = "reused"
        else:
            state = f"to do ({stage['total'] - stage['done']} of {stage['total']})" if stage["done"] else "to do"
        rows.append((stage["name"], state, stage["why"]))
    base = plan["base"]
    if base["checkpoint"]:
        rows.insert(1, ("base model", "here" if base["here"] else "to download", base["checkpoint"]))
    return [*rows, ("train", "to do", f"{plan['course']['steps']:,} steps" if plan["data"]["corpus_bytes"] else "")]


def _training(plan: dict[str, Any]) -> list[tuple[str, str]]:
    rows = _rows_and_steps(plan["data"], plan["course"]) if plan["data"]["corpus_bytes"] else []
    if plan["parameters"]:
        rows.append(("parameters", f"{_count(plan['parameters'])}, {_count(plan['trainable'])} of them trained"))
        rows.append(("disk for checkpoints and model", _gigabytes(plan["disk_bytes"])))
        rows.append(("a checkpoint", _checkpoint_in_words(plan["checkpoint"])))
    return [*rows, ("duration", _duration(plan))]


def _checkpoint_in_words(checkpoint: dict[str, Any]) -> str:
    """Its size and time, and what a stop makes of it."""
    size, seconds = _gigabytes(checkpoint["bytes"]), checkpoint["seconds"]
    if seconds is None:
        return f"{size}; how fast it is written is known once a run has written one"
    text = f"{size}, in about {seconds:.1f} s beside training ({checkpoint['source']})"
    if checkpoint["in_time"]:
        return f"{text}; a stop leaves the time for it"
    return f"{text}; a stop leaves no time: --stop_deadline_seconds {math.ceil(seconds / TIME_TO_SAVE)}"


def _rows_and_steps(data: dict[str, Any], batches: dict[str, Any]) -> list[tuple[str, str]]:
    about = "" if data["exact"] else "about "
    targets, padding = data["target_tokens"], batches["padding"]
    return [
        ("rows", f"{about}{data['rows']:,}"),
        ("tokens in them", f"{about}{data['tokens']:,}"),
        ("target tokens", "known once tokens exist" if targets is None else f"{about}{targets:,}"),
        ("padding", "known once tokens exist" if padding is None else f"{about}{100 * padding:.1f} %"),
        ("rows in a step", f"{batches['rows_per_step']:,}"),
        ("optimizer steps", f"{about}{batches['steps']:,} ({batches['epochs']:.2f} epochs)"),
        ("tokens trained on", f"{about}{batches['tokens']:,}"),
    ]


def _duration(plan: dict[str, Any]) -> str:
    speed = plan["speed"]
    if not plan["data"]["corpus_bytes"]:
        return "unknown: no corpus; give --instruction_tuning_data_dir or --pretraining_data_dir"
    if not speed:
        return "unknown: no earlier run; give --tokens_per_second"
    return f"{plan['hours']:.2f} h at {speed['tokens_per_second']:,.0f} tokens/s ({speed['source']})"


def _memory(plan: dict[str, Any], settings: PandaSettings) -> list[tuple[str, str, str]]:
    memory = plan["memory"]
    other = "without" if settings.gradient_checkpointing else "with"
    notes = {
        "activations": f"{_gigabytes(memory['activations_other'])} {other} gradient_checkpointing",
        "logits": "one chunk of targets at a time, and the gradient of the head",
        "update": "a copy of the gradients, when there are no activations",
        "engine": "buckets, gathered weights, the process itself",
    }
    rows = [(part, _gigabytes(memory[part]), notes.get(part, "")) for part in PARTS]
    rows.append(("total", _gigabytes(memory["total"]), "at the peak of a step"))
    if memory["host"]:
        rows.append(
            (
                "in CPU memory",
                _gigabytes(memory["host"]),
                "offloaded, and a copy of its part of a checkpoint while that is written",
            )
        )
    return rows


def _verdict(plan: dict[str, Any]) -> list[str]:
    lines = [f"Does not work together: {problem}" for problem in plan["problems"]] or ["The settings work together."]
    target, change = plan["target"], plan["change"]
    if plan["memory"] is None:
        lines.append("Memory: unknown until the model's configuration can be read (is the hub out of reach?).")
    elif target["memory_bytes"] is None:
        lines.append("Memory: give --gpu_memory_gb to see whether it fits.")
    elif plan["fits"]:
        lines.append(f"It fits: {_gigabytes(plan['memory']['total'])} of {_gigabytes(target['memory_bytes'])}.")
    else:
        lines += [_too_large(phase, target) for phase in plan["phases"] if not phase["fits"]]
        if change:
            lines.append(f"It does not fit. The smallest change that does: {_change(change)}")
        else:
            lines.append("It does not fit, and no change of settings makes it: more --num_processes, or shorter rows.")
    if plan["adapter"] and plan["adapter"] != change:
        lines.append(f"Or train an adapter: {_change(plan['adapter'])}")
    if not target["is_gpu"]:
        lines.append("Planned for this machine, which has no GPU; for GPUs: --gpu_memory_gb 80 --num_processes 8")
    return lines


def _phase(phase: dict[str, Any]) -> tuple[str, str, str]:
    host = f"{_gigabytes(phase['host'])} of CPU memory" if phase["host"] else ""
    return phase["name"], _gigabytes(phase["device"]), host


def _too_large(phase: dict[str, Any], target: dict[str, Any]) -> str:
    """Which part of a run has too little of what."""
    needed = f"{_gigabytes(phase['device'])} of {_gigabytes(target['memory_bytes'])}"
    if target["host_bytes"]:
        needed += f", {_gigabytes(phase['host'])} of {_gigabytes(target['host_bytes'])} of CPU memory"
    return f"Too large on a rank: {phase['name']} ({needed})."


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"


def _change(change: dict[str, Any]) -> str:
    host = f" and {_gigabytes(change['host'])} of CPU memory for each rank" if change["host"] else ""
    return f"{change['flags']}   ({_gigabytes(change['total'])}{host})"


def _gigabytes(num_bytes: float) -> str:
    gigabytes = num_bytes / GB
    if gigabytes < 0.1:
        return f"{num_bytes / 1e6:.0f} MB"
    return f"{gigabytes:.{2 if gigabytes < 10 else 1}f} GB"


def _table(title: str, rows: Sequence[tuple[str, ...]]) -> Table:
    table = plain_table(max((len(row) for row in rows), default=0), title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table
