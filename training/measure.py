"""Ask one model: the loss of every held-out record and the answers to a few prompts.

In: a model directory (whole weights or adapter, with its tokenizer), held-out records as text. Out: `Scores`. The
records are encoded with the model's own tokenizer and template; the loss of a record is summed over its target, so it
means the same under any tokenizer. Cost: one forward pass over the records, rows of similar length together, and one
batched generation.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data_prep.examples import tokenize_columns
from data_prep.reader import IGNORED, Batch, target_ranges
from data_prep.token_shard import TokenShard
from data_prep.tokenize import Recipe, Tools, load_tools
from training.alive import SignsOfLife
from training.answers import MAX_NEW_TOKENS, Answer, answer, check_columns
from training.engine import any_device
from training.gate import Scores
from training.heldout import HeldOut
from training.model import load_deployed
from training.target_loss import TargetLoss, causal_model, micro_batch

log = logging.getLogger(__name__)

NUM_PROMPTS = 16
LONGEST_ROW = 2048  # tokens; longer records are asked in parts


@dataclass(frozen=True)
class Asked:
    """A model to ask. `template` is the setting it was trained with."""

    name: str
    model_dir: Path
    template: str | dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A row: tokens ``start:start + length`` of the example of a record."""

    record: int
    start: int
    length: int


def measure(
    asked: Asked, held_out: HeldOut, micro_batch_rows: int, dtype: torch.dtype, cache_dir: Path
) -> tuple[Scores, list[Answer]]:
    """Scores of a model, and its answers."""
    log.info("asking %s (%s)", asked.name, asked.model_dir)
    tools = tools_of(asked, cache_dir)
    shard = tokenize_columns(held_out.roles, held_out.texts, tools.tokenizer, tools.template, tools.engine).shard
    model = load_deployed(asked.model_dir, dtype).to(any_device())
    longest = min(LONGEST_ROW, getattr(causal_model(model).config, "max_position_embeddings", LONGEST_ROW))
    losses, tokens = record_losses(model, shard, micro_batch_rows, longest)
    prompts, targets = prompts_of(shard, held_out.prompts(NUM_PROMPTS), longest - MAX_NEW_TOKENS)
    answers = answer(model, tools.tokenizer, prompts, targets)
    return Scores(losses, tokens, check_columns(answers)), answers


def record_losses(
    model: nn.Module, shard: TokenShard, micro_batch_rows: int, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss and number of target tokens of each example: ``(n,) float64``, ``(n,) int64``."""
    device = next(model.parameters()).device
    totals = torch.zeros(shard.num_examples, dtype=torch.float64)
    counts = torch.zeros(shard.num_examples, dtype=torch.int64)
    losses_of = TargetLoss(model)
    rows = sorted(parts_of(shard, longest), key=lambda part: part.length)
    alive = SignsOfLife("held-out records", len(rows), "rows")
    with torch.inference_mode():
        for first in range(0, len(rows), micro_batch_rows):
            alive(first)
            batch = micro_batch(batch_of(shard, rows[first : first + micro_batch_rows]), ())
            totals.index_add_(0, batch.sources, losses_of(batch.to(device), "each").double().cpu())
            counts += torch.bincount(batch.sources, minlength=len(counts))
    return totals.numpy(), counts.numpy()


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


def tools_of(asked: Asked, cache_dir: Path) -> Tools:
    """Tokenizer and template of a model, the reference engine."""
    return load_tools(Recipe(asked.model_dir, cache_dir, json.dumps(asked.template, sort_keys=True), "reference"))
