"""The stages that make training rows of a corpus: records, base model or tokenizer, tokens, plan.

In: settings. Out: `Prepared`. `panda-train` and `panda-prepare` share it. Cost: that of what is new in the corpus.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from configs.settings import PandaSettings
from data_prep import store
from data_prep.plan import PlanResult
from flows.champion import champion_directory
from flows.facts import CORPUS_TAG
from flows.outcome import Ended
from flows.run_dir import RunDir
from flows.stopwatch import Stopwatch
from tasks.prepare import base_model, plan, shard, tokenize, tokenizer
from training import run_record
from training.source import base_checkpoint


@dataclass(frozen=True)
class Prepared:
    """What training needs to know of the data; `corpus` is the fingerprint of all records."""

    plan: PlanResult
    corpus: str
    model_dir: Path | None
    tokenizer_dir: Path

    @property
    def paths(self) -> dict[str, Path | None]:
        """For RUN/config.yaml."""
        return {"plan_dir": Path(self.plan.path), "model_dir": self.model_dir, "tokenizer_dir": self.tokenizer_dir}


def prepare_data(settings: PandaSettings, watch: Stopwatch) -> Prepared:
    """Run the stages; `until_stage` may end the run here."""
    with watch("records"):
        records = shard(settings)
    until(settings, "records", {"records": records.model_dump(mode="json", exclude={"units"})})
    with watch("base model"):
        model_dir = starting_point(settings)
        tokenizer_dir = model_dir or tokenizer(settings, records)
    with watch("tokenize"):
        tokens = tokenize(settings, records, tokenizer_dir)
    until(settings, "tokenize", {"tokens": tokens.tokens, "target_tokens": tokens.target_tokens})
    with watch("plan"):
        planned = plan(settings, tokens)
    return Prepared(planned, records.fingerprint, model_dir, tokenizer_dir)


def starting_point(settings: PandaSettings) -> Path | None:
    """The directory of the weights to start from; None = from scratch."""
    champion = champion_directory(settings)
    if champion:
        return champion
    return base_model(settings) if base_checkpoint(settings) else None


def prepared_before(run: RunDir) -> Prepared:
    """What the data stages of a run have left, checked to be still there."""
    paths = yaml.safe_load(run.config.read_text(encoding="utf-8"))["paths"]
    plan_dir = Path(paths["plan_dir"])
    manifest = store.open_manifest(plan_dir)
    planned = PlanResult(
        path=str(plan_dir),
        fingerprint=plan_dir.name,
        reused=True,
        seconds=0.0,
        tokenizer_dir=paths["tokenizer_dir"],
        report={**manifest["report"], "reused": {"plan": True}},
    )
    model_dir = Path(paths["model_dir"]) if paths["model_dir"] else None
    record = run_record.read(run.path)
    corpus = record.tags.get(CORPUS_TAG, "") if record else ""
    return Prepared(planned, corpus, model_dir, Path(paths["tokenizer_dir"]))


def until(settings: PandaSettings, stage: str, summary: dict[str, Any]) -> None:
    """End the run after the stage the user named."""
    if settings.until_stage == stage:
        raise Ended("Prepared" if stage in ("records", "tokenize", "plan") else "Stopped", f"until {stage}", summary)
