"""`panda prepare`, `inspect`, `why`, `verify`: data preparation without training, and looking at what it made.

In: the flags of data preparation. Out: the report, coloured examples, stories, or what is damaged; with ``--json`` one
JSON object as the last line of stdout. `inspect` and `why` prepare first, which costs seconds when nothing is new, so
they always speak about the data and the settings at hand. No torch, no Prefect, no MLflow is imported.
"""

import dataclasses
import json
import logging
import time
from pathlib import Path
from typing import Any

from configs.cli import CONF_PATH, JSON, PRINT_CONFIG, VERBOSE, Switch, configure
from configs.settings import PandaSettings
from data_prep import in_use
from data_prep.errors import PandaError
from data_prep.pipeline import Preparation, run_stages
from data_prep.plan.build import PlanResult
from data_prep.plan.report import DataReport
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
from data_prep.store import verify_cache, write_atomically
from data_prep.tokenizer import LoadedTokenizer, load_tokenizer
from flows.cli.console import plain_table, stdout_console
from flows.cli.run import print_json
from training.models.hub import base_checkpoint, description, resolve_checkpoint

logger = logging.getLogger(__name__)

_SWITCHES = [CONF_PATH, PRINT_CONFIG, JSON, VERBOSE]
_HTML = Switch("html", "Write the page to this file too.", {"metavar": "FILE"})
_MARKDOWN = Switch("markdown", "Write Markdown to this file too.", {"metavar": "FILE"})
_EXAMPLES = Switch("examples", "Examples shown of each source (3).", {"metavar": "N", "type": int, "default": 3})
_TEXT = Switch("text", "Find the records that contain this text.", {"metavar": "TEXT"})
_WORLD = Switch("world_size", "Ranks of the run, to tell steps (1).", {"metavar": "N", "type": int, "default": 1})
_MODELS = Switch("models", "Tell which registered versions were trained on it instead, and in which steps.")
_DISCARD = Switch("discard", "Remove damaged directories; the next preparation builds just these again.")
_FIELDS = {*CorpusSettings.model_fields, *TokenizeSettings.model_fields, *PackSettings.model_fields,
           "model", "ckpt_path", "delta_base", "cache_dir", "output_dir"}  # fmt: skip
_BATCH_FIELDS = {"per_gpu_train_batch_size", "gradient_accumulation_steps", "num_train_epochs"}


def prepare(argv: list[str]) -> int:
    """Read, tokenize and plan; print the report."""
    text = "Prepare the data: JSON in, ledger, tokens and pack plan out."
    line, loaded = configure("panda prepare", text, argv, _SWITCHES, _FIELDS)
    if line.switches.print_config:
        return _print_config(loaded)
    result = _prepare(loaded.settings)[0]
    if loaded.origins["output_dir"] != "default":
        directory = Path(loaded.settings.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / "prepare.json", json.dumps(result.report, indent=1, ensure_ascii=False))
    if line.switches.json:
        print_json(result.report)
    else:
        _print_report(result.report)
    return 0


def inspect(argv: list[str]) -> int:
    """Coloured examples, lengths, packing."""
    from data_prep.inspection.inspect import inspect_plan, inspection_html, inspection_markdown, print_inspection

    switches = [*_SWITCHES, _EXAMPLES, _HTML, _MARKDOWN]
    text = "Show prepared examples with their mask, lengths and packing."
    line, loaded = configure("panda inspect", text, argv, switches, _FIELDS)
    result, tokenizer = _prepare(loaded.settings)
    inspection = inspect_plan(Path(result.path), tokenizer, line.switches.examples)
    for path, render in ((line.switches.html, inspection_html), (line.switches.markdown, inspection_markdown)):
        if path:
            Path(path).write_text(render(inspection), encoding="utf-8")
    if line.switches.json:
        print_json(dataclasses.asdict(inspection))
    else:
        print_inspection(inspection, stdout_console(highlight=True))
    return 0


def why(argv: list[str]) -> int:
    """The story of a record."""
    from data_prep.inspection.record_story import StepOrder, stories_at, stories_with, story_text

    if "--models" in argv:
        from flows.cli.registry import why_models

        return why_models(argv)
    places = [text for text in argv[:1] if not text.startswith("-")]
    text, switches = "Tell the story of a record: panda why FILE:LINE, or --text TEXT.", [_TEXT, _WORLD, _MODELS]
    line, loaded = configure("panda why", text, argv[len(places) :], [*_SWITCHES, *switches], _FIELDS | _BATCH_FIELDS)
    settings = loaded.settings
    if not places and not line.switches.text:
        raise PandaError("why: give FILE:LINE first, or --text TEXT")
    result, tokenizer = _prepare(settings)
    rows_per_step = settings.rows_per_step(line.switches.world_size)
    order = StepOrder(rows_per_step, settings.seed, max(1, int(settings.num_train_epochs)))
    if places:
        stories = stories_at(Path(result.path), places[0], tokenizer, order)
    else:
        stories = stories_with(Path(result.path), line.switches.text, tokenizer, order)
    if line.switches.json:
        print_json({"stories": [dataclasses.asdict(story) for story in stories]})
    else:
        stdout_console(highlight=True).print(*map(story_text, stories), sep="\n\n")
    return 0


def verify(argv: list[str]) -> int:
    """Hash everything in the cache; exit code 3 when something is damaged."""
    text, switches = "Read all prepared data again and compare hashes.", [CONF_PATH, JSON, VERBOSE, _DISCARD]
    line, loaded = configure("panda verify", text, argv, switches, {"cache_dir"})
    verified = verify_cache(Path(loaded.settings.cache_dir), line.switches.discard)
    if line.switches.json:
        print_json(dataclasses.asdict(verified))
    else:
        for path, names in verified.damaged.items():
            print(f"damaged: {path}: {', '.join(names)}{' (removed)' if verified.discarded else ''}")
        print(f"{verified.directories} directories, {verified.size_bytes:,} bytes, {len(verified.damaged)} damaged")
        if verified.damaged and not verified.discarded:
            print("panda verify --discard removes what is damaged; the next preparation builds it again")
    return 3 if verified.damaged else 0


def _prepare(settings: PandaSettings) -> tuple[PlanResult, LoadedTokenizer]:
    checkpoint = base_checkpoint(settings)
    directory = None
    if checkpoint is not None:
        directory = description(settings) or resolve_checkpoint(checkpoint)  # the latter says why there is none
    cache_dir = Path(settings.cache_dir)
    in_use.use_until_exit(cache_dir)
    result = run_stages(Preparation.of(settings, directory, cache_dir, _Progress()))
    return result, load_tokenizer(Path(result.tokenizer_dir), cache_dir)


class _Progress:
    """A line on stderr now and then, with rate and time left."""

    def __init__(self) -> None:
        self.stage, self.started, self.said, self.first = "", 0.0, 0.0, 0

    def __call__(self, stage: str, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        if stage != self.stage:
            self.stage, self.started, self.said, self.first = stage, now, now, done
        if now - self.said >= 2 and done < total:
            self.said = now
            rate = (done - self.first) / (now - self.started)
            left = f", {(total - done) / rate:.0f} s left" if rate else ""
            logger.info("%s: %s of %s %s (%.0f %%)%s", stage, f"{done:,}", f"{total:,}", unit, 100 * done / total, left)


def _print_report(report: DataReport) -> None:
    console = stdout_console()
    table = plain_table(2)
    for name, value in report.items():
        if isinstance(value, dict) and value and not any(isinstance(inner, dict) for inner in value.values()):
            for inner, number in value.items():
                table.add_row(f"{name}: {inner}", _number(number))
        elif not isinstance(value, dict):
            table.add_row(name, _number(value))
    for source, share in report["sources"].items():
        text = f"{share['records']:,} records x {share['epochs']} epochs, {100 * share['share']:.1f} % of the tokens"
        table.add_row(f"source: {source}", text)
    console.print(table)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _print_config(loaded: Any) -> int:
    from configs.docs import with_origins

    print(with_origins(loaded))
    return 0
