"""What is kept, why, and what goes: a pure function of what there is.

In: `Item`s, each with what it needs, and `Rules`. Out: `Decision`. Roots are kept by rule (an alias, the newest
versions, a run that lives or can be gone on with, whatever is young); all that a kept item needs is kept too. The rest
goes in an order in which nothing is deleted before what needs it, so it can be stopped at any point and what remains
is whole. A version that is only the ancestor of a kept one keeps its entry, its MLflow run and its plan, for `lineage`
and `why`, but not its weights: nothing that is kept is made of them. Cost: one pass.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

DAY = 24 * 3600.0
ANCESTRY = "needed by"

VERSION, CHECKPOINTS, RUN, MODEL, MLFLOW_RUN = "version", "checkpoints", "run", "model", "mlflow run"
PLAN, TOKENS, RECORDS, TOKENIZER, BASE = "plan", "tokens", "records", "tokenizer", "made base"
NEAR_DUPLICATES, FETCHED, FLOW_RUN = "near duplicates", "fetched model", "prefect run"
KINDS = (VERSION, CHECKPOINTS, RUN, MODEL, MLFLOW_RUN, PLAN, TOKENS, RECORDS, TOKENIZER, BASE, NEAR_DUPLICATES,
         FETCHED, FLOW_RUN)  # fmt: skip
"""In the order in which they go."""
NEWEST_FLOW_RUNS = 10  # of each deployment and end: `flows.watch` tells by them how long one takes, and what is missing


class Key(NamedTuple):
    """What an item is called: its kind, and a path or an id."""

    kind: str
    name: str


@dataclass(frozen=True)
class Item:
    """Something that takes room. `keep`: why it is kept whatever its age; `rank`: 0 is the newest of its siblings."""

    key: Key
    size: int = 0
    made: float = 0.0  # seconds since the epoch; of a run or flow run its end
    needs: frozenset[Key] = frozenset()
    keep: str = ""
    rank: int = 0
    whole: frozenset[Key] = frozenset()  # of a version: what it needs beside when it is kept for itself


@dataclass(frozen=True)
class Rules:
    """The settings `keep_versions` and `keep_days`, and the time."""

    versions: int
    days: float
    now: float


@dataclass(frozen=True)
class Decision:
    """Reasons by key, and what goes, in order. `thin`: versions that are kept, but whose weights go."""

    kept: dict[Key, str]
    freed: list[Item] = field(default_factory=list)

    @property
    def thin(self) -> set[str]:
        """Names of the kept versions that are there as ancestors alone."""
        return {key.name for key, reason in self.kept.items() if key.kind == VERSION and reason.startswith(ANCESTRY)}


def decide(items: Iterable[Item], rules: Rules) -> Decision:
    """What stays and what goes."""
    known = {item.key: item for item in items}
    kept: dict[Key, str] = {}
    for key, reason in roots(known.values(), rules):
        kept.setdefault(key, reason)
    waiting = [key for key in kept if key in known]
    while waiting:
        key = waiting.pop()
        new = [need for need in known[key].needs if need not in kept]
        kept |= dict.fromkeys(new, f"{ANCESTRY} {key.name}")
        waiting += [need for need in new if need in known]
    freed = [item for key, item in known.items() if key not in kept]
    return Decision(kept, sorted(freed, key=lambda item: (KINDS.index(item.key.kind), -item.made, item.key.name)))


def roots(items: Iterable[Item], rules: Rules) -> Iterator[tuple[Key, str]]:
    """What is kept for itself, and what a version needs to be whole."""
    for item in items:
        reason = _why(item, rules)
        if reason:
            yield item.key, reason
            yield from ((key, f"of {item.key.name}") for key in item.whole)


def _why(item: Item, rules: Rules) -> str:
    """Why an item is kept for itself; empty: only if something needs it."""
    if item.keep:
        return item.keep
    if item.key.kind == VERSION and item.rank < rules.versions:
        return f"one of the {rules.versions} newest"
    if item.key.kind == RUN and item.rank == 0:
        return "the newest run"
    if item.key.kind == FLOW_RUN and item.rank < NEWEST_FLOW_RUNS:
        return "one of the newest"
    if item.key.kind != MODEL and item.made > rules.now - rules.days * DAY:
        return "young"
    return ""
