"""The tokenizer's own chat template as a `Template`, only where its answers can be found with proof.

In: the Jinja text that comes with a tokenizer. Out: layouts. For each pattern of roles the template is rendered with
marks in place of the texts; what stands between the marks is literal. It is refused unless

    1. every text appears exactly once, in order, changed at most by stripping white space at its ends;
    2. it is prefix-stable: the rendering up to an answer, as generation asks for it, is a prefix of the whole
       rendering, and no answer changes once it is not the last, as where thoughts of earlier turns are left out;
    3. after the answer a token follows at which generation stops, before the next text; it ends the target;
    4. every record, rendered by the template, gives exactly the text of the layout (checked for each record).

What stands between the prompt and the answer's text (such as an empty ``<think>`` block) is generated, so a target.
A pretraining record has no turns: the template does not apply to it. ``strftime_now`` is not defined, so that nothing
depends on the date. Cost: one rendering a record, about 20 us.
"""

import json
import re
from collections.abc import Callable
from functools import lru_cache, partial

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data_prep import store
from data_prep.errors import TokenizerError
from data_prep.tokenizer import LoadedTokenizer
from data_prep.tokens.layouts import Layout, Piece, Role, Slot, Template, document_layout, is_document, runs_of

Render = Callable[[list[dict[str, str]], bool], str]
Roles = tuple[int, ...]
_ROLE_NAMES = {Role.SYSTEM: "system", Role.USER: "user", Role.ASSISTANT: "assistant"}
_MARK = re.compile(r"( \n)?⟦text(\d+)⟧(\n )?")  # the white space around a mark is gone where the template strips
_ADVICE = "Use chatml or alpaca, or your own function with _target_"


def load_chat_template(tokenizer: LoadedTokenizer) -> Template:
    """The tokenizer's chat template.

    :raises TokenizerError: it has none; later, per pattern of roles, if the answers cannot be found with proof.
    """
    render = chat_renderer(tokenizer)
    layout = lru_cache(maxsize=4096)(partial(chat_layout, render, tokenizer))
    return Template(
        "tokenizer",
        store.fingerprint(template="tokenizer", version=2, source=tokenizer.chat_template),
        layout=layout,
        check=partial(_check, render, layout, {i: tokenizer.special_text(i) for i in tokenizer.stop_ids}),
    )


def messages_of(roles: Roles, texts: list[str]) -> list[dict[str, str]]:
    """A record as chat messages; an input text continues the user's message on a new line."""
    messages: list[dict[str, str]] = []
    for role, text in zip(roles, texts, strict=True):
        if role == Role.INPUT:
            messages[-1]["content"] += "\n" + text
        else:
            messages.append({"role": _ROLE_NAMES[Role(role)], "content": text})
    return messages


def chat_layout(render: Render, tokenizer: LoadedTokenizer, roles: Roles) -> Layout:
    """The layout of all records with these roles.

    :raises TokenizerError: one of the conditions 1 to 3 does not hold.
    """
    if is_document(roles):
        return document_layout(roles, tokenizer.eos_id)
    messages = messages_of(roles, [f" \n⟦text{index}⟧\n " for index in range(len(roles))])
    whole = _rendered(render, messages, False, roles)
    slots = [(match.span(), _slot(match)) for match in _MARK.finditer(whole)]
    if [slot.number for _, slot in slots] != list(range(len(roles))):
        raise _refused(roles, "it leaves out, repeats or reorders texts")
    pieces: list[Piece] = []
    ends: list[int] = []
    at = 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = _prompt_end(render, messages[:number], whole, roles)
        stop, end_id = _target_end(whole, start, tokenizer, roles)
        if start < at:
            raise _refused(roles, "an answer begins before the end of the one before")
        end = stop + len(tokenizer.special_text(end_id))
        _check_answer_stays(render, messages[: number + 1], whole[:end], roles)
        pieces += [("", False), *((part, False) for part in _parts(whole, at, start, slots))]
        pieces += [(part, True) for part in _parts(whole, start, stop, slots)]
        ends.append(end_id)
        at = end
    masked, targets = runs_of(pieces, 0)[0::2], runs_of(pieces, 0)[1::2]
    ended = (target._replace(end_id=end) for target, end in zip(targets, ends, strict=True))
    return Layout(tuple(run for pair in zip(masked, ended, strict=True) for run in pair), adds_bos=False)


def _slot(match: re.Match[str]) -> Slot:
    return Slot(int(match[2]), strip_left=match[1] is None, strip_right=match[3] is None)


def _prompt_end(render: Render, messages: list[dict[str, str]], whole: str, roles: Roles) -> int:
    prompt = _rendered(render, messages, True, roles)
    if not whole.startswith(prompt):
        raise _refused(roles, f"it is not prefix-stable: asked to answer, it renders …{prompt[-80:]!r}")
    return len(prompt)


def _check_answer_stays(render: Render, messages: list[dict[str, str]], expected: str, roles: Roles) -> None:
    """What stands at the end of the conversation when the answer was just given is what stands there ever after."""
    ending = _rendered(render, messages, False, roles)
    if not ending.startswith(expected):
        why = f"as the last one an answer is …{ending[-80:]!r}, later …{expected[-80:]!r}"
        raise _refused(roles, f"it is not prefix-stable: {why}")


def _target_end(whole: str, start: int, tokenizer: LoadedTokenizer, roles: Roles) -> tuple[int, int]:
    """Where the first stop token after the answer's text stands, and its id."""
    answer = _MARK.search(whole, start)
    if answer is None:
        raise _refused(roles, "the text of an answer is part of its prompt")
    following = _MARK.search(whole, answer.end())
    stop = len(whole) if following is None else following.start()
    texts = {text: token_id for token_id in tokenizer.stop_ids if (text := tokenizer.special_text(token_id))}
    found = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))).search(whole, answer.end(), stop)
    if found is None:
        raise _refused(roles, f"no stop token ({', '.join(texts)}) follows an answer: {whole[answer.end() : stop]!r}")
    return found.start(), texts[found[0]]


def _parts(whole: str, start: int, stop: int, slots: list[tuple[tuple[int, int], Slot]]) -> list[str | Slot]:
    """``whole[start:stop]`` with slots in place of the marks."""
    parts: list[str | Slot] = []
    for (low, high), slot in slots:
        if start <= low and high <= stop:
            parts += [whole[start:low], slot] if start < low else [slot]
            start = high
    return [*parts, whole[start:stop]] if start < stop else parts


def _check(
    render: Render, layout: Callable[[Roles], Layout], end_text: dict[int | None, str], roles: Roles, texts: list[str]
) -> None:
    """Condition 4 for one record."""
    if is_document(roles):
        return
    rendered = _rendered(render, messages_of(roles, texts), False, roles)
    at = 0
    for run in layout(roles).runs:
        text = run.text(texts)
        if not rendered.startswith(text, at):
            raise _refused(roles, f"it rewrites the text of a record: {texts!r:.300}")
        at += len(text) + len(end_text.get(run.end_id, ""))


def _refused(roles: Roles, why: str) -> TokenizerError:
    names = " ".join(Role(role).name.lower() for role in roles)
    return TokenizerError(f"template: tokenizer: the chat template does not fit records of {names}: {why}. {_ADVICE}")


def _rendered(render: Render, messages: list[dict[str, str]], add_generation_prompt: bool, roles: Roles) -> str:
    try:
        return render(messages, add_generation_prompt)
    except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
        raise _refused(roles, f"it fails: {error}") from error


def chat_renderer(tokenizer: LoadedTokenizer) -> Render:
    """The template with the environment that transformers gives it, less the clock."""
    source = tokenizer.chat_template
    if source is None:
        raise TokenizerError(f"template: tokenizer, but {tokenizer.path} has no chat template. {_ADVICE}")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise_exception
    try:
        template = environment.from_string(source)
    except TemplateError as error:
        raise TokenizerError(f"{tokenizer.path}: its chat template is not valid Jinja: {error}. {_ADVICE}") from error
    names = tokenizer.special_names

    def render(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **names)

    return render


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


class _Generation(Extension):
    """``{% generation %}...{% endgeneration %}`` marks answers for transformers; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012  # the interface of jinja2

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
