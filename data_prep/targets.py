"""`_target_` nodes of the configuration: the user's own functions, by their dotted path.

In: ``{"_target_": "my_package.my_module.read_csv", "delimiter": ";"}``. Out: the function with its keyword arguments
bound, and a hash of the source file it lives in, so that what it made is made again when its code changes. A node among
the fields is called and gives the field its value. Modules are found as by ``import``, and in the working directory.
Every node passes the checks of `data_prep.allowed` here, with all that is in it, before anything of it is imported.
"""

import importlib
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from data_prep import allowed
from data_prep.errors import PandaError
from data_prep.store import hash_file

LONGEST_SECONDS = 3600
"""How long a function of the user's may take for one record. What hangs would hang every retraining after it too."""


def load_target(node: dict[str, Any], setting: str) -> Callable:
    """The function a node names, with its other fields bound as keyword arguments.

    :param setting: the name of the setting, for the error message.
    :raises PandaError: it may not be called (`panda.toml`), or cannot be imported.
    """
    module, name = _split(node, setting)
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise PandaError(f"{setting}: cannot import {node['_target_']} ({error}); {_places()}") from error
    try:
        allowed.check_object(node["_target_"], function)
    except PandaError as error:
        raise PandaError(f"{setting}: {error}") from error
    fields = {key: value for key, value in node.items() if key != "_target_"}
    return partial(function, **{key: _value(value, setting) for key, value in fields.items()})


def _value(value: Any, setting: str) -> Any:
    """The value of a field: what a node returns, anything else as it is."""
    return load_target(value, setting)() if isinstance(value, dict) and "_target_" in value else value


def target_fingerprint(node: dict[str, Any], setting: str) -> dict[str, Any]:
    """What a node's results depend on: the node itself and the bytes of the module it names (not what that imports)."""
    module, _ = _split(node, setting)
    try:
        spec, why = importlib.util.find_spec(module), ""
    except ImportError as error:  # of a package around it, which is imported for that
        spec, why = None, f" ({error})"
    if spec is None:
        raise PandaError(f"{setting}: no module {module}{why}; {_places()}")
    return {"node": node, "source": hash_file(spec.origin) if spec.origin and spec.has_location else None}


@contextmanager
def in_time() -> Iterator[None]:
    """Around a call of the user's own code: what takes longer than `LONGEST_SECONDS` is ended, again every second.

    Only in the main thread of a process, where signals arrive: a Dask worker's tasks may take for ever. Cost: 7 us.

    :raises TimeoutError: in the user's own code, wherever it waits.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, _too_late)
    timer = signal.setitimer(signal.ITIMER_REAL, LONGEST_SECONDS, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)


def _too_late(*_: Any) -> None:
    raise TimeoutError(f"no result after {LONGEST_SECONDS:,} s")


def problems_of(value: Any) -> list[str]:
    """What forbids the nodes in the value of a setting; nothing is imported.

    From here on the working directory is among the places where modules are found.
    """
    if os.getcwd() not in sys.path:  # last: nothing there may hide an installed module
        sys.path.append(os.getcwd())
    return allowed.problems(value)


def _split(node: dict[str, Any], setting: str) -> tuple[str, str]:
    """Module and name of a node that may be called."""
    if found := problems_of(node):
        raise PandaError(f"{setting}: {found[0]}")
    module, _, name = node["_target_"].rpartition(".")
    return module, name


def _places() -> str:
    return f"modules are looked for on PYTHONPATH and in the working directory ({os.getcwd()})"
