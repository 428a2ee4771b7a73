"""`_target_` nodes of the configuration: the user's own functions, by their dotted path.

In: ``{"_target_": "my_package.my_module.read_csv", "delimiter": ";"}``. Out: the function with its keyword arguments
bound, and a hash of the source file it lives in, so that what it made is made again when its code changes.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

from data_prep.errors import PandaError
from data_prep.store import hash_file


def load_target(node: dict[str, Any], setting: str) -> Callable:
    """The function a node names, with its other fields bound as keyword arguments.

    :param setting: the name of the setting, for the error message.
    :raises PandaError: it cannot be imported.
    """
    module, name = _split(node)
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise PandaError(f"{setting}: cannot import {node['_target_']} ({error}); is it on PYTHONPATH?") from error
    return partial(function, **{key: value for key, value in node.items() if key != "_target_"})


def target_fingerprint(node: dict[str, Any], setting: str) -> dict[str, Any]:
    """What a node's results depend on: the node itself and the bytes of the module it names (not what that imports)."""
    module, _ = _split(node)
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:
        spec = None
    if spec is None:
        raise PandaError(f"{setting}: no module {module}; is it on PYTHONPATH?")
    return {"node": node, "source": hash_file(spec.origin) if spec.origin and spec.has_location else None}


def _split(node: dict[str, Any]) -> tuple[str, str]:
    module, _, name = node["_target_"].rpartition(".")
    return module, name
