"""What data preparation will do and why: per stage reused or to do; exact rows when the tokens exist, else estimates.

In: settings, the configuration of the last run. Out: `DataEstimate`. Nothing is tokenized; a pack plan is made when
only it is missing, since it is an index and costs seconds. Cost: the hashing of the corpus (5 GB/s a core).
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from configs.settings import PandaSettings
from data_prep import store
from data_prep.errors import NoCorpusError
from data_prep.pipeline import ORDER, run_stages
from data_prep.places.address import absolute
from data_prep.plan.build import PlanResult, plan_fingerprint, plan_rows
from data_prep.plan.ledger import LEDGER_FILE
from data_prep.plan.report import DataReport
from data_prep.records.build_unit import RECORDS_FILE
from data_prep.records.files import UnitSpec, find_files, plan_units
from data_prep.records.shard import RecordsResult, RecordsUnit, read_arrow, shard_records
from data_prep.records.source import TABLES
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
from data_prep.tokenizer import LoadedTokenizer, load_tokenizer, trained_fingerprint, vocab_size_of
from data_prep.tokens.encoder import Engine, load_engine
from data_prep.tokens.examples import tokenize_columns
from data_prep.tokens.layouts import Template
from data_prep.tokens.templates import load_template
from data_prep.tokens.tokenize import TokensResult, tokenize_records, unit_fingerprint

BYTES_PER_TOKEN = 3.5
"""Of JSON text, where no tokenizer is at hand to count."""
TEXT_BYTES_PER_TOKEN = 3.0
"""Of the text alone."""
USUAL_UTILISATION = 0.98
SAMPLE_UNITS = 8  # of a source
SAMPLE_SLICES = 4  # of a unit
SAMPLE_RECORDS = 64  # in a slice
SAMPLE_FILES = 16
SAMPLE_BYTES = 64 << 10
COMPRESSION = 4.0
MAX_NAMES = 3
STRING = re.compile(r'"(?:[^"\\]|\\.)*"(?!\s*:)')
TOKEN_SETTINGS = ("template", "train_on", "reasoning", "model", "ckpt_path", "architecture", "reader")
PLAN_SETTINGS = (*PackSettings.model_fields, "deduplicate", "near_duplicate_threshold", "validation_fraction")


@dataclass(frozen=True)
class Stage:
    """One line of the estimate; `done` of `total` units are there."""

    name: str
    done: int
    total: int
    why: str

    @property
    def reused(self) -> bool:
        return self.done == self.total


@dataclass
class DataEstimate:
    """Counts of the training rows; exact when they come from a plan."""

    stages: list[Stage] = field(default_factory=list)
    exact: bool = False
    corpus_bytes: int = 0
    tokens: int = 0
    target_tokens: int | None = None
    rows: int = 0
    utilisation: float = USUAL_UTILISATION
    plan_dir: Path | None = None
    report: DataReport | None = None


def estimate_data(settings: PandaSettings, tokenizer_dir: Path | None, last: dict[str, Any]) -> DataEstimate:
    """Look at every stage in turn; the first one with something to do makes the rest an estimate.

    Without a corpus there are no rows: what a model needs can be asked before there is data.

    :param tokenizer_dir: of the base model; None = one is trained on the corpus, or the base model is not here yet.
    :param last: the configuration of the last run.
    """
    look = Look(settings, tokenizer_dir, last)
    try:
        run_stages(look)
    except NoCorpusError:
        return DataEstimate(stages=[Stage("records", 0, 1, "no corpus yet")])
    except _ToDo:
        _estimate_rows(look.found, settings)
    return look.found


class _ToDo(Exception):
    """A stage has something to do; those after it wait for it."""


@dataclass
class Look:
    """The stages of `data_prep.pipeline`: what each of them would find, and why; a plan is made."""

    settings: PandaSettings
    tokenizer_dir: Path | None
    last: dict[str, Any]
    found: DataEstimate = field(default_factory=DataEstimate)

    @property
    def cache(self) -> Path:
        return Path(self.settings.cache_dir)

    def records(self) -> RecordsResult:
        corpus, found = CorpusSettings.of(self.settings), self.found
        num_workers = self.settings.prepare_workers or 1
        files = find_files(corpus, self.cache)
        if unread := [file for file in files if file.remote and not file.remote.known()]:
            found.corpus_bytes = sum(file.size for file in files)
            found.stages.append(Stage("records", 0, len(files), f"{len(unread)} files have not been fetched yet"))
            found.tokens = round(found.corpus_bytes / TEXT_BYTES_PER_TOKEN)
            raise _ToDo
        specs = list(plan_units(files, corpus, num_workers, self.tokenizer_dir, self.cache))
        found.corpus_bytes = sum(spec.size for spec in specs)
        missing = [spec for spec in specs if store.find(self.cache / "records" / spec.fingerprint) is None]
        why = _why_records(missing, specs, self.last)
        found.stages.append(Stage("records", len(specs) - len(missing), len(specs), why))
        if missing:
            found.tokens = round(_text_bytes(specs) * _tokens_per_byte(specs, self.tokenizer_dir, self.cache))
            raise _ToDo
        return shard_records(corpus, self.cache, tokenizer_dir=self.tokenizer_dir)

    def tokenizer(self, records: RecordsResult) -> Path:
        known = self.tokenizer_dir or _trained_tokenizer(self.settings, records)
        if known is None:
            self.found.stages.append(Stage("tokens", 0, len(records.units), "the tokenizer is not there yet"))
            self.found.tokens = round(records_bytes(records) / TEXT_BYTES_PER_TOKEN)
            raise _ToDo
        return known

    def tokens(self, records: RecordsResult, tokenizer_dir: Path) -> TokensResult:
        tokenizer = load_tokenizer(tokenizer_dir, self.cache)
        template = load_template(self.settings.template, tokenizer, self.settings.train_on, self.settings.reasoning)
        fingerprints = [unit_fingerprint(unit, tokenizer, template) for unit in records.units]
        done = sum(store.find(self.cache / "tokens" / one) is not None for one in fingerprints)
        to_do = done < len(fingerprints)
        why = self._why_changed(TOKEN_SETTINGS, "records without tokens yet") if to_do else ""
        self.found.stages.append(Stage("tokens", done, len(fingerprints), why))
        if to_do:
            self.found.tokens, self.found.target_tokens = _sampled(records, tokenizer, template)
            raise _ToDo
        return tokenize_records(records, TokenizeSettings.of(self.settings), tokenizer_dir, self.cache)

    def plan(self, tokens: TokensResult) -> PlanResult:
        corpus, pack, found = CorpusSettings.of(self.settings), PackSettings.of(self.settings), self.found
        there = store.find(self.cache / "plans" / plan_fingerprint(tokens, corpus, pack)) is not None
        why = "" if there else self._why_changed(PLAN_SETTINGS, "new tokens") + "; made just now"
        planned = plan_rows(tokens, corpus, pack, self.cache)
        found.stages.append(Stage("plan", int(there), 1, why))
        found.exact, found.plan_dir, found.report = True, Path(planned.path), planned.report
        found.rows, found.tokens = planned.report["rows"], planned.report["tokens"]
        found.target_tokens, found.utilisation = planned.report["target_tokens"], planned.report["utilisation"]
        return planned

    def _why_changed(self, names: tuple[str, ...], otherwise: str) -> str:
        """The settings that differ from the last run's, as ``template: plain -> alpaca``."""
        now, last = self.settings.model_dump(mode="json"), self.last
        changed = [f"{name}: {last[name]} -> {now[name]}" for name in names if name in last and last[name] != now[name]]
        return ", ".join(changed) or otherwise


def _estimate_rows(estimate: DataEstimate, settings: PandaSettings) -> None:
    """Rows that the estimated tokens fill, and the stages that come later."""
    kept = 1 - settings.validation_fraction
    later = ORDER[len(estimate.stages) :]
    estimate.stages += [Stage(name, 0, 1, "comes after the stage before it") for name in later]
    estimate.tokens = round(estimate.tokens * kept)
    estimate.target_tokens = None if estimate.target_tokens is None else round(estimate.target_tokens * kept)
    estimate.rows = math.ceil(estimate.tokens / (settings.max_seq_length * USUAL_UTILISATION))


def _sampled(records: RecordsResult, tokenizer: LoadedTokenizer, template: Template) -> tuple[int, int]:
    """(tokens, target tokens) of all records, from samples of every source that are tokenized as they would be."""
    engine = load_engine(tokenizer.core, "reference")
    tokens = targets = 0.0
    for source in sorted({unit.source for unit in records.units}):
        units = [unit for unit in records.units if unit.source == source and unit.valid]
        for group in (units[start :: len(units[:SAMPLE_UNITS])] for start in range(len(units[:SAMPLE_UNITS]))):
            sample = _sample(group[0], tokenizer, template, engine)
            scale = sum(unit.valid for unit in group) / sample[2]
            tokens, targets = tokens + scale * sample[0], targets + scale * sample[1]
    return round(tokens), round(targets)


def _sample(unit: RecordsUnit, tokenizer: LoadedTokenizer, template: Template, engine: Engine) -> tuple[int, int, int]:
    """(tokens, target tokens, records) of a few slices of a unit."""
    table = read_arrow(Path(unit.path) / RECORDS_FILE).select(["roles", "texts"]).combine_chunks()
    roles, texts = table["roles"].chunk(0), table["texts"].chunk(0)
    num_tokens = num_targets = num_records = 0
    for start in range(0, unit.valid, max(SAMPLE_RECORDS, unit.valid // SAMPLE_SLICES)):
        part = slice(start, start + SAMPLE_RECORDS)
        made = tokenize_columns(_copied(roles[part]), _copied(texts[part]), tokenizer, template, engine)
        num_tokens += len(made.shard.ids)
        num_targets += int(made.shard.spans[1::2].sum())
        num_records += made.shard.num_examples
    return num_tokens, num_targets, num_records


def _copied(part: pa.ListArray) -> pa.ListArray:
    """A slice as an array of its own: the tokenizer reads whole buffers."""
    return pa.concat_arrays([part, part[:0]])


def records_bytes(records: RecordsResult) -> int:
    """Bytes of text in the valid records."""
    return sum(unit.text_bytes for unit in records.units)


def _text_bytes(specs: list[UnitSpec]) -> float:
    """Bytes after decompression, roughly."""
    return sum(spec.size * (COMPRESSION if _compressed(spec) else 1) for spec in specs)


def _compressed(spec: UnitSpec) -> bool:
    return spec.pieces[0].path.endswith((".gz", ".zst"))


def _is_json_here(spec: UnitSpec) -> bool:
    return spec.pieces[0].remote is None and spec.pieces[0].form not in TABLES.values()


def _tokens_per_byte(specs: list[UnitSpec], tokenizer_dir: Path | None, cache: Path) -> float:
    """Tokens of the strings in a sample of the files, divided by the bytes of the sample."""
    plain = [spec for spec in specs if not _compressed(spec) and _is_json_here(spec)]
    if tokenizer_dir is None or not plain:
        return 1 / BYTES_PER_TOKEN
    core = load_tokenizer(tokenizer_dir, cache).core
    num_tokens = num_bytes = 0
    for spec in plain[:: max(1, len(plain) // SAMPLE_FILES)]:
        with open(spec.pieces[0].path, "rb") as stream:
            sample = stream.read(SAMPLE_BYTES)
        num_bytes += len(sample)
        texts = list(_strings(sample.decode("utf-8", errors="ignore")))
        num_tokens += sum(len(encoding.ids) for encoding in core.encode_batch(texts))
    return num_tokens / num_bytes if num_tokens else 1 / BYTES_PER_TOKEN


def _strings(sample: str) -> Iterator[str]:
    """The values among the strings of a piece of JSON."""
    for match in STRING.finditer(sample):
        try:
            yield json.loads(match.group(), strict=False)
        except ValueError:
            continue


def _trained_tokenizer(settings: PandaSettings, records: RecordsResult) -> Path | None:
    """The tokenizer of a model from scratch, if it was trained before."""
    wanted = trained_fingerprint(records, vocab_size_of(settings.architecture))
    found = store.find(Path(settings.cache_dir) / "tokenizers" / wanted)
    return found.path if found else None


def _why_records(missing: list[UnitSpec], specs: list[UnitSpec], last: dict[str, Any]) -> str:
    """Which files are new, and which changed since the last run."""
    if not missing:
        return ""
    names = sorted({piece.path for spec in missing for piece in spec.pieces})
    known = _files_of(last)
    if not known:
        return f"{_files(len(names))} never prepared" if len(missing) < len(specs) else "nothing is prepared yet"
    new = [name for name in names if absolute(name) not in known]
    changed = [name for name in names if name not in new]
    parts = [
        f"{_files(len(group), word)} ({_some(group)})" for group, word in ((new, "new"), (changed, "changed")) if group
    ]
    return ", ".join(parts)


def _files_of(last: dict[str, Any]) -> set[str]:
    """The input files of the last run, from the ledger of its plan."""
    ledger = Path(str((last.get("paths") or {}).get("plan_dir"))) / LEDGER_FILE
    if not ledger.is_file():
        return set()
    with pa.memory_map(str(ledger)) as source:
        files = pa.ipc.open_file(source).read_all()["file"].unique()
    return {str(Path(name).absolute()) for name in files.to_pylist()}


def _files(count: int, word: str = "") -> str:
    return " ".join(part for part in (str(count), word, "file" if count == 1 else "files") if part)


def _some(names: list[str]) -> str:
    shown = ", ".join(Path(name).name for name in names[:MAX_NAMES])
    return shown + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")
