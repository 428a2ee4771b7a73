"""Stage 2: validated records -> token shards, one per unit of records, named by what their ids depend on.

In: `RecordsResult`, a tokenizer directory, a template. Out: ``<cache_dir>/tokens/<fingerprint>/`` with ``tokens.arrow``
(`token_shard`), and `TokensResult`. The fingerprint covers the unit of records, the tokenizer, the template
and the format version; not the engine, because engines give the same ids, and not the number of workers.

Cost: the engine's time plus about 25 %; memory 20 bytes a token of one unit (16 MiB of text). Small corpora are done in
this process, others by one process a core.
"""

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from data_prep import intact, store
from data_prep.errors import StoreError, TokenizerError
from data_prep.processes import FanOut, on_processes, peak_rss_bytes
from data_prep.records.build_unit import RECORDS_FILE
from data_prep.records.shard import Progress, RecordsResult, RecordsUnit, ledger_table, read_arrow
from data_prep.settings import TokenizeSettings
from data_prep.tokenizer import LoadedTokenizer, load_tokenizer
from data_prep.tokens.checks import prove
from data_prep.tokens.encoder import Engine, load_engine
from data_prep.tokens.examples import FailedRecord, tokenize_columns
from data_prep.tokens.layouts import Template
from data_prep.tokens.templates import load_template
from data_prep.tokens.token_shard import TOKENS_FILE, write_shard

STAGE = "tokens"
MIN_BYTES_FOR_PROCESSES = 48 << 20  # below, the fast engine is done before a second process has loaded the tokenizer
MIN_BYTES_FOR_PROCESSES_REFERENCE = 4 << 20
PROGRESS_SECONDS = 0.5

Builder = Callable[[dict[str, RecordsUnit]], Iterator[tuple[str, tuple[store.Built, int]]]]
"""Builds the units that are missing, by fingerprint; yields each, with the peak memory of its process."""


class TokensUnit(BaseModel):
    """The examples of one unit of records on disk."""

    model_config = ConfigDict(frozen=True)
    path: str
    fingerprint: str
    records: RecordsUnit
    examples: int
    tokens: int
    target_tokens: int
    engine: str
    proof: dict[str, Any]
    refused: list[int]  # examples that the template cannot express; they have no token
    why_refused: str  # the first of them
    reused: bool


class TokensResult(BaseModel):
    """What `tokenize_records` returns: the units in corpus order, what they were made with, and sums."""

    model_config = ConfigDict(frozen=True)
    units: list[TokensUnit]
    records: RecordsResult
    tokenizer_dir: str
    tokenizer_fingerprint: str
    template_fingerprint: str
    eos_id: int
    pad_id: int
    examples: int
    tokens: int
    target_tokens: int
    engines: dict[str, int]  # engine -> units whose ids it gave
    reused: int
    built: int
    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class Recipe:
    """What a worker needs to make any unit; small enough to be sent with each."""

    tokenizer_dir: Path
    cache_dir: Path
    template: str  # JSON of the setting, so that a recipe can be a key
    engine: Literal["auto", "reference"]
    train_on: str = "all"
    reasoning: str = "train"


@dataclass(frozen=True)
class Tools:
    """What a recipe becomes, once a process; the engine only when there is something to encode."""

    recipe: Recipe
    tokenizer: LoadedTokenizer
    template: Template

    @cached_property
    def engine(self) -> Engine:
        return load_engine(self.tokenizer.core, self.recipe.engine)


def tokenize_records(  # noqa: PLR0913, PLR0917  # as each stage is called, by name
    records: RecordsResult,
    tokenize: TokenizeSettings,
    tokenizer_dir: Path,
    cache_dir: Path,
    prepare_workers: int = 0,
    progress: Progress | None = None,
    fan_out: FanOut | None = None,
    max_rejected_fraction: float = 0.0,
) -> TokensResult:
    """Tokenize every unit of records that is not there yet.

    :param fan_out: where units are made; None = here, in ``prepare_workers`` processes when that is worth it.
    :param max_rejected_fraction: of all records, those counted that were rejected before.
    :raises TokenizerError: the tokenizer or the template cannot be used, or it refuses too many records.
    :raises StoreError: an example failed the proof.
    """
    started = time.perf_counter()
    template_json = json.dumps(tokenize.template, sort_keys=True)
    asked = tokenize.tokenizer_engine, tokenize.train_on, tokenize.reasoning
    tools = load_tools(Recipe(Path(tokenizer_dir), Path(cache_dir), template_json, *asked))
    tokenizer, template = tools.tokenizer, tools.template
    fps = [unit_fingerprint(unit, tokenizer, template) for unit in records.units]
    num_workers = prepare_workers or len(os.sched_getaffinity(0))
    build = partial(_build, tools=tools, num_workers=num_workers, fan_out=fan_out)
    made, peak_rss = _make(records.units, fps, tools.recipe.cache_dir / STAGE, build, progress)
    units = [_unit(unit, fp, made[fp]) for unit, fp in zip(records.units, fps, strict=True)]
    _check(units)
    _check_refused(units, records, max_rejected_fraction)
    reused = sum(unit.reused for unit in units)
    return TokensResult(
        units=units,
        records=records,
        tokenizer_dir=str(tokenizer_dir),
        tokenizer_fingerprint=tokenizer.fingerprint,
        template_fingerprint=template.fingerprint,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        examples=sum(unit.examples for unit in units),
        tokens=sum(unit.tokens for unit in units),
        target_tokens=sum(unit.target_tokens for unit in units),
        engines=dict(Counter(unit.engine for unit in units)),
        reused=reused,
        built=len(units) - reused,
        seconds=time.perf_counter() - started,
        peak_rss_bytes=peak_rss,
    )


def unit_fingerprint(unit: RecordsUnit, tokenizer: LoadedTokenizer, template: Template) -> str:
    """What the ids of a unit depend on."""
    return store.fingerprint(
        stage=STAGE, records=unit.fingerprint, tokenizer=tokenizer.fingerprint, template=template.fingerprint
    )


def load_tools(recipe: Recipe) -> Tools:
    """Tokenizer and template of a recipe."""
    tokenizer = load_tokenizer(recipe.tokenizer_dir, recipe.cache_dir)
    template = load_template(json.loads(recipe.template), tokenizer, recipe.train_on, recipe.reasoning)
    return Tools(recipe, tokenizer, template)


_load_tools_once = lru_cache(maxsize=1)(load_tools)  # for worker processes


def _build_in_worker(unit: RecordsUnit, fp: str, recipe: Recipe) -> tuple[store.Built, int]:
    os.environ["RAYON_NUM_THREADS"] = "1"  # read when an engine starts its threads: the processes are the parallelism
    if not _gives(fp, unit, _load_tools_once(recipe)):  # the worker of a cluster outlives the files it has read
        _load_tools_once.cache_clear()
        if not _gives(fp, unit, _load_tools_once(recipe)):
            raise TokenizerError(
                f"{recipe.tokenizer_dir} or the template differ on {socket.gethostname()} from what this run "
                "began with: start the workers of the cluster again, with the same files and code"
            )
    return build_unit(unit, fp, _load_tools_once(recipe))


def _gives(fp: str, unit: RecordsUnit, tools: Tools) -> bool:
    """Whether these tools make the ids that this fingerprint stands for."""
    return unit_fingerprint(unit, tools.tokenizer, tools.template) == fp


def build_unit(unit: RecordsUnit, fp: str, tools: Tools) -> tuple[store.Built, int]:
    """Tokenize one unit (in any process); also returns the peak memory of the process in bytes."""
    root = tools.recipe.cache_dir / STAGE
    built = store.build(root, fp, lambda directory: _write_unit(directory, unit, tools))
    return built, peak_rss_bytes()


def _write_unit(directory: Path, unit: RecordsUnit, tools: Tools) -> dict[str, Any]:
    table = read_arrow(Path(unit.path) / RECORDS_FILE).select(["roles", "texts"]).combine_chunks()
    roles, texts = _one_chunk(table["roles"]), _one_chunk(table["texts"])
    try:
        made = tokenize_columns(roles, texts, tools.tokenizer, tools.template, tools.engine)
    except FailedRecord as failed:
        raise TokenizerError(f"{place_of(unit, failed.number)}: {failed.why}") from failed
    proof = prove(made, tools.tokenizer)
    write_shard(directory / TOKENS_FILE, made.shard)
    targets = int(made.lengths[made.runs.targets].sum())
    refused = sorted(made.runs.refused)
    return {
        "records": Path(unit.path).name,
        "examples": made.shard.num_examples,
        "tokens": len(made.shard.ids),
        "target_tokens": targets,
        "engine": made.engine,
        "proof": proof,
        **({"refused": refused, "why_refused": made.runs.refused[refused[0]]} if refused else {}),
    }


def place_of(unit: RecordsUnit, record: int) -> str:
    """``file:line`` of a valid record of a unit, for messages."""
    line = read_arrow(Path(unit.path) / RECORDS_FILE)["line"][record].as_py()
    entry = ledger_table(unit).slice(line, 1).to_pylist()[0]
    return f"{entry['file']}:{entry['line']}"


def _one_chunk(column: pa.ChunkedArray) -> pa.ListArray:
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


def _make(
    units: list[RecordsUnit], fps: list[str], root: Path, build: Builder, progress: Progress | None
) -> tuple[dict[str, store.Built], int]:
    """Find or build every unit; the same content twice is built once."""
    wanted = dict(zip(fps, units, strict=True))
    intact.set_aside_damaged(root.parent, [root / fp for fp in wanted])
    found = {fp: store.find(root / fp) for fp in wanted}
    made = {fp: built for fp, built in found.items() if built}
    missing = {fp: unit for fp, unit in wanted.items() if fp not in made}
    total = sum(unit.text_bytes for unit in wanted.values())
    done = total - sum(unit.text_bytes for unit in missing.values())
    peak_rss = peak_rss_bytes()
    reported = 0.0
    for fp, (built, rss) in build(missing):
        made[fp] = built
        peak_rss = max(peak_rss, rss)
        done += missing[fp].text_bytes
        if progress and (done == total or time.monotonic() - reported > PROGRESS_SECONDS):
            reported = time.monotonic()
            progress(STAGE, done, total, "bytes")
    return made, peak_rss


def _build(
    missing: dict[str, RecordsUnit], tools: Tools, num_workers: int, fan_out: FanOut | None
) -> Iterator[tuple[str, tuple[store.Built, int]]]:
    num_workers = min(num_workers, len(missing))
    enough = MIN_BYTES_FOR_PROCESSES if tools.recipe.engine == "auto" else MIN_BYTES_FOR_PROCESSES_REFERENCE
    small = num_workers < 2 or sum(unit.text_bytes for unit in missing.values()) < enough
    if small and not fan_out:
        for fp, unit in missing.items():
            yield fp, build_unit(unit, fp, tools)
        return
    largest_first = sorted(missing, key=lambda fp: -missing[fp].text_bytes)
    fan_out = fan_out or on_processes(num_workers)
    yield from fan_out(_build_in_worker, {fp: (missing[fp], fp, tools.recipe) for fp in largest_first})


def _unit(unit: RecordsUnit, fp: str, built: store.Built) -> TokensUnit:
    facts = {name: built.manifest[name] for name in ("examples", "tokens", "target_tokens", "engine", "proof")}
    facts |= {"refused": built.manifest.get("refused", []), "why_refused": built.manifest.get("why_refused", "")}
    return TokensUnit(path=str(built.path), fingerprint=fp, records=unit, reused=built.reused, **facts)


def _check_refused(units: list[TokensUnit], records: RecordsResult, max_rejected_fraction: float) -> None:
    """A template that fits few records is a mistake; what it cannot express of a corpus is set aside.

    :raises TokenizerError: more records are rejected than the limit allows.
    """
    num_refused = sum(len(unit.refused) for unit in units)
    if not num_refused:
        return
    rejected = num_refused + records.records - records.valid
    if num_refused == records.valid or rejected > max_rejected_fraction * records.records:
        first = next(unit for unit in units if unit.refused)
        raise TokenizerError(
            f"{place_of(first.records, first.refused[0])}: {first.why_refused}\n"
            f"{rejected} of {records.records} records are rejected, {num_refused} of them by the template; "
            f"max_rejected_fraction={max_rejected_fraction}"
        )


def _check(units: list[TokensUnit]) -> None:
    for unit in units:
        if unit.examples != unit.records.valid:
            raise StoreError(f"{unit.path}: {unit.examples} examples of {unit.records.valid} valid records")
