"""What the parameters of a deployed run may say. They come over the network: from a form, a command, an automation.

Whoever types a command on this machine, or writes a file of it, is its owner and may say anything: `python train.py`,
the YAML file that `conf_path` names, the `parameters` of deployments and schedules in `prefect.yaml` (also of
`deploy/*/prefect.yaml`). Values that only a server has are held to this: paths lie in the working directory or in
`allowed_roots` of `panda.toml`, addresses are listed there in `allowed_addresses` (corpora lie below one of them),
nothing names the environment or asks for code of strangers. `_target_` nodes have a rule of their own
(`data_prep/allowed.py`), which holds for all.

In: the parameters of a flow, and the settings they make. Out: a `ConfigError` with every problem, or nothing. Cost: the
prefect.yaml files are read.
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from prefect.runtime import deployment

from configs.errors import ConfigError
from configs.load import touched
from configs.settings import PandaSettings
from data_prep.owner import Owner, owner
from data_prep.places.address import is_address, problem_of, without_secrets
from training.models.hub import find_checkpoint

PATHS = {
    *("output_dir", "cache_dir", "instruction_tuning_data_dir", "pretraining_data_dir", "tombstones", "replay_of"),
    *("neutral_texts", "quarantine"),
}
CHECKPOINTS = {"model", "ckpt_path", "delta_base"}
ADDRESSES = {"prepare_cluster", "mlflow_tracking_uri", "master_addr"}
FILES = {"conf_path", "tombstones", "quarantine", "neutral_texts"}
CORPORA = {"instruction_tuning_data_dir", "pretraining_data_dir"}
"""Those of `PATHS` that may be addresses."""
OWNERS_ALONE = {"trust_remote_code", "hostfile", "gate_benchmarks"}  # the last: lm-eval runs what its task files say
MAPPINGS = {"reader", "template", "optimizer", "lr_scheduler", "callbacks", "architecture", "gate_metrics"}
HARMLESS = {
    *("run_name", "notify", "experiment_name", "registered_model_name"),  # names, most of them of a given form
    *("mixture", "columns", "lora_target_modules", "adam_betas", "modules_to_save", "trainable_token_indices"),
    *("add_tokens", "currency"),
}
"""Beside these, a setting is a number, a switch or one of a few words. A test holds every field to one of the sets."""

INTERPOLATION = re.compile(r"\$\\*\{")
UNCLEAR_ADDRESS = re.compile(r"[%\\\s]|/\.{1,2}(/|$)|[^:/]//")
CONFIGURATION = {".yaml", ".yml"}
WRITTEN_BY_OTHERS = ("dataset", "cache")


def is_asked_over_the_network() -> bool:
    """Whether a server told a worker or `serve` to run this, rather than code of this machine."""
    return "PREFECT__FLOW_RUN_ID" in os.environ or deployment.id is not None


def check_parameters(given: dict[str, Any]) -> set[str]:
    """Look at parameters before any file they name is read; returns the settings for `check_settings`.

    :param given: the parameters that are not None.
    """
    if not is_asked_over_the_network():
        return set()
    written = _written_in_files()
    foreign = {name: value for name, value in given.items() if not _is_in(value, name, written)}
    problems = [
        f"{name}={text!r}: ${{...}} is resolved in files of this machine only, not in parameters of a run"
        for name, value in foreign.items()
        for text in _texts(value)
        if INTERPOLATION.search(text)
    ]
    if "conf_path" in foreign:
        problems += _configuration_problems(str(foreign["conf_path"]), owner())
    _raise(problems)
    return (foreign.keys() - {"conf_path", "overrides"}) | touched(foreign.get("overrides", []))


def check_settings(settings: PandaSettings, foreign: set[str]) -> None:
    """Look at what the settings named `foreign` have become."""
    rules = owner()
    fields = PandaSettings.model_fields
    chosen = {
        name: value
        for name in sorted(foreign & fields.keys())
        if (value := getattr(settings, name)) is not None and value != fields[name].default
    }
    problems = []
    for name, value in chosen.items():
        if name in CORPORA and is_address(value):
            problems += _corpus_problems(name, value, rules)
        elif name in PATHS:
            problems += _path_problems(name, value, rules)
        elif name in CHECKPOINTS:
            problems += _path_problems(name, value, rules) or _found_problems(name, value, rules)
        elif name in ADDRESSES:
            problems += _address_problems(name, value, rules)
        elif name in OWNERS_ALONE:
            problems.append(_for_the_owner(name, value))
        elif name in MAPPINGS:
            problems += _mapping_problems(name, value, rules)
    if settings.trust_remote_code:
        problems += [
            f"{name}={value!r}: trust_remote_code is on, so this decides which code runs here; "
            f"{_write_into_files(name, value)}"
            for name, value in chosen.items()
            if name in CHECKPOINTS
        ]
    _raise(problems)


def _written_in_files() -> list[tuple[str, Any]]:
    """Parameters that the owner has written into the files from which deployments are made."""
    written: list[tuple[str, Any]] = []
    for path in (Path("prefect.yaml"), *sorted(Path("deploy").glob("*/prefect.yaml"))):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            entries = content["deployments"]
            schedules = [schedule for entry in entries for schedule in entry.get("schedules") or []]
            for one in [*entries, *schedules]:
                written += (one.get("parameters") or {}).items()
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError):
            continue  # prefect deploy says what is wrong with it
    return written


def _is_in(value: Any, name: str, written: Iterable[tuple[str, Any]]) -> bool:
    return any(name == known and type(value) is type(one) and value == one for known, one in written)


def _configuration_problems(value: str, rules: Owner) -> list[str]:
    if Path(value).suffix not in CONFIGURATION:
        return [f"conf_path={value!r}: a run takes its configuration from a .yaml or .yml file only"]
    problems = _path_problems("conf_path", value, rules)
    others = [folder for folder in WRITTEN_BY_OTHERS if not problems and _place(value).is_relative_to(_place(folder))]
    return problems or [f"conf_path={value!r}: not from ./{folder}, whose files others write" for folder in others]


def _found_problems(name: str, value: str, rules: Owner) -> list[str]:
    """The directory that a checkpoint's name means; it may be a link below ./pretrained-models."""
    found = find_checkpoint(value)
    return _path_problems(name, str(found), rules) if found else []


def _path_problems(name: str, value: str, rules: Owner) -> list[str]:
    try:
        place = _place(value)
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null character, links in a circle
        return [f"{name}={value!r}: no path ({error})"]
    if any(place.is_relative_to(root) for root in rules.roots()):
        return []
    leads = "" if str(place) == value else f" (that is {place})"
    root = place.parent if name in FILES else place
    return [
        f"{name}={value!r}{leads}: outside of the directories that parameters of a run may name; "
        + rules.advice("allowed_roots", str(root))
    ]


def _place(value: str) -> Path:
    """Where a path leads, links followed: what counts is what would be read or written."""
    return Path(os.path.expanduser(value)).resolve()


def _address_problems(name: str, value: str, rules: Owner) -> list[str]:
    if value in rules.allowed_addresses:
        return []
    return [
        f"{name}={value!r}: no address that parameters of a run may name; " + rules.advice("allowed_addresses", value)
    ]


def _corpus_problems(name: str, value: str, rules: Owner) -> list[str]:
    """A corpus at an address: below one that is allowed, and written so that no server takes it for another."""
    shown = without_secrets(value)
    if problem := problem_of(value):
        return [f"{name}={shown!r}: {problem}"]
    below = any(f"{value.rstrip('/')}/".startswith(f"{root.rstrip('/')}/") for root in rules.allowed_addresses)
    if below and not UNCLEAR_ADDRESS.search(value):
        return []
    return [
        f"{name}={shown!r}: not below an address that parameters of a run may name; "
        + rules.advice("allowed_addresses", shown)
    ]


def _for_the_owner(name: str, value: Any) -> str:
    return f"{name}={value!r}: not by a parameter of a run, as it makes this machine run code; " + _write_into_files(
        name, value
    )


def _write_into_files(name: str, value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else value
    return (
        f"the owner of this machine can write `{name}: {text}` into a YAML file that conf_path names, or into the "
        f"deployment's `parameters` in {Path('prefect.yaml').absolute()}"
    )


def _mapping_problems(name: str, value: Any, rules: Owner) -> list[str]:
    """Paths and addresses among the fields of a node; an architecture has none, but may name code on the hub."""
    if name == "architecture" and "_target_" not in value:
        return [
            f"architecture: {text!r} is no value of a model's configuration but a place"
            for text in _texts(value)
            if "/" in text
        ]
    problems = []
    for text in _texts(value):
        if "://" in text:
            problems += _address_problems(name, text, rules)
        elif len(text) > 1 and (text[0] in "/~" or ".." in Path(text).parts):
            problems += _path_problems(name, text, rules)
    return problems


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value, at whatever depth, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from _texts(list(pair))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)


def _raise(problems: list[str]) -> None:
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
