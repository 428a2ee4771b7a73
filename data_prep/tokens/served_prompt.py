"""Chat messages -> the ids that training saw before the answer, for whoever asks a deployed model.

In: messages (system, user, assistant, tool, with the fields they have in a corpus), tools, and the tokenizer of a model
directory, with its chat template (`served_template`). Out: ids. The conversation is tokenized as a record of the corpus
is, by the same functions, and cut before the answer. Rendering a chat as one text, as other servers do, differs in two
ways: an earlier answer may grow together with what stands before it, and a special token in a text (``</s>``,
``<|im_end|>``) would end the user's turn. Cost: a rendering for each earlier answer, 1 ms a thousand tokens.
"""

import re
from typing import Any

import pyarrow as pa

from data_prep.errors import PandaError
from data_prep.records.turns import Rejected, Role, conversation, tool_list
from data_prep.tokenizer import LoadedTokenizer
from data_prep.tokens.chat_template import TemplateError, chat_renderer
from data_prep.tokens.encoder import load_engine
from data_prep.tokens.examples import special_pattern, tokenize_columns
from data_prep.tokens.templates import load_template

ANSWER = {"role": "assistant", "content": "the answer"}
SHOWN_CHARS = 200
Messages = list[dict[str, Any]]


class PromptError(PandaError):
    """A conversation that this model's chat template cannot express; the message names no file."""


class ServedPrompt:
    """Conversations and texts as ids. Not for several threads at once: encoding switches the tokenizer's mode."""

    def __init__(self, tokenizer: LoadedTokenizer):
        self.tokenizer = tokenizer
        self.engine = load_engine(tokenizer.core, "reference")
        self.template = load_template("tokenizer", tokenizer) if tokenizer.chat_template else None

    def of_text(self, text: str) -> list[int]:
        """A text that is the whole prompt: special tokens in it count, what generation starts with is in front."""
        bos = list(self.tokenizer.bos_ids)
        ids = self.tokenizer.core.encode(text, add_special_tokens=False).ids
        return ids if bos and ids[: len(bos)] == bos else bos + ids

    def of_chat(self, messages: Messages, tools: list[dict[str, Any]] | None = None) -> list[int]:
        """The prompt for the next message of the assistant.

        :raises PromptError: the template refuses these messages, or would take a text for a token.
        """
        if self.template is None:
            return self._line_by_line(messages)
        ids = self._as_trained(messages, tools)
        return self._as_rendered(messages, tools) if ids is None else ids

    def _as_trained(self, messages: Messages, tools: list[dict[str, Any]] | None) -> list[int] | None:
        """None where training refuses such conversations, so that it has seen none. Earlier answers are context."""
        assert self.template is not None, "checked by of_chat"
        turns = [{**turn, "train": False} if turn["role"] == "assistant" else turn for turn in messages]
        unread: list[str] = []
        try:
            roles, texts = conversation([*turns, ANSWER], "messages", unread)
            listed = tool_list(tools, "tools")
        except Rejected as rejected:
            raise PromptError(rejected.detail) from rejected
        if unread:
            raise PromptError(f"nothing is made of {', '.join(sorted(set(unread)))}; leave it out")
        if listed:
            roles, texts = bytes((Role.TOOLS,)) + roles, [listed, *texts]
        columns = pa.array([list(roles)], pa.list_(pa.int8())), pa.array([texts], pa.list_(pa.string()))
        made = tokenize_columns(*columns, self.tokenizer, self.template, self.engine)
        return None if made.runs.refused else made.shard.ids[: -int(made.shard.runs(0)[-1])].tolist()

    def _as_rendered(self, messages: Messages, tools: list[dict[str, Any]] | None) -> list[int]:
        self._refuse_special_text(messages)
        try:
            text = chat_renderer(self.tokenizer)(messages, True, tools or None)
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            why = str(error)[:SHOWN_CHARS]
            raise PromptError(f"messages: the model's chat template refuses this conversation: {why}") from error
        return self.tokenizer.core.encode(text, add_special_tokens=False).ids

    def _refuse_special_text(self, messages: Messages) -> None:
        pattern = re.compile(special_pattern(self.tokenizer.special_ids) or r"(?!)")
        for number, message in enumerate(messages):
            if found := pattern.search(message["content"]):
                raise PromptError(
                    f"messages[{number}].content: {found[0]!r} is a token of this model, and its chat template takes "
                    "conversations of this form only as they are rendered; leave it out"
                )

    def _line_by_line(self, messages: Messages) -> list[int]:
        """Of a model without a chat template (trained with a function of one's own)."""
        self._refuse_special_text(messages)
        return self.of_text("\n".join(message["content"] for message in messages))
