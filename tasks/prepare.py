"""Tasks of data preparation: each calls one function of `data_prep`, reports, and hands its result on."""

from pathlib import Path

from configs.settings import PandaSettings
from data_prep.inspection.inspect import inspect_plan, inspection_markdown
from data_prep.plan.build import PlanResult, plan_rows
from data_prep.records.shard import RecordsResult, shard_records
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
from data_prep.tokenizer import load_tokenizer, train_tokenizer, vocab_size_of
from data_prep.tokens.tokenize import TokensResult, tokenize_records
from tasks.cluster import on_cluster
from tasks.reporting import StageProgress, show_prepared, show_report
from tasks.stage import stage
from training.models.delta import model_directory
from training.settings import ModelSettings

EXAMPLES_SHOWN = 2  # of each source


@stage("validate and shard", reused=lambda result: None if result.built else f"{result.records:,} records")
def shard(settings: PandaSettings) -> RecordsResult:
    """JSON corpora -> Arrow shards of valid records, and a ledger line for every record."""
    return shard_records(
        CorpusSettings.of(settings),
        Path(settings.cache_dir),
        StageProgress("records"),
        on_cluster(settings.prepare_cluster),
    )


@stage("base model")
def base_model(settings: PandaSettings) -> Path | None:
    """The directory of the weights to start from, downloaded or added up if need be; None = from scratch."""
    return model_directory(ModelSettings.of(settings), Path(settings.cache_dir))


@stage("train tokenizer")
def tokenizer(settings: PandaSettings, records: RecordsResult) -> Path:
    """A byte-level BPE of the corpus itself, for a model that starts from scratch."""
    return train_tokenizer(records, vocab_size_of(settings.architecture), Path(settings.cache_dir))


@stage("tokenize and mask", reused=lambda result: None if result.built else f"{result.tokens:,} tokens")
def tokenize(settings: PandaSettings, records: RecordsResult, tokenizer_dir: Path) -> TokensResult:
    """Records -> token shards in which the prompts are masked."""
    return tokenize_records(
        records,
        TokenizeSettings.of(settings),
        tokenizer_dir,
        Path(settings.cache_dir),
        settings.prepare_workers,
        StageProgress("tokens"),
        on_cluster(settings.prepare_cluster),
    )


@stage("plan packing", reused=lambda result: f"plan {result.fingerprint}" if result.reused else None)
def plan(settings: PandaSettings, tokens: TokensResult) -> PlanResult:
    """Token shards -> which example goes into which row, and the data report."""
    result = plan_rows(tokens, CorpusSettings.of(settings), PackSettings.of(settings), Path(settings.cache_dir))
    show_report(result.report)
    tokenizer = load_tokenizer(Path(tokens.tokenizer_dir), Path(settings.cache_dir))
    show_prepared(inspection_markdown(inspect_plan(Path(result.path), tokenizer, EXAMPLES_SHOWN)))
    return result
