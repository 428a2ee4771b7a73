"""Which version is the champion: what the gate has found is written down, and the aliases move.

In: versions, the verdict of the gate, the answer of a person where one was asked. Out: aliases and tags in the
registry. The tag `panda.gate` is written last: a version that has it is settled, and a run that was killed before tries
again. Cost: a few requests. MLflow moves an alias in one step, so there is always exactly one champion.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from training import run_files
from training.comparison.approval import APPROVED, REFUSED, WAITING, in_words
from training.comparison.job import Answered, GateResult, Job, ModelUnderTest
from training.comparison.report import verdict_markdown
from training.comparison.statistics import interval_of
from training.registry.lineage import config_of, plan_of
from training.registry.versions import CHALLENGER, CHAMPION, Registry, RegistryError, Version
from training.tracking.looks import only_a_look
from training.tracking.tags import (
    APPROVAL_TAG,
    COMMENT_TAG,
    GAIN_TAG,
    GATE_TAG,
    PROMOTED_BY_HAND_TAG,
    REASONS_TAG,
    REPLACED_TAG,
    ROLLED_BACK_TAG,
    WEIGHTS_FREED_TAG,
)

PASSED, FAILED = "passed", "failed"


def settle(registry: Registry, version: Version, result: GateResult, answer: Answered | None = None) -> bool:
    """Move the alias that the gate and a person's answer earn, write down why; returns whether it is the champion now.

    A version that was refused has passed the gate all the same, and says so; it stays challenger for good.
    """
    champion = registry.champion(version.name)
    passed, reasons = result["promoted"], list(result["reasons"])
    compared_with = result.get("champion")
    if passed and (champion.uri if champion else None) not in (compared_with, version.uri):
        passed = False
        reasons = [f"the champion has changed since it was compared with {compared_with}: panda promote {version.uri}"]
    result.pop("approval", None)
    tags = {REASONS_TAG: "; ".join(reasons), **_gain(result)}
    if answer:
        result["approval"], reasons = answer, [in_words(answer), *reasons]
        tags |= {APPROVAL_TAG: answer["answer"], REASONS_TAG: "; ".join(reasons)}
        tags |= {COMMENT_TAG: answer["comment"]} if answer["comment"] else {}
    result["promoted"] = passed and (answer is None or answer["answer"] == APPROVED)
    result["reasons"] = reasons
    with only_a_look(f"the description of {version.uri}"):
        registry.describe(version, verdict_markdown(result))
    if result["promoted"]:
        make_champion(registry, version)
    else:
        registry.set_alias(version, CHALLENGER)
    registry.tag(version, {**tags, GATE_TAG: PASSED if passed else FAILED})
    return result["promoted"]


def wait_for_approval(registry: Registry, version: Version, result: GateResult) -> None:
    """Say in the registry that a person is asked."""
    registry.describe(version, verdict_markdown(result))
    registry.tag(version, {APPROVAL_TAG: WAITING})


def _gain(result: GateResult) -> dict[str, str]:
    rows = [row for row in result["slices"] if row["slice"] == "all"]
    return {GAIN_TAG: str(interval_of(rows[0]))} if rows else {}


def make_champion(registry: Registry, version: Version) -> Version | None:
    """Move the alias; returns the version that was champion before."""
    before = registry.champion(version.name)
    if before and before.version != version.version:
        registry.tag(version, {REPLACED_TAG: str(before.version)})
    registry.set_alias(version, CHAMPION)
    registry.drop_alias(version, CHALLENGER)
    return before


def promote(registry: Registry, reference: str, despite_gate: bool) -> tuple[Version, Version | None]:
    """Make a version the champion by hand; one that failed the gate, never saw it, or was refused, only on demand."""
    version = registry.resolve(reference)
    _check_has_weights(version)
    obstacle = _obstacle(version)
    if obstacle and not despite_gate:
        raise RegistryError(f"{version.uri} {obstacle}. To promote it nevertheless: --despite_gate")
    before = make_champion(registry, version)
    registry.tag(version, {PROMOTED_BY_HAND_TAG: time.strftime("%Y-%m-%dT%H:%M:%S")})
    return replace(version, aliases=[CHAMPION]), before


def _obstacle(version: Version) -> str | None:
    """Why a version is not to be promoted without second thoughts. One that nobody answered for may be."""
    approval = version.tags.get(APPROVAL_TAG)
    if version.tags.get(GATE_TAG) == PASSED:
        return f"was {version.tags[REASONS_TAG]}" if approval == REFUSED else None
    if approval == WAITING:
        return "waits for approval: answer in its Prefect run"
    return f"has not passed the gate: {version.tags.get(REASONS_TAG, 'it was never compared')}"


def _check_has_weights(version: Version) -> None:
    freed = version.tags.get(WEIGHTS_FREED_TAG)
    if freed:
        raise RegistryError(f"{version.uri}: its weights were freed by panda gc ({freed}); only its lineage is left")


def rollback(registry: Registry, name: str) -> tuple[Version, Version]:
    """Give the alias back to the version that was champion before; returns (champion now, champion until now)."""
    current = registry.resolve(f"{name}@{CHAMPION}")
    replaced = current.tags.get(REPLACED_TAG)
    if replaced is None:
        raise RegistryError(f"{current.uri} replaced no other champion, so there is nothing to go back to")
    before = registry.resolve(f"{name}/{replaced}")
    _check_has_weights(before)
    registry.set_alias(before, CHAMPION)
    registry.tag(current, {ROLLED_BACK_TAG: time.strftime("%Y-%m-%dT%H:%M:%S")})
    return before, current


def job_of(registry: Registry, version: Version, run_dir: Path, gate: dict[str, Any]) -> Job:
    """What the gate is to compare. The champion's files are fetched only where MLflow does not keep them here."""
    config = yaml.safe_load((run_dir / run_files.CONFIG).read_text(encoding="utf-8"))
    cache_dir, template, quantised = Path(config["cache_dir"]), config["template"], config.get("use_quant", False)
    champion = registry.champion(version.name)
    if champion and champion.version == version.version:  # tried again after the alias has moved
        champion = None
    base = config["paths"]["model_dir"]
    return Job(
        gate=gate,
        cache_dir=str(cache_dir),
        candidate=ModelUnderTest(version.uri, template, str(run_dir / run_files.MODEL), quantised=quantised),
        champion=_champion_model(registry, champion, cache_dir, template) if champion else None,
        champion_plan=_champion_plan(registry, champion, cache_dir) if champion else None,
        base=ModelUnderTest(base, template, base, quantised=quantised) if base else None,
    )


def _champion_model(registry: Registry, champion: Version, cache_dir: Path, template: Any) -> ModelUnderTest:
    config = config_of(registry, champion)
    template, quantised = config.get("template", template), config.get("use_quant", False)
    try:
        files = str(registry.files(champion, cache_dir))
        return ModelUnderTest(champion.uri, template, files, quantised=quantised)
    except (RegistryError, OSError) as error:
        return ModelUnderTest(champion.uri, template, problem=str(error))


def _champion_plan(registry: Registry, champion: Version, cache_dir: Path) -> str | None:
    plan_dir = plan_of(champion, config_of(registry, champion), cache_dir)
    return str(plan_dir) if plan_dir else None
