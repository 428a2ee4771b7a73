"""What the owner of this machine allows: the file `panda.toml` in the working directory, which no run can change.

    allowed_targets = ["some_library.readers"]                     # modules or objects that `_target_` may name
    allowed_roots = ["/srv/panda"]                                 # directories that parameters of a run may name
    allowed_addresses = ["http://mlflow:5000", "s3://corpora"]  # servers and corpora that they may name

All of it is optional, and the file as well: `_target_` may always name modules in the working directory, and parameters
of a deployed run paths in it (`flows/parts/permission.py`). In: the file. Out: `Owner`. Cost: reading some lines.
"""

import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.errors import PandaError

FILE = "panda.toml"
KEYS = ("allowed_targets", "allowed_roots", "allowed_addresses")


@dataclass(frozen=True)
class Owner:
    """What `panda.toml` adds to what is always allowed."""

    path: Path
    allowed_targets: list[str] = field(default_factory=list)
    allowed_roots: list[str] = field(default_factory=list)
    allowed_addresses: list[str] = field(default_factory=list)

    def roots(self) -> list[Path]:
        """The working directory and the directories of the file, links followed."""
        return [
            self.path.parent,
            *((self.path.parent / Path(root).expanduser()).resolve() for root in self.allowed_roots),
        ]

    def advice(self, key: str, value: str) -> str:
        """What the owner has to write, and where."""
        return f'the owner of this machine can allow it by a line in {self.path}: {key} = ["{value}"]'


def owner() -> Owner:
    """The file of the working directory; a PandaError names what is wrong in it."""
    path = Path(os.getcwd(), FILE)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Owner(path)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise PandaError(f"{path}: {error}") from error
    for key, value in content.items():
        if key not in KEYS:
            raise PandaError(f"{path}: {key!r} is none of {', '.join(KEYS)}")
        if not isinstance(value, list) or not all(isinstance(entry, str) and entry for entry in value):
            raise PandaError(f'{path}: {key}={value!r}: a list of texts is expected, {key} = ["..."]')
    return Owner(path, **content)
