"""The plan of a run for a person at a terminal. In: the plan. Out: text on stdout. Cost: none."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from configs.settings import PandaSettings

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "update", "engine")
GB = 1e9


def show(plan: dict[str, Any], settings: PandaSettings) -> None:
    """Stages and why, rows and steps, memory part by part, disk, hours, verdict."""
    console = Console(highlight=False)
    console.print(_table("Stages", _stages(plan)))
    console.print(_table("Training", _training(plan)))
    if plan["memory"]:
        console.print(_table(f"Memory of a rank ({plan['target']['words']})", _memory(plan, settings)))
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
        rows.append(("disk for checkpoints and model", _size(plan["disk_bytes"])))
    return [*rows, ("duration", _duration(plan))]


def _rows_and_steps(data: dict[str, Any], course: dict[str, Any]) -> list[tuple[str, str]]:
    about = "" if data["exact"] else "about "
    targets = data["target_tokens"]
    return [
        ("rows", f"{about}{data['rows']:,}"),
        ("tokens in them", f"{about}{data['tokens']:,}"),
        ("target tokens", "known once tokens exist" if targets is None else f"{about}{targets:,}"),
        ("padding", f"{about}{100 * course['padding']:.1f} %"),
        ("rows in a step", f"{course['rows_per_step']:,}"),
        ("optimizer steps", f"{about}{course['steps']:,} ({course['epochs']:.2f} epochs)"),
        ("tokens trained on", f"{about}{course['tokens']:,}"),
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
        "activations": f"{_size(memory['activations_other'])} {other} gradient_checkpointing",
        "logits": "one chunk of targets at a time, and the gradient of the head",
        "update": "float32 gradients, when there are no activations",
        "engine": "buckets, gathered weights, the process itself",
    }
    rows = [(part, _size(memory[part]), notes.get(part, "")) for part in PARTS]
    rows.append(("total", _size(memory["total"]), "at the peak of a step"))
    if memory["host"]:
        rows.append(("in CPU memory", _size(memory["host"]), "offloaded, or weights being loaded"))
    return rows


def _verdict(plan: dict[str, Any]) -> list[str]:
    lines = [f"Does not work together: {problem}" for problem in plan["problems"]] or ["The settings work together."]
    target, change = plan["target"], plan["change"]
    if plan["memory"] is None:
        lines.append("Memory: unknown until the model's configuration can be read (is the hub out of reach?).")
    elif target["memory_bytes"] is None:
        lines.append("Memory: give --gpu_memory_gb to see whether it fits.")
    elif plan["fits"]:
        lines.append(f"It fits: {_size(plan['memory']['total'])} of {_size(target['memory_bytes'])}.")
    elif change:
        lines.append(f"It does not fit. The smallest change that does: {_change(change)}")
    else:
        lines.append("It does not fit, and no change of settings makes it: more --num_processes, or shorter rows.")
    if plan["adapter"] and plan["adapter"] != change:
        lines.append(f"Or train an adapter: {_change(plan['adapter'])}")
    if not target["is_gpu"]:
        lines.append("Planned for this machine, which has no GPU; for GPUs: --gpu_memory_gb 80 --num_processes 8")
    return lines


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"


def _change(change: dict[str, Any]) -> str:
    host = f" and {_size(change['host'])} of CPU memory for each rank" if change["host"] else ""
    return f"{change['flags']}   ({_size(change['total'])}{host})"


def _size(num_bytes: float) -> str:
    gigabytes = num_bytes / GB
    if gigabytes < 0.1:
        return f"{num_bytes / 1e6:.0f} MB"
    return f"{gigabytes:.{2 if gigabytes < 10 else 1}f} GB"


def _table(title: str, rows: Sequence[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    return table
