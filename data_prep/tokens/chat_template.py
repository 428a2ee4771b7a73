"""A chat template in Jinja as layouts, only where the answers can be found with proof.

In: the Jinja text of a prompt template: one of ours (`data_prep.tokens.templates`), or the one that comes with a
tokenizer. Out: layouts. For each pattern of roles the template is rendered with marks in place of the texts; what
stands between the marks is literal. It is refused unless

    1. every text appears exactly once, in order, changed at most by stripping white space at its ends;
    2. it is prefix-stable: the rendering up to an answer, as generation asks for it, is a prefix of the whole
       rendering, and no answer changes once it is not the last, as where thoughts of earlier turns are left out;
    3. after the answer a token follows at which generation stops, before the next text; it ends the target;
    4. every record, rendered by the template, gives exactly the text of the layout (checked for each record of a
       tokenizer's template; ours only join texts).

What stands between the prompt and the answer's text (such as an empty ``<think>`` block) is generated, so a target.
A pretraining record has no turns: no template applies to it. ``strftime_now`` is not defined, so that nothing depends
on the date. Cost: two renderings an answer for a new pattern of roles, 0.2 ms where there are few, 50 ms for 200 turns;
for condition 4 one a record, about 20 us.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data_prep.errors import TokenizerError
from data_prep.records.turns import Role
from data_prep.tokenizer import LoadedTokenizer
from data_prep.tokens.layouts import Layout, Refusal, Run, Slot, document_layout, is_document

Roles = tuple[int, ...]
Messages = list[dict[str, Any]]
_MARK = re.compile(r"( \n)?⟦text(\d+)⟧(\n )?")  # the white space around a mark is gone where the template strips
Render = Callable[[Messages, bool, list[Any] | None], str]  # (messages, add_generation_prompt, tools)
_ADVICE = "Use chatml or alpaca, or your own function with _target_"


@dataclass(frozen=True)
class ChatTemplate:
    """A template that can be rendered, and the tokens at which generation stops: their text in a rendering -> id."""

    source: str
    render: Render
    ends: dict[str, int]
    special: re.Pattern[str]  # what would be more than text in a rendering: special tokens, and the marks of others
    names_input: bool = False  # an input is a message of its own and not more of the user's

    @property
    def reads_thoughts(self) -> bool:
        """Whether it has a place of its own for thoughts."""
        return "reasoning_content" in self.source


def chat_template_of(tokenizer: LoadedTokenizer) -> ChatTemplate:
    """The tokenizer's chat template.

    :raises TokenizerError: it has none, or one that is not valid Jinja.
    """
    ends = {text: token_id for token_id in tokenizer.stop_ids if (text := tokenizer.special_text(token_id))}
    return ChatTemplate(
        tokenizer.chat_template or "", chat_renderer(tokenizer), ends, protected({**tokenizer.special_ids, **ends})
    )


def protected(special: Iterable[str]) -> re.Pattern[str]:
    """What may not stand in a text of a record when it is rendered."""
    texts = sorted(filter(None, special), key=len, reverse=True)
    return re.compile("|".join([r"⟦special\d+⟧", *map(re.escape, texts)]))


def chat_renderer(tokenizer: LoadedTokenizer) -> Render:
    """The tokenizer's chat template, ready to be asked.

    :raises TokenizerError: it has none, or one that is not valid Jinja.
    """
    source = tokenizer.chat_template
    if source is None:
        raise TokenizerError(f"template: tokenizer, but {tokenizer.path} has no chat template. {_ADVICE}")
    try:
        return renderer(source, tokenizer.special_names)
    except TemplateError as error:
        raise TokenizerError(f"{tokenizer.path}: its chat template is not valid Jinja: {error}. {_ADVICE}") from error


def layouts_of(chat: ChatTemplate, eos_id: int, adds_bos: bool) -> Callable[[Roles], Layout]:
    """The layout of each pattern of roles; ``adds_bos`` says that bos is put in front, and not by the template.

    The function raises Refusal where one of the conditions 1 to 3 does not hold.
    """

    @lru_cache(maxsize=4096)
    def layout(roles: Roles) -> Layout:
        return document_layout(roles, eos_id) if is_document(roles) else Layout(_runs(chat, roles), adds_bos)

    return layout


def renderer(source: str, names: dict[str, str]) -> Render:
    """Jinja text with the environment that transformers gives it, less the clock; ``names`` are what it may name.

    :raises TemplateError: it is not valid Jinja.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise_exception
    template = environment.from_string(source)

    def render(messages: Messages, add_generation_prompt: bool, tools: list[Any] | None = None) -> str:
        return template.render(
            messages=messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt, **names
        )

    return render


def messages_of(roles: Roles, texts: list[str], names_input: bool) -> Messages:
    """A record as chat messages; an input continues the user's message on a new line, or is one of its own."""
    messages: Messages = []
    for role, text in zip(roles, texts, strict=True):
        if role == Role.INPUT and not names_input:
            messages[-1]["content"] += "\n" + text
        else:
            messages.append({"role": Role(role).word, "content": text})
    return messages


def _runs(chat: ChatTemplate, roles: Roles) -> tuple[Run, ...]:
    messages = messages_of(roles, [f" \n⟦text{index}⟧\n " for index in range(len(roles))], chat.names_input)
    speakers = [role for role in roles if role != Role.INPUT or chat.names_input]
    whole = rendered(chat, messages, False, roles)
    slots = [(match.span(), _slot(match)) for match in _MARK.finditer(whole)]
    if [slot.number for _, slot in slots] != list(range(len(roles))):
        raise refused(roles, "it leaves out, repeats or reorders texts")
    runs: list[Run] = []
    at = 0
    for number, role in enumerate(speakers):
        if role not in (Role.ASSISTANT, Role.ANSWERED):
            continue
        try:
            start = _prompt_end(chat, messages[:number], whole, roles)
            stop, end = _target_end(chat, whole, start, roles)
            if start < at:
                raise refused(roles, "an answer begins before the end of the one before")
            _check_answer_stays(chat, messages[: number + 1], whole[: stop + len(end)], roles)
        except Refusal:
            if role == Role.ASSISTANT:
                raise
            continue  # context that was generated otherwise stands as the template shows it now
        runs += [
            Run(False, tuple(_parts(whole, at, start, slots))),
            Run(role == Role.ASSISTANT, tuple(_parts(whole, start, stop, slots)), chat.ends[end]),
        ]
        at = stop + len(end)
    while runs and not runs[-1].target:
        runs.pop()
    return tuple(runs)


def _slot(match: re.Match[str]) -> Slot:
    return Slot(int(match[2]), strip_left=match[1] is None, strip_right=match[3] is None)


def _prompt_end(chat: ChatTemplate, messages: Messages, whole: str, roles: Roles) -> int:
    prompt = rendered(chat, messages, True, roles)
    if not whole.startswith(prompt):
        raise refused(roles, f"it is not prefix-stable: asked to answer, it renders …{prompt[-80:]!r}")
    return len(prompt)


def _check_answer_stays(chat: ChatTemplate, messages: Messages, expected: str, roles: Roles) -> None:
    """What stands at the end of the conversation when the answer was just given is what stands there ever after."""
    ending = rendered(chat, messages, False, roles)
    if not ending.startswith(expected):
        why = f"as the last one an answer is …{ending[-80:]!r}, later …{expected[-80:]!r}"
        raise refused(roles, f"it is not prefix-stable: {why}")


def _target_end(chat: ChatTemplate, whole: str, start: int, roles: Roles) -> tuple[int, str]:
    """Where the first stop token after the answer's text stands, and its text."""
    answer = _MARK.search(whole, start)
    if answer is None:
        raise refused(roles, "the text of an answer is part of its prompt")
    following = _MARK.search(whole, answer.end())
    stop = len(whole) if following is None else following.start()
    found = end_pattern(chat).search(whole, answer.end(), stop)
    if found is None:
        between = whole[answer.end() : stop]
        raise refused(roles, f"no stop token ({', '.join(chat.ends)}) follows an answer: {between!r}")
    return found.start(), found[0]


def end_pattern(chat: ChatTemplate) -> re.Pattern[str]:
    """Finds a token at which generation stops."""
    return re.compile("|".join(map(re.escape, sorted(chat.ends, key=len, reverse=True))))


def _parts(whole: str, start: int, stop: int, slots: list[tuple[tuple[int, int], Slot]]) -> list[str | Slot]:
    """``whole[start:stop]`` with slots in place of the marks."""
    parts: list[str | Slot] = []
    for (low, high), slot in slots:
        if start <= low and high <= stop:
            parts += [whole[start:low], slot] if start < low else [slot]
            start = high
    return [*parts, whole[start:stop]] if start < stop else parts


def check_record(chat: ChatTemplate, layout: Callable[[Roles], Layout], roles: Roles, texts: list[str]) -> None:
    """Condition 4 for one record."""
    if is_document(roles):
        return
    whole = rendered(chat, messages_of(roles, texts, chat.names_input), False, roles)
    text_of_end: dict[int | None, str] = {token_id: text for text, token_id in chat.ends.items()}
    at = 0
    for run in layout(roles).runs:
        text = run.text(texts)
        if not whole.startswith(text, at):
            raise refused(roles, f"it rewrites the text of a record: {texts!r:.300}")
        at += len(text) + len(text_of_end.get(run.end_id, ""))


def refused(roles: Roles, why: str) -> Refusal:
    """What is raised where a record does not fit."""
    names = " ".join(Role(role).word for role in roles)
    return Refusal(f"template: the chat template does not fit records of {names}: {why}. {_ADVICE}")


def rendered(
    chat: ChatTemplate, messages: Messages, add_generation_prompt: bool, roles: Roles, tools: list[Any] | None = None
) -> str:
    """What the template makes of messages.

    :raises Refusal: it fails.
    """
    try:
        return chat.render(messages, add_generation_prompt, tools)
    except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
        raise refused(roles, f"it fails: {error}") from error


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


class _Generation(Extension):
    """``{% generation %}...{% endgeneration %}`` marks answers for transformers; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012  # the interface of jinja2

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
