"""The one loader: template.yaml < model/*.yaml < preset/*.yaml < --conf_path file < key=value overrides < flags.

In: what the user typed, or the parameters of a deployment. Out: `Loaded`: validated settings and the origin of each
value. Hydra composes the YAML tree; below this module nobody knows Hydra. Cost: ~0.4 s, most of it importing hydra.
Raises `ConfigError` with all problems at once.

YAML as Hydra reads it: 3e-4 is a float (a string in plain PyYAML), a key given twice is an error.

In: text. Out: plain values. Cost: importing omegaconf, ~0.1 s, once.
"""

import os
import tempfile
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from configs import guide_names
from configs.errors import ConfigError, did_you_mean
from configs.field_types import allowed, kind_of, takes_mapping
from configs.settings import PandaSettings
from training.planning.compatibility import implied


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises `yaml.YAMLError`, also for what no setting can be."""
    from omegaconf._utils import get_yaml_loader

    try:
        content = yaml.load(text, Loader=get_yaml_loader())
        _check_tree(content, ())
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error
    return content


def _check_tree(value: Any, above: tuple[int, ...]) -> None:
    """Keys are texts or numbers, and nothing contains itself (an alias to a node above it)."""
    if not isinstance(value, dict | list):
        return
    if id(value) in above:
        raise yaml.YAMLError("an alias (*name) stands inside the very value that it names")
    for key in value if isinstance(value, dict) else ():
        if not isinstance(key, str | int | float):
            raise yaml.YAMLError(f"the key {key!r} is no text; put it into quotes")
    for inner in value.values() if isinstance(value, dict) else value:
        _check_tree(inner, (*above, id(value)))


def one_line(error: Exception) -> str:
    """A parser's message without its drawing."""
    return " ".join(str(error).split())


CONFIG_DIR = Path(__file__).parent
PATH_MODEL = "from-path"
"""The file of configs/model that stands for any directory or hub id."""
QUOTED = "key='\"a(b)\"'"
RUN_PATHS = "paths"
"""What the config.yaml of a run has beside the settings."""


@dataclass(frozen=True)
class Loaded:
    """Validated settings, and where each value came from (`default`, `model/llama-7b.yaml`, `flag`, ...)."""

    settings: PandaSettings
    origins: dict[str, str]


def load(
    values: dict[str, Any] | None = None,
    overrides: list[str] | None = None,
    conf_path: str | Path | None = None,
    problems: list[str] | None = None,
) -> Loaded:
    """Compose, convert and check a configuration.

    :param values: flat field -> value, as flags or form fields give them.
    :param overrides: Hydra overrides ``key=value``; nested keys (``architecture.hidden_size=128``) work.
    :param conf_path: the user's YAML file.
    :param problems: what is known to be wrong already; reported together with what is found here.
    """
    values, problems = dict(values or {}), list(problems or [])
    conf = _read_user_file(Path(conf_path), problems) if conf_path else {}
    overrides = _parsable(_without_unknown(guide_names.in_words(overrides or []), problems), problems)
    dotted = dict(text.split("=", 1) for text in overrides if "=" in text)

    def given(name: str) -> str | None:
        return values.get(name) or dotted.get(name) or conf.get(name)

    groups, chosen = _choose_groups(given("model") or given("ckpt_path"), given("preset"), problems)
    nested = [text for text in overrides if _key(text) not in ("model", "preset")]
    composed = _compose([*groups, *nested], conf, problems)
    composed = _whole_architecture(composed, conf, dotted)
    files = [group.replace("=", "/") + ".yaml" for group in groups]
    layers = [
        *((file, _read_yaml(CONFIG_DIR / file)) for file in files),
        (str(conf_path), conf),
        ("override", {_top(name): None for name in dotted}),
        ("flag", {**chosen, **values}),
    ]
    settled = _settle_warmup(layers)
    return _validate({**composed, **chosen, **values, **settled}, _origins(layers), problems)


def given_value(name: str, values: dict[str, Any], overrides: list[str] | None, conf_path: str | Path | None) -> Any:
    """What somebody gave for one setting, without a look at the others: the whole may be wrong.

    :raises ConfigError: the user's YAML file cannot be read.
    """
    if values.get(name) is not None:
        return values[name]
    texts = [text.split("=", 1)[1] for text in overrides or [] if "=" in text and _key(text) == name]
    if texts:
        return parse_yaml(texts[-1])
    return _read_user_file(Path(conf_path), []).get(name) if conf_path else None


def touched(overrides: list[str]) -> set[str]:
    """The settings that overrides change, by the names that `load` takes them for."""
    return {_top(text) for text in guide_names.in_words(overrides)}


def names(group: str) -> list[str]:
    """The names a group offers, for example the models that have a YAML of their own."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml") if path.stem != PATH_MODEL)


def dump(settings: PandaSettings) -> str:
    """The configuration as YAML that `--conf_path` reads back to an equal object."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_user_file(path: Path, problems: list[str]) -> dict[str, Any]:
    """The user's values. The config.yaml of a run will do: its `paths` are facts of that run, no settings."""
    conf = _read_yaml(path)
    if "defaults" in conf:
        raise ConfigError([f"{path}: a defaults list has no place here; write `model: llama-7b` and `preset: lora`"])
    if "hydra" in conf:
        raise ConfigError([f"{path}: `hydra` is no setting; what it configures is not the user's"])
    conf = guide_names.in_mapping(conf, str(path), problems)
    return {name: value for name, value in conf.items() if name != RUN_PATHS}


def _choose_groups(model: Any, preset: Any, problems: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Hydra's group choices, and the values that follow from a model that is a path or a hub id."""
    model = str(model or _read_yaml(CONFIG_DIR / "template.yaml")["defaults"][1]["model"])
    groups: list[str] = []
    chosen: dict[str, Any] = {}
    if model in names("model"):
        groups.append(f"model={model}")
    elif "/" in model or any(map(os.path.isdir, (model, f"pretrained-models/{model}"))):  # false for any text
        groups.append(f"model={PATH_MODEL}")
        chosen = {"model": model}
    else:
        near = did_you_mean(model, names("model")) or "; known are " + ", ".join(names("model"))
        problems.append(f"unknown model {model!r}{near}; a directory or a hub id (owner/name) works as well")
    if preset in names("preset"):
        groups.append(f"preset={preset}")
    elif preset:
        chosen["preset"] = preset  # refused with the other values
    return groups, chosen


def _without_unknown(overrides: list[str], problems: list[str]) -> list[str]:
    """The overrides of known settings; the others become problems."""
    known = PandaSettings.model_fields
    unknown = [text for text in overrides if _top(text) not in known]
    problems.extend(f"unknown setting {_top(text)!r}{did_you_mean(_top(text), known)} (override)" for text in unknown)
    return [text for text in overrides if text not in unknown]


def _key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+~")


def _top(override: str) -> str:
    """The field an override touches: ``+architecture.hidden_size=128`` -> ``architecture``."""
    return _key(override).split(".")[0]


def _compose(overrides: list[str], conf: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """The YAML tree as one flat mapping; the user's file is a Hydra config put after ours."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "conf").mkdir()
        (Path(folder) / "conf" / "user.yaml").write_text(yaml.safe_dump(conf, allow_unicode=True), encoding="utf-8")
        user = [f"hydra.searchpath=[file://{folder}]", "+conf@_global_=user"] if conf else []
        try:
            with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
                composed = compose("template", overrides=[*user, *overrides])
            return OmegaConf.to_container(composed, resolve=True)  # type: ignore[return-value]  # a mapping, as the template is
        except (HydraException, OmegaConfBaseException) as error:
            problems.append(one_line(error))
            return {}


def _parsable(overrides: list[str], problems: list[str]) -> list[str]:
    """The overrides that Hydra's grammar accepts; the others become problems."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, good = OverridesParser.create(), []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            problems.append(
                f"{text}: {str(error).splitlines()[0]}; a value with special characters needs quotes: {QUOTED}"
            )
            continue
        if override.is_sweep_override():
            problems.append(f"{text}: several values; one run takes one, and a list is written [1,2]")
        else:
            good.append(text)
    return good


def _whole_architecture(composed: dict[str, Any], conf: dict[str, Any], dotted: dict[str, str]) -> dict[str, Any]:
    """An architecture with `model_type` or `_target_` in the user's file is whole: nothing else stays in it."""
    own = conf.get("architecture")
    if (
        not isinstance(own, dict)
        or not {"model_type", "_target_"} & own.keys()
        or not isinstance(composed.get("architecture"), dict)
    ):
        return composed
    kept = own.keys() | {_key(text).split(".")[1] for text in dotted if _key(text).startswith("architecture.")}
    return {**composed, "architecture": {key: value for key, value in composed["architecture"].items() if key in kept}}


def _origins(layers: list[tuple[str, dict[str, Any]]]) -> dict[str, str]:
    origins = dict.fromkeys(PandaSettings.model_fields, "default")
    for origin, content in layers:
        origins.update({name: origin for name in content})
    return origins


def _settle_warmup(layers: list[tuple[str, dict[str, Any]]]) -> dict[str, int]:
    """The last layer with one of the two kinds of warm-up sets the other to 0; both in one layer stay, an error."""
    kinds = {"warmup_steps": "warmup_proportion", "warmup_proportion": "warmup_steps"}
    for _, content in reversed(layers):
        chosen = content.keys() & kinds
        if len(chosen) == 1:
            other = kinds[chosen.pop()]
            content[other] = 0
            return {other: 0}
        if chosen:
            break
    return {}


def _validate(merged: dict[str, Any], origins: dict[str, str], problems: list[str]) -> Loaded:
    try:
        loaded = Loaded(PandaSettings(**merged), origins)
    except ValidationError as error:
        found = [_explain(problem, origins) for problem in error.errors(include_url=False)]
        raise ConfigError(list(dict.fromkeys([*problems, *found]))) from None
    if problems:
        raise ConfigError(problems)
    return _with_implied(loaded)


def _with_implied(loaded: Loaded) -> Loaded:
    """Defaults that would contradict what was asked for give way; values that somebody gave stay."""
    found = {name: one for name, one in implied(loaded.settings).items() if loaded.origins[name] == "default"}
    changed = {name: value for name, (value, _) in found.items()}
    origins = {name: f"follows from {why}" for name, (_, why) in found.items()}
    return Loaded(loaded.settings.model_copy(update=changed), loaded.origins | origins)


def _explain(problem: Any, origins: dict[str, str]) -> str:
    """One pydantic problem as ``key=value: what is wrong (origin)``."""
    if not problem["loc"]:
        return str(problem["msg"]).removeprefix("Value error, ")
    name = str(problem["loc"][0])
    origin = origins.get(name, "form")
    if problem["type"] == "extra_forbidden":
        return f"unknown setting {name!r}{did_you_mean(name, PandaSettings.model_fields)} ({origin})"
    if problem["type"] == "value_error":
        message = str(problem["msg"]).removeprefix("Value error, ")
    else:
        message = f"must be {allowed(name)}" + (
            " or a mapping" if takes_mapping(name) and "mapping" not in allowed(name) else ""
        )
        message += did_you_mean(str(problem["input"]), map(str, typing.get_args(kind_of(name))))
    return f"{name}={_typed(problem['input'])}: {message} ({origin})"


def _typed(value: Any) -> str:
    """A value as the user typed it."""
    return value if isinstance(value, str) and value and not any(map(str.isspace, value)) else repr(value)


def _read_yaml(path: Path) -> dict[str, Any]:
    """A mapping in a file."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError([f"{path}: {one_line(error)}"]) from error
    if not isinstance(content, dict):
        raise ConfigError([f"{path}: a mapping of settings is expected, not a {type(content).__name__}"])
    if wrong := [key for key in content if not isinstance(key, str)]:
        raise ConfigError([f"{path}: {key!r} is the name of no setting; names are texts" for key in wrong])
    return content
