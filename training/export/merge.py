"""Merge a LoRA adapter into its base: new weights = weights + scale * B @ A, one shard of the base after the other.

In: the adapter's and the base's directories (safetensors). Out: safetensors with the names, shards and dtypes of the
base; the sum is computed in float32 and rounded once. What this file does not know (DoRA, biases, transposed layers
of GPT-2, renamed weights) is merged by peft in memory instead. Cost: peak memory is one shard, about 5 GB at most,
whatever the size of the model; reading and writing the weights once.

LoRA: arXiv 2106.09685; rank-stabilised scale alpha / sqrt(r): arXiv 2312.03732.
"""

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.errors import ModelError
from training.models.hub import ADAPTER

PREFIX = "base_model.model."
INDEX = "model.safetensors.index.json"
PLAIN = {"use_dora": False, "bias": "none", "fan_in_fan_out": False, "lora_bias": False, "target_parameters": None}


@dataclass(frozen=True)
class Adapter:
    """The tensors of an adapter by the base weight they change."""

    config: dict[str, Any]
    a: dict[str, Tensor] = field(default_factory=dict)  # weight name -> (r, in)
    b: dict[str, Tensor] = field(default_factory=dict)  # weight name -> (out, r)
    whole: dict[str, Tensor] = field(default_factory=dict)  # weights that were trained as they are
    others: list[str] = field(default_factory=list)  # tensors this file does not know

    @property
    def names(self) -> set[str]:
        """The base weights it changes."""
        return self.a.keys() | self.whole.keys()

    def scale(self, name: str) -> float:
        """alpha / r, or alpha / sqrt(r), of a weight, with the patterns of peft."""
        rank = self.a[name].shape[0]
        module = name.removesuffix(".weight")
        patterns = (self.config.get("alpha_pattern") or {}).items()
        alpha = next((a for p, a in patterns if re.fullmatch(rf"(.*\.)?({p})", module)), self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """The merged weight, in the dtype of the base."""
        if name in self.whole:
            return self.whole[name].to(weight.dtype)
        if name not in self.a:
            return weight
        change = self.b[name].float() @ self.a[name].float()
        return (weight.float() + self.scale(name) * change).to(weight.dtype)


def read_adapter(directory: Path) -> Adapter:
    """An adapter directory, its tensors sorted by what they do."""
    adapter = Adapter(json.loads((directory / ADAPTER).read_text()))
    for name, tensor in load_file(directory / "adapter_model.safetensors").items():
        target, kind = _target_of(name)
        {"A": adapter.a, "B": adapter.b, "whole": adapter.whole}.get(kind, {})[target] = tensor
        if not kind:
            adapter.others.append(name)
    return adapter


def _target_of(name: str) -> tuple[str, str]:
    """(base weight, "A" | "B" | "whole" | "" for what is not known) of a tensor's name."""
    bare = name.removeprefix(PREFIX)
    match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight", bare)
    if match:
        return f"{match[1]}.weight", match[2]
    return bare, "" if "lora_" in bare or not name.startswith(PREFIX) else "whole"


def merge(adapter_dir: Path, base_dir: Path, target: Path) -> str:
    """Write the merged weights into `target`; returns how: "streamed" or "in memory"."""
    config = json.loads((base_dir / "config.json").read_text())
    if config.get("quantization_config"):
        raise ModelError(f"{base_dir}: the base is quantised; give the un-quantised weights with --base")
    adapter = read_adapter(adapter_dir)
    if can_stream(adapter, base_dir):
        merge_streamed(adapter, base_dir, target)
        return "streamed"
    merge_in_memory(adapter_dir, base_dir, target)
    return "in memory"


def can_stream(adapter: Adapter, base_dir: Path) -> bool:
    """Whether every tensor of the adapter is known and changes a weight that the base's files have by that name."""
    plain = all(adapter.config.get(name) in (value, None) for name, value in PLAIN.items())
    weights = {name for shard in shards(base_dir) for name in names_in(shard)}
    return plain and not adapter.others and adapter.a.keys() == adapter.b.keys() and adapter.names <= weights


def shards(base_dir: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or the single one."""
    index = base_dir / INDEX
    if index.exists():
        return [base_dir / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    files = sorted(base_dir.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{base_dir}: no .safetensors files; pickled weights (.bin) are not read")
    return files


def names_in(shard: Path) -> list[str]:
    """Names of the tensors of a file."""
    with safe_open(shard, "pt") as tensors:
        return list(tensors.keys())


def merge_streamed(adapter: Adapter, base_dir: Path, target: Path) -> None:
    """Shard by shard; shards the adapter does not touch are copied as they are."""
    for shard in shards(base_dir):
        if adapter.names.isdisjoint(names_in(shard)):
            shutil.copyfile(shard, target / shard.name)
        else:
            save_file(dict(merged(adapter, shard)), target / shard.name, metadata={"format": "pt"})
    if (base_dir / INDEX).exists():
        shutil.copyfile(base_dir / INDEX, target / INDEX)
    shutil.copyfile(base_dir / "config.json", target / "config.json")


def merged(adapter: Adapter, shard: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, merged weight) of a shard."""
    with safe_open(shard, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  # not a mapping
            yield name, adapter.apply(name, tensors.get_tensor(name)).contiguous()


def merge_in_memory(adapter_dir: Path, base_dir: Path, target: Path) -> None:
    """peft's own merge of the whole model, in float32; saved in the base's dtype."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = AutoConfig.from_pretrained(base_dir).dtype or torch.float32
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32, use_safetensors=True)
    model = PeftModel.from_pretrained(base, adapter_dir).merge_and_unload(safe_merge=True)
    model.to(dtype).save_pretrained(target)
