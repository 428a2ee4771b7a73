"""Writes configs/template.yaml from the settings classes, so that defaults are stated once and shown everywhere.

In: nothing. Out: the YAML text, one commented section per group. Run ``python -m configs.template`` after changing a
setting; a test compares the file with this.
"""

import textwrap

import yaml

from configs.load import CONFIG_DIR
from configs.settings import PandaSettings, fields_by_group

HEADER = """\
# All settings with their defaults, made by `python -m configs.template` from the settings classes.
# To use your own values: put only those that differ into a file, and run `python train.py --conf_path FILE`.
defaults:
  - _self_
  - model: panda-tiny
  - optional preset: null
"""
CHOSEN_BY_GROUP = ("model", "preset")
END = "...\n"  # PyYAML closes a bare scalar with a document end


def render() -> str:
    """The text of template.yaml."""
    parts = [HEADER]
    for title, names in fields_by_group().items():
        parts.append(f"\n# --- {title}\n")
        parts.extend(_entry(name) for name in names if name not in CHOSEN_BY_GROUP)
    return "".join(parts)


def _entry(name: str) -> str:
    info = PandaSettings.model_fields[name]
    comment = textwrap.fill(str(info.description), 116, initial_indent="# ", subsequent_indent="# ")
    value = list(info.default) if isinstance(info.default, tuple) else info.default
    return f"{comment}\n{name}: {yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix(END)}"


if __name__ == "__main__":
    (CONFIG_DIR / "template.yaml").write_text(render(), encoding="utf-8")
