"""`panda lineage`, `takedown`, `why --models`: what a version was made of, and where a record has gone.

In: a version, or a record as FILE:LINE or by its text. Out: tables, or one JSON object with ``--json``. A takedown
writes tombstones, which the next preparation obeys, and tags every version that saw a record; the texts themselves stay
in the corpus file and in the cache until they are deleted there. Cost: a pass over the ledger of each plan.
"""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from configs.flags import Switch
from data_prep import tombstones
from data_prep.errors import PandaError
from flows.json_line import print_json
from flows.registry_cli import Verb, parse_verb
from training.lineage import Found, Seen, describe, find_record, find_text, versions_trained_on
from training.versions import TAKEDOWN_TAG

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
        _print_facts(Console(highlight=False), facts)
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
        _print_record(Console(highlight=False), record, seen)
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
        _print_record(Console(highlight=False), record, seen)
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
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 2))
    for one in seen:
        table.add_row(one.uri, ", ".join(one.aliases), how(one))
    console.print(table if seen else "  no version is registered")


def _print_facts(console: Console, facts: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
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
