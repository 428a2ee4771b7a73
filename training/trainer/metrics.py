"""What is measured in a step and where it goes: RUN/metrics.jsonl is the truth, everything else reads it.

In: counts and seconds of a step. Out: one JSON line a step, and a progress line with rate and ETA. Cost: a few
microseconds and one small write a step. On GPUs spans are measured with events: nothing waits for them until the step
has ended anyway.
"""

import json
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from data_prep import store
from training.models.loss import layers_of, output_layer
from training.run_files import Spans, read_lines

SPANS = ("data", "forward", "backward", "step")

PEAK_FLOPS: dict[str, float] = {  # words of the device's name -> dense bfloat16 operations per second
    # NVIDIA's data sheets, which print twice as much, with sparsity, from Hopper on. Boards before families.
    "GB200": 2500e12, "B200": 2250e12,
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H800 PCIe": 756e12, "H800": 989e12,
    "H200 NVL": 835e12, "H200": 989e12, "H20": 148e12,
    "A100": 312e12, "A800": 312e12, "A40": 149.7e12, "A30": 165e12, "A10G": 70e12, "A10": 125e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    "5090": 209.5e12, "4090": 165.2e12, "3090": 71e12,  # architecture papers, adding up in float32
}  # fmt: skip


@dataclass
class Clock:
    """Seconds in each span of the current step."""

    device: torch.device
    _spans: list[tuple[str, Any, Any]] = field(default_factory=list)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        begin = self._now()
        try:
            yield
        finally:
            self._spans.append((name, begin, self._now()))

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> Spans:
        """The spans since the last call."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        totals = dict.fromkeys(SPANS, 0.0)
        for name, begin, end in self._spans:
            totals[name] += begin.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - begin
        self._spans.clear()
        data, forward, backward, step = totals.values()
        return Spans(seconds_data=data, seconds_forward=forward, seconds_backward=backward, seconds_step=step)


def memory_peak_bytes(device: torch.device) -> int:
    """Peak of GPU memory, or of this process without GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Flops:
    """Floating point operations, forward and backward, without attention scores (arXiv 2001.08361)."""

    per_token: float
    per_target: float  # the output layer, which sees only what predicts a target

    def of(self, tokens: float, targets: float) -> float:
        return self.per_token * tokens + self.per_target * targets


def flops_of(model: PreTrainedModel) -> Flops:
    """2 a weight forward, 2 for the gradient that flows through, 2 more where the weight itself is trained.

    Embeddings are looked up, not multiplied.
    """
    lookup, output = layers_of(model.get_input_embeddings()), layers_of(model.get_output_embeddings())
    ends = {parameter for layer in (*lookup, *output) if layer is not None for parameter in layer.parameters()}
    head = set() if output == [None] else set(output_layer(model).parameters())
    body = [parameter for parameter in model.parameters() if parameter not in ends]
    return Flops(*(float(sum(num_elements(p) * (6 if p.requires_grad else 4) for p in part)) for part in (body, head)))


def num_elements(parameter: nn.Parameter) -> int:
    """Of the whole weight: sharded ones keep their size aside, 4-bit ones hold two in a byte."""
    if hasattr(parameter, "quant_state") and parameter.quant_state is not None:
        return int(torch.Size(parameter.quant_state.shape).numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def peak_flops(device: torch.device) -> float | None:
    """Peak of the device, None where it is not known (no CPU's is)."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """Of a device by its name: "NVIDIA H100 80GB HBM3"."""
    words = set(re.split(r"[\s-]+", name))
    return next((peak for board, peak in PEAK_FLOPS.items() if words.issuperset(board.split())), None)


class JsonLines:
    """A file of one JSON object a line, of which a resumed run keeps the lines up to its step."""

    def __init__(self, path: Path, last_step: int):
        self.path = path
        kept = [line for line in read_lines(path) if line["step"] <= last_step]
        store.write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, **values: Any) -> None:
        store.append(self.path, json.dumps({**values, "time": round(time.time(), 3)}) + "\n")
