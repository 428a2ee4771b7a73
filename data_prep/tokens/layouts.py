"""Layouts: how the texts of a record become masked and target text.

In: the roles of a record (`data_prep.records.normalise`). Out: a `Layout`, the runs of the example, alternating masked
and target, masked first (perhaps empty). A run is what is encoded at once: the prompt up to an answer is one string, as
generation sees it; an answer is another, followed by the id that ends it. Nothing stands between them that the template
does not state.

    roles (user, input, assistant), texts ("Add.", "1 2", "3"), template plain, no bos:

        run      parts                 text          after it    target
        0        (0, "\n", 1)          "Add.\n1 2"               no
        1        (2,)                  "3"           eos         yes

Special tokens count in the literal text of a template and nowhere else: a "</s>" inside a record stays plain text.
What follows the last target is left out: it cannot influence the loss. Layouts depend on roles only, so they are made
once per pattern of roles and applied to columns; only user functions and the check of a chat template run per record.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from data_prep.errors import TokenizerError
from data_prep.records.turns import Role


class Refusal(TokenizerError):
    """A template cannot express a record, or not so that its answers are found: the record is set aside."""


class Slot(NamedTuple):
    """A text of the record, with white space stripped where a chat template strips it."""

    number: int
    strip_left: bool = False
    strip_right: bool = False

    def of(self, texts: list[str]) -> str:
        text = texts[self.number]
        text = text.lstrip() if self.strip_left else text
        return text.rstrip() if self.strip_right else text


class Run(NamedTuple):
    """Text encoded at once: literals of the template and slots. An answer, context or target, ends in ``end_id``."""

    target: bool
    parts: tuple[str | Slot, ...]
    end_id: int | None = None

    def text(self, texts: list[str]) -> str:
        return "".join(part if isinstance(part, str) else part.of(texts) for part in self.parts)


class Layout(NamedTuple):
    """The runs of every record with the same roles: a masked one first, a target last; none if it has no target."""

    runs: tuple[Run, ...]
    adds_bos: bool  # put what generation puts before a prompt (`LoadedTokenizer.bos_ids`) in front


class Segment(NamedTuple):
    """What a user's template function yields; plain ``(text, is_target)`` tuples do as well."""

    text: str
    target: bool
    special: bool = False  # the text is the template's own: special tokens in it count


@dataclass(frozen=True)
class Template:
    """A template bound to a tokenizer: layouts by roles, or of one record (``segments``) where its roles do not tell.

    Without ``layout`` every record is laid out alone; without ``segments`` none is.
    """

    name: str
    fingerprint: str
    layout: Callable[[tuple[int, ...]], Layout] | None = None
    segments: Callable[[tuple[int, ...], list[str]], tuple[Layout, list[str]]] | None = None
    alone: Callable[[tuple[int, ...]], bool] | None = None  # roles whose records are always laid out alone
    alone_text: str | None = None  # so are records that say this
    check: Callable[[tuple[int, ...], list[str]], None] | None = None  # raises if a record does not follow the layout


Piece = tuple[str | Slot, bool]  # a part and whether it is a target


def document_layout(roles: tuple[int, ...], eos_id: int) -> Layout:
    """Title and text of a pretraining record, joined by a line feed; every token is a target."""
    parts: list[str | Slot] = []
    for index in range(len(roles)):
        parts += ["\n", Slot(index)] if index else [Slot(index)]
    return Layout((Run(False, ()), Run(True, tuple(parts), eos_id)), adds_bos=True)


def is_document(roles: tuple[int, ...]) -> bool:
    """Whether the roles are those of a pretraining record."""
    return Role.TEXT in roles or Role.TITLE in roles


def runs_of(pieces: Iterable[Piece], eos_id: int) -> tuple[Run, ...]:
    """Join neighbouring pieces into alternating runs, masked first; drop what follows the last target.

    An empty masked piece keeps two targets apart, so that each gets its end.
    """
    runs: list[tuple[bool, list[str | Slot]]] = [(False, [])]
    for part, target in pieces:
        if runs[-1][0] != target:
            runs.append((target, []))
        if part != "":
            runs[-1][1].append(part)
    while runs and not runs[-1][0]:
        runs.pop()
    return tuple(Run(target, tuple(parts), eos_id if target else None) for target, parts in runs)
