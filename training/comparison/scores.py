"""Score one model: the loss of every held-out record, and what it generates after a few prompts.

In: a model with its tokenizer (whole weights or adapter), held-out records as text. Out: `Scores`, and the generations.
The records are encoded with the model's own tokenizer and template; the loss of a record is summed over its target, so
it means the same under any tokenizer. Generation is greedy, so that the same model gives the same text, of which is
said whether it ends, says something, and does not repeat itself without end. All ranks call this together: they share
the records, whose losses are the same whatever the number of ranks, because the same rows are computed together; and
all of them write the same texts, because with sharded weights each token needs all of them. Cost: one forward pass over
the records, rows of similar length together, and one batched generation of `MAX_NEW_TOKENS` tokens.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from data_prep.errors import TokenizerError
from data_prep.plan.reader import IGNORED, Batch, target_ranges
from data_prep.tokenizer import LoadedTokenizer
from data_prep.tokens.examples import tokenize_columns
from data_prep.tokens.token_shard import TokenShard
from data_prep.tokens.tokenize import Recipe, load_tools
from training.comparison.heldout import HeldOut
from training.comparison.job import Answer, ModelUnderTest
from training.comparison.statistics import Scores
from training.distributed import Ranks
from training.engines.inference import UsedModel
from training.launch.heartbeat import Heartbeat
from training.models.loss import causal_model, micro_batch

MAX_NEW_TOKENS = 96
SHORT_TARGET_TOKENS = 8  # up to here an answer can be expected to be exact
LONGEST_PERIOD = 16
MIN_REPEATED = 24  # tokens of a repetition; and three periods of it


LONGEST_ROW = 2048  # tokens; longer records are asked in parts


@dataclass(frozen=True)
class Part:
    """A row: tokens ``start:start + length`` of the example of a record."""

    record: int
    start: int
    length: int


@dataclass(frozen=True)
class Asking:
    """How models are asked: rows of a micro-batch, ranks, where converted tokenizers are, what targets are, prompts."""

    micro_batch_rows: int
    ranks: Ranks
    cache_dir: Path
    train_on: str = "all"
    reasoning: str = "train"
    num_prompts: int = 16


def score(model: UsedModel, one: ModelUnderTest, held_out: HeldOut, asking: Asking) -> tuple[Scores, list[Answer]]:
    """Scores of a model, and its generations.

    :param one: where its tokenizer is, and the template it was trained with
    """
    template = json.dumps(one.template, sort_keys=True)
    tools = load_tools(Recipe(one.files, asking.cache_dir, template, "reference", asking.train_on, asking.reasoning))
    made = tokenize_columns(held_out.roles, held_out.texts, tools.tokenizer, tools.template, tools.engine)
    for record, why in made.runs.refused.items():
        raise TokenizerError(f"{held_out.places[record]}: {why}")
    shard = made.shard
    longest = min(LONGEST_ROW, getattr(causal_model(model.model).config, "max_position_embeddings", LONGEST_ROW))
    losses, tokens = record_losses(model, shard, asking, longest)
    num_new = min(MAX_NEW_TOKENS, longest // 2)
    prompts, targets = prompts_of(shard, held_out.prompts(asking.num_prompts), longest - num_new)
    generations = generate(model, tools.tokenizer, prompts, targets, num_new, asking.ranks)
    return Scores(losses, tokens, check_columns(generations)), generations


def record_losses(model: UsedModel, shard: TokenShard, asking: Asking, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss and number of target tokens of each example: ``(n,) float64``, ``(n,) int64``."""
    ranks, size = asking.ranks, asking.micro_batch_rows
    totals = torch.zeros(2, shard.num_examples, dtype=torch.float64)  # losses, target tokens
    rows = sorted(parts_of(shard, longest), key=lambda part: part.length)
    batches = [rows[first : first + size] for first in range(0, len(rows), size)]
    num_passes = -(-len(batches) // ranks.world_size)  # of every rank: sharded weights need all of them
    alive = Heartbeat("held-out records", num_passes, "micro-batches")
    with torch.no_grad():
        for done in range(num_passes):
            alive(done)
            mine = done * ranks.world_size + ranks.rank
            batch = micro_batch(batch_of(shard, batches[min(mine, len(batches) - 1)]), ())
            losses = model(batch.to(ranks.device), "each").double().cpu()
            if mine < len(batches):
                totals[0].index_add_(0, batch.sources, losses)
                totals[1] += torch.bincount(batch.sources, minlength=shard.num_examples)
    losses_and_tokens = np.array(ranks.sum(*totals.flatten().tolist())).reshape(2, -1)
    return losses_and_tokens[0], losses_and_tokens[1].astype(np.int64)


def parts_of(shard: TokenShard, longest: int) -> list[Part]:
    """Every example as rows of at most `longest` tokens."""
    return [
        Part(record, start, min(longest, int(length) - start))
        for record, length in enumerate(shard.lengths)
        for start in range(0, int(length), longest)
    ]


def batch_of(shard: TokenShard, rows: list[Part]) -> Batch:
    """Rows as the reader's batch; `sources` holds the record of each token instead of its source."""
    shape = (len(rows), max(row.length for row in rows))
    ids, labels = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    positions, records = np.zeros(shape, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
    for line, row in enumerate(rows):
        begin = int(shard.offsets[row.record]) + row.start
        ids[line, : row.length] = shard.ids[begin : begin + row.length]
        records[line, : row.length] = row.record
        positions[line, : row.length] = np.arange(row.length)
        positions[line, row.length :] = np.arange(shape[1] - row.length)
        for low, high in target_ranges(shard.runs(row.record), row.start, row.length):
            labels[line, low:high] = ids[line, low:high]
    return Batch(ids, labels, positions, records)


def prompts_of(shard: TokenShard, records: list[int], longest: int) -> tuple[list[list[int]], list[list[int]]]:
    """Ids before the first answer of each record (the last `longest` of them), and those of the right answer."""
    prompts, targets = [], []
    for record in records:
        begin, (prompt, target) = int(shard.offsets[record]), shard.runs(record)[:2].tolist()
        prompts.append(shard.ids[begin + max(0, prompt - longest) : begin + prompt].tolist())
        targets.append(shard.ids[begin + prompt : begin + prompt + target].tolist())
    return prompts, targets


@torch.no_grad()
def generate(  # noqa: PLR0913, PLR0917  # a class around one call would hide what it needs
    model: UsedModel,
    tokenizer: LoadedTokenizer,
    prompts: list[list[int]],
    targets: list[list[int]],
    num_new: int,
    ranks: Ranks,
) -> list[Answer]:
    """Greedy generations after prompts (ids), of `num_new` tokens at most; `targets` are the ids of the right answers.

    A model cannot go on from nothing: an empty prompt is eos, after which a new text begins.
    """
    if not prompts:
        return []
    ids, mask = left_padded([prompt or [tokenizer.eos_id] for prompt in prompts], tokenizer.pad_id)
    alive = Heartbeat("answers", num_new, "tokens")
    output = model.generate(
        input_ids=ids.to(ranks.device),
        attention_mask=mask.to(ranks.device),
        max_new_tokens=num_new,
        do_sample=False,
        pad_token_id=tokenizer.pad_id,
        eos_token_id=sorted(tokenizer.stop_ids),
        synced_gpus=ranks.world_size > 1,  # a rank whose answers have ended goes on with the others
        stopping_criteria=StoppingCriteriaList([_Alive(alive, ids.shape[1])]),
    )
    new = output[:, ids.shape[1] :].tolist()
    return [checked(tokenizer, *pair) for pair in zip(new, targets, strict=True)]


class _Alive(StoppingCriteria):
    """Stops nothing; says that a token more is there."""

    def __init__(self, alive: Heartbeat, num_prompt: int):
        self.alive = alive
        self.num_prompt = num_prompt

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.alive(input_ids.shape[1] - self.num_prompt)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def left_padded(prompts: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, ``(num_prompts, longest) int64``; generation goes on at the right."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def checked(tokenizer: LoadedTokenizer, new: list[int], target: list[int]) -> Answer:
    """One generation with its checks, from its ids."""
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


def check_columns(generations: list[Answer]) -> dict[str, np.ndarray]:
    """Check -> ``(num_prompts,) float64``: 1 good, 0 bad, nan where it does not apply."""
    columns: dict[str, list[bool | None]] = {
        "ends": [one["ends"] for one in generations],
        "not_empty": [one["not_empty"] for one in generations],
        "no_repetition": [one["no_repetition"] for one in generations],
        "exact": [one["exact"] for one in generations],
    }
    return {name: np.array([_number(value) for value in values], np.float64) for name, values in columns.items()}


def _number(value: bool | None) -> float:
    return float("nan") if value is None else float(value)
