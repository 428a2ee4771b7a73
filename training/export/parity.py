"""How much two models differ in what they say next: KL divergence and top-1 agreement on the same prompts.

In: a model, an adapter and its base, token ids of prompts. Out: `Difference`. Layers are read from the files one after
the other, while all prompts pass through them together; of the first model only the log-probabilities at the last
positions are kept. Cost: both models' files are read once, memory for one layer, embeddings and output layer.
"""

import gc
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from training.devices import any_device
from training.export.streamed import streamed
from training.models.build import empty_deployed

log = logging.getLogger(__name__)

TIE_NATS = 0.01  # two tokens this close in log-probability are equally likely: rounding may swap them
POSITIONS = 32  # last positions of each prompt that are compared: 8 prompts x 32 x 128k words = 130 MB


@dataclass(frozen=True)
class Difference:
    """Over all positions: mean and largest KL(adapter || merged) in nats, share of equal most likely tokens."""

    mean_kl: float
    max_kl: float
    top1_agreement: float
    num_positions: int


@dataclass(frozen=True)
class Tuned:
    """An adapter and its base."""

    adapter: Path
    base: Path
    trust_remote_code: bool = False


def difference(merged: Path, tuned: Tuned, prompts: list[list[int]]) -> Difference:
    """Compare a merged model with base and adapter, in float32."""
    log.info("asking the merged model, layer by layer")
    q = log_probabilities(load(merged, None, tuned.trust_remote_code), prompts)
    gc.collect()
    log.info("asking the adapter on its base, layer by layer")
    p = log_probabilities(load(tuned.adapter, tuned.base, tuned.trust_remote_code), prompts)
    kl = torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in zip(p, q, strict=True)]).clamp(min=0)
    same = torch.cat([agrees(a, b) for a, b in zip(p, q, strict=True)])
    return Difference(kl.mean().item(), kl.max().item(), same.float().mean().item(), len(kl))


def agrees(p: Tensor, q: Tensor) -> Tensor:
    """Whether the most likely token of `p` is (one of) the most likely of `q`: ``(n, vocabulary)`` -> ``(n,) bool``."""
    mine = q.gather(-1, p.argmax(-1, keepdim=True)).squeeze(-1)
    return mine >= q.max(-1).values - TIE_NATS


def load(model_dir: Path, base: Path | None = None, trust_remote_code: bool = False) -> nn.Module:
    """A model in float32, or an adapter on its base, whose layers are read when they are called."""
    empty = empty_deployed(model_dir, torch.float32, base, trust_remote_code=trust_remote_code)
    return streamed(empty, any_device())


@torch.no_grad()
def log_probabilities(model: nn.Module, prompts: list[list[int]]) -> list[Tensor]:
    """For each prompt ``(up to POSITIONS, vocabulary) float32``, on the CPU; all of them pass together, filled up."""
    longest = max(map(len, prompts))
    wanted = [range(max(0, len(ids) - POSITIONS), len(ids)) for ids in prompts]
    columns = sorted({column for some in wanted for column in some})
    device = any_device()
    batch = torch.tensor([[*ids, *[ids[-1]] * (longest - len(ids))] for ids in prompts], device=device)
    kept = torch.tensor(columns, device=device)
    logits = model(input_ids=batch, use_cache=False, logits_to_keep=kept).logits
    place = {column: i for i, column in enumerate(columns)}
    return [
        logits[row, [place[column] for column in some]].float().log_softmax(-1).cpu() for row, some in enumerate(wanted)
    ]
