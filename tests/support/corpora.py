"""A small real corpus, prepared for real, and tiny models trained on it for real: for gate, lineage and takedown."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from data_prep.pipeline import prepare
from data_prep.plan.reader import open_plan
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
from tests.support.ranks_here import alone
from tests.support.tokenizers import bytes_core, save
from training.compare import run_job
from training.comparison.job import read_job, write_job
from training.launch.run_config import read_config
from training.models.build import config_of, save_model
from training.models.loss import CausalLMLoss
from training.registry import lineage
from training.registry.promotion import job_of, settle
from training.registry.register import register
from training.registry.versions import Registry, Version
from training.run_files import CORPUS_REPORT
from training.settings import GateSettings, TrackingSettings, TrainSettings
from training.tracking.run import RunMetadata, open_run
from training.tracking.tags import CORPUS_TAG, PARENT_TAG, PLAN_TAG
from training.trainer.batches import load

ARCHITECTURE = {
    "model_type": "llama", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 260,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "bos_token_id": 0,
    "eos_token_id": 1, "max_position_embeddings": 256,
}  # fmt: skip
ROWS_PER_STEP = 8
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CHINESE = ("零", "一", "二", "三", "四", "五", "六", "七", "八", "九")


def records(number: int) -> list[dict[str, str]]:
    """Questions a tiny model can learn; every third in Chinese. Each has a number of its own, so none is a copy."""
    made = []
    for i in range(number):
        words = CHINESE if i % 3 == 0 else NUMBERS
        word, target = words[i % 10], words[(i + 1) % 10]
        question = f"{i}：{word}之后是什么" if i % 3 == 0 else f"{i}: what follows {word}"
        made.append({"input": question, "target": target})
    return made


NAME = "panda-count"


class Project:
    """A directory with a corpus, its cache and its outputs."""

    def __init__(self, root: Path, output_dir: Path, data_dir: Path | None = None, **changes: Any):
        self.root, self.output_dir, self.cache_dir, self.changes = root, output_dir, root / "cache", changes
        self.tokenizer_dir = save(bytes_core(), root / "tokenizer", bos_token="<s>")
        self.data_dir = data_dir or root / "corpus"
        if data_dir is None:
            self.data_dir.mkdir()
            lines = [json.dumps(record, ensure_ascii=False) for record in records(300)]
            (self.data_dir / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def settings(self, **changes: Any) -> dict[str, Any]:
        """The flat configuration of a run."""
        groups = (CorpusSettings, TokenizeSettings, PackSettings, TrainSettings, TrackingSettings, GateSettings)
        values = {name: field.default for group in groups for name, field in group.model_fields.items()}
        return values | {
            "instruction_tuning_data_dir": str(self.data_dir), "pretraining_data_dir": None, "validation_fraction": 0.2,
            "tombstones": str(self.root / "tombstones.jsonl"), "max_seq_length": 128, "architecture": ARCHITECTURE,
            "cache_dir": str(self.cache_dir), "output_dir": str(self.output_dir), "per_gpu_eval_batch_size": 16,
            "per_gpu_train_batch_size": ROWS_PER_STEP, "gradient_accumulation_steps": 1, "learning_rate": 5e-3,
        } | self.changes | changes  # fmt: skip

    def plan(self, **changes: Any) -> Any:
        """Prepare the corpus as it is now."""
        settings = self.settings(**changes)
        corpus, tokenize, pack = (
            group(**{name: settings[name] for name in group.model_fields})
            for group in (CorpusSettings, TokenizeSettings, PackSettings)
        )
        return prepare(corpus, tokenize, pack, self.tokenizer_dir, self.cache_dir)

    def train(self, name: str, steps: int, model_dir: Path | None = None) -> Path:
        """A finished run directory: the model trained for some steps in the order the product trains in."""
        planned = self.plan()
        run_dir = self.output_dir / name
        run_dir.mkdir()
        settings = self.settings(max_steps=steps)
        paths = {"plan_dir": planned.path, "tokenizer_dir": str(self.tokenizer_dir), "run_dir": str(run_dir)}
        config = {**settings, "paths": {**paths, "model_dir": model_dir and str(model_dir)}}
        (run_dir / "config.yaml").write_text(yaml.safe_dump(_plain(config), allow_unicode=True), encoding="utf-8")
        model = train_model(Path(planned.path), steps, settings["seed"], settings["learning_rate"], model_dir)
        save_model(model, model.state_dict(), str(self.tokenizer_dir), run_dir / "model")
        trained = {"steps": steps, "rows_per_step": ROWS_PER_STEP, "best_step": None}
        (run_dir / "train.json").write_text(json.dumps(trained))
        return run_dir


def train_model(plan_dir: Path, steps: int, seed: int, learning_rate: float, model_dir: Path | None = None) -> Any:
    """A tiny model after some steps of AdamW."""
    from transformers import AutoModelForCausalLM

    from data_prep.plan.order import rows_of_step, steps_per_epoch

    torch.manual_seed(seed)
    if model_dir:
        model = AutoModelForCausalLM.from_pretrained(model_dir)
    else:
        model = AutoModelForCausalLM.from_config(config_of(ARCHITECTURE))
    plan, losses_of = open_plan(plan_dir, "train"), CausalLMLoss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    per_epoch = steps_per_epoch(plan.num_rows, ROWS_PER_STEP)
    for step in range(steps):
        rows = rows_of_step(plan.num_rows, ROWS_PER_STEP, seed, step // per_epoch, step % per_epoch)
        batch = load(plan, np.asarray(rows))
        (losses_of(batch)[0] / len(batch.targets)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _plain(value: Any) -> Any:
    """Tuples as lists, for YAML."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple | list) else value


@dataclass
class Registered:
    """A version and what the gate said."""

    version: Version
    verdict: dict
    run_dir: Path


def add_version(
    project: Project,
    name: str,
    steps: int,
    model_dir: Path | None = None,
    uri: str | None = None,
    *,
    answer: dict[str, str] | None = None,
    **gate: float,
) -> Registered:
    """Train, track, register, compare, settle: what the flow does, without Prefect."""
    run_dir = project.train(name, steps, model_dir)
    plan_dir = read_config(run_dir / "config.yaml").plan_dir
    tags = {PLAN_TAG: plan_dir.name, CORPUS_TAG: "c" * 32}
    facts = RunMetadata({"model": "tiny"}, reports={CORPUS_REPORT: lineage.corpus_files(plan_dir)}, tags=tags)
    with open_run(TrackingSettings(mlflow_tracking_uri=uri), run_dir, facts) as tracked:
        run_id = tracked.wait_for_run_id()
        registry = Registry(tracked.uri)
        parent = lineage.parent_of(registry, model_dir and str(model_dir))
        version = register(run_dir, run_id, NAME, tags | ({PARENT_TAG: parent} if parent else {}), tracked.uri)
        resolved = registry.resolve(version.uri)
        write_job(job_of(registry, resolved, run_dir, GateSettings(**gate).model_dump()), run_dir)
        with alone() as ranks:
            verdict = run_job(read_config(run_dir / "config.yaml"), read_job(run_dir), ranks)
        settle(registry, resolved, verdict, answer)
        (run_dir / "gate.json").write_text(json.dumps(verdict))
    return Registered(registry.resolve(version.uri), verdict, run_dir)
