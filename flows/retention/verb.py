"""`panda gc`: show what may go by `keep_versions` and `keep_days`, and free it with ``--yes``.

In: flags. Out: a table by kind, with ``--paths`` every single thing and why the rest is kept, or one JSON object with
``--json``. Without ``--yes`` nothing is changed. Exit code 0. Cost: see the parts.
"""

import time
from collections import Counter
from pathlib import Path
from typing import Any

from configs.cli import CONF_PATH, JSON, VERBOSE, Switch, configure
from data_prep import in_use
from flows.cli.console import plain_table, stdout_console
from flows.cli.run import print_json
from flows.retention.policy import KINDS, Decision, Item, Rules, decide
from flows.retention.remove import free
from flows.retention.whole import Found, Places, look
from training.registry.versions import Registry
from training.settings import TrackingSettings
from training.tracking.database import is_missing
from training.tracking.run import tracking_uri

TEXT = "Free what no version, no run and no question about them needs any more. Without --yes it only shows what."
YES = Switch("yes", "Free it; without this nothing is changed.")
PATHS = Switch("paths", "Show every single thing that goes, and why the others stay.")
FIELDS = {"output_dir", "cache_dir", "mlflow_tracking_uri", "keep_versions", "keep_days"}


def main(argv: list[str]) -> int:
    """Look, decide, show, free."""
    line, loaded = configure("panda gc", TEXT, argv, [YES, PATHS, CONF_PATH, JSON, VERBOSE], FIELDS)
    settings = loaded.settings
    output_dir, cache_dir = Path(settings.output_dir).absolute(), Path(settings.cache_dir).absolute()
    uri = tracking_uri(TrackingSettings.of(settings), output_dir)
    places = Places(output_dir, cache_dir, None if is_missing(uri) else Registry(uri))
    rules = Rules(settings.keep_versions, settings.keep_days, time.time())
    with in_use.alone(cache_dir) as is_free:
        found = look(places, is_free)
        decision = decide(found.items, rules)
        done = free(decision, places) if line.switches.yes else []
    if line.switches.json:
        print_json(as_dict(found, decision, done, line.switches.yes))
    else:
        _show(found, decision, done, line.switches)
    return 0


def as_dict(found: Found, decision: Decision, done: list[Item], is_done: bool) -> dict[str, Any]:
    """For ``--json``."""
    items = done if is_done else decision.freed
    return {
        "freed" if is_done else "would_free": [_plain(item) for item in items],
        "bytes": sum(item.size for item in items),
        "kept": [{"kind": key.kind, "name": key.name, "why": why} for key, why in sorted(decision.kept.items())],
        "left_alone": found.left,
    }


def _plain(item: Item) -> dict[str, Any]:
    return {"kind": item.key.kind, "name": item.key.name, "bytes": item.size}


def _show(found: Found, decision: Decision, done: list[Item], switches: Any) -> None:
    console, items = stdout_console(), done if switches.yes else decision.freed
    kinds = Counter(item.key.kind for item in found.items)
    table = plain_table(4)
    table.add_row("kind", "there", "freed" if switches.yes else "would go", "MB")
    for kind in KINDS:
        mine = [item for item in items if item.key.kind == kind]
        if kinds[kind]:
            table.add_row(kind, f"{kinds[kind]:,}", f"{len(mine):,}", f"{sum(item.size for item in mine) / 1e6:,.1f}")
    table.add_row("all", f"{len(found.items):,}", f"{len(items):,}", f"{sum(item.size for item in items) / 1e6:,.1f}")
    console.print(table)
    if switches.paths:
        for item in items:
            console.print(f"- {item.key.kind} {item.key.name}", markup=False)
        for key, why in sorted(decision.kept.items()):
            console.print(f"  {key.kind} {key.name}: {why}", markup=False)
    for text in found.left:
        console.print(f"left alone: {text}", markup=False)
    if items and not switches.yes:
        console.print("nothing was changed; panda gc --yes frees it, --paths names it")
