"""What a run is planned for: how many ranks, on GPUs or not, with how much memory each.

In: nothing. Out: `Hardware`; what NVIDIA's tool says of the GPUs of this machine. Cost: a call of ``nvidia-smi``.
"""

import os
import shutil
import subprocess
from dataclasses import dataclass

FITS = 0.95  # of a GPU's memory: the rest is for what no one foresees
FITS_CPU = 0.6  # glibc keeps up to half as much again (2.5 GB allocated, 3.8 GB resident)
FIRST_WITH_BF16 = 8.0  # compute capability: Ampere
GB = 1e9
GPU_CONTEXT_BYTES = 1.0e9  # CUDA, cuBLAS and NCCL, outside of torch's allocator
GPU_FRAGMENTATION = 0.04
CPU_PROCESS_BYTES = 0.22e9  # Python with torch, transformers and deepspeed, as far as a step needs it: fitted


@dataclass(frozen=True)
class Hardware:
    """What the ranks run on."""

    ranks: int
    is_gpu: bool
    bf16: bool
    memory_bytes: float | None = None  # of each rank; None = not known
    host_bytes: float | None = None  # CPU memory of each rank on a GPU; None = not known
    machines: int = 1

    @property
    def ranks_here(self) -> int:
        """Ranks of one machine."""
        return self.ranks // self.machines

    @property
    def element_bytes(self) -> int:
        return 2 if self.bf16 else 4

    @property
    def words(self) -> str:
        kind = "GPU" if self.is_gpu else "CPU rank"
        memory = f", {self.memory_bytes / GB:.1f} GB each" if self.memory_bytes else ""
        return f"{self.ranks} {kind}{'s' if self.ranks > 1 else ''}, {'bfloat16' if self.bf16 else 'float32'}{memory}"

    def with_overhead(self, num_bytes: float) -> float:
        """What a rank takes that has tensors of that size at its peak."""
        if self.is_gpu:
            return num_bytes * (1 + GPU_FRAGMENTATION) + GPU_CONTEXT_BYTES
        return num_bytes + CPU_PROCESS_BYTES

    def tensors_in(self, num_bytes: float) -> float:
        """What of that is tensors: the other way round."""
        if self.is_gpu:
            return (num_bytes - GPU_CONTEXT_BYTES) / (1 + GPU_FRAGMENTATION)
        return num_bytes - CPU_PROCESS_BYTES

    def fits(self, num_bytes: float) -> bool:
        """Whether a rank has room for that much; a memory that is not known has."""
        share = FITS if self.is_gpu else FITS_CPU
        return self.memory_bytes is None or num_bytes <= share * self.memory_bytes

    def host_fits(self, num_bytes: float) -> bool:
        """Whether there is so much CPU memory for each rank on a GPU."""
        return self.host_bytes is None or num_bytes <= FITS * self.host_bytes


def first_gpu() -> tuple[float | None, bool]:
    """Memory of the first GPU in bytes, None if nobody knows, and whether it computes in bfloat16."""
    for mebibytes, capability in query_gpus("memory.total", "compute_cap")[:1]:
        if mebibytes is not None and capability is not None:
            return mebibytes * 2**20, capability >= FIRST_WITH_BF16
    return None, True


def query_gpus(*fields: str) -> list[list[float | None]]:
    """Numbers of each GPU that ranks may use, by nvidia-smi's names (None: it has none).

    [] where the tool is not there or does not answer.
    """
    if not shutil.which("nvidia-smi"):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    only = [f"--id={visible}"] if visible else []
    command = ["nvidia-smi", *only, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    lines = (line.split(",") for line in text.strip().splitlines())
    return [[_number(word) for word in words] for words in lines if len(words) == len(fields)]


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:  # "[N/A]"
        return None
