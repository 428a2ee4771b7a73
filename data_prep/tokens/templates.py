"""Prompt templates by name: plain, alpaca, chatml, the tokenizer's own, or a user's function.

In: the setting ``template``, the tokenizer. Out: a `Template`, which gives the `Layout` of a record by its roles; and,
of the same Jinja text, the chat template of the deployed model (what transformers, vLLM and MLflow read), so that it is
asked as it was trained. BOS and EOS in it are texts of tokens when a model is asked; when a record is laid out, bos is
put in front as ids and eos is a mark. A test compares the ids of both.
Cost: a layout is made once per pattern of roles and applied to columns; only user functions run per record.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from data_prep import store
from data_prep.errors import TokenizerError
from data_prep.records.turns import Role
from data_prep.settings import TEMPLATES
from data_prep.targets import in_time, load_target, target_fingerprint
from data_prep.tokenizer import LoadedTokenizer
from data_prep.tokens.chat_template import (
    ChatTemplate,
    Roles,
    chat_template_of,
    check_record,
    layouts_of,
    protected,
    renderer,
)
from data_prep.tokens.conversation import record_layout
from data_prep.tokens.layouts import Layout, Refusal, Segment, Slot, Template, runs_of

PLAIN = """\
{#- The texts as they are; prompt texts in a row (system, instruction, input) are joined by a line feed. -#}
{{- BOS }}{% for message in messages -%}
{%- if not loop.first and 'assistant' not in (message.role, messages[loop.index0 - 1].role) %}{{ '\\n' }}{% endif -%}
{{ message.content }}{% if message.role == 'assistant' %}{{ EOS }}{% endif %}
{%- endfor %}"""

ALPACA = """\
{#- Stanford Alpaca's headings; a system text takes the place of its preamble, later turns have none. -#}
{{- BOS }}{% if not messages or messages[0].role != 'system' -%}
{{- 'Below is an instruction that describes a task' }}
{%- if 'input' in messages[:2] | map(attribute='role') %}{{ ', paired with an input that provides further context' }}
{%- endif %}{{ '. Write a response that appropriately completes the request.\\n\\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'system' %}{{ message.content }}
{%- elif message.role == 'assistant' %}{{ '### Response:\\n' + message.content + EOS }}
{%- elif message.role == 'input' %}{{ '### Input:\\n' + message.content }}
{%- else %}{{ '### Instruction:\\n' + message.content }}
{%- endif %}{{ '\\n\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"""

CHATML = """\
{#- An answer ends in the tokenizer's eos. -#}
{{- BOS }}{% for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- if message.role == 'assistant' %}{{ EOS + '\\n' }}{% else %}{{ '<|im_end|>\\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

SOURCES = {"plain": PLAIN, "alpaca": ALPACA, "chatml": CHATML}
NAMES_INPUT = {"alpaca"}  # an input has a heading of its own
ALONE = {Role.FIELDS, Role.RESULT, Role.TOOLS}  # a record with one of these is laid out from its own rendering
_EOS_MARK = "⟦eos⟧"


def load_template(
    setting: str | dict[str, Any], tokenizer: LoadedTokenizer, train_on: str = "all", reasoning: str = "train"
) -> Template:
    """The template of the setting ``template``: a name of `TEMPLATES`, or a ``_target_`` node.

    :raises TokenizerError: it is unknown, cannot be loaded, or cannot do what the other settings ask.
    """
    unusual = {"train_on": train_on} if train_on != "all" else {}
    unusual |= {"reasoning": reasoning} if reasoning != "train" else {}
    if not isinstance(setting, str):
        if unusual:
            asked = ", ".join(f"{name}={value}" for name, value in unusual.items())
            raise TokenizerError(f"{asked}: your own function says itself which segments are targets; leave it out")
        make = partial(_user_layout, load_target(setting, "template"), tokenizer.eos_id)
        node = store.fingerprint(template=target_fingerprint(setting, "template"))
        return Template("user", node, segments=make)
    if setting == "tokenizer":
        source = {"template": "tokenizer", "version": 2, "source": tokenizer.chat_template}
        return _bound(chat_template_of(tokenizer), source, unusual, tokenizer)
    if setting not in SOURCES:
        raise TokenizerError(
            f"template: unknown name {setting!r}; use one of {', '.join(TEMPLATES)}, or a _target_ node"
        )
    render = renderer(SOURCES[setting], {"BOS": "", "EOS": _EOS_MARK})
    special = protected({*tokenizer.special_ids, _EOS_MARK})
    chat = ChatTemplate(SOURCES[setting], render, {_EOS_MARK: tokenizer.eos_id}, special, setting in NAMES_INPUT)
    return _bound(chat, {"template": setting, "version": 1}, unusual, tokenizer)


def _bound(chat: ChatTemplate, source: dict[str, Any], unusual: dict[str, str], tokenizer: LoadedTokenizer) -> Template:
    """A named template; ours leave it to the tokenizer to put bos in front."""
    adds_bos = source["template"] != "tokenizer"
    reasoning, last = unusual.get("reasoning", "train"), unusual.get("train_on") == "last"
    by_roles = layouts_of(chat, tokenizer.eos_id, adds_bos)

    def layout(roles: Roles) -> Layout:
        return by_roles(_last_alone(roles) if last else roles)

    def segments(roles: Roles, texts: list[str]) -> tuple[Layout, list[str]]:
        return record_layout(chat, _last_alone(roles) if last else roles, texts, reasoning, adds_bos)

    return Template(
        source["template"],
        store.fingerprint(**source, **unusual),
        layout=layout,
        segments=segments,
        alone=lambda roles: not ALONE.isdisjoint(roles),
        alone_text=None if reasoning == "train" else "</think>",
        check=None if adds_bos else partial(check_record, chat, layout),
    )


def _last_alone(roles: Roles) -> Roles:
    """The same record with all answers but the last trained one as context."""
    last = max((number for number, role in enumerate(roles) if role == Role.ASSISTANT), default=0)
    return tuple(
        Role.ANSWERED if role == Role.ASSISTANT and number < last else role for number, role in enumerate(roles)
    )


def served_template(setting: str | dict[str, Any], tokenizer: LoadedTokenizer) -> str | None:
    """Jinja text for ``chat_template.jinja`` of the deployed model; None for a user's own function."""
    if setting == "tokenizer":
        return tokenizer.chat_template
    if not isinstance(setting, str):
        return None
    bos = "".join(map(tokenizer.special_text, tokenizer.bos_ids))
    values = {"BOS": bos, "EOS": tokenizer.special_text(tokenizer.eos_id)}
    constants = "".join(f"{{%- set {name} = {json.dumps(text)} -%}}\n" for name, text in values.items())
    return constants + SOURCES[setting]


def _segment(text: str, target: bool, special: bool = False) -> Segment:
    if not isinstance(text, str):
        raise TypeError(f"a segment is (text, is_target), and the text a string, not {text!r:.80}")
    text.encode()  # a lone surrogate is no text for any tokenizer: UnicodeEncodeError
    return Segment(text, bool(target), bool(special))


def _user_layout(
    function: Callable[..., Any], eos_id: int, roles: tuple[int, ...], texts: list[str]
) -> tuple[Layout, list[str]]:
    """A layout of one record and the texts of its slots, from the segments of a user's function."""
    if not {Role.ANSWERED, *ALONE}.isdisjoint(roles):
        raise Refusal("template: your own function gets texts alone, and this record has weights, tools or thoughts")
    record = [{"role": Role(role).word, "content": text} for role, text in zip(roles, texts, strict=True)]
    try:
        with in_time():
            segments = [_segment(*segment) for segment in function(record)]
    except Exception as error:  # whatever a user's function raises is for the user to see, with the record
        raise TokenizerError(f"template: your function failed: {type(error).__name__}: {error}") from error
    pieces = ((s.text if s.special else Slot(i), s.target) for i, s in enumerate(segments))
    return Layout(runs_of(pieces, eos_id), adds_bos=True), [segment.text for segment in segments]
