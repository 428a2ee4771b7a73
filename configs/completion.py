"""Shell completion: flags, names of models and presets, allowed values, files.

In: the verbs of the command. Out: a bash script (zsh reads it through its bash emulation). It holds all words, so that
TAB costs no start of Python. ``eval "$(panda completion)"`` in ~/.bashrc or ~/.zshrc.
"""

import typing

from configs.limits import kind_of
from configs.load import names
from configs.settings import PandaSettings

SWITCHES = ("conf_path", "dry_run", "gpu_memory_gb", "help", "json", "print_config", "tokens_per_second", "verbose")
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


def script(verbs: list[str]) -> str:
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
