"""A deployed model that answers: loaded from its directory, asked as it was trained, its text given out as it comes.

In: a model directory (whole weights, or an adapter and its base), ids of a prompt, `Sampling`. Out: pieces of text, and
`Written` at the end. Streamed or not, the text is the same: that of all new tokens, without special ones, cut before
the first stop string. Cost: the weights in memory, in the precision they were saved in on a GPU and in float32 on the
CPU (bfloat16 is many times slower there); an adapter is not merged, so this is the model that the gate has seen.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from data_prep.tokenizer import load_tokenizer
from data_prep.tokens.served_prompt import ServedPrompt
from training.devices import any_device
from training.errors import ModelError
from training.export.export import find_base
from training.models.build import load_deployed
from training.models.hub import base_of
from training.models.shards import tensors_of

BASE_VARIABLE = "PANDA_BASE_MODEL"  # also what a registered version itself looks at
BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I8": 1, "U8": 1}
UNKNOWN_CONTEXT = 32768  # tokens; for architectures without a table of positions, whose memory does not grow either

Reason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """How an answer is made. Temperature 0 takes the likeliest token; a seed makes the others repeatable."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Written:
    """How an answer ended, and its new tokens (an end token is one of them)."""

    num_tokens: int
    reason: Reason


@dataclass(frozen=True)
class Deployed:
    """A model in memory with what it is asked through."""

    model: Any
    prompt: ServedPrompt
    decoder: Tokenizer  # a copy of its own: decoding goes on while the other one encodes
    stop_ids: frozenset[int]
    pad_id: int
    context_length: int

    @torch.inference_mode()
    def write(
        self, ids: list[int], sampling: Sampling, say: Callable[[str], None], go_on: Callable[[], bool] = lambda: True
    ) -> Written:
        """Go on after `ids`. `go_on` is called after each token; the answer ends where it says False."""
        text = Text(self.decoder, sampling.stop, say)
        ending = _Ending(self.stop_ids, text, go_on)
        device = next(self.model.parameters()).device
        batch = torch.tensor([ids], device=device)
        self.model.generate(
            input_ids=batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=sampling.max_tokens,
            do_sample=False,  # `_Sampler` draws, with a generator of its own
            num_beams=1,
            logits_processor=LogitsProcessorList([_Sampler(sampling, device)] if sampling.temperature else []),
            stopping_criteria=StoppingCriteriaList([ending]),
            eos_token_id=sorted(self.stop_ids),
            pad_token_id=self.pad_id,
        )
        return Written(ending.num_tokens, "stop" if text.end() else ending.reason or "length")


def load(model_dir: Path, cache_dir: Path, base: Path | None = None, trust_remote_code: bool = False) -> Deployed:
    """A deployed model on a GPU if there is one. `base`: where the base of an adapter is, if it has moved."""
    device = any_device()
    tokenizer = load_tokenizer(model_dir, cache_dir)
    base_dir = _base_dir(model_dir, base)
    check_room(base_dir or model_dir, device, *room_of(device))
    dtype = "auto" if device.type == "cuda" else torch.float32
    model: Any = load_deployed(model_dir, dtype, base_dir, trust_remote_code).to(device)
    model.generation_config.cache_implementation = None  # a static cache would be one for all answers at once
    config = model.config.get_text_config()
    return Deployed(
        model=model,
        prompt=ServedPrompt(tokenizer),
        decoder=Tokenizer.from_str(tokenizer.core.to_str()),
        stop_ids=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id,
        context_length=getattr(config, "max_position_embeddings", None) or UNKNOWN_CONTEXT,
    )


def room_of(device: torch.device) -> tuple[int, int]:
    """Bytes that are free for a model, and bytes a weight at least takes there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], 1
    return psutil.virtual_memory().available, 4  # as float32


def check_room(weights_dir: Path, device: torch.device, free_bytes: int, bytes_a_weight: int) -> None:
    """Refuse what has no room before anything is loaded.

    :raises ModelError: the weights need more than is free.
    """
    infos = tensors_of(weights_dir).values()
    needed = sum(max(bytes_a_weight, BYTES.get(info.dtype, 4)) * math.prod(info.shape) for info in infos)
    if needed > free_bytes:
        raise ModelError(
            f"{weights_dir}: its weights need {needed / 1e9:.1f} GB, and {free_bytes / 1e9:.1f} GB are free on "
            f"this {device.type}. One device holds the model here; panda export writes it for servers that use several "
            "(vllm serve DIRECTORY --tensor-parallel-size N)"
        )


def _base_dir(model_dir: Path, base: Path | None) -> Path | None:
    """The directory of an adapter's base: as given, as referred to, or at $PANDA_BASE_MODEL; None for whole weights."""
    reference = base_of(model_dir)
    if reference is None:
        return None
    moved = os.environ.get(BASE_VARIABLE)
    if base is None and moved and not Path(reference).exists():
        base = Path(moved)
    if base is None and Path(reference).is_absolute() and not Path(reference).exists():
        raise ModelError(f"the base model {reference} is gone; name its directory with --base or in {BASE_VARIABLE}")
    return base or find_base(reference)


class Text:
    """Tokens in, text out as soon as it will not change: whole characters, nothing that may begin a stop string."""

    def __init__(self, decoder: Tokenizer, stops: tuple[str, ...], say: Callable[[str], None]):
        self.decoder = decoder
        self.stream = DecodeStream([], skip_special_tokens=True)
        self.stops = stops
        self.say = say
        self.ids: list[int] = []
        self.num_decoded = 0  # characters that the stream has given out
        self.pending = ""  # what may still become a stop string
        self.stopped = False

    def add(self, token: int) -> bool:
        """Take a token; whether a stop string is complete."""
        self.ids.append(token)
        self._give(self.stream.step(self.decoder, token) or "")
        return self.stopped

    def end(self) -> bool:
        """Say the rest, such as an unfinished character; whether a stop string was found."""
        if not self.stopped:
            whole = self.decoder.decode(self.ids, skip_special_tokens=True)
            self._give(whole[self.num_decoded :])
        if not self.stopped and self.pending:
            self.say(self.pending)
        self.pending = ""
        return self.stopped

    def _give(self, piece: str) -> None:
        self.num_decoded += len(piece)
        self.pending += piece
        found = [at for stop in self.stops if (at := self.pending.find(stop)) >= 0]
        self.stopped = bool(found)
        until = min(found) if found else len(self.pending) - self._num_held()
        if until > 0:
            self.say(self.pending[:until])
        self.pending = self.pending[until:]

    def _num_held(self) -> int:
        """Characters at the end that are the beginning of a stop string."""
        lengths = (n for stop in self.stops for n in range(1, len(stop)) if self.pending.endswith(stop[:n]))
        return max(lengths, default=0)


class _Ending(StoppingCriteria):
    """Sees every new token: gives its text on, and says when the answer ends."""

    def __init__(self, stop_ids: frozenset[int], text: Text, go_on: Callable[[], bool]):
        self.stop_ids = stop_ids
        self.text = text
        self.go_on = go_on
        self.num_tokens = 0
        self.reason: Reason | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        if self.reason is None:
            self.num_tokens += 1
            token = int(input_ids[0, -1])
            if token in self.stop_ids or self.text.add(token):
                self.reason = "stop"
            elif not self.go_on():
                self.reason = "cancelled"
        return torch.tensor([self.reason is not None], device=input_ids.device)


class _Sampler(LogitsProcessor):
    """Draws the next token and leaves no other: several answers at once each have a random generator of their own."""

    def __init__(self, sampling: Sampling, device: torch.device):
        self.warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(sampling.temperature)]
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))
        self.generator = torch.Generator(device)
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        drawn = torch.multinomial(scores.softmax(-1), 1, generator=self.generator)
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn, 0.0)
