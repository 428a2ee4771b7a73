"""Talk to a registered model in the terminal.

In: a model in memory, lines of a person. Out: answers, printed as they are generated. The conversation so far goes
through the model's chat template with every question; `/new` forgets it. Cost: none beside the model's.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

from data_prep.errors import PandaError
from training.serving.deployed import Deployed, Sampling

HELP = "/new starts over, /quit ends (so does Ctrl-D)"


def chat(deployed: Deployed, lines: Iterable[str], sampling: Sampling, system: str | None, say: Callable[[str], None]):
    """Answer line after line. `say` prints text without a line feed of its own."""
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
            messages.append({"role": "assistant", "content": answer(deployed, messages, sampling, say)})


def answer(deployed: Deployed, messages: list[dict[str, str]], sampling: Sampling, say: Callable[[str], None]) -> str:
    """The model's next message, said while it comes.

    :raises PandaError: there is no room for an answer.
    """
    ids = deployed.prompt.of_chat(messages)
    room = deployed.context_length - len(ids)
    if room < 1:
        raise PandaError(f"the conversation has {len(ids)} tokens, the model's context {deployed.context_length}")
    said: list[str] = []

    def both(piece: str) -> None:
        said.append(piece)
        say(piece)

    written = deployed.write(ids, replace(sampling, max_tokens=min(sampling.max_tokens, room)), both)
    say(" [...]\n" if written.reason == "length" else "\n")
    return "".join(said)
