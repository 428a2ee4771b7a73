"""`panda reproduce VERSION`: data, configuration and environment from the registry; the first losses must agree.

In: a version. Out: the losses then and now, whether they agree, and what is another than it was; exit code 3 when they
do not. The data are prepared again from the corpus. Where they get another plan, that of the version is used if it
still is in the cache, else the new one if no file of the corpus has changed. Cost: preparing what is not cached, then
starting the ranks and a few steps.
"""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.cli import Switch
from configs.settings import PandaSettings
from data_prep import in_use
from data_prep.errors import PandaError
from data_prep.pipeline import Preparation, run_stages
from flows.cli.console import stdout_console
from flows.cli.registry import Verb, parse_verb
from flows.cli.run import print_json
from training import run_files
from training.bases.start import model_directory
from training.models.hub import base_checkpoint
from training.registry.lineage import config_of, describe, plan_of
from training.registry.reproduce import Reproduced, ReproduceError, num_ranks, recorded_losses, reproduce
from training.registry.versions import Version
from training.settings import ModelSettings
from training.tracking.tags import PARENT_TAG, PLAN_TAG

STEPS = Switch("steps", "Optimizer steps to train again (5).", {"metavar": "N", "type": int, "default": 5})
SHOWN_CHANGES = 10

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Train the first steps again and compare."""
    text = "Rebuild data and configuration of a version from the registry; check that its first losses agree."
    verb = parse_verb("panda reproduce VERSION", text, argv, (STEPS,))
    in_use.use_until_exit(verb.cache_dir)
    version = verb.registry.resolve(verb.words[0])
    config = config_of(verb.registry, version)
    if not config:
        raise ReproduceError(f"{version.uri}: its run {version.run_id} has no {run_files.CONFIG} among its artifacts")
    recorded = recorded_losses(verb.registry, version, verb.switches.steps)
    data = rebuild(verb, version, config)
    trained = verb.registry.json_artifact(version, run_files.TRAINED)
    again = {**config, "num_processes": num_ranks(config, trained), "paths": data["paths"]}
    then = verb.registry.json_artifact(version, run_files.ENVIRONMENT_REPORT)
    result = reproduce(again, recorded, then, verb.cache_dir, logger.debug)
    _say(verb, version, data, result)
    return 0 if result.agrees else 3


def rebuild(verb: Verb, version: Version, config: dict[str, Any]) -> dict[str, Any]:
    """Model, tokenizer and plan on this machine: {"paths", "plan", "same"}; `same`: made again from the corpus.

    :raises ReproduceError: the corpus is another, and the old plan is gone.
    """
    settings = PandaSettings(**{name: config[name] for name in PandaSettings.model_fields if name in config})
    model_dir = starting_point(verb, version, config, settings)
    paths = {"model_dir": model_dir and str(model_dir)}
    planned, problem = _prepare(settings, model_dir, verb.cache_dir)
    wanted = version.tags.get(PLAN_TAG)
    made = {"plan_dir": planned.path, "tokenizer_dir": planned.tokenizer_dir} if planned else {}
    if planned and planned.fingerprint == wanted:
        return {"paths": {**paths, **made}, "plan": wanted, "same": True}
    old = plan_of(version, config, verb.cache_dir)
    if old and Path(config["paths"]["tokenizer_dir"]).is_dir():
        kept = {"plan_dir": str(old), "tokenizer_dir": config["paths"]["tokenizer_dir"]}
        return {"paths": {**paths, **kept}, "plan": wanted, "same": False}
    changed = _changed_files(verb, version)
    if planned and not changed:  # by code that names its plans in another way; whether it is the same, the losses tell
        return {"paths": {**paths, **made}, "plan": planned.fingerprint, "same": True}
    raise ReproduceError(_what_changed(version, problem, changed))


def starting_point(verb: Verb, version: Version, config: dict[str, Any], settings: PandaSettings) -> Path | None:
    """The weights it started from: where they were, its parent's files, or the checkpoint the settings name."""
    before = config["paths"]["model_dir"]
    if before is None or Path(before, "config.json").is_file():
        return before and Path(before)
    if PARENT_TAG in version.tags:
        return verb.registry.files(verb.registry.resolve(version.tags[PARENT_TAG]), verb.cache_dir)
    return model_directory(ModelSettings.of(settings), verb.cache_dir) if base_checkpoint(settings) else None


def _prepare(settings: PandaSettings, model_dir: Path | None, cache_dir: Path) -> tuple[Any, str]:
    """The plan of the corpus as it is now; None and why if there is none."""
    try:
        return run_stages(Preparation.of(settings, model_dir, cache_dir)), ""
    except PandaError as error:
        return None, str(error)


def _changed_files(verb: Verb, version: Version) -> list[str]:
    """A line for each file of the corpus that is another than it was."""
    files = describe(verb.registry, version, verb.cache_dir)["corpus"]["files"]
    return [f"  {file['file']}: {file['now']}" for file in files if file["now"] != "unchanged"]


def _what_changed(version: Version, problem: str, changed: list[str]) -> str:
    first = f"{version.uri}: the corpus gives another plan than {version.tags.get(PLAN_TAG)}, which is not here"
    hint = "Bring back the files as they were (panda lineage lists their hashes), or the plan into --cache_dir"
    others = ["  all files are as they were: the directory, the tombstones, the quarantine or the code differ"]
    return "\n".join([f"{first} any more{': ' + problem if problem else ''}", *(changed or others), hint])


def _say(verb: Verb, version: Version, data: dict[str, Any], result: Reproduced) -> None:
    if verb.switches.json:
        verdict = {"agrees": result.agrees, "bitwise": result.bitwise, "difference": result.largest_difference}
        print_json({"version": version.uri, "plan": data["plan"], "data_rebuilt": data["same"], **verdict,
                    **asdict(result)})  # fmt: skip
        return
    console = stdout_console()
    console.print(f"data: plan {data['plan']} {_made(data['same'])}")
    for step, then, now in zip(result.steps, result.recorded, result.again, strict=True):
        console.print(f"step {step}: loss {then!r}, again {now!r}")
    console.print(_verdict(result), style="bold")
    more = len(result.environment) - SHOWN_CHANGES
    for change in [*result.environment[:SHOWN_CHANGES], *([f"and {more} more"] if more > 0 else [])]:
        console.print(f"  another environment: {change}", markup=False)


def _made(same: bool) -> str:
    return "made again from the corpus" if same else "as it was; the corpus gives another one now"


def _verdict(result: Reproduced) -> str:
    if result.bitwise:
        return "the losses are equal bit by bit"
    relation = "within" if result.agrees else "NOT within"
    return f"largest relative difference {result.largest_difference:.2g}, {relation} {result.tolerance:g}"
