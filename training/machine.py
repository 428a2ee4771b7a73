"""Facts about this machine that the launcher needs, found without torch. In: /proc, /dev, cgroups. Out: numbers."""

import os
import socket
from pathlib import Path

from training.commands import Machine

MEMORY_EVENTS = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))


def this_machine() -> Machine:
    """GPUs, usable cores and a port that is free now."""
    return Machine(num_gpus=num_gpus(), num_cores=len(os.sched_getaffinity(0)), free_port=free_port())


def num_gpus() -> int:
    """GPUs the ranks will see: CUDA_VISIBLE_DEVICES if set, else the NVIDIA device files."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def free_port() -> int:
    """A free TCP port of the loopback device. Another process may take it before rank 0 does: that run is retried."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def num_oom_kills() -> int:
    """How often the kernel has killed a process of this control group for memory; 0 where that is not counted."""
    for path in MEMORY_EVENTS:
        if path.exists():
            words = path.read_text().split()
            return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else 0
    return 0


def machine_kind() -> str:
    """Processor, cores and GPUs: where they are the same, so are the losses, bit by bit."""
    cpu = _values(Path("/proc/cpuinfo"), "model name")[:1] or ["unknown processor"]
    models = [model for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
              for model in _values(path, "Model")]  # fmt: skip
    return ", ".join([f"{cpu[0]} ({len(os.sched_getaffinity(0))} cores)", *models])


def _values(path: Path, name: str) -> list[str]:
    """Values of the lines `name : value` of a file in /proc."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name]
