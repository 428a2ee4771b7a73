"""Export a version of the registry: its files, prompts from its held-out data, its card.

In: a version, a target directory. Out: the exported directory (see `export`), with the configuration of its run beside
the card. Cost: that of the export; the prompts are the first tokens of held-out rows, or a few sentences where the plan
is no longer on this machine.
"""

import json
from pathlib import Path

import numpy as np
import yaml

from training.export import Exported, export
from training.lineage import MARKER, config_of, plan_of
from training.model_card import CardFacts, model_card
from training.versions import Registry, Version

NUM_PROMPTS = 8
PROMPT_TOKENS = 128
SENTENCES = ("The capital of France is", "Once upon a time", "def fibonacci(n):", "中国的首都是", "1, 2, 3, 4,",
             "Question: What is water made of?\nAnswer:")  # fmt: skip


def publish(registry: Registry, version: Version, target: Path, cache_dir: Path, base: Path | None = None) -> Exported:
    """Write the version to `target`."""
    model_dir = registry.files(version, cache_dir)
    config = config_of(registry, version)
    facts = CardFacts(
        version.uri,
        version.tags,
        config,
        registry.json_artifact(version, "report/data.json"),
        registry.json_artifact(version, "gate.json"),
    )
    prompts = held_out_prompts(plan_of(version, config, cache_dir)) or sentence_prompts(model_dir)
    exported = export(model_dir, target, prompts, lambda done: model_card(facts, done), base)
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
    from data_prep.reader import open_plan

    plan = open_plan(plan_dir, "validation")
    lengths = plan.row_tokens[:NUM_PROMPTS]
    batches = [
        plan.batch(np.array([row])).input_ids[0][: min(PROMPT_TOKENS, length)] for row, length in enumerate(lengths)
    ]
    return [ids.tolist() for ids in batches]


def sentence_prompts(model_dir: Path) -> list[list[int]]:
    """A few sentences as the model's tokenizer sees them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    return [tokenizer(text).input_ids for text in SENTENCES]
