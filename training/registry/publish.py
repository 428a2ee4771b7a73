"""Export a version of the registry: its files, its model card, the configuration it was trained with.

In: a version, a target directory. Out: the exported directory (see `export`), where a merged model was compared on
prompts from its held-out data, or on a few sentences where its plan is no longer on this machine. The card is README.md
with the metadata block of the Hugging Face hub, made of what MLflow holds of version and run; what is not known is left
out. Cost: that of the export.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import ModelCardData

from data_prep.plan.reader import open_plan
from training import run_files
from training.comparison.statistics import interval_of
from training.export.export import Exported, Source, export
from training.registry.lineage import MARKER, config_of, plan_of
from training.registry.versions import Registry, Version
from training.tracking.tags import BENCHMARK_TAG, CORPUS_TAG, EVAL_LOSS_TAG, PLAN_TAG, tagged

NUM_PROMPTS = 8
PROMPT_TOKENS = 128
SENTENCES = ("The capital of France is", "Once upon a time", "def fibonacci(n):", "中国的首都是", "1, 2, 3, 4,",
             "Question: What is water made of?\nAnswer:")  # fmt: skip
SHOWN = ("learning_rate", "lr_scheduler", "optimizer", "num_train_epochs", "max_steps", "per_gpu_train_batch_size",
         "gradient_accumulation_steps", "max_seq_length", "template", "seed", "use_lora", "lora_r", "lora_alpha",
         "use_rslora", "use_dora", "loraplus_lr_ratio", "modules_to_save", "trainable_token_indices", "add_tokens",
         "init_lora_weights", "use_quant")  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """Where to, and with what. `base`: of an adapter, where it has moved."""

    target: Path
    cache_dir: Path
    base: Path | None = None
    trust_remote_code: bool = False


def publish(registry: Registry, version: Version, asked: Asked) -> Exported:
    """Write the version to `asked.target`."""
    target, cache_dir = asked.target, asked.cache_dir
    model_dir = registry.files(version, cache_dir)
    config = config_of(registry, version)
    facts = CardFacts(
        version.uri,
        version.tags,
        config,
        registry.json_artifact(version, run_files.DATA_REPORT),
        registry.json_artifact(version, run_files.GATE),
    )
    prompts = held_out_prompts(plan_of(version, config, cache_dir)) or sentence_prompts(model_dir)
    source = Source(model_dir, prompts, asked.base, asked.trust_remote_code)
    exported = export(source, target, lambda done: model_card(facts, done))
    (target / MARKER).write_text(json.dumps({"version": version.uri}), encoding="utf-8")
    if config:
        settings = {name: value for name, value in config.items() if name not in ("paths", "resume", "run_name")}
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        (target / "training_config.yaml").write_text(text, encoding="utf-8")
    return exported


def held_out_prompts(plan_dir: Path | None) -> list[list[int]]:
    """The first tokens of the first held-out rows."""
    if not plan_dir:
        return []
    plan = open_plan(plan_dir, "validation")
    lengths = plan.row_tokens[:NUM_PROMPTS]
    batches = [
        plan.batch(np.array([row])).input_ids[0][: min(PROMPT_TOKENS, length)] for row, length in enumerate(lengths)
    ]
    return [ids.tolist() for ids in batches]


def sentence_prompts(model_dir: Path) -> list[list[int]]:
    """A few sentences as the model's tokenizer sees them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    return [tokenizer(text).input_ids for text in SENTENCES]


@dataclass(frozen=True)
class CardFacts:
    """What the card tells of a version."""

    uri: str
    tags: dict[str, str]
    config: dict[str, Any] = field(default_factory=dict)  # RUN/config.yaml
    data: dict[str, Any] = field(default_factory=dict)  # the data report
    gate: dict[str, Any] = field(default_factory=dict)  # the verdict


def model_card(facts: CardFacts, exported: Exported) -> str:
    """The whole card."""
    sections = [
        _header(facts, exported),
        f"# {facts.uri.removeprefix('models:/').replace('/', ' version ')}",
        _origin(facts, exported),
        _section("Data", _data(facts.data)),
        _section("Evaluation", _evaluation(facts)),
        _section("Training", _table(["setting", "value"], _settings(facts.config))),
        _section("Reproduce", _reproduce(facts)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def licence_of(base_dir: str | None) -> str | None:
    """The `license:` of the base's own card, if it states one."""
    card = Path(base_dir or "", "README.md")
    match = re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8"), re.MULTILINE) if card.is_file() else None
    return match[1] if match else None


def _header(facts: CardFacts, exported: Exported) -> str:
    known = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=facts.config.get("ckpt_path"),
        license=licence_of(exported.base_model or facts.config.get("paths", {}).get("model_dir")),
    )
    return f"---\n{known.to_yaml()}\n---"


def _origin(facts: CardFacts, exported: Exported) -> str:
    start = facts.config.get("ckpt_path") or "random weights"
    text = f"`{facts.config.get('model', 'A causal language model')}`, trained from {start}."
    if exported.difference:
        found = exported.difference
        text += (
            f" A LoRA adapter merged into its base in float32; against base and adapter on {found.num_positions} "
            f"positions: mean KL {found.mean_kl:.1e} nats, same most likely token at {found.top1_agreement:.2%}."
        )
    return text


def _data(report: dict[str, Any]) -> str:
    """Counts of the corpus, what was left out and why."""
    names = ("records_in", "accepted", "validation_records", "tokens", "target_tokens", "rows", "max_seq_length")
    rows = [[name.replace("_", " "), f"{report[name]:,}"] for name in names if name in report]
    for kind in ("rejected", "dropped"):
        rows += [[f"{kind}: {reason}", f"{number:,}"] for reason, number in report.get(kind, {}).items()]
    for source, share in report.get("sources", {}).items():
        rows.append([f"source {source}", f"{share['records']:,} records, {share['share']:.1%} of the tokens"])
    return _table(["what", "number"], rows)


def _evaluation(facts: CardFacts) -> str:
    """Held-out losses, and the comparison with intervals."""
    losses = list(tagged(facts.tags, EVAL_LOSS_TAG).items())
    parts = [_table(["held-out source", "loss per target token"], losses)]
    rows = [
        [row["against"], row["slice"], f"{row['records']:,}", str(interval_of(row))]
        for row in facts.gate.get("slices", [])
    ]
    interval = f"gain in nats per target token [{facts.gate.get('confidence', 0.95):.0%} interval]"
    parts.append(_table(["against", "slice", "records", interval], rows))
    scores = list(tagged(facts.tags, BENCHMARK_TAG).items())
    parts.append(_table(["benchmark (lm-eval)", "score"], scores))
    reasons = facts.gate.get("reasons", [])
    parts.append("\n".join(f"- {reason}" for reason in reasons))
    return "\n\n".join(part for part in parts if part)


def _settings(config: dict[str, Any]) -> list[list[str]]:
    return [[f"`{name}`", f"`{config[name]}`"] for name in SHOWN if config.get(name) is not None]


def _reproduce(facts: CardFacts) -> str:
    """The configuration is beside the card; the fingerprints say whether the data is the same."""
    prints = [[name.removeprefix("panda."), f"`{facts.tags[name]}`"] for name in (CORPUS_TAG, PLAN_TAG)
              if name in facts.tags]  # fmt: skip
    if not facts.config:
        return _table(["fingerprint", "value"], prints)
    return f"    python train.py --conf_path training_config.yaml\n\n{_table(['fingerprint', 'value'], prints)}"


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
