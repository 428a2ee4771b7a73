"""Checks by real runs: this project's launcher, ranks and engines train a model with random weights on a sample corpus.

In: a `Workshop`: a folder, what the machine has, the model that fits. Out: what was `Found`. The run of "training" is
what the lines after it look at. Cost: minutes on GPUs, most of it loading and compiling kernels.
"""

import json
import math
import shutil
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from data_prep.pipeline import prepare
from data_prep.records.shard import shard_records
from data_prep.sample import write_sample
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
from data_prep.tokenizer import train_tokenizer
from training import run_files
from training.devices import uses_bf16
from training.gpu_check.lines import Found, NotAvailable
from training.launch import launcher
from training.launch.exits import ExitReason
from training.models.build import copy_tokenizer, load_model, vocabulary_size
from training.planning import memory
from training.planning.hardware import GB, Hardware, first_gpu
from training.planning.model_shape import config_from, measure
from training.run_files import read_lines
from training.settings import TrainSettings

EVENTS = "events.json"  # what the ranks of the run of "training" said
STEPS = 8
SAVED_AT = 4
WARM = 2  # steps that compile, allocate, and say nothing of the speed
STALL_SECONDS = 0.5
STALL_SHARE = 0.1  # of the time that writing takes
MEMORY_TOLERANCE = 0.15


@dataclass(frozen=True)
class Scale:
    """A model and the rows it is trained on."""

    name: str
    architecture: dict[str, Any]
    num_tokens: int
    micro_batch: int


def _llama(hidden: int, inner: int, layers: int, heads: int, groups: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": 512,
    }  # fmt: skip


SCALES = {
    "7B": Scale("7B", _llama(4096, 11008, 32, 32, 32), 2048, 1),
    "1B": Scale("1B", _llama(2048, 5632, 22, 32, 4), 2048, 4),
    "tiny": Scale("tiny", _llama(64, 128, 2, 4, 2), 128, 2),
}
PUBLISHED = {  # tokens a second and GPU, model FLOPs utilisation: of 7B, full, 8 GPUs, rows of 2,048 tokens
    "H100": (10_643, 0.464), "A100-SXM4-80GB": (4_641, 0.642), "A100-SXM4-40GB": (3_679, 0.509),
}  # fmt: skip
SOURCE = "llm-foundry, scripts/train/benchmarking/README.md"
"""https://github.com/mosaicml/llm-foundry"""


@dataclass
class Workshop:
    """Where the runs take place, and what the first of them leaves for the checks after it."""

    folder: Path
    scale: Scale
    ranks: int
    device: torch.device
    plan_dir: Path = Path()
    tokenizer_dir: Path = Path()
    events: list[dict[str, Any]] = field(default_factory=list)

    def settings(self, **values: Any) -> TrainSettings:
        common = {
            "architecture": self.scale.architecture, "strategy": "fsdp", "num_processes": self.ranks,
            "per_gpu_train_batch_size": self.scale.micro_batch, "gradient_accumulation_steps": 2,
            "gradient_checkpointing": self.device.type == "cuda", "max_steps": STEPS, "save_steps": SAVED_AT,
            "keep_last": STEPS, "warmup_steps": 0, "learning_rate": 3e-4,
        }  # fmt: skip
        return TrainSettings(**{**common, **values})

    def run_dir(self, name: str, settings: TrainSettings, model_dir: Path | None = None) -> Path:
        """A new run directory with its configuration."""
        run_dir = self.folder / name
        run_dir.mkdir()
        paths = {
            "plan_dir": str(self.plan_dir), "tokenizer_dir": str(self.tokenizer_dir), "run_dir": str(run_dir),
            "model_dir": model_dir and str(model_dir),
        }  # fmt: skip
        content = settings.model_dump(mode="json") | {"paths": paths, "max_seq_length": self.scale.num_tokens}
        (run_dir / run_files.CONFIG).write_text(yaml.safe_dump(content))
        return run_dir

    def train(self, run_dir: Path, settings: TrainSettings, resume: bool = False) -> list[dict[str, Any]]:
        """Train to the end; the lines of metrics.jsonl."""
        log: list[str] = []
        self.events.clear()
        report = launcher.launch(run_dir, settings, lambda event: self.events.append(dict(event)), log.append, resume)
        if report.reason is not ExitReason.completed:
            raise RuntimeError(f"{report.reason.value} in {report.source}: {report.message}")
        if report.micro_batch_halvings:
            raise RuntimeError(f"out of memory with {self.scale.micro_batch} rows, the plan says they fit")
        return read_lines(run_dir / run_files.METRICS)

    @property
    def trained(self) -> list[dict[str, Any]]:
        """What the run of "training" measured, a line a step."""
        lines = read_lines(self.folder / "training" / run_files.METRICS)
        if len(lines) < STEPS:
            raise NotAvailable("the training run did not end well")
        return lines


def data(shop: Workshop) -> Found:
    """The sample corpus as rows, and its tokenizer."""
    write_sample(shop.folder / "data")
    folders = {f"{kind}_data_dir": str(shop.folder / "data" / kind) for kind in ("instruction_tuning", "pretraining")}
    corpus = CorpusSettings.model_validate(folders)
    cache = shop.folder / "cache"
    vocabulary = shop.scale.architecture["vocab_size"]
    shop.tokenizer_dir = train_tokenizer(shard_records(corpus, cache), vocabulary, cache)
    pack = PackSettings.model_validate({"max_seq_length": shop.scale.num_tokens})
    planned = prepare(corpus, TokenizeSettings.model_validate({}), pack, shop.tokenizer_dir, cache)
    shop.plan_dir = Path(planned.path)
    return Found(f"{planned.report['rows']} rows of {shop.scale.num_tokens}, {planned.report['utilisation']:.1%} full")


def communication(shop: Workshop) -> Found:
    """Sums and gathered parts of all ranks."""
    from training.gpu_check.ranks import FILE

    if shop.device.type == "cuda" and torch.cuda.device_count() < 2:
        raise NotAvailable("one GPU alone sends nothing")
    settings = shop.settings(num_processes=max(shop.ranks, 2))
    run_dir = shop.run_dir("communication", settings)
    log: list[str] = []
    report = launcher.use("training.gpu_check.ranks", run_dir, settings, log.append)
    if report.reason is not ExitReason.completed:
        raise RuntimeError(f"{report.source}: {report.message}")
    found = run_files.read_json(run_dir / FILE)
    measured = f"{found['backend']} between {settings.num_processes} ranks, {found['bytes_per_second'] / GB:.1f} GB/s"
    return Found(measured, good=found["right"])


def training(shop: Workshop) -> Found:
    """A whole model with FSDP2, a checkpoint on the way, evaluation and the model at the end."""
    settings = shop.settings()
    run_dir = shop.run_dir("training", settings)
    losses = [line["loss"] for line in shop.train(run_dir, settings)]
    (run_dir / EVENTS).write_text(json.dumps(shop.events))
    fell = all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    return Found(f"{shop.scale.name}, {shop.ranks} ranks: loss {losses[0]:.3f} -> {losses[-1]:.3f}", good=fell)


def resume(shop: Workshop) -> Found:
    """The same run from its first checkpoint on gives the same losses, to the last bit."""
    wanted = [line["loss"] for line in shop.trained]
    run_dir = shop.folder / "resumed"
    shutil.copytree(shop.folder / "training", run_dir)
    config = yaml.safe_load((run_dir / run_files.CONFIG).read_text())
    config["paths"]["run_dir"] = str(run_dir)
    (run_dir / run_files.CONFIG).write_text(yaml.safe_dump(config))
    for later in sorted((run_dir / run_files.CHECKPOINTS).iterdir())[1:]:
        shutil.rmtree(later)
    losses = [line["loss"] for line in shop.train(run_dir, shop.settings(), resume=True)]
    if not shop.events or shop.events[0].get("after_step") != SAVED_AT:
        raise RuntimeError(f"it did not go on from step {SAVED_AT}")
    difference = max(abs(a - b) for a, b in zip(losses, wanted, strict=True))
    says = "bit-equal" if losses == wanted else f"differs by up to {difference:.2e}: some kernel adds in any order"
    return Found(f"from step {SAVED_AT}: {says}", good=losses == wanted)


def checkpoint_stall(shop: Workshop) -> Found:
    """How long steps wait for a checkpoint, beside how long writing it takes."""
    lines = shop.trained
    gaps = [after["time"] - before["time"] - after["seconds"] for before, after in pairwise(lines)]
    stall = max(0.0, gaps[SAVED_AT - 1] - median(gaps))
    events = run_files.read_json(shop.folder / "training" / EVENTS)
    written = max(event["seconds"] for event in events if event.get("event") == "checkpoint")
    good = stall <= max(STALL_SECONDS, STALL_SHARE * written)
    return Found(f"{stall:.2f} s", f"written in {written:.2f} s; at most {STALL_SHARE:.0%} of that", good)


def memory_against_plan(shop: Workshop) -> Found:
    """The peak of a rank's tensors against the plan's."""
    if shop.device.type != "cuda":
        raise NotAvailable("without a GPU a tiny model's memory is that of Python; benchmarks/memory.py compares there")
    settings = shop.settings()
    hardware = hardware_of(shop, settings)
    vocabulary = vocabulary_size(str(shop.tokenizer_dir))
    config = config_from(None, {**shop.scale.architecture, "vocab_size": vocabulary})
    dtype = torch.bfloat16 if hardware.bf16 else torch.float32
    shape = measure(config, settings, shop.scale.num_tokens, dtype, packed=True)
    planned = hardware.tensors_in(memory.estimate(shape, settings, hardware).total)
    peak = max(line["memory_peak_bytes"] for line in shop.trained)
    off = planned / peak - 1
    return Found(f"{peak / GB:.2f} GB", f"planned {planned / GB:.2f} GB, {off:+.1%}", abs(off) <= MEMORY_TOLERANCE)


def hardware_of(shop: Workshop, settings: TrainSettings) -> Hardware:
    """What the ranks run on, as the plan sees it."""
    is_gpu = shop.device.type == "cuda"
    return Hardware(shop.ranks, is_gpu, uses_bf16(settings, shop.device), first_gpu()[0] if is_gpu else None)


def speed(shop: Workshop) -> Found:
    """Tokens a second and GPU, and MFU, beside what others publish."""
    lines = shop.trained[WARM:]
    tokens = median(line["tokens_per_second"] for line in lines) / shop.ranks
    unit = "GPU" if shop.device.type == "cuda" else "CPU rank"
    measured = f"{tokens:,.0f} tokens/s/{unit}"
    if "mfu" not in lines[0]:
        return Found(measured, "MFU: the peak of this device is not known")
    measured += f", MFU {median(line['mfu'] for line in lines):.1%}"
    name = torch.cuda.get_device_name(shop.device)
    known = next(((board, *figures) for board, figures in PUBLISHED.items() if board in name), None)
    if known is None:
        return Found(measured, "nothing published for this GPU")
    return Found(measured, f"7B, 8 x {known[0]}: {known[1]:,} tokens/s/GPU, MFU {known[2]:.1%} ({SOURCE})")


def four_bits(shop: Workshop) -> Found:
    """An adapter on frozen 4-bit weights: quantised while they are read, trained, saved."""
    small = shop.settings(
        architecture={**SCALES["tiny"].architecture, "vocab_size": vocabulary_size(str(shop.tokenizer_dir))}
    )
    base = shop.folder / "base"
    model: Any = load_model(small, None, str(shop.tokenizer_dir), torch.float32)
    model.save_pretrained(base)
    copy_tokenizer(str(shop.tokenizer_dir), base)
    settings = shop.settings(
        use_lora=True, use_quant=True, lora_r=8, strategy="deepspeed", max_steps=3, num_processes=1
    )
    losses = [line["loss"] for line in shop.train(shop.run_dir("four-bits", settings, base), settings)]
    return Found(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}", good=all(map(math.isfinite, losses)))
