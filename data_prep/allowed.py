"""Whether a `_target_` node may be called: by its name before anything is imported, and by what it turns out to be.

Allowed are modules that lie in the working directory, a few harmless names (`ALWAYS`), and what the owner of the
machine adds in `panda.toml`. Never, whatever that file says: Python's own modules (builtins, os, subprocess, functools,
...), libraries that call or load what they are told, and the packages of this project, which start processes and write
files. A module of the user may have imported any of these, so the object that a name stands for is looked at as well:
it must come from where its name says it does. In: a node, an object. Out: a problem in words, or None. Cost: some stat
calls.
"""

import functools
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from data_prep.errors import PandaError
from data_prep.owner import Owner, owner

ALWAYS = ("torch.optim", "training.engines.optimizers")
OURS = ("benchmarks", "configs", "data_prep", "deploy", "flows", "tasks", "tests", "train", "training")
"""All that this project brings: what lies in a clone beside the user's modules is not the user's."""
TRAMPOLINES = (
    *("cloudpickle", "dill", "hydra", "joblib", "omegaconf", "pandas.eval", "pip", "pkg_resources", "prefect"),
    *("setuptools", "torch.classes", "torch.hub", "torch.jit", "torch.load", "torch.multiprocessing", "torch.ops"),
    *("torch.serialization", "torch.utils.cpp_extension", "yaml"),
)
"""Names outside the standard library that call, load or run what their arguments say."""
DATA = ("cache", "dataset", "outputs")
"""Directories in the working directory whose content others have written."""
INSTALLED = ("site-packages", "dist-packages")


def problems(value: Any) -> list[str]:
    """What forbids the nodes in a value, at whatever depth; nothing is imported."""
    rules = owner()
    return list(dict.fromkeys(found for name in names(value) if (found := _problem(name, rules))))


def names(value: Any) -> Iterator[Any]:
    """What every `_target_` in a value names."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield value["_target_"]
        for inner in value.values():
            yield from names(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from names(inner)


def check_object(name: str, found: Any) -> None:
    """Raise a PandaError when the object that an allowed name stands for comes from where no name may point."""
    rules = owner()
    named_by_owner = name in rules.allowed_targets
    for module in _homes(found):
        never = not isinstance(module, str) or _is_never(module)
        if never or not (named_by_owner or _is_allowed(module, rules)):
            raise PandaError(
                f"{name} is not what its name says: it comes from {module or type(found).__name__}, which `_target_` "
                "may not name; write a function of your own that calls it"
                + ("" if never else f", or {rules.advice('allowed_targets', name)}")
            )


def _problem(name: Any, rules: Owner) -> str | None:
    parts = name.split(".") if isinstance(name, str) else []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        return f"{name!r} is not of the form package.module.function"
    if _is_never(name):
        return (
            f"{name} may not be named by `_target_`: modules of Python itself and others that run what they are told "
            f"never may; write a function of your own in the working directory ({rules.path.parent})"
        )
    if _is_allowed(name, rules):
        return None
    if _spec(parts[0]) is None:
        return (
            f"no module {parts[0]}; modules are looked for on PYTHONPATH and in the working directory ({os.getcwd()})"
        )
    return (
        f"{name} may not be named by `_target_`: it lies outside of the working directory ({rules.path.parent}) "
        f"or in its {', '.join(DATA)}; " + rules.advice("allowed_targets", name.rpartition(".")[0])
    )


def _is_never(name: str) -> bool:
    top = _top(name)
    if top in sys.stdlib_module_names or top in sys.builtin_module_names or top.startswith("__"):
        return True
    if any(part.startswith("__") for part in name.split(".")):
        return True
    return not _below(name, ALWAYS) and (top in OURS or _below(name, TRAMPOLINES))


def _is_allowed(name: str, rules: Owner) -> bool:
    return _below(name, ALWAYS) or _below(name, rules.allowed_targets) or _in_working_directory(_top(name))


def _top(name: str) -> str:
    return name.partition(".")[0]


def _below(name: str, prefixes: tuple[str, ...] | list[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _in_working_directory(top: str) -> bool:
    """Whether a top-level module is a file or directory there, installed by nobody, written by us or the user."""
    spec = _spec(top)
    if spec is None or top in DATA:
        return False
    places = [spec.origin] if spec.has_location else list(spec.submodule_search_locations or [])
    return bool(places) and all(place and _is_own_file(Path(place)) for place in places)


def _spec(top: str) -> ModuleSpec | None:
    """Where a top-level module is; it is not imported."""
    try:
        return importlib.util.find_spec(top)
    except (ImportError, ValueError):  # ValueError: __main__ and the like
        return None


def _is_own_file(path: Path) -> bool:
    here = Path(os.getcwd())
    absolute = Path(os.path.abspath(path))  # a link in the working directory is its owner's doing: not followed
    places = [place for place in (absolute, absolute.resolve()) if place.is_relative_to(here)]
    environment = Path(sys.prefix)
    return bool(places) and not any(
        set(INSTALLED) & set(place.relative_to(here).parts)
        or (environment.is_relative_to(here) and place.is_relative_to(environment))
        for place in places
    )


def _homes(found: Any) -> Iterator[Any]:
    """The modules that define what a call of the object would run, as far as the object shows them."""
    if isinstance(found, functools.partial):
        yield from _homes(found.func)
        return
    if isinstance(found, types.MethodType):
        yield from _homes(found.__func__)
        yield type(found.__self__).__module__ if not isinstance(found.__self__, type) else found.__self__.__module__
        return
    wrapped = getattr(found, "__wrapped__", None)
    if wrapped is not None:
        yield from _homes(wrapped)
    if isinstance(found, (type, types.FunctionType, types.BuiltinFunctionType)) or wrapped is not None:
        yield getattr(found, "__module__", None)
    else:  # an object of a class that can be called
        yield type(found).__module__
