"""YAML as Hydra reads it: 3e-4 is a float (a string in plain PyYAML), a key given twice is an error.

In: text. Out: plain values. Cost: importing omegaconf, ~0.1 s, once.
"""

from typing import Any

import yaml


def parse(text: str) -> Any:
    """The value of a YAML text. Raises `yaml.YAMLError`."""
    from omegaconf._utils import get_yaml_loader

    return yaml.load(text, Loader=get_yaml_loader())


def one_line(error: Exception) -> str:
    """A parser's message without its drawing."""
    return " ".join(str(error).split())
