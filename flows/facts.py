"""What MLflow is told about a run before it trains. In: settings and results of the data stages. Out: `Facts`."""

from pathlib import Path
from typing import Any

from prefect.runtime import flow_run

from configs.settings import PandaSettings, RunSettings
from data_prep.plan import PlanResult
from data_prep.store import fingerprint
from training.lineage import corpus_files
from training.run_record import Dataset
from training.tracking import Facts

CORPUS_TAG = "panda.corpus"
TARGET_TOKENS_TAG = "panda.target_tokens"


def facts(settings: PandaSettings, corpus: str, plan: PlanResult) -> Facts:
    """Parameters = the configuration; data sets = the corpora, by the fingerprint of their records."""
    folders = {"instruction": settings.instruction_tuning_data_dir, "pretraining": settings.pretraining_data_dir}
    datasets = [
        Dataset(source, corpus, folder, profile=plan.report["sources"].get(source, {}))
        for source, folder in folders.items()
        if folder and Path(folder).is_dir()
    ]
    tags = {
        CORPUS_TAG: corpus,
        TARGET_TOKENS_TAG: str(target_tokens_of_corpus(plan.report)),
        "panda.plan": plan.fingerprint,
        "panda.config": config_hash(settings),
        "prefect.flow_run_id": str(flow_run.id or ""),
        "prefect.flow_run_url": str(flow_run.ui_url or ""),
    }
    reports = {"data": plan.report, "corpus": corpus_files(Path(plan.path))}
    return Facts(settings.model_dump(mode="json"), datasets, reports, tags)


def target_tokens_of_corpus(report: dict[str, Any]) -> int:
    """With those of the old records that replay left out, so that it grows with the corpus."""
    return report["target_tokens"] + report.get("not_replayed_target_tokens", 0)


def config_hash(settings: PandaSettings) -> str:
    """Of all settings but those that say where things go."""
    return fingerprint(config=settings.model_dump(mode="json", exclude=set(RunSettings.model_fields)))


def version_tags(known: Facts, losses: dict[str, dict[str, float]]) -> dict[str, str]:
    """Tags of the model version: what it was made of, and how good it is."""
    lineage = {name: value for name, value in known.tags.items() if value}
    return lineage | {f"eval_loss.{source}": f"{loss:.6f}" for source, loss in losses["after"].items()}
