"""Data preparation from JSON to the pack plan: the three stages in order, each costing only what is new.

In: settings, a tokenizer directory (or none: one is trained on the corpus), a cache directory. Out: `PlanResult`, whose
report says what became of every record. `panda prepare` and the flow's tasks call the same functions.
"""

from pathlib import Path

from data_prep.plan.build import PlanResult, plan_rows
from data_prep.records.shard import Progress, shard_records
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
from data_prep.tokenizer import DEFAULT_VOCAB_SIZE, train_tokenizer
from data_prep.tokens.tokenize import tokenize_records


def prepare(  # noqa: PLR0913, PLR0917  # the settings of three stages
    corpus: CorpusSettings,
    tokenize: TokenizeSettings,
    pack: PackSettings,
    tokenizer_dir: Path | None,
    cache_dir: Path,
    progress: Progress | None = None,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
) -> PlanResult:
    """Read, tokenize and plan a corpus below ``cache_dir``; ``vocab_size`` is that of a tokenizer trained here."""
    records = shard_records(corpus, cache_dir, progress, tokenizer_dir=tokenizer_dir)
    if tokenizer_dir is None:
        tokenizer_dir = train_tokenizer(records, vocab_size, cache_dir)
    tokens = tokenize_records(records, tokenize, tokenizer_dir, cache_dir, corpus.prepare_workers, progress)
    return plan_rows(tokens, corpus, pack, cache_dir)
