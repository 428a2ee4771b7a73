"""The stages that make training rows of a corpus: records, base model or tokenizer, tokens, plan.

In: settings. Out: `Prepared`. `panda-train` and `panda-prepare` share it. Cost: that of what is new in the corpus.

What MLflow is told about a run before it trains. In: settings and results of the data stages. Out: `RunMetadata`.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml
from prefect.runtime import deployment, flow_run

from configs.settings import PandaSettings, RunSettings
from data_prep import intact, store
from data_prep.pipeline import run_stages
from data_prep.places.address import is_address
from data_prep.plan.build import PlanResult
from data_prep.plan.report import DataReport
from data_prep.records.shard import RecordsResult
from data_prep.store import fingerprint
from data_prep.tokens.tokenize import TokensResult
from flows.parts.champion import champion_directory
from flows.parts.flow_states import EarlyExit
from flows.parts.run_dir import AFTER_DATA, RunDir, Summary
from tasks import assets
from tasks.account import Stopwatch
from tasks.prepare import base_model, plan, shard, tokenize, tokenizer
from training import run_files
from training.bases.tokens import with_tokens
from training.models.hub import base_checkpoint
from training.registry.lineage import corpus_files
from training.run_files import Losses
from training.tracking import run_record
from training.tracking.run import RunMetadata
from training.tracking.run_record import HELD_OUT, HELD_OUT_CONTEXT, Dataset
from training.tracking.tags import (
    CONFIG_TAG,
    CORPUS_TAG,
    EVAL_LOSS_TAG,
    FLOW_RUN_TAG,
    FLOW_RUN_URL_TAG,
    PLAN_TAG,
    SOURCE_NAME_TAG,
    SOURCE_TYPE_TAG,
    STOPPED_TAG,
    TARGET_TOKENS_TAG,
)


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


@dataclass
class FlowStages:
    """The stages of `data_prep.pipeline` as Prefect tasks, each timed; `until_stage` may end the run after one."""

    settings: PandaSettings
    watch: Stopwatch
    corpus: str = ""
    model_dir: Path | None = None

    def records(self) -> RecordsResult:
        with self.watch("records"):
            records = shard(self.settings)
        until(self.settings, "records", {"records": records.model_dump(mode="json", exclude={"units"})})
        self.corpus = records.fingerprint
        return records

    def tokenizer(self, records: RecordsResult) -> Path:
        with self.watch("base model"):
            self.model_dir = starting_point(self.settings)
            return self.model_dir or tokenizer(self.settings, records)

    def tokens(self, records: RecordsResult, tokenizer_dir: Path) -> TokensResult:
        with self.watch("tokenize"):
            tokens = tokenize(self.settings, records, tokenizer_dir)
        until(self.settings, "tokenize", {"tokens": tokens.tokens, "target_tokens": tokens.target_tokens})
        return tokens

    def plan(self, tokens: TokensResult) -> PlanResult:
        with self.watch("plan"):
            return plan(self.settings, tokens)


def prepare_data(settings: PandaSettings, watch: Stopwatch) -> Prepared:
    """Run the stages; `until_stage` may end the run here."""
    stages = FlowStages(settings, watch)
    planned = run_stages(stages)
    assets.plan_made(planned, stages.corpus)
    return Prepared(planned, stages.corpus, stages.model_dir, Path(planned.tokenizer_dir))


def starting_point(settings: PandaSettings) -> Path | None:
    """The directory of the weights to start from; None = from scratch."""
    champion = champion_directory(settings)
    if champion:
        return with_tokens(champion, settings.add_tokens or [], Path(settings.cache_dir))
    return base_model(settings) if base_checkpoint(settings) else None


def prepared_before(run: RunDir) -> Prepared:
    """What the data stages of a run have left, checked to be still there."""
    paths = yaml.safe_load(run.config.read_text(encoding="utf-8"))["paths"]
    plan_dir = Path(paths["plan_dir"])
    manifest = store.open_manifest(plan_dir)
    shards = [(plan_dir / shard).resolve() for shard in manifest["shards"]]
    intact.require_intact(plan_dir.parent.parent, [plan_dir, *shards])
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


def until(settings: PandaSettings, stage: str, summary: Summary) -> None:
    """End the run after the stage the user named."""
    if settings.until_stage == stage:
        raise EarlyExit("Stopped" if stage in AFTER_DATA else "Prepared", f"until {stage}", summary)


def run_metadata(settings: PandaSettings, corpus: str, plan: PlanResult) -> RunMetadata:
    """Parameters = the configuration; data sets = the corpora, by fingerprint of the records, and what is held out."""
    folders = {"instruction": settings.instruction_tuning_data_dir, "pretraining": settings.pretraining_data_dir}
    datasets = [
        Dataset(source, corpus, folder, profile=plan.report["sources"].get(source, {}))
        for source, folder in folders.items()
        if folder and (is_address(folder) or Path(folder).is_dir())
    ]
    if plan.report["validation_records"]:
        held_out = {
            "records": plan.report["validation_records"],
            "tokens": plan.report["validation_tokens"],
            "target_tokens": plan.report["validation_target_tokens"],
        }
        datasets.append(Dataset(HELD_OUT, plan.fingerprint, plan.path, HELD_OUT_CONTEXT, held_out))
    tags = {
        SOURCE_TYPE_TAG: "LOCAL",
        SOURCE_NAME_TAG: "flows/panda_train.py" if deployment.id else "train.py",
        CORPUS_TAG: corpus,
        TARGET_TOKENS_TAG: str(target_tokens_of_corpus(plan.report)),
        PLAN_TAG: plan.fingerprint,
        CONFIG_TAG: config_hash(settings),
        FLOW_RUN_TAG: str(flow_run.id or ""),
        FLOW_RUN_URL_TAG: str(flow_run.ui_url or ""),
        STOPPED_TAG: "",
    }
    reports = {run_files.DATA_REPORT: plan.report, run_files.CORPUS_REPORT: corpus_files(Path(plan.path))}
    return RunMetadata(settings.model_dump(mode="json"), datasets, reports, tags)


def target_tokens_of_corpus(report: DataReport) -> int:
    """With those of the old records that replay left out, so that it grows with the corpus."""
    return report["target_tokens"] + report.get("not_replayed_target_tokens", 0)


def config_hash(settings: PandaSettings) -> str:
    """Of all settings but those that say where things go."""
    return fingerprint(config=settings.model_dump(mode="json", exclude=set(RunSettings.model_fields)))


def version_tags(known: RunMetadata, losses: Losses) -> dict[str, str]:
    """Tags of the model version: what it was made of, and how good it is."""
    lineage = {name: value for name, value in known.tags.items() if value}
    return lineage | {EVAL_LOSS_TAG + source: f"{loss:.6f}" for source, loss in losses["after"].items()}
