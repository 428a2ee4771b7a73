"""Chat templates of the shapes that well-known models have, shortened: whose answers are found, whose are refused."""

import json

import pytest

from data_prep.errors import TokenizerError
from data_prep.records.turns import Role
from data_prep.tokenizer import load_tokenizer
from data_prep.tokens.templates import load_template
from tests.data_prep.tokens.test_templates import story
from tests.support.tokenizers import bytes_core, save

SYSTEM, USER, ASSISTANT = Role.SYSTEM, Role.USER, Role.ASSISTANT
CHAT = [USER, ASSISTANT, USER, ASSISTANT]

LLAMA_3 = (
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN_2_5 = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nYou help.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    '{%- if message.role == "user" or (message.role == "system" and not loop.first)'
    ' or (message.role == "assistant" and not message.tool_calls) %}'
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
QWEN_3 = (  # answers before the last question lose their thoughts
    "{%- set ns = namespace(last=0) %}"
    "{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}"
    "{%- endfor %}"
    "{%- for message in messages %}"
    "{%- set content = message.content %}{%- set thoughts = '' %}"
    "{%- if message.role == 'assistant' and '</think>' in content %}"
    "{%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' and loop.index0 > ns.last %}"
    "{{- '<think>\n' + thoughts + '\n</think>\n\n' }}{%- endif %}"
    "{{- content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def template_of(tmp_path, source, bos, eos, stop=None):
    """The small tokenizer with special tokens and chat template of a model; ``stop`` is one more stop token."""
    core = bytes_core()
    core.add_special_tokens([token for token in (bos, eos, stop) if token])
    directory = save(core, tmp_path, bos_token=bos, eos_token=eos, chat_template=source)
    if stop:
        ids = [core.token_to_id(eos), core.token_to_id(stop)]
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return load_template("tokenizer", load_tokenizer(directory)), core


def test_llama_3(tmp_path):
    template, core = template_of(tmp_path, LLAMA_3, "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
    end = core.token_to_id("<|eot_id|>")
    assert story(template, [SYSTEM, *CHAT], [" s", "a", "b\n", "c", "d"]) == [
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        f"=> b[{end}]",
        "<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        f"=> d[{end}]",
    ]
    template.check(tuple(CHAT), ["a", " b ", "c", "d"])


def test_qwen_2_5(tmp_path):
    template, core = template_of(tmp_path, QWEN_2_5, None, "<|im_end|>")
    end = core.token_to_id("<|im_end|>")
    assert story(template, CHAT, list("abcd")) == [
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
        f"=> b[{end}]",
        "\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n",
        f"=> d[{end}]",
    ]
    assert story(template, [SYSTEM, USER, ASSISTANT], list("sab"))[0].startswith("<|im_start|>system\ns<|im_end|>\n")
    template.check(tuple(CHAT), list("abcd"))


def test_gemma(tmp_path):
    template, core = template_of(tmp_path, GEMMA, "<bos>", "<eos>", "<end_of_turn>")
    end = core.token_to_id("<end_of_turn>")
    assert story(template, CHAT, list("abcd")) == [
        "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\n",
        f"=> b[{end}]",
        "\n<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n",
        f"=> d[{end}]",
    ]
    with pytest.raises(TokenizerError, match=r"records of system user assistant.*System role not supported"):
        template.layout((SYSTEM, USER, ASSISTANT))
    with pytest.raises(TokenizerError, match="must alternate"):
        template.layout((USER, ASSISTANT, ASSISTANT))


def test_qwen_3_fits_one_answer_without_thoughts(tmp_path):
    """The empty thoughts are what the model is to generate, so they are a target."""
    template, core = template_of(tmp_path, QWEN_3, None, "<|im_end|>")
    assert story(template, [USER, ASSISTANT], ["a", "b"]) == [
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
        f"=> <think>\n\n</think>\n\nb[{core.token_to_id('<|im_end|>')}]",
    ]
    with pytest.raises(TokenizerError, match="rewrites the text of a record"):
        template.check((USER, ASSISTANT), ["a", "<think>\nhm\n</think>\n\nb"])


def test_qwen_3_is_refused_where_an_answer_changes_once_it_is_not_the_last(tmp_path):
    template, _ = template_of(tmp_path, QWEN_3, None, "<|im_end|>")
    with pytest.raises(TokenizerError, match=r"not prefix-stable.*Use chatml or alpaca"):
        template.layout(tuple(CHAT))
