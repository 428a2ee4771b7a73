"""The documented record shapes of other tools, in their own forms: used unchanged, or refused with the reason.

Every sample is written anew in the form that the tool documents. `=>` marks a target, `_` an answer that is context.
"""

import json

import pytest

from data_prep.records.normalise import Decoder, normalise
from data_prep.records.turns import Rejected, Role

SHOWN = {Role.ASSISTANT: "=> ", Role.ANSWERED: "_ "}
CALL = {"id": "c1", "type": "function", "function": {"name": "sky", "arguments": '{"city": "Oslo"}'}}
TOOLS = [{"type": "function", "function": {"name": "sky", "parameters": {"type": "object"}}}]
ASKED = {"role": "user", "content": "Is it day?"}
SAID = {"role": "assistant", "content": "Yes."}
FLAT_CALL = json.dumps({"name": "sky", "arguments": {"city": "Oslo"}})

TABLE = {  # (tool, shape) -> record, what becomes of it
    ("openai", "chat"): (
        {"messages": [{"role": "system", "content": "s"}, ASKED, SAID]},
        ["s", "Is it day?", "=> Yes."],
    ),
    ("openai", "weights"): (
        {"messages": [ASKED, {**SAID, "weight": 0}, ASKED, {**SAID, "weight": 1}]},
        ["Is it day?", "_ Yes.", "Is it day?", "=> Yes."],
    ),
    ("openai", "tools"): (
        {
            "messages": [
                ASKED,
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "sun"},
                SAID,
            ],
            "tools": TOOLS,
            "parallel_tool_calls": False,
        },
        ["{", "Is it day?", "{", "=> ", "{", "sun", "=> Yes."],
    ),
    ("openai", "preference"): (
        {"input": {"messages": [ASKED]}, "preferred_output": [SAID], "non_preferred_output": [SAID]},
        "unsupported_field",
    ),
    ("databricks", "prompt and response"): ({"prompt": "Is it day?", "response": "Yes."}, ["Is it day?", "=> Yes."]),
    ("databricks", "prompt and completion"): (
        {"prompt": "Is it day?", "completion": "Yes."},
        ["Is it day?", "=> Yes."],
    ),
    ("databricks", "dolly"): (
        {"instruction": "Is it day?", "context": "Noon.", "response": "Yes.", "category": "qa"},
        ["Is it day?", "Noon.", "=> Yes."],
    ),
    ("databricks", "text"): ({"text": "A whole day."}, ["A whole day."]),
    ("llama-factory", "alpaca"): (
        {"instruction": "Is it day?", "input": "Noon.", "output": "Yes.", "system": "s", "history": [["Hi", "Hello"]]},
        ["s", "Hi", "=> Hello", "Is it day?", "Noon.", "=> Yes."],
    ),
    ("llama-factory", "sharegpt"): (
        {
            "conversations": [
                {"from": "human", "value": "Is it day?"},
                {"from": "function_call", "value": FLAT_CALL},
                {"from": "observation", "value": "sun"},
                {"from": "gpt", "value": "Yes."},
            ],
            "system": "s",
            "tools": json.dumps([TOOLS[0]["function"]]),
        },
        ["{", "s", "Is it day?", "{", "=> ", "sun", "=> Yes."],
    ),
    ("llama-factory", "preference"): (
        {"instruction": "Is it day?", "input": "", "chosen": "Yes.", "rejected": "No."},
        "unsupported_field",
    ),
    ("llama-factory", "kto"): ({"instruction": "Is it day?", "output": "Yes.", "kto_tag": True}, "unsupported_field"),
    ("llama-factory", "images"): (
        {
            "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "Yes."}],
            "images": ["a.jpg"],
        },
        "unsupported_field",
    ),
    ("axolotl", "chat with trained turns"): (
        {"messages": [ASKED, {**SAID, "train": False}, ASKED, {**SAID, "train": True}]},
        ["Is it day?", "_ Yes.", "Is it day?", "=> Yes."],
    ),
    ("axolotl", "question and answer"): ({"question": "Is it day?", "answer": "Yes."}, ["Is it day?", "=> Yes."]),
    ("axolotl", "gpteacher"): (
        {"instruction": "Is it day?", "input": "Noon.", "response": "Yes."},
        ["Is it day?", "Noon.", "=> Yes."],
    ),
    ("axolotl", "completion"): ({"text": "A whole day."}, ["A whole day."]),
    ("axolotl", "trained question"): ({"messages": [{**ASKED, "train": True}, SAID]}, "unsupported_weight"),
    ("axolotl", "segments"): (
        {"segments": [{"label": False, "text": "Day?"}, {"label": True, "text": "Yes."}]},
        "unknown_shape",
    ),
    ("trl", "language modelling"): ({"text": "A whole day."}, ["A whole day."]),
    ("trl", "conversation"): ({"messages": [ASKED, {**SAID, "thinking": "sun"}]}, ["Is it day?", "{", "=> Yes."]),
    ("trl", "prompt and completion"): ({"prompt": "Is it", "completion": " day."}, ["Is it", "=>  day."]),
    ("trl", "conversational prompt and completion"): (
        {"prompt": [ASKED, SAID, ASKED], "completion": [SAID]},
        ["Is it day?", "_ Yes.", "Is it day?", "=> Yes."],
    ),
    ("trl", "prompt alone"): ({"prompt": "Is it day?"}, "unknown_shape"),
    ("trl", "preference"): ({"prompt": "Is it", "chosen": " day.", "rejected": " night."}, "unsupported_field"),
    ("trl", "unpaired preference"): ({"prompt": "Is it", "completion": " day.", "label": True}, "unsupported_field"),
    ("ms-swift", "messages with loss"): (
        {"messages": [ASKED, {**SAID, "loss": False}, ASKED, {**SAID, "loss": True}]},
        ["Is it day?", "_ Yes.", "Is it day?", "=> Yes."],
    ),
    ("ms-swift", "query and response"): (
        {"system": "s", "query": "Is it day?", "response": "Yes.", "history": [["Hi", "Hey"]]},
        ["s", "Hi", "=> Hey", "Is it day?", "=> Yes."],
    ),
    ("ms-swift", "agent"): (
        {
            "tools": json.dumps(TOOLS),
            "messages": [
                ASKED,
                {"role": "tool_call", "content": FLAT_CALL},
                {"role": "tool_call", "content": FLAT_CALL},
                {"role": "tool_response", "content": "sun"},
                {"role": "tool_response", "content": "sun"},
                SAID,
            ],
        },
        ["{", "Is it day?", "{", "=> ", "sun", "sun", "=> Yes."],
    ),
    ("ms-swift", "rejected response"): ({"messages": [ASKED, SAID], "rejected_response": "No."}, "unsupported_field"),
    ("ms-swift", "loss weight"): ({"messages": [ASKED, {**SAID, "loss_weight": 0.3}]}, "unsupported_weight"),
}


@pytest.mark.parametrize(("tool", "shape"), TABLE)
def test_a_documented_sample(tool, shape):
    record, expected = TABLE[tool, shape]
    try:
        roles, texts = normalise(Decoder().decode(json.dumps(record).encode()), "instruction", [])
    except Rejected as rejected:
        assert rejected.reason == expected
        return
    of_json = (Role.FIELDS, Role.TOOLS)
    shown = ["{" if role in of_json else SHOWN.get(role, "") + text for role, text in zip(roles, texts, strict=True)]
    assert shown == expected
