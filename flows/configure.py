"""From the parameters of a flow to its configuration. In: parameters, None = not given. Out: `Loaded`, checked.

Cost: composing the YAML, 0.3 s, and a look at the names of the corpus files.
"""

from typing import Any

from configs.load import Loaded, load
from flows import preflight


def configure(parameters: dict[str, Any]) -> Loaded:
    """The configuration that the parameters make, checked as far as possible without work."""
    given = {name: value for name, value in parameters.items() if value is not None}
    loaded = load(given, given.pop("overrides", None), given.pop("conf_path", None))
    preflight.check(loaded.settings, {name for name, origin in loaded.origins.items() if origin != "default"})
    return loaded
