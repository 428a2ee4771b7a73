"""Writes docs/settings.md from the settings classes: the same text as ``--help``, the Prefect form and the template.

In: nothing. Out: Markdown, a table a group. Run ``python -m configs.reference`` after changing a setting; a test
compares the file with this.
"""

from pathlib import Path

from configs.flags import plain_text
from configs.limits import allowed, takes_mapping
from configs.settings import PandaSettings, fields_by_group

REFERENCE = Path(__file__).parents[1] / "docs" / "settings.md"
HEADER = """\
# Settings

One name everywhere: a flag of `train.py` and `panda`, a key of a YAML file, a field of the Prefect form, a parameter of
the MLflow run. Made by `python -m configs.reference` from the settings classes. Models and presets change some
defaults; `--print_config` shows the values of a run and where each comes from.
"""


def render() -> str:
    """The text of docs/settings.md."""
    return HEADER + "".join(_table(title, names) for title, names in fields_by_group().items())


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


if __name__ == "__main__":
    REFERENCE.write_text(render(), encoding="utf-8")
