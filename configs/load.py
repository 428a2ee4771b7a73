"""The one loader: template.yaml < model/*.yaml < preset/*.yaml < --conf_path file < key=value overrides < flags.

In: what the user typed, or the parameters of a deployment. Out: `Loaded`: validated settings and the origin of each
value. Hydra composes the YAML tree; below this module nobody knows Hydra. Cost: ~0.4 s, most of it importing hydra.
Raises `ConfigError` with all problems at once.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from configs.errors import ConfigError, did_you_mean
from configs.settings import PandaSettings

CONFIG_DIR = Path(__file__).parent
PATH_MODEL = "from-path"
"""The file of configs/model that stands for any directory or hub id."""


@dataclass(frozen=True)
class Loaded:
    """Validated settings, and where each value came from (`default`, `model/llama-7b.yaml`, `flag`, ...)."""

    settings: PandaSettings
    origins: dict[str, str]


def load(
    values: dict[str, Any] | None = None, overrides: list[str] | None = None, conf_path: str | Path | None = None
) -> Loaded:
    """Compose, convert and check a configuration.

    :param values: flat field -> value, as flags or form fields give them.
    :param overrides: Hydra overrides ``key=value``; nested keys (``architecture.hidden_size=128``) work.
    :param conf_path: the user's YAML file.
    """
    values, overrides = dict(values or {}), list(overrides or [])
    conf = _read_yaml(Path(conf_path)) if conf_path else {}
    _refuse_unknown_names(overrides)
    dotted = dict(text.split("=", 1) for text in overrides)

    def given(name: str) -> str | None:
        return values.get(name) or dotted.get(name) or conf.get(name)

    choice = {"model": given("model") or given("ckpt_path"), "preset": given("preset")}
    groups, chosen = _choose_groups(**choice)
    nested = [text for text in overrides if text.split("=")[0] not in choice]
    composed = _compose([*groups, *nested], conf)
    files = [group.replace("=", "/") + ".yaml" for group in groups]
    layers = [
        *((file, _read_yaml(CONFIG_DIR / file)) for file in files),
        (str(conf_path), conf),
        ("override", {_top(name): None for name in dotted}),
        ("flag", {**chosen, **values}),
    ]
    merged = _settle_warmup({**composed, **chosen, **values}, [set(content) for _, content in layers])
    return _validate(merged, _origins(layers))


def names(group: str) -> list[str]:
    """The names a group offers, for example the models that have a YAML of their own."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml") if path.stem != PATH_MODEL)


def dump(settings: PandaSettings) -> str:
    """The configuration as YAML that `--conf_path` reads back to an equal object."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _choose_groups(model: str | None, preset: str | None) -> tuple[list[str], dict[str, Any]]:
    """Hydra's group choices, and the values that follow from a model that is a path or a hub id."""
    model = model or str(_read_yaml(CONFIG_DIR / "template.yaml")["defaults"][1]["model"])
    problems, groups, chosen = [], [], {}
    if model in names("model"):
        groups.append(f"model={model}")
    elif "/" in model or Path(model).is_dir() or Path("pretrained-models", model).is_dir():
        groups.append(f"model={PATH_MODEL}")
        chosen = {"model": model}
    else:
        problems.append(_unknown("model", model) + "; a directory or a hub id (owner/name) works as well")
    if preset in names("preset"):
        groups.append(f"preset={preset}")
    elif preset:
        problems.append(_unknown("preset", preset))
    if problems:
        raise ConfigError(problems)
    return groups, chosen


def _unknown(group: str, name: str) -> str:
    known = names(group)
    return f"unknown {group} {name!r}{did_you_mean(name, known)} (known: {', '.join(known)})"


def _refuse_unknown_names(overrides: list[str]) -> None:
    known = PandaSettings.model_fields
    unknown = [_top(text) for text in overrides if _top(text) not in known]
    if unknown:
        raise ConfigError([f"unknown setting {name!r}{did_you_mean(name, known)} (override)" for name in unknown])


def _top(override: str) -> str:
    """The field an override touches: ``+architecture.hidden_size=128`` -> ``architecture``."""
    return override.split("=", 1)[0].lstrip("+~").split(".")[0]


def _compose(overrides: list[str], conf: dict[str, Any]) -> dict[str, Any]:
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
            return OmegaConf.to_container(composed, resolve=True)  # type: ignore[return-value]
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError([str(error).split("\n")[0]]) from error


def _origins(layers: list[tuple[str, dict[str, Any]]]) -> dict[str, str]:
    origins = dict.fromkeys(PandaSettings.model_fields, "default")
    for origin, content in layers:
        origins.update({name: origin for name in content})
    return origins


def _settle_warmup(merged: dict[str, Any], layers: list[set[str]]) -> dict[str, Any]:
    """The later layer decides which of the two kinds of warm-up holds; both in one layer stay, and are an error."""
    for given in reversed(layers):
        chosen = given & {"warmup_steps", "warmup_proportion"}
        if len(chosen) == 1:
            other = {"warmup_steps": "warmup_proportion", "warmup_proportion": "warmup_steps"}[chosen.pop()]
            return {**merged, other: 0}
        if chosen:
            break
    return merged


def _validate(merged: dict[str, Any], origins: dict[str, str]) -> Loaded:
    try:
        return Loaded(PandaSettings(**merged), origins)
    except ValidationError as error:
        raise ConfigError([_explain(problem, origins) for problem in error.errors()]) from None


def _explain(problem: Any, origins: dict[str, str]) -> str:
    """One pydantic problem as ``key=value: what is wrong (origin)``."""
    key = ".".join(str(part) for part in problem["loc"])
    origin = origins.get(str(problem["loc"][0]) if problem["loc"] else "", "form")
    if problem["type"] == "extra_forbidden":
        return f"unknown setting {key!r}{did_you_mean(key, PandaSettings.model_fields)} ({origin})"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return f"{key}={problem['input']!r}: {message} ({origin})" if key else message


def _read_yaml(path: Path) -> dict[str, Any]:
    """A mapping in OmegaConf's YAML dialect: 3e-4 is a float (a string in plain PyYAML), duplicate keys are errors."""
    from omegaconf._utils import get_yaml_loader

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=get_yaml_loader()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError([f"{path}: {' '.join(str(error).split())}"]) from error
    if not isinstance(content, dict):
        raise ConfigError([f"{path}: a mapping of settings is expected, not a {type(content).__name__}"])
    return content
