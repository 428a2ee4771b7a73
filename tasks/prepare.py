"""Tasks of data preparation: each calls one stage of `data_prep.pipeline`, reports, and hands its result on."""

from pathlib import Path

from configs.settings import PandaSettings
from data_prep.inspection.inspect import inspect_plan, inspection_markdown
from data_prep.pipeline import Preparation
from data_prep.plan.build import PlanResult
from data_prep.records.shard import RecordsResult
from data_prep.tokenizer import load_tokenizer
from data_prep.tokens.tokenize import TokensResult
from tasks.cluster import on_cluster
from tasks.reporting import StageProgress, show_prepared, show_report
from tasks.stage import stage
from training.bases.start import model_directory
from training.models.hub import description
from training.settings import ModelSettings
from training.tracking.looks import only_a_look

EXAMPLES_SHOWN = 2  # of each source


def _stages(
    settings: PandaSettings, tokenizer_dir: Path | None = None, progress: StageProgress | None = None
) -> Preparation:
    fan_out = on_cluster(settings.prepare_cluster)
    return Preparation.of(settings, tokenizer_dir, Path(settings.cache_dir), progress, fan_out)


def _records_in_words(result: RecordsResult) -> str:
    rejected = sum(result.rejected.values())
    return f"{result.records:,} records in {result.files:,} files: {result.valid:,} valid, {rejected:,} rejected"


@stage("validate and shard", says=_records_in_words, reused=lambda result: not result.built)
def shard(settings: PandaSettings) -> RecordsResult:
    """JSON corpora -> Arrow shards of valid records, and a ledger line for every record."""
    reads_with = description(ModelSettings.of(settings)) if settings.reader else None
    return _stages(settings, reads_with, StageProgress("records")).records()


@stage("base model", says=lambda folder: f"weights in {folder}" if folder else "random weights")
def base_model(settings: PandaSettings) -> Path | None:
    """The directory of the weights to start from, downloaded or added up if need be; None = from scratch."""
    return model_directory(ModelSettings.of(settings), Path(settings.cache_dir))


@stage("train tokenizer", says=lambda folder: f"tokenizer in {folder}")
def tokenizer(settings: PandaSettings, records: RecordsResult) -> Path:
    """A byte-level BPE of the corpus itself, for a model that starts from scratch."""
    return _stages(settings).tokenizer(records)


def _tokens_in_words(result: TokensResult) -> str:
    return f"{result.examples:,} examples, {result.tokens:,} tokens, {result.target_tokens:,} of them targets"


@stage("tokenize and mask", says=_tokens_in_words, reused=lambda result: not result.built)
def tokenize(settings: PandaSettings, records: RecordsResult, tokenizer_dir: Path) -> TokensResult:
    """Records -> token shards in which the prompts are masked."""
    return _stages(settings, progress=StageProgress("tokens")).tokens(records, tokenizer_dir)


def _plan_in_words(result: PlanResult) -> str:
    report = result.report
    full = f"{100 * report['utilisation']:.1f} % full"
    return f"{report['rows']:,} rows of {report['max_seq_length']:,} tokens, {full}: plan {result.fingerprint}"


@stage("plan packing", says=_plan_in_words, reused=lambda result: result.reused)
def plan(settings: PandaSettings, tokens: TokensResult) -> PlanResult:
    """Token shards -> which example goes into which row, and the data report."""
    result = _stages(settings).plan(tokens)
    show_report(result.report)
    with only_a_look("the examples"):
        tokenizer = load_tokenizer(Path(tokens.tokenizer_dir), Path(settings.cache_dir))
        show_prepared(inspection_markdown(inspect_plan(Path(result.path), tokenizer, EXAMPLES_SHOWN)))
    return result
