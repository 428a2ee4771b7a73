"""The prompt template of training as the chat template of the deployed model, so that it is asked as it was trained.

In: the setting ``template``, the tokenizer. Out: Jinja text for ``chat_template.jinja`` (what transformers, vLLM and
MLflow read), or None for a user's own function. Rendering it gives the ids of `template.py`, white space and all; a
test compares them. With ``template=tokenizer`` it is the tokenizer's own. Cost: none.
"""

import json
from typing import Any

from data_prep.tokenizer import LoadedTokenizer
from data_prep.tokens.layouts import Role
from data_prep.tokens.templates import ALPACA, ALPACA_HEADING

_PLAIN = """\
{{- BOS }}{% for message in messages -%}
{%- if not loop.first and 'assistant' not in (message.role, messages[loop.index0 - 1].role) %}{{ '\\n' }}{% endif -%}
{{ message.content }}{% if message.role == 'assistant' %}{{ EOS }}{% endif %}
{%- endfor %}"""

_ALPACA = """\
{{- BOS }}{% if messages[0].role != 'system' %}{{ PREAMBLE }}{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'system' %}{{ message.content }}
{%- elif message.role == 'assistant' %}{{ RESPONSE + message.content + EOS }}
{%- else %}{{ INSTRUCTION + message.content }}
{%- endif %}{{ '\\n\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ RESPONSE }}{% endif %}"""

_CHATML = """\
{{- BOS }}{% for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- if message.role == 'assistant' %}{{ EOS + '\\n' }}{% else %}{{ '<|im_end|>\\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

_SOURCES = {"plain": _PLAIN, "alpaca": _ALPACA, "chatml": _CHATML}


def served_template(setting: str | dict[str, Any], tokenizer: LoadedTokenizer) -> str | None:
    """Jinja text of a template; None where nothing is known about it."""
    if setting == "tokenizer":
        return tokenizer.chat_template
    if not isinstance(setting, str) or setting not in _SOURCES:
        return None
    values = {
        "BOS": "".join(map(tokenizer.special_text, tokenizer.bos_ids)),
        "EOS": tokenizer.special_text(tokenizer.eos_id),
        "PREAMBLE": ALPACA,
        "INSTRUCTION": ALPACA_HEADING[Role.USER],
        "RESPONSE": ALPACA_HEADING[Role.ASSISTANT],
    }
    used = {name: text for name, text in values.items() if name in _SOURCES[setting]}
    constants = "".join(f"{{%- set {name} = {json.dumps(text)} -%}}\n" for name, text in used.items())
    return constants + _SOURCES[setting]
