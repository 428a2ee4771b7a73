"""Flags of the command line, derived from the settings classes: one vocabulary, documented once.

In: argv. Out: `CommandLine` (values given by flag, Hydra overrides, switches). A value stays text here unless its type
is a list or a mapping; the settings classes convert and check it. Cost: milliseconds, nothing heavy is imported.
"""

import argparse
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any

import yaml

from configs.errors import ConfigError, did_you_mean
from configs.settings import PandaSettings, fields_by_group

OVERRIDE = re.compile(r"^[+~]{0,2}[A-Za-z_][\w.@]*=")
"""A Hydra override; taken out of argv first, so that `--adam_betas 0.9 0.95 lora_r=4` means what it says."""


@dataclass
class CommandLine:
    """What the user typed: `values` by field name, Hydra `overrides` (key=value), and the switches of the command."""

    values: dict[str, Any]
    overrides: list[str]
    switches: argparse.Namespace


@dataclass(frozen=True)
class Switch:
    """A flag of one command that is no setting, for example ``--json``."""

    name: str
    help: str
    options: dict[str, Any] = field(default_factory=lambda: {"action": "store_true"})


CONF_PATH = Switch("conf_path", "YAML file whose values go over the template's.", {"metavar": "FILE"})
PRINT_CONFIG = Switch("print_config", "Show every value with its origin, and stop.")
JSON = Switch("json", "Print one JSON object as the last line of stdout.")
VERBOSE = Switch("verbose", "Show the traceback of an error, and debug logs.")


def build_parser(prog: str, description: str, switches: list[Switch], groups: set[str] | None = None):
    """Parser with one group of flags per settings group; `groups` limits it to field names that a command uses."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--flag value ...] [key=value ...]",
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # what is not typed is not there: `--pretraining_data_dir null` is
        epilog="Hydra overrides work as well: learning_rate=2e-4 architecture.hidden_size=128",
    )
    command = parser.add_argument_group("command")
    for switch in switches:
        default = False if switch.options.get("action") == "store_true" else None
        command.add_argument(
            f"--{switch.name}", dest=f"switch_{switch.name}", default=default, help=switch.help, **switch.options
        )
    for title, names in fields_by_group().items():
        shown = [name for name in names if groups is None or name in groups]
        if shown:
            section = parser.add_argument_group(title)
            for name in shown:
                _add_field(section, name)
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> CommandLine:
    """Split argv into settings, overrides and switches; misspelt flags are named together with the nearest real one."""
    parser.error = _raise_usage  # type: ignore[method-assign]  # argparse would print usage and exit; we list problems
    overrides = [text for text in argv if OVERRIDE.match(text)]
    known, unknown = parser.parse_known_args([text for text in argv if not OVERRIDE.match(text)])
    flags = [option.lstrip("-") for action in parser._actions for option in action.option_strings]
    problems = [_explain_unknown(text, flags) for text in unknown if text.startswith("-")]
    if problems or unknown:
        raise ConfigError(problems or [f"{text!r} is neither a flag nor a key=value override" for text in unknown])
    given = vars(known)
    values = {name: _or_none(name, given[name]) for name in PandaSettings.model_fields if name in given}
    switches = argparse.Namespace(**{k.removeprefix("switch_"): v for k, v in given.items() if k.startswith("switch_")})
    return CommandLine(values, overrides, switches)


def _or_none(name: str, value: Any) -> Any:
    """`null` or `none` for a setting that may be none is None, as in YAML."""
    optional = type(None) in typing.get_args(PandaSettings.model_fields[name].annotation)
    return None if optional and value in ("null", "none", "None") else value


def _explain_unknown(flag: str, known: list[str]) -> str:
    name = flag.split("=", maxsplit=1)[0]
    return f"unknown flag {name}{did_you_mean(name.lstrip('-'), known, '--')}"


def _raise_usage(message: str) -> typing.NoReturn:
    raise ConfigError([message.replace("argument --", "--")])


def _add_field(section: argparse._ArgumentGroup, name: str) -> None:
    info = PandaSettings.model_fields[name]
    default = "none" if info.default is None else info.default
    text = f"{info.description} [{default}]".replace("%", "%%")
    kind = _plain_type(info.annotation)
    if kind is bool:
        section.add_argument(f"--{name}", nargs="?", const="true", metavar="true|false", help=text)
    elif typing.get_origin(kind) in (list, tuple):
        section.add_argument(f"--{name}", nargs="+", action=_Sequence, metavar="VALUE", help=text)
    else:
        section.add_argument(f"--{name}", type=_reader(info.annotation), metavar=_metavar(kind), help=text)


def _plain_type(annotation: Any) -> Any:
    """The type of a field without `| None`."""
    if isinstance(annotation, types.UnionType):
        parts = [part for part in typing.get_args(annotation) if part is not type(None)]
        return parts[0]
    return annotation


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(str(value) for value in typing.get_args(kind))
    origin = typing.get_origin(kind) or kind
    return {int: "N", float: "X", dict: "YAML"}.get(origin, "TEXT")


def _reader(annotation: Any) -> Any:
    """A mapping may be typed as YAML; everything else stays text for the settings class to convert."""
    union = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if not any(typing.get_origin(part) is dict for part in union):
        return str

    def read(text: str) -> Any:
        return yaml.safe_load(text) if text.lstrip().startswith("{") or str not in union else text

    return read


class _Sequence(argparse.Action):
    """`--adam_betas 0.9 0.99`, `0.9,0.99`, `(0.9, 0.99)` and `[0.9, 0.99]` are the same."""

    def __call__(self, parser, namespace, values, option_string=None):
        items = " ".join(values).replace(",", " ").strip("()[] ").split()
        setattr(namespace, self.dest, items)
