"""`panda models`, `promote`, `rollback`: which versions there are, how they did at the gate, which one is in use.

In: flags. Out: a table, or one JSON object with ``--json``. Cost: a few requests to MLflow.
"""

import time
from typing import Any

from rich.console import Console
from rich.table import Table

from configs.flags import Switch
from flows.json_line import print_json
from flows.registry_cli import Verb, parse_verb
from training import promotion
from training.versions import GAIN_TAG, GATE_TAG, PARENT_TAG, REASONS_TAG, Version

DESPITE_GATE = Switch("despite_gate", "Promote although the version has not passed the gate.")


def models(argv: list[str]) -> int:
    """All versions, or those of one model."""
    verb = parse_verb("panda models [NAME]", "Show registered versions: gate, aliases, what they were made of.", argv)
    versions = verb.registry.versions(*verb.words)
    if verb.switches.json:
        print_json({"registry": verb.registry.shown_uri, "versions": [as_dict(version) for version in versions]})
        return 0
    Console(highlight=False).print(
        _table(versions) if versions else f"no registered version in {verb.registry.shown_uri}"
    )
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
        "eval_loss": version.tags.get("eval_loss.all"),
        "benchmarks": version.benchmarks,
        "corpus": version.tags.get("panda.corpus"),
        "plan": version.tags.get("panda.plan"),
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
        table.add_column(heading, no_wrap=heading != "taken down")
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
