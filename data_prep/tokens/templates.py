"""Prompt templates: how the texts of a record become masked and target text.

In: the roles of a record (`Role`). Out: a `Layout`, the runs of the example, alternating masked and target, masked
first (perhaps empty). A run is what is encoded at once: the prompt up to an answer is one string, as generation sees
it; an answer is another, followed by the id that ends it. Nothing stands between them that the template does not state.

    roles (user, input, assistant), texts ("Add.", "1 2", "3"), template plain, no bos:

        run      parts                 text          after it    target
        0        (0, "\n", 1)          "Add.\n1 2"               no
        1        (2,)                  "3"           eos         yes

Special tokens count in the literal text of a template and nowhere else: a "</s>" inside a record stays plain text.
What follows the last target is left out: it cannot influence the loss. Layouts depend on roles only, so they are made
once per pattern of roles and applied to columns; only user functions and the check of a chat template run per record.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache, partial
from typing import Any, NamedTuple

from data_prep import store
from data_prep.errors import TokenizerError
from data_prep.targets import load_target, target_fingerprint
from data_prep.tokens.tokenizer import LoadedTokenizer


class Role(IntEnum):
    """What a text of a record is; the values are those of the records files."""

    SYSTEM = 0
    USER = 1
    INPUT = 2
    ASSISTANT = 3
    TITLE = 4
    TEXT = 5


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
    """Text encoded at once: literals of the template and slots; a target run ends in ``end_id``."""

    target: bool
    parts: tuple[str | Slot, ...]
    end_id: int | None = None

    def text(self, texts: list[str]) -> str:
        return "".join(part if isinstance(part, str) else part.of(texts) for part in self.parts)


class Layout(NamedTuple):
    """The runs of every record with the same roles: masked, target, masked, ..., target; none if it has no target."""

    runs: tuple[Run, ...]
    adds_bos: bool  # put what generation puts before a prompt (`LoadedTokenizer.bos_ids`) in front


class Segment(NamedTuple):
    """What a user's template function yields; plain ``(text, is_target)`` tuples do as well."""

    text: str
    target: bool
    special: bool = False  # the text is the template's own: special tokens in it count


@dataclass(frozen=True)
class Template:
    """A template bound to a tokenizer. One of ``layout`` and ``segments`` is given."""

    name: str
    fingerprint: str
    layout: Callable[[tuple[int, ...]], Layout] | None = None
    segments: Callable[[tuple[int, ...], list[str]], tuple[Layout, list[str]]] | None = None
    check: Callable[[tuple[int, ...], list[str]], None] | None = None  # raises if a record does not follow the layout


def load_template(setting: str | dict[str, Any], tokenizer: LoadedTokenizer) -> Template:
    """The template of the setting ``template``: a name of `TEMPLATES`, ``tokenizer``, or a ``_target_`` node."""
    if not isinstance(setting, str):
        make = partial(_user_layout, load_target(setting, "template"), tokenizer.eos_id)
        node = store.fingerprint(template=target_fingerprint(setting, "template"))
        return Template("user", node, segments=make)
    if setting == "tokenizer":
        from data_prep.tokens.chat_template import load_chat_template

        return load_chat_template(tokenizer)
    if setting not in TEMPLATES:
        known = ", ".join([*TEMPLATES, "tokenizer"])
        raise TokenizerError(f"template: unknown name {setting!r}; use one of {known}, or a _target_ node")
    layout = lru_cache(maxsize=4096)(partial(_layout, TEMPLATES[setting], tokenizer))
    return Template(setting, store.fingerprint(template=setting, version=1), layout=layout)


Piece = tuple[str | Slot, bool]  # a part and whether it is a target
Turns = list[tuple[int, Role]]  # (number of the text, what it is)


def plain(turns: Turns, tokenizer: LoadedTokenizer) -> Iterator[Piece]:
    """The texts as they are; prompt texts in a row (system, instruction, input) are joined by a line feed."""
    previous = Role.ASSISTANT
    for index, role in turns:
        yield "\n" if Role.ASSISTANT not in (previous, role) else "", False
        yield Slot(index), role == Role.ASSISTANT
        previous = role


ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
ALPACA_HEADING = {Role.USER: "### Instruction:\n", Role.INPUT: "### Input:\n", Role.ASSISTANT: "### Response:\n"}


def alpaca(turns: Turns, tokenizer: LoadedTokenizer) -> Iterator[Piece]:
    """Stanford Alpaca's headings; a system text takes the place of its preamble, later turns have none."""
    roles = [role for _, role in turns]
    if roles[0] != Role.SYSTEM:
        yield ALPACA_WITH_INPUT if Role.INPUT in roles[:2] else ALPACA, False
    for index, role in turns:
        if role == Role.SYSTEM:
            yield from ((Slot(index), False), ("\n\n", False))
            continue
        yield ALPACA_HEADING[role], False
        yield Slot(index), role == Role.ASSISTANT
        yield "\n\n", False


_CHATML_ROLE = {Role.SYSTEM: "system", Role.USER: "user", Role.ASSISTANT: "assistant"}


def chatml(turns: Turns, tokenizer: LoadedTokenizer) -> Iterator[Piece]:
    """ChatML: ``<|im_start|>role`` line feed text ``<|im_end|>`` line feed. An answer ends in the tokenizer's eos."""
    for number, (index, role) in enumerate(turns):
        if role == Role.INPUT:
            continue
        yield f"<|im_start|>{_CHATML_ROLE[role]}\n", False
        yield Slot(index), role == Role.ASSISTANT
        if number + 1 < len(turns) and turns[number + 1][1] == Role.INPUT:
            yield from (("\n", False), (Slot(turns[number + 1][0]), False))
        yield "\n" if role == Role.ASSISTANT else "<|im_end|>\n", False


TEMPLATES: dict[str, Callable[[Turns, LoadedTokenizer], Iterator[Piece]]] = {
    "plain": plain,
    "alpaca": alpaca,
    "chatml": chatml,
}


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


def _layout(template: Callable[..., Iterator[Piece]], tokenizer: LoadedTokenizer, roles: tuple[int, ...]) -> Layout:
    if is_document(roles):
        return document_layout(roles, tokenizer.eos_id)
    turns = [(index, Role(role)) for index, role in enumerate(roles)]
    return Layout(runs_of(template(turns, tokenizer), tokenizer.eos_id), adds_bos=True)


def _segment(text: str, target: bool, special: bool = False) -> Segment:
    if not isinstance(text, str):
        raise TypeError(f"a segment is (text, is_target), and the text a string, not {text!r:.80}")
    return Segment(text, bool(target), bool(special))


def _user_layout(
    function: Callable[..., Any], eos_id: int, roles: tuple[int, ...], texts: list[str]
) -> tuple[Layout, list[str]]:
    """A layout of one record and the texts of its slots, from the segments of a user's function."""
    record = [{"role": Role(role).name.lower(), "content": text} for role, text in zip(roles, texts, strict=True)]
    try:
        segments = [_segment(*segment) for segment in function(record)]
    except Exception as error:  # whatever a user's function raises is for the user to see, with the record
        raise TokenizerError(f"template: your function failed: {type(error).__name__}: {error}") from error
    pieces = ((s.text if s.special else Slot(i), s.target) for i, s in enumerate(segments))
    return Layout(runs_of(pieces, eos_id), adds_bos=True), [segment.text for segment in segments]
