"""`panda plan --exact`: a training step of all ranks played on this machine without weights, phase by phase.

In: the settings, what the ranks run on. Out: what `training.planning.rehearsal` found, in a process of its own, so that
`panda plan` imports nothing heavy and frees everything. Cost: about 10 s, and a minute and a half for 65B.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from configs.errors import ConfigError
from configs.settings import PandaSettings
from training.planning.hardware import GB, Hardware
from training.settings import TrainSettings

SECONDS = 900
WHAT = {
    "load": "every rank reads its slices",
    "step": "forward, backward, update",
    "evaluate": "held-out rows, weights in memory",
    "save": "a copy of the shards, written beside the training",
    "export": "shards written by who holds them; an adapter is gathered",
}


def rehearse(settings: PandaSettings, target: Hardware, described: Path | None) -> dict[str, Any]:
    """Phases of a run with FSDP2, and the first that a rank has no room for."""
    train = TrainSettings.of(settings).model_copy(update={"precision": "bf16" if target.bf16 else "float32"})
    wanted = {
        "settings": train.model_dump(mode="json"),
        "model_dir": str(described) if described else None,
        "ranks": target.ranks,
        "is_gpu": target.is_gpu,
        "num_tokens": settings.max_seq_length,
    }
    command, job = [sys.executable, "-m", "training.planning.rehearsal"], json.dumps(wanted)
    done = subprocess.run(command, input=job, capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError([f"--exact: this model could not be rehearsed with fake tensors: {reason}"])
    phases = [phase | {"total": target.with_overhead(phase["peak"])} for phase in json.loads(done.stdout)]
    too_large = [phase["name"] for phase in phases if not target.fits(phase["total"])]
    return {"strategy": "fsdp", "phases": phases, "fits": not too_large, "does_not_fit": too_large}


def table(exact: dict[str, Any], target: dict[str, Any]) -> Table:
    """Phase by memory and communication; a phase that does not fit is marked."""
    limit = f" of {_gigabytes(target['memory_bytes'])}" if target["memory_bytes"] else ""
    title = f"Rehearsed with FSDP2: rank 0 of {target['words']}"
    drawn = Table(title=title, title_justify="left", box=SIMPLE)
    for name in ("phase", f"memory{limit}", "tensors at the peak", "held", "CPU memory", "sent", "what"):
        drawn.add_column(name, justify="left" if name in ("phase", "what") else "right")
    for phase in exact["phases"]:
        mark = "  does not fit" if phase["name"] in exact["does_not_fit"] else ""
        sent = f"{_gigabytes(phase['sent'])} a {phase['per']}" if phase["sent"] else "nothing"
        drawn.add_row(
            phase["name"], _gigabytes(phase["total"]) + mark, _gigabytes(phase["peak"]), _gigabytes(phase["held"]),
            _gigabytes(phase["host"]) if phase["host"] else "", sent, WHAT[phase["name"]],
        )  # fmt: skip
    return drawn


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / GB:.2f} GB" if num_bytes >= GB / 10 else f"{num_bytes / 1e6:.1f} MB"
