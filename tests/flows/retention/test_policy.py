"""What goes and what stays, for whatever there is."""

import random
from itertools import pairwise

import pytest

from flows.retention.policy import (
    CHECKPOINTS,
    DAY,
    FLOW_RUN,
    KINDS,
    MLFLOW_RUN,
    MODEL,
    PLAN,
    RECORDS,
    RUN,
    TOKENS,
    VERSION,
    Item,
    Key,
    Rules,
    decide,
)

NOW = 1000 * DAY
NEEDED_BY = {
    VERSION: (VERSION, MLFLOW_RUN, PLAN), CHECKPOINTS: (RUN,), RUN: (MODEL, MLFLOW_RUN, PLAN), PLAN: (TOKENS,),
    TOKENS: (RECORDS,),
}  # fmt: skip


def anything(seed: int) -> list[Item]:
    """Items of all kinds that need each other at random; who needs a version is younger than it."""
    draw = random.Random(seed)
    keys = [Key(kind, f"{kind}-{number:02}") for kind in KINDS for number in range(draw.randrange(12))]
    made = {key: NOW - draw.choice([1, 40, 400]) * DAY - draw.random() for key in keys}
    items = []
    for key in keys:
        below = [other for other in keys if other.kind in NEEDED_BY.get(key.kind, ())]
        older = [other for other in below if other.kind != key.kind or made[other] < made[key]]
        needs = draw.sample(older, min(len(older), draw.randrange(4)))
        whole = [other for other in keys if key.kind == VERSION and other.kind in (MODEL, RUN) and draw.random() < 0.2]
        keep = draw.choice(["", "", "", "", "champion"])
        items.append(Item(key, 1, made[key], frozenset(needs), keep, draw.randrange(20), frozenset(whole)))
    return items


@pytest.mark.parametrize("seed", range(200))
def test_what_remains_is_whole_wherever_it_is_stopped(seed):
    items = anything(seed)
    decision = decide(items, Rules(3, 30, NOW))
    assert {*decision.kept, *(item.key for item in decision.freed)} >= {item.key for item in items}
    assert not {item.key for item in decision.freed} & decision.kept.keys()
    left = {item.key: item for item in items}
    for gone in [None, *decision.freed]:
        if gone:
            del left[gone.key]
        for item in left.values():
            assert item.needs <= left.keys(), f"{item.key} lacks {item.needs - left.keys()} when {gone} has gone"


@pytest.mark.parametrize("seed", range(50))
def test_nothing_is_kept_for_nothing_and_the_rules_hold(seed):
    items = {item.key: item for item in anything(seed)}
    kept = decide(items.values(), Rules(3, 30, NOW)).kept
    for key, item in items.items():
        young = item.made > NOW - 30 * DAY and key.kind != MODEL
        newest = item.rank < {VERSION: 3, RUN: 1, FLOW_RUN: 10}.get(key.kind, 0)
        wanted = [other for other in items.values() if other.key in kept and key in other.needs]
        whole = [
            other for other in items.values() if key in other.whole and kept.get(other.key, "needed")[:6] != "needed"
        ]
        assert (key in kept) == bool(item.keep or young or newest or wanted or whole), item


def version(number: int, rank: int, keep: str = "", parent: int | None = None) -> Item:
    needs = {Key(MLFLOW_RUN, str(number)), Key(PLAN, str(number))}
    needs |= {Key(VERSION, str(parent))} if parent else set()
    whole = {Key(MODEL, str(one)) for one in (number, parent) if one}
    return Item(Key(VERSION, str(number)), 0, number, frozenset(needs), keep, rank, frozenset(whole))


def test_a_line_of_champions_keeps_its_lineage_and_the_weights_that_reproduce_it():
    """Ten versions, each made of the one before: entries, MLflow runs and plans stay, and three models."""
    versions = [version(number, 10 - number, "champion" if number == 10 else "", number - 1 or None)
                for number in range(1, 11)]  # fmt: skip
    parts = [Item(Key(kind, str(number))) for kind in (MODEL, MLFLOW_RUN, PLAN) for number in range(1, 11)]
    decision = decide([*versions, *parts], Rules(2, 0, NOW))
    assert [item.key for item in decision.freed] == [Key(MODEL, str(number)) for number in range(1, 8)]
    assert decision.thin == {str(number) for number in range(1, 9)}


def test_versions_that_nobody_needs_go_child_before_parent():
    versions = [version(number, 10 - number, "", number - 1 if number % 2 == 0 else None) for number in range(1, 11)]
    freed = [item.key.name for item in decide(versions, Rules(2, 0, NOW)).freed]
    assert freed == [str(number) for number in range(8, 0, -1)]
    assert all(int(first) > int(second) for first, second in pairwise(freed))
