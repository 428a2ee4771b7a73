"""`panda models`, `promote`, `rollback`: which versions there are, how they did at the gate, which one is in use.

In: flags. Out: a table, or one JSON object with ``--json``. Cost: a few requests to MLflow.

`panda lineage`, `takedown`, `why --models`: what a version was made of, and where a record has gone.

In: a version, or a record as FILE:LINE or by its text. Out: tables, or one JSON object with ``--json``. A takedown
writes tombstones, which the next preparation obeys, and tags every version that saw a record; the texts themselves stay
in the corpus file and in the cache until they are deleted there. Cost: a pass over the ledger of each plan.

What the verbs about registered models share: their flags, and which registry and cache they mean.

In: argv of a verb. Out: `Verb` (positional words, switches, settings, registry). The flags are the settings themselves,
so a run and the verbs about it find the same MLflow and the same cache. Cost: MLflow's import, 2 to 4 s.
"""

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from configs.cli import CONF_PATH, JSON, VERBOSE, Switch, configure
from configs.settings import PandaSettings
from data_prep.errors import PandaError
from data_prep.plan import tombstones
from flows.cli.console import plain_table, stdout_console
from flows.cli.run import print_json
from training.registry import promotion
from training.registry.lineage import Found, Seen, describe, find_record, find_text, versions_trained_on
from training.registry.versions import Registry, RegistryError, Version
from training.settings import TrackingSettings
from training.tracking.database import is_missing
from training.tracking.redact import redact_text
from training.tracking.run import tracking_uri
from training.tracking.sync import connect
from training.tracking.tags import (
    CORPUS_TAG,
    EVAL_LOSS_TAG,
    GAIN_TAG,
    GATE_TAG,
    PARENT_TAG,
    PLAN_TAG,
    REASONS_TAG,
    TAKEDOWN_TAG,
)

REASON_CHARS = 160
FIELDS = {"output_dir", "cache_dir", "mlflow_tracking_uri"}


@dataclass(frozen=True)
class Verb:
    """A parsed command line of a verb about registered models."""

    words: list[str]
    switches: argparse.Namespace
    settings: PandaSettings
    registry: Registry

    @property
    def cache_dir(self) -> Path:
        return Path(self.settings.cache_dir)


def parse_verb(
    usage: str, text: str, argv: list[str], switches: tuple[Switch, ...] = (), fields: frozenset[str] = frozenset()
) -> Verb:
    """Read argv: the words in front, then flags. `usage` is such as ``panda promote VERSION``.

    :raises PandaError: another number of words than `usage` has; a word in brackets may be missing.
    """
    words = _words(argv)
    wanted = usage.split()[2:]
    if "-h" not in argv and "--help" not in argv:
        least = len([word for word in wanted if not word.startswith("[")])
        if not least <= len(words) <= len(wanted):
            raise PandaError(f"usage: {usage} [--flag value ...]")
    line, loaded = configure(usage, text, argv[len(words) :], [*switches, CONF_PATH, JSON, VERBOSE], FIELDS | fields)
    uri = tracking_uri(TrackingSettings.of(loaded.settings), Path(loaded.settings.output_dir))
    _check_there(uri)
    return Verb(words, line.switches, loaded.settings, Registry(uri))


def _check_there(uri: str) -> None:
    """MLflow would create a missing database, and answers for a missing server with a traceback."""
    other = "name another with --output_dir or --mlflow_tracking_uri"
    if is_missing(uri):
        raise RegistryError(f"there is no registry at {uri} yet: a run makes it; {other}")
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        connect(uri).search_registered_models(max_results=1)
    except (MlflowException, SQLAlchemyError) as error:
        reason = str(error).splitlines()[0][:REASON_CHARS]
        raise RegistryError(redact_text(f"MLflow at {uri} does not answer ({reason}); start it, or {other}")) from error


def _words(argv: list[str]) -> list[str]:
    """What stands before the first flag."""
    first_flag = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    return argv[:first_flag]


DESPITE_GATE = Switch("despite_gate", "Promote although the version has not passed the gate.")


def models(argv: list[str]) -> int:
    """All versions, or those of one model."""
    verb = parse_verb("panda models [NAME]", "Show registered versions: gate, aliases, what they were made of.", argv)
    versions = verb.registry.versions(*verb.words)
    if verb.switches.json:
        print_json({"registry": verb.registry.shown_uri, "versions": [as_dict(version) for version in versions]})
        return 0
    stdout_console().print(_table(versions) if versions else f"no registered version in {verb.registry.shown_uri}")
    return 0


def promote(argv: list[str]) -> int:
    """Make a version the champion."""
    text = "Make a version the champion of its model. Versions are written models:/NAME/7 or models:/NAME@challenger."
    verb = parse_verb("panda promote VERSION", text, argv, (DESPITE_GATE,))
    version, before = promotion.promote(verb.registry, verb.words[0], verb.switches.despite_gate)
    _say(verb, version, before)
    return 0


def rollback(argv: list[str]) -> int:
    """Back to the champion before."""
    verb = parse_verb("panda rollback NAME", "Give the champion alias back to the version that had it before.", argv)
    version, before = promotion.rollback(verb.registry, verb.words[0])
    _say(verb, version, before)
    return 0


def _say(verb: Verb, version: Version, before: Version | None) -> None:
    if verb.switches.json:
        print_json({"champion": version.uri, "before": before.uri if before else None})
    else:
        print(f"{version.uri} is the champion" + (f"; it was {before.uri}" if before else ""))


def as_dict(version: Version) -> dict[str, Any]:
    """A version for ``--json``."""
    return {
        "version": version.uri,
        "aliases": version.aliases,
        "created": _time(version),
        "gate": version.tags.get(GATE_TAG),
        "gain": version.tags.get(GAIN_TAG),
        "reasons": version.tags.get(REASONS_TAG),
        "eval_loss": version.tags.get(EVAL_LOSS_TAG + "all"),
        "benchmarks": version.benchmarks,
        "corpus": version.tags.get(CORPUS_TAG),
        "plan": version.tags.get(PLAN_TAG),
        "parent": version.tags.get(PARENT_TAG),
        "taken_down": version.taken_down,
        "run_id": version.run_id,
    }


def _time(version: Version) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(version.created_ms / 1000))


def _table(versions: list[Version]) -> Table:
    """Fits into 80 columns; ``--json`` and `panda lineage` tell more."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("version", "alias", "created", "loss", "gate", "gain", "from", "taken down"):
        table.add_column(heading, no_wrap=heading in ("created", "loss", "gate", "gain"), overflow="fold")
    for row in map(as_dict, versions):
        table.add_row(
            row["version"].removeprefix("models:/"),
            ", ".join(row["aliases"]),
            row["created"][5:10],
            f"{float(row['eval_loss']):.4f}" if row["eval_loss"] else "",
            row["gate"] or "",
            (row["gain"] or "").partition(" ")[0],
            (row["parent"] or "").removeprefix(row["version"].rpartition("/")[0] + "/"),
            str(len(row["taken_down"]) or ""),
        )
    return table


TEXT = Switch("text", "The records that contain this text.", {"metavar": "TEXT"})
ALL = Switch("all", "Take down every record that contains the text, not only a single one.")
NOTE = Switch("note", "Why, for whoever reads the list of tombstones.", {"metavar": "TEXT", "default": ""})
SHOWN_CHARS = 200
SHOWN_STEPS = 8


def lineage(argv: list[str]) -> int:
    """What a version was made of."""
    text = "Show what a version was made of: corpus files with hashes, plan, parent, code, gate, configuration."
    verb = parse_verb("panda lineage VERSION", text, argv)
    facts = describe(verb.registry, verb.registry.resolve(verb.words[0]), verb.cache_dir)
    if verb.switches.json:
        print_json(facts)
    else:
        _print_facts(stdout_console(), facts)
    return 0


def why_models(argv: list[str]) -> int:
    """Which versions were trained on a record: ``panda why FILE:LINE --models``."""
    text = "Show every version that was trained on a record, and in which steps."
    verb = parse_verb("panda why [FILE:LINE]", text, argv, (TEXT, Switch("models", "Ask the registry.")))
    answers = [(record, _versions(verb, record)) for record in _records(verb)]
    if verb.switches.json:
        print_json({"records": [{**asdict(record), "versions": [asdict(s) for s in seen]} for record, seen in answers]})
        return 0
    for record, seen in answers:
        _print_record(stdout_console(), record, seen)
    return 0


def takedown(argv: list[str]) -> int:
    """Take records down, and tag the versions that saw them."""
    text = "Take a record down: the next preparation drops it and its copies; versions that saw it are tagged."
    verb = parse_verb("panda takedown [FILE:LINE]", text, argv, (TEXT, ALL, NOTE), frozenset({"tombstones"}))
    if verb.settings.tombstones is None:
        raise PandaError("takedown: tombstones=none leaves no place to write to; give --tombstones FILE")
    records = _records(verb)
    if len(records) > 1 and not verb.switches.all:
        texts = "\n".join(f"  {record.hash}  {_short(record.text)}" for record in records)
        raise PandaError(f"takedown: {len(records)} records are meant; to take down all of them: --all\n{texts}")
    path = Path(verb.settings.tombstones)
    new = tombstones.append(path, [_tombstone(record, verb.switches.note) for record in records])
    answers = [(record, _versions(verb, record)) for record in records]
    for record, seen in answers:
        _tag(verb, record, seen)
    _say_taken_down(verb, path, len(new), answers)
    return 0


def _records(verb: Verb) -> list[Found]:
    if bool(verb.words) == bool(verb.switches.text):
        raise PandaError("give FILE:LINE first, or --text TEXT")
    if verb.words:
        return find_record(verb.words[0], verb.registry, verb.cache_dir)
    return find_text(verb.switches.text, verb.cache_dir)


def _versions(verb: Verb, record: Found) -> list[Seen]:
    return versions_trained_on(verb.registry, record.hash, verb.cache_dir)


def _tombstone(record: Found, note: str) -> dict[str, Any]:
    entry = {"hash": record.hash, "record": record.places[0] if record.places else "", "time": _now()}
    return entry | ({"note": note} if note else {})


def _tag(verb: Verb, record: Found, seen: list[Seen]) -> None:
    """Versions that were trained on the record, and those nobody can tell it of."""
    for one in seen:
        if one.trained or not one.certain:
            verb.registry.tag(verb.registry.resolve(one.uri), {TAKEDOWN_TAG + record.hash: f"{_now()} {how(one)}"})


def _say_taken_down(verb: Verb, path: Path, num_new: int, answers: list[tuple[Found, list[Seen]]]) -> None:
    tagged = sorted({one.uri for _, seen in answers for one in seen if one.trained or not one.certain})
    if verb.switches.json:
        records = [{"hash": record.hash, "places": record.places} for record, _ in answers]
        print_json({"tombstones": str(path), "new": num_new, "records": records, "versions": tagged})
        return
    for record, seen in answers:
        _print_record(stdout_console(), record, seen)
    print(f"{num_new} new in {path}; the next preparation drops what is listed there. Versions tagged: {len(tagged)}")
    print("The text itself is still in the corpus and in the cache; delete it there as well if nobody may read it.")


def how(seen: Seen) -> str:
    """What a version has to do with a record, in words."""
    if seen.through:
        return f"through its parent {seen.through}"
    if seen.trained:
        more = f" and {len(seen.steps) - SHOWN_STEPS} more" if len(seen.steps) > SHOWN_STEPS else ""
        return f"in steps {', '.join(map(str, seen.steps[:SHOWN_STEPS]))}{more}"
    return "not trained on it" if seen.certain else f"cannot tell: {seen.note}"


def _print_record(console: Console, record: Found, seen: list[Seen]) -> None:
    console.print(f"{record.hash}  {', '.join(record.places)}", style="bold", markup=False)
    console.print(f"  {_short(record.text)}", markup=False)
    table = plain_table(3, indent=2)
    for one in seen:
        table.add_row(one.uri, ", ".join(one.aliases), how(one))
    console.print(table if seen else "  no version is registered")


def _print_facts(console: Console, facts: dict[str, Any]) -> None:
    table = plain_table(2)
    table.add_row("version", f"{facts['version']} {', '.join(facts['aliases'])}")
    table.add_row("made from", " <- ".join(facts["ancestors"]) or str(facts["base"] or "random weights"))
    table.add_row("run", f"{facts['run_id']} in {facts['run_dir']}")
    table.add_row("code", f"{facts['code']['commit']}{', changed since' if facts['code']['changed'] == 'true' else ''}")
    table.add_row("gate", f"{facts['gate']['result']}: {facts['gate']['reasons']}")
    table.add_row("plan", f"{facts['plan']['fingerprint']} in {facts['plan']['path'] or 'no directory here any more'}")
    table.add_row("corpus", facts["corpus"]["fingerprint"])
    for file in facts["corpus"]["files"]:
        table.add_row("", f"{file['file']}  {file['bytes']:,} bytes  xxh3 {file['xxh3']}  {file['now']}")
    for content in facts["taken_down"]:
        table.add_row("taken down", content)
    console.print(table)


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= SHOWN_CHARS else flat[:SHOWN_CHARS] + "…"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S")
