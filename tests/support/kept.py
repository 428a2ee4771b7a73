"""What version 0.1 has left on disk: caches, a killed run, a registered version; paths in it begin with `MADE_IN`."""

import tarfile
from pathlib import Path

MADE_IN = "/tmp/kept"
_ARCHIVE = Path(__file__).parents[1] / "assets" / "run-of-version-0.1.tar.xz"


def unpack(directory: Path, part: str = "") -> None:
    """All of it, or the members that have `part` in their names."""
    with tarfile.open(_ARCHIVE) as archive:
        # An argument of `extractall` would be clearer, and Python 3.11.2, which is Debian's, does not know it.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(directory, members=[member for member in archive if part in member.name])
