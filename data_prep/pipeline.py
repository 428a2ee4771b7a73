"""Data preparation from JSON to the pack plan: the stages, their order, and what they share.

In: settings, a tokenizer directory (or none: one is trained on the corpus), a cache directory. Out: `PlanResult`, whose
report says what became of every record. The order is stated once, in `run_stages`; who wants more around a stage (a
task of Prefect, a stopwatch, an early end) gives `Stages` of its own whose methods call those of `Preparation`.
Cost: a stage costs only what is new.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from pydantic import BaseModel

from data_prep.plan.build import PlanResult, plan_rows
from data_prep.processes import FanOut
from data_prep.records.shard import Progress, RecordsResult, shard_records
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
from data_prep.tokenizer import DEFAULT_VOCAB_SIZE, train_tokenizer, vocab_size_of
from data_prep.tokens.tokenize import TokensResult, tokenize_records

ORDER = ("records", "tokens", "plan")
"""The stages that leave something behind, as `run_stages` has them."""


class Stages(Protocol):
    """What is done to a corpus, one after another; each stage gets what the ones before it have made."""

    def records(self) -> RecordsResult:
        """Read, validate and shard."""

    def tokenizer(self, records: RecordsResult) -> Path:
        """The tokenizer of the base model, or one trained on the records."""

    def tokens(self, records: RecordsResult, tokenizer_dir: Path) -> TokensResult:
        """Tokenize and mask."""

    def plan(self, tokens: TokensResult) -> PlanResult:
        """Plan the rows."""


def run_stages(stages: Stages) -> PlanResult:
    """All stages in their order."""
    records = stages.records()
    tokens = stages.tokens(records, stages.tokenizer(records))
    return stages.plan(tokens)


@dataclass(frozen=True)
class Preparation:
    """The stages themselves, with the settings and the place they share."""

    corpus: CorpusSettings
    tokenize: TokenizeSettings
    pack: PackSettings
    tokenizer_dir: Path | None  # None: `vocab_size` entries are trained on the corpus
    cache_dir: Path
    progress: Progress | None = None
    vocab_size: int = DEFAULT_VOCAB_SIZE
    fan_out: FanOut | None = None  # where units are made; None: in processes of this machine

    @classmethod
    def of(
        cls,
        wider: BaseModel,
        tokenizer_dir: Path | None,
        cache_dir: Path,
        progress: Progress | None = None,
        fan_out: FanOut | None = None,
    ) -> Self:
        """The stages of a wider settings object, with the vocabulary that its ``architecture`` asks for, if any."""
        groups = CorpusSettings.of(wider), TokenizeSettings.of(wider), PackSettings.of(wider)
        vocab_size = vocab_size_of(getattr(wider, "architecture", None))
        return cls(*groups, tokenizer_dir, cache_dir, progress, vocab_size, fan_out)

    def records(self) -> RecordsResult:
        return shard_records(self.corpus, self.cache_dir, self.progress, self.fan_out, self.tokenizer_dir)

    def tokenizer(self, records: RecordsResult) -> Path:
        return self.tokenizer_dir or train_tokenizer(records, self.vocab_size, self.cache_dir)

    def tokens(self, records: RecordsResult, tokenizer_dir: Path) -> TokensResult:
        num_workers, limit = self.corpus.prepare_workers, self.corpus.max_rejected_fraction
        return tokenize_records(
            records, self.tokenize, tokenizer_dir, self.cache_dir, num_workers, self.progress, self.fan_out, limit
        )

    def plan(self, tokens: TokensResult) -> PlanResult:
        return plan_rows(tokens, self.corpus, self.pack, self.cache_dir)


def prepare(
    corpus: CorpusSettings, tokenize: TokenizeSettings, pack: PackSettings, tokenizer_dir: Path | None, cache_dir: Path
) -> PlanResult:
    """Read, tokenize and plan a corpus below ``cache_dir``, here."""
    return run_stages(Preparation(corpus, tokenize, pack, tokenizer_dir, cache_dir))
