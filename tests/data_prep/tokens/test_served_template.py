"""The deployed model's chat template gives the ids training saw, through transformers' own renderer."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from data_prep.records.turns import Role
from data_prep.tokenizer import load_tokenizer
from data_prep.tokens.templates import load_template, served_template

CHATS = [
    ["user"],
    ["system", "user"],
    ["user", "assistant", "user"],
    ["system", "user", "assistant", "user", "assistant", "user"],
]


@pytest.fixture(params=["with bos", "without bos"])
def directory(request, tmp_path):
    """A byte-level tokenizer with ChatML's tokens, that adds a bos or not."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    core.train_from_iterator(["Write a response that completes the request."], trainer)
    if request.param == "with bos":
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    core.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        *((name, roles) for name in ("plain", "alpaca", "chatml") for roles in CHATS),
        *((name, ["user", "input"]) for name in ("plain", "alpaca")),  # chatml: more of the user's message
    ],
)
def test_the_prompt_is_the_one_of_training(directory, name, roles):
    tokenizer = load_tokenizer(directory)
    (directory / "chat_template.jinja").write_text(served_template(name, tokenizer))
    texts = [f"  text {number}\nof a chat{{{{ x }}}} 中文 \n" for number in range(len(roles))]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    deployed = AutoTokenizer.from_pretrained(directory)
    asked = deployed.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = deployed(asked, add_special_tokens=False).input_ids
    assert ids == trained_prompt(tokenizer, name, [*roles, "assistant"], [*texts, "the answer"])


def trained_prompt(tokenizer, name: str, roles: list[str], texts: list[str]) -> list[int]:
    """Ids of everything before the last answer, run by run as the examples are made."""
    layout = load_template(name, tokenizer).layout(tuple(Role[role.upper()] for role in roles))
    ids = list(tokenizer.bos_ids) if layout.adds_bos else []
    for run in layout.runs[:-1]:
        ids += tokenizer.core.encode(run.text(texts), add_special_tokens=False).ids
        ids += [run.end_id] if run.target else []
    return ids


def test_other_templates(directory):
    tokenizer = load_tokenizer(directory)
    assert served_template({"_target_": "mine.template"}, tokenizer) is None
    assert served_template("tokenizer", tokenizer) is None
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    assert served_template("tokenizer", load_tokenizer(directory)) == "{{ messages }}"
