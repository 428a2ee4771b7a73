"""Flags of the command line, derived from the settings classes: one vocabulary, documented once.

In: argv. Out: `CommandLine` (values given by flag, Hydra overrides, switches). A value stays text here unless its type
is a list or a mapping; the settings classes convert and check it. Cost: milliseconds, nothing heavy is imported.

From argv to checked settings: what every command with settings does first.

In: argv. Out: `CommandLine` and `Loaded`, or one `ConfigError` with the problems of flags, files and values together;
``--help`` prints the flags with the values that the rest of argv would give them, and exits. Cost: ~0.4 s.
"""

import argparse
import re
import typing
from dataclasses import dataclass, field
from typing import Any

import yaml

from configs import guide_names
from configs.errors import ConfigError, did_you_mean
from configs.field_types import allowed, kind_of, takes_mapping, takes_none
from configs.load import Loaded, load, one_line, parse_yaml
from configs.settings import PandaSettings, fields_by_group

OVERRIDE = re.compile(r"^[+~]{0,2}[A-Za-z_][\w.@]*=")
"""A Hydra override; taken out of argv first, so that `--adam_betas 0.9 0.95 lora_r=4` means what it says."""
MISSING = "<no value>"


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


@dataclass(frozen=True)
class Shown:
    """The value of a setting as help shows it, and where it comes from."""

    value: Any
    origin: str


CONF_PATH = Switch("conf_path", "YAML file whose values go over the template's.", {"metavar": "FILE"})
PRINT_CONFIG = Switch("print_config", "Show every value with its origin, and stop.")
JSON = Switch("json", "Print one JSON object as the last line of stdout.")
VERBOSE = Switch("verbose", "Show the traceback of an error, and debug logs.")
DRY_RUN = Switch("dry_run", "Tell what would be done, like `panda plan`, and stop.")
PLAN_SWITCHES = [
    Switch("gpu_memory_gb", "Plan for GPUs with this much memory each; not given = what this machine has.",
           {"metavar": "GB", "type": float}),
    Switch("host_memory_gb", "CPU memory of a machine with these GPUs; not given = of this one, if it has them.",
           {"metavar": "GB", "type": float}),
    Switch("tokens_per_second", "Speed of all ranks together, for the hours of a plan; not given = as earlier runs.",
           {"metavar": "N", "type": float}),
    Switch("exact", "Also play a step of all ranks (FSDP2) with tensors without memory: memory and traffic by phase."),
]  # fmt: skip


def build_parser(
    prog: str,
    description: str,
    switches: list[Switch],
    groups: set[str] | None = None,
    shown: dict[str, Shown] | None = None,
) -> argparse.ArgumentParser:
    """Parser with one group of flags per settings group.

    :param groups: limits the flags to the field names that a command uses.
    :param shown: the values help shows; the defaults of the settings classes when not given.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--flag value ...] [key=value ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=_formatter,
        epilog="Each setting: what it is (its range) [its value; where that comes from]. "
        "Hydra overrides work as well: learning_rate=2e-4 architecture.hidden_size=128",
    )
    command = parser.add_argument_group("command")
    for switch in switches:
        command.add_argument(f"--{switch.name}", dest=f"switch_{switch.name}", help=switch.help, **switch.options)
    for title, names in fields_by_group().items():
        offered = [name for name in names if groups is None or name in groups]
        if offered:
            section = parser.add_argument_group(title)
            for name in offered:
                _add_field(section, name, (shown or {}).get(name) or _default(name))
    return parser


def read(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[CommandLine, list[str]]:
    """What is right in argv, and the problems with the rest; a misspelt flag comes with the nearest real one."""
    parser.error = _raise_usage  # type: ignore[method-assign]  # argparse would print usage and exit; we list problems
    argv = guide_names.in_words(argv)
    overrides = [text for text in argv if OVERRIDE.match(text)]
    known, unknown = parser.parse_known_args([text for text in argv if not OVERRIDE.match(text)])
    problems = _explain_unknown(parser, unknown)
    values = {}
    for name, text in vars(known).items():
        if name in PandaSettings.model_fields and text is not None:
            try:
                values[name] = _convert(name, text)
            except ValueError as error:
                problems.append(f"--{name} {error}")
    switches = {key.removeprefix("switch_"): value for key, value in vars(known).items() if key.startswith("switch_")}
    return CommandLine(values, overrides, argparse.Namespace(**switches)), problems


def _explain_unknown(parser: argparse.ArgumentParser, unknown: list[str]) -> list[str]:
    """The unknown flags; what follows one of them is taken for its value."""
    flags = [option.lstrip("-") for action in parser._actions for option in action.option_strings]
    misspelt = [text.split("=", maxsplit=1)[0] for text in unknown if text.startswith("-")]
    if unknown and not misspelt:
        return [f"{text!r} is neither a flag nor a key=value override" for text in unknown]
    return [f"unknown flag {name}{did_you_mean(name.lstrip('-'), flags, '--')}" for name in misspelt]


def _raise_usage(message: str) -> typing.NoReturn:
    raise ConfigError([message.replace("argument --", "--")])


def _convert(name: str, text: Any) -> Any:
    """The value of a flag: lists split, mappings read, the rest left to the settings classes."""
    kind = kind_of(name)
    if text in (MISSING, []):
        raise ValueError(f"needs a value: {allowed(name)}")
    if takes_none(name) and str(text).lower() in ("none", "null"):
        return None
    if takes_mapping(name) and text.lstrip().startswith(("{", "[")):
        return _mapping(text)
    if typing.get_origin(kind) in (list, tuple) and isinstance(text, list):
        return " ".join(text).replace(",", " ").strip("()[] ").split()
    if typing.get_origin(kind) is typing.Literal:
        return {str(value): value for value in typing.get_args(kind)}.get(text, text)
    return text


def _mapping(text: str) -> Any:
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{text}: no YAML mapping: {one_line(error)}") from error
    if isinstance(value, dict) and None in value.values():
        raise ValueError(f"{text}: a key without a value; write {{key: value}} with a space after the colon, in quotes")
    return value


def _add_field(section: argparse._ArgumentGroup, name: str, shown: Shown) -> None:
    kind, takes = kind_of(name), allowed(name)
    limits = f" ({takes})" if " >" in takes or " <" in takes else ""
    text = f"{PandaSettings.model_fields[name].description}{limits} [{plain_text(shown.value)}; {shown.origin}]"
    options: dict[str, Any] = {"nargs": "?", "const": "true" if kind is bool else MISSING}
    if typing.get_origin(kind) in (list, tuple) and not takes_mapping(name):
        options = {"nargs": "*"}
    section.add_argument(f"--{name}", metavar=_metavar(name), help=text.replace("%", "%%"), **options)


def _default(name: str) -> Shown:
    return Shown(PandaSettings.model_fields[name].default, "default")


def plain_text(value: Any) -> str:
    """A value as one would type it after its flag."""
    if isinstance(value, bool) or value is None:
        return {None: "none", True: "true", False: "false"}[value]
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _metavar(name: str) -> str:
    kind = kind_of(name)
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(str(value) for value in typing.get_args(kind))
    if takes_mapping(name):
        return "YAML" if kind is not str else "NAME|YAML"
    return {int: "N", float: "X", bool: "true|false", str: "TEXT"}.get(kind, "VALUE")


def _formatter(prog: str) -> argparse.HelpFormatter:
    return _Formatter(prog, max_help_position=30)


class _Formatter(argparse.HelpFormatter):
    """Shows `--flag VALUE`, without the brackets of argument counts that exist for better error messages."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return str(action.metavar) if action.nargs in ("?", "*") else super()._format_args(action, default_metavar)


def configure(
    prog: str, description: str, argv: list[str], switches: list[Switch], names: set[str] | None = None
) -> tuple[CommandLine, Loaded]:
    """Read argv and load the configuration it means; `names` limits the flags to those the command uses."""
    if {"-h", "--help"} & set(argv):
        build_parser(prog, description, switches, names, _shown(prog, argv, switches)).parse_args(["--help"])
    line, problems = read(build_parser(prog, description, switches, names), argv)
    return line, load(line.values, line.overrides, getattr(line.switches, "conf_path", None), problems)


def _shown(prog: str, argv: list[str], switches: list[Switch]) -> dict[str, Shown]:
    """The values that the rest of argv means; none when there is something wrong with it."""
    rest = [text for text in argv if text not in ("-h", "--help")]
    try:
        _, loaded = configure(prog, "", rest, switches)
    except ConfigError:
        return {}
    return {name: Shown(getattr(loaded.settings, name), origin) for name, origin in loaded.origins.items()}
