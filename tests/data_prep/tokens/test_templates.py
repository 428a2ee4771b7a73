"""Templates on records small enough to check by eye: every line below is a run, `=>` marks targets."""

from itertools import pairwise, product

import pytest

from data_prep import store
from data_prep.errors import PandaError, TokenizerError
from data_prep.records.normalise import Role
from data_prep.tokenizer import load_tokenizer
from data_prep.tokens.layouts import runs_of
from data_prep.tokens.templates import load_template
from tests.support.tokenizers import bytes_core, save

USER, INPUT, ASSISTANT, SYSTEM, TITLE, TEXT = (
    Role.USER, Role.INPUT, Role.ASSISTANT, Role.SYSTEM, Role.TITLE, Role.TEXT,
)  # fmt: skip
PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)


def story(template, roles, texts):
    """The runs of a record as text, targets after `=>` and with the token that ends them."""
    layout = template.layout(tuple(roles))
    return [
        ("=> " if run.target else "") + run.text(texts) + (f"[{run.end_id}]" if run.target else "")
        for run in layout.runs
    ]


@pytest.mark.parametrize(
    ("name", "roles", "texts", "expected"),
    [
        ("plain", [USER, ASSISTANT], ["1+1=", "2"], ["1+1=", "=> 2[1]"]),
        ("plain", [USER, INPUT, ASSISTANT], ["Add.", "1 1", "2"], ["Add.\n1 1", "=> 2[1]"]),
        ("plain", [SYSTEM, USER, ASSISTANT, USER, ASSISTANT], list("sabcd"), ["s\na", "=> b[1]", "c", "=> d[1]"]),
        ("plain", [USER, ASSISTANT, ASSISTANT], list("abc"), ["a", "=> b[1]", "", "=> c[1]"]),
        ("plain", [USER, ASSISTANT, USER], list("abc"), ["a", "=> b[1]"]),
        ("plain", [USER], ["a"], []),
        ("plain", [TITLE, TEXT], ["深圳", "一月"], ["", "=> 深圳\n一月[1]"]),
        ("plain", [TEXT], ["一月"], ["", "=> 一月[1]"]),
        ("chatml", [TEXT], ["一月"], ["", "=> 一月[1]"]),
        (
            "alpaca",
            [USER, ASSISTANT, USER, ASSISTANT],
            list("abcd"),
            [
                f"{PREAMBLE}### Instruction:\na\n\n### Response:\n",
                "=> b[1]",
                "\n\n### Instruction:\nc\n\n### Response:\n",
                "=> d[1]",
            ],
        ),
        (
            "alpaca",
            [SYSTEM, USER, INPUT, ASSISTANT],
            list("sabc"),
            ["s\n\n### Instruction:\na\n\n### Input:\nb\n\n### Response:\n", "=> c[1]"],
        ),
        (
            "chatml",
            [SYSTEM, USER, INPUT, ASSISTANT, USER, ASSISTANT],
            list("sabcde"),
            [
                "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n",
                "=> c[1]",
                "\n<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\n",
                "=> e[1]",
            ],
        ),
    ],
)
def test_runs_by_eye(bytes_tokenizer, name, roles, texts, expected):
    assert story(load_template(name, bytes_tokenizer), roles, texts) == expected


def test_alpaca_names_the_input(bytes_tokenizer):
    (prompt, _) = story(load_template("alpaca", bytes_tokenizer), [USER, INPUT, ASSISTANT], list("abc"))
    assert prompt.startswith("Below is an instruction that describes a task, paired with an input")


@pytest.mark.parametrize(
    ("name", "fingerprint", "layouts"),
    [
        ("plain", "c833aa7e57b2388398cf4622cde21dc6", "4331256894c29f2c9c960767c0dd872e"),
        ("alpaca", "e56c9be8ac2d95ab66026bd294a9e95b", "fd8e9af6311a79cba31278cb9d67ba9b"),
        ("chatml", "3e3f43e56ba77620d297ab61b398dd10", "9c0c30dedd1ae1de1185871ebb569e62"),
    ],
)
def test_token_shards_made_before_stay_valid(bytes_tokenizer, name, fingerprint, layouts):
    """The fingerprint says what the layouts are: who changes one of them raises the version in the fingerprint."""
    template = load_template(name, bytes_tokenizer)
    assert template.fingerprint == fingerprint
    patterns = [roles for length in range(1, 5) for roles in product(Role, repeat=length) if can_be(roles)]
    stories = [story(template, roles, list("abcd")[: len(roles)]) for roles in patterns]
    assert store.fingerprint(stories=stories) == layouts


def can_be(roles):
    """An input stands only beside an instruction."""
    return all(before == USER for before, role in pairwise([None, *roles]) if role == INPUT)


def test_an_unknown_name_lists_the_known(bytes_tokenizer):
    with pytest.raises(TokenizerError, match="plain, alpaca, chatml, tokenizer"):
        load_template("llama", bytes_tokenizer)


def test_runs_alternate_and_start_masked():
    runs = runs_of([("a", True), ("b", True), ("c", False), ("d", True), ("e", False)], 9)
    assert [(run.target, run.parts, run.end_id) for run in runs] == [
        (False, (), None), (True, ("a", "b"), 9), (False, ("c",), None), (True, ("d",), 9),
    ]  # fmt: skip


def test_a_users_function(bytes_tokenizer):
    node = {"_target_": "users_functions.upside_down", "mark": "?"}
    layout, texts = load_template(node, bytes_tokenizer).segments((USER, ASSISTANT), ["q", "a"])
    assert [(run.target, run.text(texts)) for run in layout.runs] == [
        (False, ""), (True, "a"), (False, "?q"), (True, "?"),
    ]  # fmt: skip


def test_a_users_function_that_is_not_there(bytes_tokenizer):
    with pytest.raises(PandaError, match=r"template.*no_such"):
        load_template({"_target_": "users_functions.no_such"}, bytes_tokenizer)


# ------------------------------------------------------------------------------------------------ chat templates

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(tmp_path, source, **config):
    directory = save(bytes_core(), tmp_path, eos_token="<|im_end|>", **config)
    if source is not None:
        (directory / "chat_template.jinja").write_text(source)
    return load_template("tokenizer", load_tokenizer(directory))


def test_a_chat_template_by_eye(tmp_path):
    template = chat(tmp_path, CHATML)
    assert story(template, [USER, ASSISTANT, USER, INPUT, ASSISTANT], list("abcde")) == [
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
        "=> b[3]",
        "\n<|im_start|>user\nc\nd<|im_end|>\n<|im_start|>assistant\n",
        "=> e[3]",
    ]
    assert not template.layout((USER, ASSISTANT)).adds_bos
    assert template.layout((TEXT,)).adds_bos
    template.check((USER, ASSISTANT), ["any ⟦text0⟧ <|im_end|>", "text\n"])


def test_stripping_is_found_and_followed(tmp_path):
    template = chat(tmp_path, CHATML.replace("m.content", "m.content | trim"))
    record = ([USER, ASSISTANT], [" \n a b \n", "\tc\n"])
    assert story(template, *record) == ["<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\n", "=> c[3]"]
    template.check((USER, ASSISTANT), record[1])


def test_generation_blocks_and_bos_are_rendered(tmp_path):
    source = CHATML.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    template = chat(tmp_path, "{{ bos_token }}" + source, bos_token="<s>")
    assert story(template, [USER, ASSISTANT], ["a", "b"])[0].startswith("<s><|im_start|>user\na")


def test_what_stands_before_the_answers_text_is_generated_too(tmp_path):
    source = CHATML.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
    )
    assert story(chat(tmp_path, source), [USER, ASSISTANT], ["a", "b"])[1] == "=> <think></think>b[3]"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (CHATML.replace("<|im_end|>", "\n"), "no stop token"),
        (CHATML.replace("{% for", "{{ messages | length }}{% for"), "not prefix-stable"),
        (CHATML.replace("m.content", "m.content[:3]"), "leaves out"),
        (CHATML.replace("in messages", "in messages | reverse"), "reorders"),
        (CHATML + "{{ messages[0].content }}", "repeats"),
        (CHATML + "{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        (CHATML.replace("assistant\n", "system\n"), "not prefix-stable"),
    ],
)
def test_a_chat_template_without_proof_is_refused(tmp_path, source, why):
    with pytest.raises(TokenizerError, match=why) as caught:
        chat(tmp_path, source).layout((USER, ASSISTANT))
    assert "Use chatml or alpaca" in str(caught.value)


def test_a_template_that_rewrites_a_text_is_refused_at_that_record(tmp_path):
    template = chat(tmp_path, CHATML.replace("m.content", "m.content | replace('bad', 'good')"))
    template.check((USER, ASSISTANT), ["fine", "fine"])
    with pytest.raises(TokenizerError, match="rewrites the text of a record"):
        template.check((USER, ASSISTANT), ["fine", "bad"])


def test_no_chat_template_or_a_broken_one(tmp_path):
    with pytest.raises(TokenizerError, match="has no chat template"):
        chat(tmp_path / "none", None)
    with pytest.raises(TokenizerError, match="not valid Jinja"):
        chat(tmp_path / "broken", "{% for %}")


def test_named_chat_templates(tmp_path):
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    assert len(chat(tmp_path, None, chat_template=named).layout((USER, ASSISTANT)).runs) == 2
