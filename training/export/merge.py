"""Merge a LoRA adapter into its base: new weights = weights + scale * B @ A, one tensor of the base after the other.

In: the adapter's and the base's directories (safetensors). Out: safetensors with the names, shards and dtypes of the
base; the sum is computed in float32 and rounded once. What this file does not know (biases, transposed layers of GPT-2,
renamed weights) is merged by peft in memory instead, if there is enough. Cost: memory for a few tensors, whatever the
size of the model; reading and writing the weights once.

LoRA: arXiv 2106.09685; rank-stabilised scale alpha / sqrt(r): arXiv 2312.03732; DoRA, whose rows then get the lengths
it has learnt: arXiv 2402.09353.
"""

import json
import math
import re
import shutil
from collections.abc import Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor

from training.errors import ModelError
from training.models.hub import ADAPTER
from training.models.shards import rewrite_shards, tensors_of

PREFIX = "base_model.model."
SPARE = 1.1
PLAIN = {"bias": "none", "fan_in_fan_out": False, "lora_bias": False, "target_parameters": None}


@dataclass(frozen=True)
class Adapter:
    """The tensors of an adapter by the base weight they change."""

    config: dict[str, Any]
    a: dict[str, Tensor] = field(default_factory=dict)  # weight name -> (r, in)
    b: dict[str, Tensor] = field(default_factory=dict)  # weight name -> (out, r)
    magnitude: dict[str, Tensor] = field(default_factory=dict)  # weight name -> (out,), of DoRA
    whole: dict[str, Tensor] = field(default_factory=dict)  # weights that were trained as they are
    rows: dict[str, Tensor] = field(default_factory=dict)  # weight name -> (n, hidden): `trained_rows` of it
    others: list[str] = field(default_factory=list)  # tensors this file does not know

    @property
    def names(self) -> set[str]:
        """The base weights it changes."""
        return self.a.keys() | self.whole.keys() | self.rows.keys()

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
        if name in self.rows:
            return weight.index_copy(0, self.trained_rows(name), self.rows[name].to(weight.dtype))
        if name not in self.a:
            return weight
        merged = weight.float() + self.scale(name) * (self.b[name].float() @ self.a[name].float())
        if name in self.magnitude:
            merged *= (self.magnitude[name].float() / torch.linalg.norm(merged, dim=1)).unsqueeze(1)
        return merged.to(weight.dtype)

    def trained_rows(self, name: str) -> Tensor:
        """``(n,) int64``: which rows of an embedding or output layer `rows` has."""
        declared = self.config["trainable_token_indices"]
        if isinstance(declared, dict):
            declared = next(rows for module, rows in declared.items() if f".{name}".endswith(f".{module}.weight"))
        return torch.tensor(declared)

    def for_base(self, names: Set[str]) -> "Adapter":
        """The same for a base with these weights, of which one may be there twice, or once for embedding and head.

        peft keeps a whole one under both names, rows under the first one.
        """
        shared = [one for name, one in self.whole.items() if name in names]
        whole = {
            name: one for name, one in self.whole.items()
            if name in names or not any(torch.equal(one, other) for other in shared)
        }  # fmt: skip
        declared = self.config.get("trainable_token_indices")
        modules = declared if isinstance(declared, dict) and len(self.rows) == 1 else ()
        tied = {f"{module}.weight": one for module in modules for one in self.rows.values()}
        return replace(self, whole=whole, rows=self.rows | {name: tied[name] for name in tied.keys() & names})


def read_adapter(directory: Path) -> Adapter:
    """An adapter directory, its tensors sorted by what they do."""
    adapter = Adapter(json.loads((directory / ADAPTER).read_text()))
    for name, tensor in load_file(directory / "adapter_model.safetensors").items():
        target, kind = _target_of(name)
        places = {"A": adapter.a, "B": adapter.b, "m": adapter.magnitude, "rows": adapter.rows, "whole": adapter.whole}
        places.get(kind, {})[target] = tensor
        if not kind:
            adapter.others.append(name)
    return adapter


def _target_of(name: str) -> tuple[str, str]:
    """(base weight, "A" | "B" | "m" | "rows" | "whole" | "" for what is not known) of a tensor's name."""
    bare = name.removeprefix(PREFIX)
    match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight", bare)
    if match:
        return f"{match[1]}.weight", match[2]
    for end, kind in ((".lora_magnitude_vector", "m"), (".token_adapter.trainable_tokens_delta", "rows")):
        if bare.endswith(end):
            return f"{bare.removesuffix(end)}.weight", kind
    return bare, "" if "lora_" in bare or not name.startswith(PREFIX) else "whole"


def merge(adapter_dir: Path, base_dir: Path, target: Path, trust_remote_code: bool = False) -> str:
    """Write the merged weights into `target`; returns how: "streamed" or "in memory"."""
    config = json.loads((base_dir / "config.json").read_text())
    if config.get("quantization_config"):
        raise ModelError(f"{base_dir}: the base is quantised; give the un-quantised weights with --base")
    adapter = read_adapter(adapter_dir).for_base(tensors_of(base_dir).keys())
    if can_stream(adapter, base_dir):
        rewrite_shards(base_dir, target, adapter.apply)
        shutil.copyfile(base_dir / "config.json", target / "config.json")
        return "streamed"
    check_memory(adapter_dir, base_dir, psutil.virtual_memory().available)
    merge_in_memory(adapter_dir, base_dir, target, trust_remote_code)
    return "in memory"


def check_memory(adapter_dir: Path, base_dir: Path, available_bytes: int) -> None:
    """Refuse, before anything is loaded, a merge of a whole float32 model for which there is no room.

    :raises ModelError: it needs more than is available.
    """
    needed = SPARE * sum(4 * math.prod(info.shape) for info in tensors_of(base_dir).values())
    if needed > available_bytes:
        raise ModelError(
            f"{adapter_dir}: an adapter of this kind is merged by peft, with the whole model in memory as float32: "
            f"{needed / 1e9:.1f} GB, and {available_bytes / 1e9:.1f} GB are available. Use it unmerged "
            "(panda serve, panda chat), export on a machine with more memory, or train a LoRA adapter without "
            "bias, which is merged one tensor after the other"
        )


def can_stream(adapter: Adapter, base_dir: Path) -> bool:
    """Whether every tensor of the adapter is known and changes a weight that the base's files have by that name."""
    plain = all(adapter.config.get(name) in (value, None) for name, value in PLAIN.items())
    known = plain and not adapter.others and adapter.a.keys() == adapter.b.keys() >= adapter.magnitude.keys()
    return known and adapter.names <= tensors_of(base_dir).keys()


def merge_in_memory(adapter_dir: Path, base_dir: Path, target: Path, trust_remote_code: bool = False) -> None:
    """peft's own merge of the whole model, in float32; saved in the base's dtype."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    dtype = AutoConfig.from_pretrained(base_dir, **options).dtype or torch.float32
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32, use_safetensors=True, **options)
    model = PeftModel.from_pretrained(base, adapter_dir).merge_and_unload(safe_merge=True)
    model.to(dtype).save_pretrained(target)
