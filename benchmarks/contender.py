"""What all contenders of a benchmark of training have in common: records, ids, mask, optimizer, measure, held-out loss.

In: records {instruction, input, output}, a model directory. Out: a line of JSON a contender: target tokens per second
of wall clock and of CPU, held-out loss before and after. Every fiftieth record is held out of everybody's training.
The ids are those of our template `plain`: instruction and input joined by a line feed, the answer encoded alone, eos;
answer and eos are the targets. Needs torch and transformers only, because the Python of another trainer imports it too.
Cost: a forward pass over the held-out records, twice.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, TrainerCallback

HELD_OUT_EVERY = 50
IGNORED = -100
BETAS = (0.9, 0.99)
OPTIMIZER: dict[str, Any] = {
    "learning_rate": 1e-5, "adam_epsilon": 1e-6, "weight_decay": 0.0, "max_grad_norm": 1.0, "warmup_steps": 0,
}  # fmt: skip
"""By names that are ours and those of transformers; the learning rate is constant."""
OPTIMIZER_OF_TRANSFORMERS = {**OPTIMIZER, "adam_beta1": BETAS[0], "adam_beta2": BETAS[1]}

Record = dict[str, str]
Example = dict[str, list[int]]  # input_ids, and labels as long


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every contender is told."""
    parser.add_argument("--model-dir", type=Path, required=True)
    parser.add_argument("--real", type=Path, required=True, help="directory with instruction_tuning/*.json")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a row")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches of one row in a step")
    parser.add_argument("--steps", type=int, default=6, help="measured steps, after one that is not")


def records_of(real: Path) -> tuple[list[Record], list[Record]]:
    """(what is trained on, what is held out)."""
    files = sorted((real / "instruction_tuning").glob("*.json"))
    records = [record for file in files for record in json.loads(file.read_text(encoding="utf-8"))]
    return [record for i, record in enumerate(records) if i % HELD_OUT_EVERY], records[::HELD_OUT_EVERY]


def prompt_of(record: Record) -> str:
    """Instruction and input."""
    return "\n".join(part for part in (record["instruction"], record.get("input")) if part)


def examples_of(records: list[Record], model_dir: Path) -> list[Example]:
    """Ids and labels of records."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    examples = []
    for record in records:
        prompt = tokenizer(prompt_of(record), add_special_tokens=False)["input_ids"]
        answer = [*tokenizer(record["output"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        examples.append({"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer})
    return examples


def loss_of(model: torch.nn.Module, examples: list[Example]) -> float:
    """Mean loss of a target token, each example alone in its row."""
    was_training, total, targets = model.training, 0.0, 0
    model.eval()
    with torch.no_grad():
        for example in examples:
            ids = torch.tensor([example["input_ids"]])
            labels = torch.tensor([label for label in example["labels"] if label != IGNORED])
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(labels) + 1).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum").item()
            targets += len(labels)
    model.train(was_training)
    return total / targets


class Measure:
    """Steps of a contender, (wall seconds, CPU seconds, target tokens) each, and its held-out losses."""

    def __init__(self, held_out: list[Example]):
        self.steps: list[tuple[float, float, int]] = []
        self._losses: list[float] = []
        self._held_out = held_out

    def evaluate(self, model: torch.nn.Module) -> None:
        """To be called before the first step and after the last one."""
        self._losses.append(loss_of(model, self._held_out))

    def report(self, **more: str) -> None:
        """All as a line of JSON; the first step is not in the rates."""
        wall, cpu, targets = (sum(column) for column in zip(*self.steps[1:], strict=True))
        report = {
            "target_tokens_per_second": targets / wall,
            "target_tokens_per_cpu_second": targets / cpu,
            "target_tokens": sum(step[2] for step in self.steps),
            "held_out_before": self._losses[0],
            "held_out_after": self._losses[1],
        }
        print("\n" + json.dumps(report | more), flush=True)


class Measuring(TrainerCallback):
    """Fills a `Measure` in whatever trains by the Trainer of transformers."""

    def __init__(self, measure: Measure):
        self._measure = measure
        self._began = (0.0, 0.0)
        self._targets = 0

    def on_train_begin(self, *_, **given):
        self._measure.evaluate(given["model"])
        self._hook = given["model"].register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _, __, inputs: dict[str, Any]) -> None:
        self._targets += int((inputs["labels"][:, 1:] != IGNORED).sum())

    def on_step_begin(self, *_, **__):
        self._began, self._targets = (time.perf_counter(), time.process_time()), 0

    def on_step_end(self, *_, **__):
        wall, cpu = time.perf_counter() - self._began[0], time.process_time() - self._began[1]
        self._measure.steps.append((wall, cpu, self._targets))

    def on_train_end(self, *_, **given):
        self._hook.remove()
        self._measure.evaluate(given["model"])
