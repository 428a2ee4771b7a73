"""Names in PandaLLM's guide that are ours under another spelling: they work, and a line says what they are taken as.

In: words of a command line, keys of a YAML file. Out: the same with our names. `reader` is called as the guide calls
its `read_tensor` (`data_prep.records.user_reader`), so the node itself stays as it is. Cost: none.
"""

import logging
import re
from functools import cache
from typing import Any

OURS = {"learing_rate": "learning_rate", "read_tensor": "reader"}
"""Name in the guide -> the setting."""
NAMES = "|".join(OURS)
WORD = re.compile(rf"(--)({NAMES})(=.*)?|([+~]{{0,2}})({NAMES})((?:\.[\w.@]+)?=.*)", re.DOTALL)
"""A flag, or a Hydra override."""

logger = logging.getLogger(__name__)


def in_words(words: list[str]) -> list[str]:
    """Words of a command line or Hydra overrides: ``--learing_rate 2e-3`` and ``learing_rate=2e-3``."""
    return [_word(*filter(None, match.groups())) if (match := WORD.fullmatch(word)) else word for word in words]


def in_mapping(content: dict[str, Any], where: str, problems: list[str]) -> dict[str, Any]:
    """The keys of a YAML file; a setting given under both names is a problem."""
    for name in content.keys() & OURS:
        if OURS[name] in content:
            problems.append(f"{name} is the guide's name of {OURS[name]}; give one of the two ({where})")
        _say(f"{where}: {name} is taken as {OURS[name]}")
    return {OURS.get(name, name): value for name, value in content.items()}


def _word(*parts: str) -> str:
    """Prefix, name and rest of a word, of which only the name is always there."""
    name = next(part for part in parts if part in OURS)
    before, _, after = "".join(parts).partition(name)
    _say(f"{before}{name} is taken as {before}{OURS[name]}")
    return f"{before}{OURS[name]}{after}"


@cache
def _say(line: str) -> None:
    """Once a process: a direct run reads its configuration twice."""
    logger.info(line)
