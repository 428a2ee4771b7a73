"""Prompt templates by name: plain, alpaca, chatml, the tokenizer's own, or a user's function.

In: the setting ``template``, the tokenizer. Out: a `Template`, which gives the `Layout` of a record by its roles. A
layout is made once per pattern of roles and applied to columns; only user functions run per record.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

from data_prep import store
from data_prep.errors import TokenizerError
from data_prep.targets import load_target, target_fingerprint
from data_prep.tokenizer import LoadedTokenizer
from data_prep.tokens.chat_template import load_chat_template
from data_prep.tokens.layouts import Layout, Piece, Role, Segment, Slot, Template, document_layout, is_document, runs_of


def load_template(setting: str | dict[str, Any], tokenizer: LoadedTokenizer) -> Template:
    """The template of the setting ``template``: a name of `TEMPLATES`, ``tokenizer``, or a ``_target_`` node."""
    if not isinstance(setting, str):
        make = partial(_user_layout, load_target(setting, "template"), tokenizer.eos_id)
        node = store.fingerprint(template=target_fingerprint(setting, "template"))
        return Template("user", node, segments=make)
    if setting == "tokenizer":
        return load_chat_template(tokenizer)
    if setting not in TEMPLATES:
        known = ", ".join([*TEMPLATES, "tokenizer"])
        raise TokenizerError(f"template: unknown name {setting!r}; use one of {known}, or a _target_ node")
    layout = lru_cache(maxsize=4096)(partial(_layout, TEMPLATES[setting], tokenizer))
    return Template(setting, store.fingerprint(template=setting, version=1), layout=layout)


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
