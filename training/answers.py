"""What a model's answers are like: whether they end, say something, and do not repeat themselves without end.

In: a model, prompts as ids, the targets. Out: per prompt the text and its checks. Greedy, so that the same model gives
the same answers. Cost: one batched generation of `MAX_NEW_TOKENS` tokens for all prompts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.tokenizer import LoadedTokenizer

MAX_NEW_TOKENS = 96
SHORT_TARGET_TOKENS = 8  # up to here an answer can be expected to be exact
LONGEST_PERIOD = 16
MIN_REPEATED = 24  # tokens of a repetition; and three periods of it


@dataclass(frozen=True)
class Answer:
    """An answer and what is to be said of it; `exact` is None for long targets."""

    text: str
    ends: bool
    not_empty: bool
    no_repetition: bool
    exact: bool | None


@torch.inference_mode()
def answer(
    model: nn.Module, tokenizer: LoadedTokenizer, prompts: list[list[int]], targets: list[list[int]]
) -> list[Answer]:
    """Greedy answers to prompts (ids); `targets` are the ids of the right answers."""
    if not prompts:
        return []
    ids, mask = left_padded(prompts, tokenizer.pad_id)
    device = next(model.parameters()).device
    generate: Callable[..., Tensor] = model.generate  # type: ignore[assignment]  # nn.Module says Tensor
    output = generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_id,
        eos_token_id=sorted(tokenizer.stop_ids),
    )
    new = output[:, ids.shape[1] :].tolist()
    return [judged(tokenizer, *pair) for pair in zip(new, targets, strict=True)]


def left_padded(prompts: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, ``(num_prompts, longest) int64``; generation goes on at the right."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def judged(tokenizer: LoadedTokenizer, new: list[int], target: list[int]) -> Answer:
    """The checks of one answer, from its ids."""
    end = next((i for i, token in enumerate(new) if token in tokenizer.stop_ids), None)
    said = new if end is None else new[:end]
    text = tokenizer.core.decode(said, skip_special_tokens=True)
    wanted = tokenizer.core.decode([i for i in target if i not in tokenizer.stop_ids], skip_special_tokens=True)
    return Answer(
        text=text,
        ends=end is not None,
        not_empty=bool(text.strip()),
        no_repetition=not is_runaway(said),
        exact=text.strip() == wanted.strip() if len(target) <= SHORT_TARGET_TOKENS else None,
    )


def is_runaway(ids: list[int]) -> bool:
    """Whether the end repeats a period of at most 16 tokens, three times and over 24 tokens at least."""
    for period in range(1, LONGEST_PERIOD + 1):
        length = max(MIN_REPEATED, 3 * period)
        tail = ids[-length:]
        if len(tail) == length and all(tail[i] == tail[i - period] for i in range(period, length)):
            return True
    return False


def check_columns(answers: list[Answer]) -> dict[str, np.ndarray]:
    """Check -> ``(num_prompts,) float64``: 1 good, 0 bad, nan where it does not apply."""
    names = ("ends", "not_empty", "no_repetition", "exact")
    return {name: np.array([_number(getattr(one, name)) for one in answers], dtype=np.float64) for name in names}


def _number(value: bool | None) -> float:
    return float("nan") if value is None else float(value)
