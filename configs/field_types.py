"""What values a setting takes, in words: for help texts and error messages.

In: the name of a field. Out: text such as ``a number >= 0 and < 1``. Cost: none.
"""

import types
import typing
from typing import Any

import annotated_types

from configs.settings import PandaSettings

COMPARISONS = {
    annotated_types.Ge: (">=", "ge"),
    annotated_types.Gt: (">", "gt"),
    annotated_types.Le: ("<=", "le"),
    annotated_types.Lt: ("<", "lt"),
}
NOUNS = {int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping", str: "text"}


def allowed(name: str) -> str:
    """The values field `name` takes; for text that must look a certain way, an example."""
    info = PandaSettings.model_fields[name]
    words = _words(info.annotation, info.metadata)
    return f"{words} such as {info.examples[0]}" if info.examples else words


def kind_of(name: str) -> Any:
    """The type of a field without `| None` and without its limits."""
    return plain(PandaSettings.model_fields[name].annotation)


def takes_none(name: str) -> bool:
    """Whether a field may be empty, which is typed as `none`."""
    return type(None) in typing.get_args(PandaSettings.model_fields[name].annotation)


def takes_mapping(name: str) -> bool:
    """Whether a field may hold a mapping, which is typed as YAML."""
    annotation = PandaSettings.model_fields[name].annotation
    parts = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    return any(_is_mapping(part) for part in parts)


def plain(annotation: Any) -> Any:
    """A type without `| None` (the first one of several) and without `Annotated`."""
    if _is_union(annotation):
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation


def _is_mapping(annotation: Any) -> bool:
    kind = plain(annotation)
    if typing.get_origin(kind) is list:
        return _is_mapping(typing.get_args(kind)[0])
    return typing.get_origin(kind) is dict


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (types.UnionType, typing.Union)  # the latter: a Literal | None


def _words(annotation: Any, metadata: list[Any]) -> str:
    kind = plain(annotation)
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(value) for value in parts)
    if origin is tuple:
        return f"{len(parts)} values, each {_part(parts[0])}"
    if origin is list:
        return "a list of mappings" if _is_mapping(kind) else "one or more values"
    limits = [f"{COMPARISONS[type(item)][0]} {getattr(item, COMPARISONS[type(item)][1])}" for item in _limits(metadata)]
    return " ".join([NOUNS[origin or kind], " and ".join(limits)]).strip()


def _part(annotation: Any) -> str:
    if typing.get_origin(annotation) is not typing.Annotated:
        return NOUNS[annotation]
    kind, *metadata = typing.get_args(annotation)
    return _words(kind, [item for field in metadata for item in getattr(field, "metadata", [field])])


def _limits(metadata: list[Any]) -> list[Any]:
    return [item for item in metadata if type(item) in COMPARISONS]
