"""`panda plan` and `train.py --dry_run`: what a run would do, need and take. Nothing is trained, no weights are loaded.

In: the flags of `train.py`; the memory of a GPU and the speed, if one wants to say. Out: a report, or one JSON object;
exit code 2 when the settings do not work together. Cost: that of `flows.cli.run_plan`.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.table import Table

from configs.cli import CONF_PATH, JSON, PLAN_SWITCHES, VERBOSE, CommandLine, configure
from configs.load import Loaded
from flows.cli.console import plain_table, stdout_console
from flows.cli.estimate import DataEstimate
from flows.cli.run import print_json
from flows.cli.run_plan import Asked, CheckpointCost, Course, Needs, RunPlan, as_json, flags, make_plan
from training.planning.hardware import GB, Hardware
from training.planning.rehearsal_job import PlayedPhase
from training.settings import TIME_TO_SAVE

if TYPE_CHECKING:  # it imports torch
    from training.planning.phases import Fitting, Phase

TEXT = "Tell what a run would do, need and take: stages, rows, steps, memory, disk, hours. Nothing is trained."
PLAYED = {
    "load": "every rank reads its slices",
    "step": "forward, backward, update",
    "evaluate": "held-out rows, weights in memory",
    "save": "a copy of the shards, written beside the training",
    "export": "shards written by who holds them; an adapter is gathered",
}


def main(argv: list[str]) -> int:
    """`panda plan`."""
    line, loaded = configure("panda plan", TEXT, argv, [CONF_PATH, JSON, VERBOSE, *PLAN_SWITCHES])
    return run(line, loaded)


def run(line: CommandLine, loaded: Loaded) -> int:
    """Make the plan of a configuration and show it."""
    plan = make_plan(loaded.settings, Asked.of(line.switches))
    if line.switches.json:
        print_json(as_json(plan))
    else:
        show(plan)
    return 2 if plan.problems else 0


def show(plan: RunPlan) -> None:
    """Stages and why, rows and steps, memory part by part, disk, hours, verdict."""
    console = stdout_console()
    console.print(_table("Stages", _stages(plan)))
    console.print(_table("Training", _training(plan)))
    if plan.needs:
        memory = _memory(plan.needs, plan.settings.gradient_checkpointing)
        console.print(_table(f"Memory of a rank ({plan.target.words})", memory))
        console.print(_table("Phases, each on a rank", [_phase(phase) for phase in plan.needs.phases]))
    if plan.exact:
        console.print(_exact(plan.exact, plan.target))
    for line in _verdict(plan):
        console.print(line, markup=False)


def _stages(plan: RunPlan) -> list[tuple[str, str, str]]:
    rows = []
    for stage in plan.data.stages:
        if stage.reused:
            state = "reused"
        else:
            state = f"to do ({stage.total - stage.done} of {stage.total})" if stage.done else "to do"
        rows.append((stage.name, state, stage.why))
    if plan.base.checkpoint:
        rows.insert(1, ("base model", "here" if plan.base.here else "to download", plan.base.checkpoint))
    return [*rows, ("train", "to do", f"{plan.course.steps:,} steps" if plan.data.corpus_bytes else "")]


def _training(plan: RunPlan) -> list[tuple[str, str]]:
    rows = _rows_and_steps(plan.data, plan.course) if plan.data.corpus_bytes else []
    if plan.needs:
        counts = f"{_count(plan.needs.parameters)}, {_count(plan.needs.trainable)} of them trained"
        rows.append(("parameters", counts))
        rows.append(("disk for checkpoints and model", _gigabytes(plan.needs.disk_bytes)))
    if plan.checkpoint:
        rows.append(("a checkpoint", _checkpoint_in_words(plan.checkpoint)))
    return [*rows, ("duration", _duration(plan)), *_cost(plan)]


def _checkpoint_in_words(checkpoint: CheckpointCost) -> str:
    """Its size and time, and what a stop makes of it."""
    size, seconds = _gigabytes(checkpoint.bytes), checkpoint.seconds
    if seconds is None:
        return f"{size}; how fast it is written is known once a run has written one"
    text = f"{size}, in about {seconds:.1f} s beside training ({checkpoint.source})"
    if checkpoint.in_time:
        return f"{text}; a stop leaves the time for it"
    return f"{text}; a stop leaves no time: --stop_deadline_seconds {math.ceil(seconds / TIME_TO_SAVE)}"


def _rows_and_steps(data: DataEstimate, course: Course) -> list[tuple[str, str]]:
    about = "" if data.exact else "about "
    targets, padding = data.target_tokens, course.padding
    return [
        ("rows", f"{about}{data.rows:,}"),
        ("tokens in them", f"{about}{data.tokens:,}"),
        ("target tokens", "known once tokens exist" if targets is None else f"{about}{targets:,}"),
        ("padding", "known once tokens exist" if padding is None else f"{about}{100 * padding:.1f} %"),
        ("rows in a step", f"{course.rows_per_step:,}"),
        ("optimizer steps", f"{about}{course.steps:,} ({course.epochs:.2f} epochs)"),
        ("tokens trained on", f"{about}{course.tokens:,}"),
    ]


def _duration(plan: RunPlan) -> str:
    if not plan.data.corpus_bytes:
        return "unknown: no corpus; give --instruction_tuning_data_dir or --pretraining_data_dir"
    if not plan.speed:
        return "unknown: no earlier run; give --tokens_per_second"
    return f"{plan.hours:.2f} h at {plan.speed.tokens_per_second:,.0f} tokens/s ({plan.speed.source})"


def _cost(plan: RunPlan) -> list[tuple[str, str]]:
    """Hours of the devices that train, their price, and whether they are within the limit."""
    hours, limit = plan.device_hours, plan.settings.max_gpu_hours
    if hours is None or not plan.data.corpus_bytes:
        return []
    name = "GPU-hours" if plan.target.is_gpu else "rank-hours (CPU)"
    over = f"; max_gpu_hours={limit:g} will end training before" if limit is not None and hours > limit else ""
    price = [] if plan.price is None else [("price of training", f"{plan.price:,.2f} {plan.settings.currency}")]
    return [(f"{name} of training", f"{hours:,.4g}{over}"), *price]


def _memory(needs: Needs, checkpointing: bool) -> list[tuple[str, str, str]]:
    other = "without" if checkpointing else "with"
    notes = {
        "activations": f"{_gigabytes(needs.activations_other)} {other} gradient_checkpointing",
        "logits": "one chunk of targets at a time, and the gradient of the head",
        "update": "a copy of the gradients, when there are no activations",
        "engine": "buckets, gathered weights, the process itself",
    }
    parts = asdict(needs.memory)
    host = parts.pop("host")
    rows = [(part, _gigabytes(size), notes.get(part, "")) for part, size in parts.items()]
    rows.append(("total", _gigabytes(needs.memory.total), "at the peak of a step"))
    if host:
        offloaded = "offloaded, and a copy of its part of a checkpoint while that is written"
        rows.append(("in CPU memory", _gigabytes(host), offloaded))
    return rows


def _verdict(plan: RunPlan) -> list[str]:
    lines = [f"Does not work together: {problem}" for problem in plan.problems] or ["The settings work together."]
    lines += _whether_it_fits(plan.needs, plan.target)
    if not plan.target.is_gpu:
        lines.append("Planned for this machine, which has no GPU; for GPUs: --gpu_memory_gb 80 --num_processes 8")
    return lines


def _whether_it_fits(needs: Needs | None, target: Hardware) -> list[str]:
    """Which phases do not, and the changes with which they do."""
    if needs is None:
        return ["Memory: unknown until the model's configuration can be read (is the hub out of reach?)."]
    if target.memory_bytes is None:
        return ["Memory: give --gpu_memory_gb to see whether it fits."]
    lines = [_too_large(phase, target) for phase in needs.phases if not phase.fits(target)]
    if not lines:
        return [f"It fits: {_gigabytes(needs.memory.total)} of {_gigabytes(target.memory_bytes)}."]
    if needs.change:
        lines.append(f"It does not fit. The smallest change that does: {_change(needs.change)}")
    else:
        lines.append("It does not fit, and no change of settings makes it: more --num_processes, or shorter rows.")
    if needs.adapter and needs.adapter != needs.change:
        lines.append(f"Or train an adapter: {_change(needs.adapter)}")
    return lines


def _phase(phase: "Phase") -> tuple[str, str, str]:
    host = f"{_gigabytes(phase.host)} of CPU memory" if phase.host else ""
    return phase.name, _gigabytes(phase.device), host


def _too_large(phase: "Phase", target: Hardware) -> str:
    """Which part of a run has too little of what."""
    needed = f"{_gigabytes(phase.device)} of {_gigabytes(target.memory_bytes or 0)}"
    if target.host_bytes:
        needed += f", {_gigabytes(phase.host)} of {_gigabytes(target.host_bytes)} of CPU memory"
    return f"Too large on a rank: {phase.name} ({needed})."


def _change(change: "Fitting") -> str:
    needed = change.memory
    host = f" and {_gigabytes(needed.host)} of CPU memory for each rank" if needed.host else ""
    return f"{flags(change.settings)}   ({_gigabytes(needed.total)}{host})"


def _exact(phases: list[PlayedPhase], target: Hardware) -> Table:
    """Phase by memory and communication; a phase that does not fit is marked."""
    limit = f" of {_closely(target.memory_bytes)}" if target.memory_bytes else ""
    title = f"Rehearsed with FSDP2: rank 0 of {target.words}"
    drawn = Table(title=title, title_justify="left", box=SIMPLE)
    for name in ("phase", f"memory{limit}", "tensors at the peak", "held", "CPU memory", "sent", "what"):
        drawn.add_column(name, justify="left" if name in ("phase", "what") else "right")
    for phase in phases:
        total = target.with_overhead(phase.peak)
        mark = "" if target.fits(total) else "  does not fit"
        sent = f"{_closely(phase.sent)} a {phase.per}" if phase.sent else "nothing"
        drawn.add_row(
            phase.name, _closely(total) + mark, _closely(phase.peak), _closely(phase.held),
            _closely(phase.host) if phase.host else "", sent, PLAYED[phase.name],
        )  # fmt: skip
    return drawn


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"


def _gigabytes(num_bytes: float) -> str:
    gigabytes = num_bytes / GB
    if gigabytes < 0.1:
        return f"{num_bytes / 1e6:.0f} MB"
    return f"{gigabytes:.{2 if gigabytes < 10 else 1}f} GB"


def _closely(num_bytes: float) -> str:
    """A digit more, for what is counted and not estimated."""
    return f"{num_bytes / GB:.2f} GB" if num_bytes >= GB / 10 else f"{num_bytes / 1e6:.1f} MB"


def _table(title: str, rows: Sequence[tuple[str, ...]]) -> Table:
    table = plain_table(max((len(row) for row in rows), default=0), title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table
