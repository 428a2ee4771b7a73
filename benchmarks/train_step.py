"""Seconds of an optimizer step: ours against a bare PyTorch loop over the same rows; target tokens/s against others.

In: a checkpoint directory, real instruction records. Out: a table of ratios. Contenders of `bare` take turns, step by
step in one process; those of `trl` and `peers` are processes that run one after another. CPU seconds are given beside
wall seconds, because they hardly change when the machine is busy.

    python -m benchmarks.train_step bare --model-dir DIR --real CORPORA
    python -m benchmarks.train_step trl --model-dir DIR --real CORPORA
    python -m benchmarks.train_step peers --model-dir DIR --real CORPORA --peer axolotl=PYTHON [--peer ...]

`bare` does the same forward, backward, clipping and AdamW update on the same rows, without engine, loader, metrics and
checkpoints. TRL is measured with its defaults and with the settings that make it fastest here (packing, no gradient
checkpointing, one packed row a micro-batch). PYTHON is that of an environment that has the peer: how to make it, and
the peer's settings, are in `benchmarks.train_peers`. Model, float32, records, ids, loss mask, optimizer and tokens in a
row are the same for all (`benchmarks.contender`), but not the order of the records. A target token is one that
contributes to the loss. The held-out loss after the same number of steps says whether a fast one has learned as much.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.contender import (
    BETAS,
    OPTIMIZER,
    OPTIMIZER_OF_TRANSFORMERS,
    Measure,
    Measuring,
    add_arguments,
    examples_of,
    records_of,
)
from benchmarks.rows import Row, say
from data_prep.pipeline import prepare
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=CONTENDERS)
    add_arguments(parser)
    parser.add_argument("--layers", type=int, default=0, help="keep only the first layers of the model; 0 = all")
    parser.add_argument("--zero-stage", type=int, default=2)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help="for `peers`, repeatable")
    given = parser.parse_args()
    if given.layers:
        given.model_dir, given.layers = shortened(given.model_dir, given.layers), 0
    CONTENDERS[given.what](given)


def shortened(model_dir: Path, layers: int) -> Path:
    """The same checkpoint with its first layers only: the same kind of work in less time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = Path(tempfile.gettempdir(), "panda-benchmark", f"{model_dir.name}-{layers}-layers")
    if not (target / "config.json").is_file():
        AutoModelForCausalLM.from_pretrained(model_dir, num_hidden_layers=layers).save_pretrained(target)
        AutoTokenizer.from_pretrained(model_dir).save_pretrained(target)
    return target


def bare(given: argparse.Namespace) -> None:
    """Print the ratio of step times, ours : bare."""
    ours, theirs = our_steps(given), bare_steps(given)
    for step in (ours, theirs):
        step()
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "bare": []}
    for _ in range(given.steps):
        times["ours"].append(timed(ours)[:2])
        times["bare"].append(timed(theirs)[:2])
    wall = {name: statistics.median(pair[0] for pair in pairs) for name, pairs in times.items()}
    cpu = statistics.median(a[1] / b[1] for a, b in zip(times["ours"], times["bare"], strict=True))
    say(Row("optimizer step", wall["ours"], "bare PyTorch loop", wall["bare"], "s", at_most=1.05, cpu_ratio=cpu))
    data = ours.data_share() * wall["ours"]
    say(Row("waiting for data in a step", data, "step", wall["ours"], "s", at_most=0.01))


def timed(step: Callable[[], int]) -> tuple[float, float, int]:
    """(wall seconds, CPU seconds, target tokens) of a step."""
    wall, cpu = time.perf_counter(), time.process_time()
    targets = step()
    return time.perf_counter() - wall, time.process_time() - cpu, targets


def write_config(given: argparse.Namespace) -> Path:
    """Prepare the records that all train on and write RUN/config.yaml."""
    run_dir = Path(tempfile.mkdtemp(prefix="panda-run-"))
    (run_dir / "corpus").mkdir()
    (run_dir / "corpus" / "records.json").write_text(json.dumps(records_of(given.real)[0]), encoding="utf-8")
    corpus = CorpusSettings(
        instruction_tuning_data_dir=str(run_dir / "corpus"), pretraining_data_dir=None, validation_fraction=0
    )
    pack = PackSettings(max_seq_length=given.length)
    plan = prepare(corpus, TokenizeSettings(), pack, given.model_dir, Path(tempfile.gettempdir(), "panda-benchmark"))
    config = {
        "zero_stage": given.zero_stage, "gradient_accumulation_steps": given.accumulation, "num_train_epochs": 100,
        "lr_scheduler": "constant", "adam_betas": list(BETAS), **OPTIMIZER,
        "paths": {
            "plan_dir": str(plan.path), "model_dir": str(given.model_dir), "tokenizer_dir": str(given.model_dir),
            "run_dir": str(run_dir),
        },
    }  # fmt: skip
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    return run_dir / "config.yaml"


class OurSteps:
    """The product's own loop body, one step a call."""

    def __init__(self, run, progress):
        from training.trainer import loop

        self._loop, self._run, self._progress = loop, run, progress
        self._batches = loop._micro_batches(run, 0)
        self._records: list[Any] = []

    def __call__(self) -> int:
        self._records.append(self._loop.one_step(self._run, self._progress, self._batches)[0])
        return self._records[-1]["target_tokens"]

    @property
    def model(self) -> torch.nn.Module:
        return self._run.engine.module.model

    def data_share(self) -> float:
        measured = self._records[1:]
        return sum(r["seconds_data"] for r in measured) / sum(r["seconds"] for r in measured)


def our_steps(given: argparse.Namespace) -> OurSteps:
    """Made by the worker's own functions, on one rank."""
    from training.distributed import join, this_rank
    from training.launch.run_config import read_config
    from training.trainer.checkpoint import Progress
    from training.trainer.run import build_run

    ranks = this_rank()
    join(ranks)
    progress = Progress()
    return OurSteps(build_run(read_config(write_config(given)), ranks, progress), progress)


def bare_steps(given: argparse.Namespace) -> Callable[[], int]:
    """The same mathematics as a plain loop: rows are assembled before the clock runs."""
    from data_prep.plan.reader import open_plan
    from training.engines.engine import trainable
    from training.launch.run_config import read_config
    from training.models.build import load_model
    from training.models.loss import CausalLMLoss
    from training.trainer.batches import batch_schedule, load

    config = read_config(write_config(given))
    model = CausalLMLoss(load_model(config.settings, config.model_dir, config.tokenizer_dir, torch.float32))
    parameters = [parameter for _, parameter in trainable(model)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.0, fused=True)
    scheduled = batch_schedule(open_plan(config.plan_dir, "train"), config.settings, 1)
    steps = [
        [load(scheduled.plan, rows) for rows in scheduled.micro_batches(step, 0, 1, 1)]
        for step in range(given.steps + 1)
    ]
    remaining = iter(zip(steps, map(scheduled.target_tokens, range(given.steps + 1)), strict=True))

    def step() -> int:
        batches, targets = next(remaining)
        for batch in batches:
            (model(batch)[0] / targets).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return targets

    return step


def against_trl(given: argparse.Namespace) -> None:
    """Target tokens per second beside TRL's, and the losses where a step has as many tokens."""
    ours, default, packed = (contend(name, US, given) for name in ("ours-alone", "trl-default", "trl-packed"))
    say(Row("held-out loss after training", ours["held_out_after"], "before", ours["held_out_before"], "nats"))
    compare_speed(ours, "TRL's defaults", default, at_least=1.5)
    compare_speed(ours, "TRL, fastest settings", packed, at_least=1.5)
    compare_losses(ours, "TRL, fastest settings", packed)


def against_peers(given: argparse.Namespace) -> None:
    """The same beside trainers that have environments of their own."""
    ours = contend("ours-alone", US, given)
    for peer in given.peer:
        name, _, python = peer.partition("=")
        theirs = contend(name, [python, "-m", "benchmarks.train_peers"], given)
        called = f"{name} {theirs['version']}"
        compare_speed(ours, called, theirs)
        compare_losses(ours, called, theirs)


def contend(name: str, program: list[str], given: argparse.Namespace) -> dict[str, Any]:
    """What a contender reports from a process of its own."""
    arguments = ["--model-dir", given.model_dir, "--real", given.real, "--length", given.length]
    arguments += ["--accumulation", given.accumulation, "--steps", given.steps]
    if program is US:
        arguments += ["--zero-stage", given.zero_stage]
    done = subprocess.run([*program, name, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-4000:]}")
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(name, report, flush=True)
    return report


def compare_speed(ours: dict[str, Any], called: str, theirs: dict[str, Any], at_least: float | None = None) -> None:
    wall, cpu = "target_tokens_per_second", "target_tokens_per_cpu_second"
    cpu_ratio = ours[cpu] / theirs[cpu]
    say(Row("target tokens", ours[wall], called, theirs[wall], "1/s", at_least=at_least, cpu_ratio=cpu_ratio))


def compare_losses(ours: dict[str, Any], called: str, theirs: dict[str, Any]) -> None:
    name = "held_out_after"
    say(Row("held-out loss after as many steps", ours[name], called, theirs[name], "nats"))


def ours_alone(given: argparse.Namespace) -> None:
    measure, step = measure_of(given), our_steps(given)
    measure.evaluate(step.model)
    measure.steps += [timed(step) for _ in range(given.steps + 1)]
    measure.evaluate(step.model)
    measure.report()


def measure_of(given: argparse.Namespace) -> Measure:
    return Measure(examples_of(records_of(given.real)[1], given.model_dir))


def trl_default(given: argparse.Namespace) -> None:
    """SFTTrainer as its documentation shows it; only precision, optimizer, length and steps are given."""
    run_trl(given, {})


def trl_packed(given: argparse.Namespace) -> None:
    """The fastest settings found for it on a CPU."""
    packed = {"packing": True, "gradient_checkpointing": False, "per_device_train_batch_size": 1}
    run_trl(given, {**packed, "gradient_accumulation_steps": given.accumulation})


def run_trl(given: argparse.Namespace, settings: dict) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    measure = measure_of(given)
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_length=given.length, max_steps=given.steps + 1, bf16=False, use_cpu=True,
        lr_scheduler_type="constant", report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        **OPTIMIZER_OF_TRANSFORMERS, **settings,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(given.model_dir, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(examples_of(records_of(given.real)[0], given.model_dir)),
        processing_class=AutoTokenizer.from_pretrained(given.model_dir),
        callbacks=[Measuring(measure)],
    )
    trainer.train()
    measure.report()


US = [sys.executable, "-m", "benchmarks.train_step"]
CONTENDERS: dict[str, Callable[[argparse.Namespace], None]] = {
    "bare": bare,
    "trl": against_trl,
    "peers": against_peers,
    "ours-alone": ours_alone,
    "trl-default": trl_default,
    "trl-packed": trl_packed,
}

if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
