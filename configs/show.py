"""The configuration as YAML with the origin of every value, for ``--print_config``.

In: `Loaded`. Out: text that ``--conf_path`` reads back. Cost: none.
"""

import yaml

from configs.load import Loaded
from configs.settings import fields_by_group

COLUMN = 44
END = "...\n"  # PyYAML closes a bare scalar with a document end


def render(loaded: Loaded) -> str:
    """One line a setting, in groups: ``name: value  # origin``."""
    lines = []
    for title, names in fields_by_group().items():
        lines.append(f"\n# --- {title}")
        lines.extend(_line(loaded, name) for name in names)
    return "\n".join(lines).lstrip("\n")


def _line(loaded: Loaded, name: str) -> str:
    value = loaded.settings.model_dump(mode="json", include={name})[name]
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True, sort_keys=False)
    return f"{name}: {text.removesuffix(END).strip()}".ljust(COLUMN) + f"  # {loaded.origins[name]}"
