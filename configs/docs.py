"""What is written from the settings classes, so that a default is stated once and shown everywhere.

In: nothing, or a `Loaded`. Out: configs/template.yaml and docs/settings.md (``python -m configs.docs``, after a
setting has changed; a test compares both files with this), the configuration with the origin of every value for
``--print_config``, and the completion script of the shells, which holds all words, so that TAB starts no Python:
``eval "$(panda completion)"`` in ~/.bashrc or ~/.zshrc.
"""

import textwrap
import typing
from pathlib import Path

import yaml

from configs.cli import CONF_PATH, DRY_RUN, JSON, PLAN_SWITCHES, PRINT_CONFIG, VERBOSE, plain_text
from configs.field_types import allowed, kind_of, takes_mapping
from configs.load import CONFIG_DIR, Loaded, names
from configs.settings import PandaSettings, fields_by_group

REFERENCE = Path(__file__).parents[1] / "docs" / "settings.md"
REFERENCE_HEADER = """\
# Settings

One name everywhere: a flag of `train.py` and `panda`, a key of a YAML file, a field of the Prefect form, a parameter of
the MLflow run. Made by `python -m configs.docs` from the settings classes. Models and presets change some
defaults; `--print_config` shows the values of a run and where each comes from.
"""


def reference() -> str:
    """The text of docs/settings.md."""
    return REFERENCE_HEADER + "".join(_table(title, group) for title, group in fields_by_group().items())


def _table(title: str, names: list[str]) -> str:
    rows = "".join(_row(name) for name in names)
    return f"\n## {title}\n\n| setting | takes | default | what it is |\n| --- | --- | --- | --- |\n{rows}"


def _row(name: str) -> str:
    info = PandaSettings.model_fields[name]
    takes = allowed(name).removeprefix("one of ")
    if takes_mapping(name) and "mapping" not in takes:
        takes += " or a mapping"
    cells = [f"`{name}`", takes, plain_text(info.default), " ".join(str(info.description).split())]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


TEMPLATE_HEADER = """\
# All settings with their defaults, made by `python -m configs.docs` from the settings classes.
# To use your own values: put only those that differ into a file, and run `python train.py --conf_path FILE`.
defaults:
  - _self_
  - model: panda-tiny
  - optional preset: null
"""
CHOSEN_BY_GROUP = ("model", "preset")
END = "...\n"  # PyYAML closes a bare scalar with a document end


def template() -> str:
    """The text of configs/template.yaml."""
    parts = [TEMPLATE_HEADER]
    for title, group in fields_by_group().items():
        parts.append(f"\n# --- {title}\n")
        parts.extend(_entry(name) for name in group if name not in CHOSEN_BY_GROUP)
    return "".join(parts)


def _entry(name: str) -> str:
    info = PandaSettings.model_fields[name]
    comment = textwrap.fill(str(info.description), 116, initial_indent="# ", subsequent_indent="# ")
    value = list(info.default) if isinstance(info.default, tuple) else info.default
    return f"{comment}\n{name}: {yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix(END)}"


COLUMN = 44


def with_origins(loaded: Loaded) -> str:
    """One line a setting, in groups: ``name: value  # origin``."""
    lines = []
    for title, group in fields_by_group().items():
        lines.append(f"\n# --- {title}")
        lines.extend(_line(loaded, name) for name in group)
    return "\n".join(lines).lstrip("\n")


def _line(loaded: Loaded, name: str) -> str:
    value = loaded.settings.model_dump(mode="json", include={name})[name]
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True, sort_keys=False)
    return f"{name}: {text.removesuffix(END).strip()}".ljust(COLUMN) + f"  # {loaded.origins[name]}"


SWITCHES = ("help", *(one.name for one in (CONF_PATH, DRY_RUN, JSON, PRINT_CONFIG, VERBOSE, *PLAN_SWITCHES)))
FILES = ("cache_dir", "ckpt_path", "conf_path", "hostfile", "instruction_tuning_data_dir", "output_dir",
         "pretraining_data_dir")  # fmt: skip
SCRIPT = """\
if [ -n "$ZSH_VERSION" ]; then autoload -U +X compinit && compinit && autoload -U +X bashcompinit && bashcompinit; fi
_panda() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" flag="${{COMP_WORDS[COMP_CWORD-1]}}" words="{flags}"
    if [ "$COMP_CWORD" -eq 1 ] && [ "${{COMP_WORDS[0]##*/}}" = panda ]; then words="{verbs}"; fi
    case "$flag" in
{cases}
        {files}) COMPREPLY=($(compgen -f -- "$word")); return ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _panda panda train.py
"""


def completion_script(verbs: list[str]) -> str:
    """The completion script of the commands `panda` and `train.py`."""
    values = {name: words for name in PandaSettings.model_fields if (words := _values(name))}
    return SCRIPT.format(
        flags=" ".join(f"--{name}" for name in sorted({*PandaSettings.model_fields, *SWITCHES})),
        verbs=" ".join(verbs),
        cases="\n".join(f'        --{name}) words="{" ".join(words)}" ;;' for name, words in values.items()),
        files="|".join(f"--{name}" for name in FILES),
    )


def _values(name: str) -> list[str]:
    """The words that may follow a flag; none when anything may."""
    kind = kind_of(name)
    if name == "model":
        return names("model")
    if kind is bool:
        return ["true", "false"]
    return [str(value) for value in typing.get_args(kind)] if typing.get_origin(kind) is typing.Literal else []


if __name__ == "__main__":
    (CONFIG_DIR / "template.yaml").write_text(template(), encoding="utf-8")
    REFERENCE.write_text(reference(), encoding="utf-8")
