"""How much two models differ in what they say next: KL divergence and top-1 agreement on the same prompts.

In: a model, an adapter and its base, token ids of prompts. Out: `Difference`. One model is in memory at a time; of the
first only the log-probabilities at the last positions are kept. Cost: one forward pass a prompt and model.
"""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from training.devices import any_device

TIE_NATS = 0.01  # two tokens this close in log-probability are equally likely: rounding may swap them
POSITIONS = 32  # last positions of each prompt that are compared: 8 prompts x 32 x 128k words = 130 MB


@dataclass(frozen=True)
class Difference:
    """Over all positions: mean and largest KL(adapter || merged) in nats, share of equal most likely tokens."""

    mean_kl: float
    max_kl: float
    top1_agreement: float
    num_positions: int


def difference(merged: Path, adapter: Path, base: Path, prompts: list[list[int]]) -> Difference:
    """Compare a merged model with base and adapter, in float32."""
    q = log_probabilities(load(merged), prompts)
    gc.collect()
    p = log_probabilities(load(base, adapter), prompts)
    kl = torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in zip(p, q, strict=True)]).clamp(min=0)
    same = torch.cat([agrees(a, b) for a, b in zip(p, q, strict=True)])
    return Difference(kl.mean().item(), kl.max().item(), same.float().mean().item(), len(kl))


def agrees(p: Tensor, q: Tensor) -> Tensor:
    """Whether the most likely token of `p` is (one of) the most likely of `q`: ``(n, vocabulary)`` -> ``(n,) bool``."""
    mine = q.gather(-1, p.argmax(-1, keepdim=True)).squeeze(-1)
    return mine >= q.max(-1).values - TIE_NATS


def load(model_dir: Path, adapter: Path | None = None) -> nn.Module:
    """A model in float32, with an adapter on it if there is one."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, use_safetensors=True)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model.to(any_device()).eval()


@torch.inference_mode()
def log_probabilities(model: nn.Module, prompts: list[list[int]]) -> list[Tensor]:
    """For each prompt ``(up to POSITIONS, vocabulary) float32``, on the CPU."""
    result = []
    for ids in prompts:
        batch = torch.tensor([ids], device=next(model.parameters()).device)
        logits = model(input_ids=batch, use_cache=False, logits_to_keep=POSITIONS).logits
        result.append(logits[0].float().log_softmax(-1).cpu())
    return result
