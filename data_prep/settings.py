"""The settings of data preparation: every field is a flag, a form field and an MLflow param.

A field is documented once, here, by its ``description``; ``--help``, the Prefect form, the template YAML and the
reference page print that text. In: plain values. Out: frozen, validated pydantic models. Cost: none, no I/O.
The classes group fields by the stage that *owns* them, because a stage's fingerprint is made of its own group only.
"""

from itertools import filterfalse
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from data_prep.errors import did_you_mean

Overflow = Literal["drop", "truncate_prompt_left", "truncate_target", "split", "error"]


class Settings(BaseModel):
    """Base of every settings group: unknown fields are errors, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @classmethod
    def of(cls, wider: BaseModel) -> Self:
        """This group's part of a wider settings object (the full configuration is a superset of every group)."""
        return cls(**{name: getattr(wider, name) for name in cls.model_fields})


def name_or_target(*names: str) -> AfterValidator:
    """Accept one of the names in any case, or a `_target_` node; None stays None."""
    known = {name.lower(): name for name in names}

    def check(value: Any) -> Any:
        if isinstance(value, dict):
            return _check_target(value)
        if isinstance(value, str) and value.lower() not in known:
            raise ValueError(f"use one of {', '.join(names)}, or a `_target_` node{did_you_mean(value, names)}")
        return known[value.lower()] if isinstance(value, str) else value

    return AfterValidator(check)


def _check_target(node: dict[str, Any]) -> dict[str, Any]:
    target = node.get("_target_")
    if not isinstance(target, str) or not all(part.isidentifier() for part in target.split(".")) or "." not in target:
        raise ValueError("a node names its function as `_target_: package.module.function`")
    return node


SUFFIXES = (
    *(f".{form}{compression}" for form in ("json", "jsonl", "csv", "tsv") for compression in ("", ".gz", ".zst")),
    *(".parquet", ".arrow"),
)
"""Names of the files that are read of a corpus; with a ``reader`` all are."""
FORMATS = tuple(suffix for suffix in SUFFIXES if suffix.count(".") == 1)

COLUMNS = (
    *("input", "target", "instruction", "output", "conversations", "messages", "system", "title", "content", "text"),
    *("history", "tools", "functions", "context", "prompt", "completion", "response", "query", "question", "answer"),
)
"""Fields of a record that a corpus may have under other names."""


def is_plain_key(key: str) -> bool:
    """Whether a decoder can be told of this key of an object."""
    return '"' not in key and "\\" not in key and all(character >= " " for character in key)


def _check_columns(columns: dict[str, str]) -> dict[str, str]:
    for name in columns:
        if name not in COLUMNS:
            raise ValueError(f"{name} is no field of a record{did_you_mean(name, COLUMNS)}; use {', '.join(COLUMNS)}")
    for key in filterfalse(is_plain_key, columns.values()):
        raise ValueError(f"{key!r}: the key of a field has no quote, backslash or control character")
    twice = sorted({key for key in columns.values() if list(columns.values()).count(key) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)}: one key of the corpus for two fields")
    return columns


TEMPLATES = ("plain", "alpaca", "chatml", "tokenizer")
Target = Annotated[dict[str, Any], AfterValidator(_check_target)]


class SeedSettings(Settings):
    """Randomness"""

    seed: int = Field(42, ge=0, lt=2**31, description="Seed of model initialisation, row order and sampling.")


class CorpusSettings(Settings):
    """Corpus: what is read, and which records are accepted"""

    instruction_tuning_data_dir: str | None = Field(
        "./dataset/instruction_tuning",
        description="Directory of instruction records ({input, target}, {instruction, input, output}, chats), or an "
        "address such as s3://bucket/folder; every .json, .jsonl, .csv, .tsv, .parquet and .arrow below it is read, "
        "text also as .gz and .zst.",
    )
    pretraining_data_dir: str | None = Field(
        "./dataset/pretraining",
        description="Directory of pretraining records ({title, content}, {text}), read the same way.",
    )
    reader: Target | None = Field(
        None,
        description="A `_target_` node: your function or data set of the records of one file, called with its path (as "
        "`file_path` if it has that parameter), `tokenizer` if it has that one, and the fields of the node.",
    )
    columns: Annotated[dict[str, str], AfterValidator(_check_columns)] | None = Field(
        None,
        description="Names that fields have in this corpus, field -> its key there, such as "
        "{instruction: q, output: a}; docs/records.md lists the fields.",
    )
    strict_fields: bool = Field(
        False,
        description="Reject records with a field that nothing is made of (unsupported_field); otherwise such fields "
        "are counted in the data report (unread_fields).",
    )
    max_rejected_fraction: float = Field(
        0.1, ge=0, le=1, description="Stop when a larger fraction of the records is rejected as unusable."
    )
    deduplicate: Literal["exact", "near", "none"] = Field(
        "exact", description="Drop repeated records: same content (exact), MinHash neighbours too (near), or none."
    )
    near_duplicate_threshold: float = Field(
        0.8,
        gt=0,
        le=1,
        description="Jaccard similarity from which two records are near duplicates (`deduplicate=near`).",
    )
    validation_fraction: float = Field(
        0.02, ge=0, lt=1, description="Fraction of records held out for evaluation, chosen by content hash."
    )
    tombstones: str | None = Field(
        "./tombstones.jsonl",
        description="File of the content hashes of records that `panda takedown` took down: they are dropped.",
    )
    quarantine: str | None = Field(
        "./quarantine.jsonl",
        description="File of the content hashes of records that training has named because of a spike (`on_spike`), in "
        "the form of tombstones: they are dropped. Delete a line to take its record back.",
    )
    replay_share: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the records that the champion was trained on that is trained on again when training goes "
        "on from it (`init_from=champion`), chosen by content hash; new records all are.",
    )
    replay_of: str | None = Field(
        None,
        description="Directory of the plan that `replay_share` takes for what was trained on before; "
        "None = that of the champion.",
    )
    prepare_workers: int = Field(
        0, ge=0, description="Processes that read and tokenize; 0 = one per core. Changes no byte of the output."
    )


class TokenizeSettings(Settings):
    """Tokens: how a record becomes ids and targets"""

    template: Annotated[str | dict[str, Any], name_or_target(*TEMPLATES)] = Field(
        "plain",
        description="Prompt template: plain, alpaca, chatml, tokenizer (the tokenizer's own chat template), "
        "or a `_target_` node of your function record -> segments.",
    )
    train_on: Literal["all", "last"] = Field(
        "all",
        description="Answers of a conversation that are targets: all (but those of weight 0), or the last of these.",
    )
    reasoning: Literal["train", "mask", "drop"] = Field(
        "train",
        description="Thoughts before an answer (reasoning_content, <think>): targets as the answer is, context only "
        "(mask), or left out (drop).",
    )
    tokenizer_engine: Literal["auto", "reference"] = Field(
        "auto",
        description="auto = the fast engine wherever it gives the ids of `tokenizers`, proven on every shard; "
        "reference = `tokenizers` only.",
    )


class PackSettings(SeedSettings):
    """Packing: how examples fill the rows"""

    max_seq_length: int = Field(2048, ge=8, description="Tokens in a training row.")
    packing: bool = Field(True, description="Put several examples into one row, isolated from each other.")
    overflow: Overflow = Field(
        "drop",
        description="An instruction example longer than a row is dropped, cut (truncate_prompt_left, truncate_target), "
        "split into parts, or an error. Pretraining documents are always split, losing no token.",
    )
    mixture: dict[str, Annotated[float, Field(ge=0)]] | None = Field(
        None,
        description="Weight of each source as epochs over it, e.g. {instruction: 2, pretraining: 0.5}; "
        "sources are `instruction`, `pretraining` and their sub-directories (`instruction/medical`). None = 1 each.",
    )
    mixture_by: Literal["epochs", "share"] = Field(
        "epochs",
        description="What `mixture` states: epochs over each source, or the share of the tokens that each of them gets "
        "(every source is named; as many tokens as there are without repeating one).",
    )
