"""Examples for people: tokens with their mask, as text for a terminal, as HTML and as Markdown.

In: a directory of tokens and its tokenizer. Out: `Shown`, the example as text token by token, and
renderings of it. Masked tokens are grey, targets green, neighbouring tokens differ in shade; HTML and Markdown carry
the same. Cost: decoding the tokens shown.
"""

import html
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text
from tokenizers.decoders import DecodeStream

from data_prep import store
from data_prep.plan.reader import target_ranges
from data_prep.tokenizer import LoadedTokenizer
from data_prep.tokens.token_shard import TOKENS_FILE, open_shard

MAX_TOKENS = 2000  # of one example shown; the middle of a longer one is left out
_TERMINAL = {True: ("bold green", "bold bright_green"), False: ("grey50", "grey66")}
_HTML = {True: ("#b7e4c7", "#95d5b2"), False: ("#e9ecef", "#dee2e6")}


@dataclass(frozen=True)
class Token:
    """One or more ids that are text together (a character may take several)."""

    text: str
    ids: tuple[int, ...]
    target: bool


@dataclass(frozen=True)
class Shown:
    """An example as tokens, with where it comes from."""

    title: str
    tokens: list[Token]
    num_tokens: int
    num_targets: int


def show_example(tokens_dir: Path, example: int, tokenizer: LoadedTokenizer, title: str) -> Shown:
    """One example of a directory of tokens."""
    store.open_manifest(tokens_dir)
    tokens = open_shard(tokens_dir / TOKENS_FILE)
    ids = tokens.ids[tokens.offsets[example] : tokens.offsets[example + 1]].tolist()
    labels = sum(high - low for low, high in target_ranges(tokens.runs(example), 0, len(ids)))
    mask = tokens.target_mask(example).tolist()
    return Shown(title, as_tokens(ids, mask, tokenizer), len(ids), labels)


def as_tokens(ids: list[int], mask: list[bool], tokenizer: LoadedTokenizer) -> list[Token]:
    """Ids as text; ids that make a character only together are one token. Targets are those of the mask."""
    tokens: list[Token] = []
    pending: list[int] = []
    stream = DecodeStream(skip_special_tokens=False)
    for position, (token_id, target) in enumerate(zip(ids, mask, strict=True)):
        pending.append(token_id)
        text = stream.step(tokenizer.core, token_id)
        ends = position + 1 == len(ids) or mask[position + 1] != target
        if text is None and ends:
            text = tokenizer.core.decode(pending, skip_special_tokens=False)
        if text is not None:
            tokens.append(Token(text, tuple(pending), target))
            pending = []
        if ends:
            stream = DecodeStream(skip_special_tokens=False)
    return tokens


def abridged(tokens: list[Token], limit: int = MAX_TOKENS) -> list[Token]:
    """The first and last tokens of a long example."""
    if len(tokens) <= limit:
        return tokens
    gap = Token(f" […{len(tokens) - limit:,} tokens…] ", (), False)
    return [*tokens[: limit // 2], gap, *tokens[-limit // 2 :]]


def as_terminal(shown: Shown) -> Text:
    """For rich: title, then the tokens in colour."""
    text = Text(f"{shown.title}  {shown.num_tokens:,} tokens, {shown.num_targets:,} of them trained on\n", style="bold")
    for number, token in enumerate(abridged(shown.tokens)):
        text.append(token.text, style=_TERMINAL[token.target][number % 2])
    return text


def as_html(shown: Shown) -> str:
    """A fragment of HTML: a heading and a block of coloured spans."""
    spans = "".join(
        f'<span style="background:{_HTML[token.target][number % 2]}" title="{" ".join(map(str, token.ids))}">'
        f"{html.escape(token.text)}</span>"
        for number, token in enumerate(abridged(shown.tokens))
    )
    counts = f"{shown.num_tokens:,} tokens, {shown.num_targets:,} of them trained on"
    return f'<h4>{html.escape(shown.title)}</h4>\n<p>{counts}</p>\n<pre style="white-space:pre-wrap">{spans}</pre>\n'


def as_markdown(shown: Shown) -> str:
    """Targets between ⟦ and ⟧ in a code block: Markdown in artifacts has no colours."""
    text, inside = "", False
    for token in abridged(shown.tokens):
        if token.target != inside:
            text += "⟦" if token.target else "⟧"
            inside = token.target
        text += token.text
    text += "⟧" if inside else ""
    fence = "`" * max(3, _longest_run_of_backticks(text) + 1)
    counts = f"{shown.num_tokens:,} tokens, {shown.num_targets:,} of them trained on (⟦…⟧)"
    return f"**{shown.title}** {counts}\n\n{fence}\n{text}\n{fence}\n"


def _longest_run_of_backticks(text: str) -> int:
    longest = 0
    while "`" * (longest + 1) in text:
        longest += 1
    return longest
