"""Keep passwords and tokens out of parameters, artifacts and logs.

In: settings or text. Out: the same with `***` where a secret was. A secret is the password of a URL, or the value of a
field whose name says so. Cost: none.
"""

import re
import textwrap
from typing import Any

HIDDEN = "***"
_PASSWORD = re.compile(r"(?P<before>\b[a-z][a-z0-9+.-]*://[^\s:/@]*:)[^\s@/]+(?=@)", re.IGNORECASE)
_CREDENTIALS = re.compile(r"//[^\s/@]*@")
_SECRET_NAME = re.compile(r"(^|_)(password|passwd|secret|token|api_key|credentials?)$", re.IGNORECASE)


def redact_text(text: str) -> str:
    """`scheme://user:password@host` becomes `scheme://user:***@host`."""
    return _PASSWORD.sub(rf"\g<before>{HIDDEN}", text)


def what_it_says(error: BaseException, width: int = 160) -> str:
    """An error's message (its type where it has none) for a log: one line, shortened at a word, no password."""
    return redact_text(textwrap.shorten(str(error) or type(error).__name__, width))


def public_link(uri: str) -> str | None:
    """The address of a server for people, without user and password; None for a database."""
    return _CREDENTIALS.sub("//", uri) if uri.startswith(("http://", "https://")) else None


def redact(value: Any) -> Any:
    """The same for every string in nested lists and mappings, and for fields with a secret's name."""
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, dict):
        return {
            name: HIDDEN if inner is not None and _SECRET_NAME.search(str(name)) else redact(inner)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(inner) for inner in value]
    return value
