"""Talk to a registered model in the terminal.

In: a loaded `ServedModel`, lines of a person. Out: answers, printed as they are generated. The conversation so far goes
through the model's chat template with every question; `/new` forgets it. Cost: the model in memory.
"""

from collections.abc import Callable, Iterable
from typing import Any

from transformers import TextStreamer

HELP = "/new starts over, /quit ends (so does Ctrl-D)"


def chat(served: Any, lines: Iterable[str], options: dict[str, Any], system: str | None, say: Callable[[str], None]):
    """Answer line after line. `served` is the `ServedModel`, `say` prints text without a line feed of its own."""
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    for line in lines:
        text = line.strip()
        if text == "/quit":
            return
        if text == "/new":
            messages = list(opening)
        elif text:
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": answer(served, messages, options, say)})


def answer(served: Any, messages: list[dict[str, str]], options: dict[str, Any], say: Callable[[str], None]) -> str:
    """The model's next message, said while it comes."""
    streamer = _Streamer(served.tokenizer, say)
    text, _, reason = served.generate(served.encode_chat(messages), options, streamer)
    say(" [...]\n" if reason == "length" else "\n")
    return text


class _Streamer(TextStreamer):
    """transformers' streamer, which knows where words are complete, with another way out than stdout."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Text that will not change any more."""
        self.say(text)
