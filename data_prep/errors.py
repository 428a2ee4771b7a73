"""Errors a user can cause and mend.

Each message names the thing, the value, the limit and the fix, without a traceback.
"""

import contextlib
import difflib
import errno
import os
from collections.abc import Iterable, Iterator


class PandaError(Exception):
    """Base of all errors that are shown as one clear line (or list) instead of a traceback."""


class CorpusError(PandaError):
    """The corpus cannot be used: missing, empty, or too much of it is rejected."""


class NoCorpusError(CorpusError):
    """There is no corpus, and none was asked for: the default directories are absent, or switched off."""


class TokenizerError(PandaError):
    """The tokenizer is missing, or cannot express what training needs (for example it has no eos token)."""


class StoreError(PandaError):
    """Prepared data is damaged, of another format version, or violates conservation."""


class DiskError(PandaError):
    """The disk is full, read-only, or not what a path says; what is complete stays, and the same command goes on."""


_OF_THE_DISK = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room, or name a directory on another disk"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "name a directory that can be written"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "name a directory, this is a file or below one"),
    errno.EIO: "the disk has failed to read or write; look at it before anything else",
    errno.ENAMETOOLONG: "name a shorter path",
}


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """What the disk refuses becomes a message with the path and the way out; other errors of the system stay."""
    try:
        yield
    except OSError as error:
        named = isinstance(error.filename, str | bytes)
        told = disk_error(error, f"{os.fsdecode(error.filename)}: " if named else "")
        if told is None:
            raise
        raise told from error


def disk_error(error: OSError, where: str) -> DiskError | None:
    """The error for people, beginning with ``where``; None where it is not of the disk."""
    advice = _OF_THE_DISK.get(error.errno or 0)
    if advice is None:
        return None
    return DiskError(
        f"{where}{os.strerror(error.errno or 0)}; {advice}; then run the same again: what is complete is kept"
    )


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`"; did you mean X?"`, or an empty string when nothing is near."""
    by_lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {prefix}{by_lower[near[0]]}?" if near else ""
