"""The Prefect of this project: where its database is, where its server answers, and the auth string that opens it.

In: what the user has set (environment, `.env`, prefect.toml: Prefect's own order), and `.prefect/profiles.toml`, which
is made here when it is missing. It is a file of Prefect's profiles, so `prefect` in the project's directory finds
address and auth string there as our commands do. Out: an `Address`. Only its owner can read the file; our commands send
the string to servers of our own and to those the user names it for. No Prefect is imported (1.5 s). Cost: 10 ms.
"""

import contextlib
import fcntl
import json
import os
import secrets
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.store import write_atomically
from flows.stack.listeners import belongs_to_somebody_else, is_local

HOME = ".prefect"
PROFILE = "panda"
DEFAULT_URL = "http://127.0.0.1:4200/api"
URL = "PREFECT_API_URL"
AUTH_STRING = "PREFECT_API_AUTH_STRING"
SERVER_AUTH_STRING = "PREFECT_SERVER_API_AUTH_STRING"
IN_TOML = {
    URL: ("api", "url"),
    AUTH_STRING: ("api", "auth_string"),
    SERVER_AUTH_STRING: ("server", "api", "auth_string"),
    "PREFECT_UI_API_URL": ("server", "ui", "api_url"),
    "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": ("server", "api", "cors_allowed_origins"),
    "PREFECT_HOME": ("home",),
    "PREFECT_PROFILES_PATH": ("profiles_path",),
}


@dataclass(frozen=True)
class Address:
    """A Prefect server, and what it is opened with; `by_user` when not this project but its user has named it."""

    url: str
    by_user: bool = False
    auth_string: str = field(default="", repr=False)

    def variables(self) -> dict[str, str]:
        """For the environment of this process and its children, before they import Prefect."""
        places = {"PREFECT_HOME": str(home()), "PREFECT_PROFILES_PATH": str(profiles_path())}
        return places | {URL: self.url, AUTH_STRING: self.auth_string}


def address() -> Address:
    """The server to use: the user's, or the one of this project."""
    profile = ensure_profile()
    given = set_by_user(URL)
    url = given or profile[URL]
    return Address(url, bool(given), _auth_string(url, profile))


def own_address(port: int) -> Address:
    """A server that we start on this machine."""
    profile = ensure_profile()
    string = set_by_user(AUTH_STRING) or set_by_user(SERVER_AUTH_STRING) or profile[AUTH_STRING]
    return Address(f"http://127.0.0.1:{port}/api", auth_string=string)


def _auth_string(url: str, profile: dict[str, str]) -> str:
    """Ours is for ourselves: neither another machine's server gets it, nor that of another user of this one."""
    given = set_by_user(AUTH_STRING)
    if given is not None:
        return given
    if is_local(url):
        return "" if belongs_to_somebody_else(url) else set_by_user(SERVER_AUTH_STRING) or profile[AUTH_STRING]
    return profile[AUTH_STRING] if url == profile[URL] else ""


def server_auth_string() -> str:
    """What a server of ours asks for."""
    return set_by_user(SERVER_AUTH_STRING) or set_by_user(AUTH_STRING) or ensure_profile()[SERVER_AUTH_STRING]


def set_by_user(name: str) -> str | None:
    """From the environment, `.env` or prefect.toml, in the order in which Prefect looks there."""
    if name in os.environ:
        return os.environ[name]
    if Path(".env").is_file():
        import dotenv

        if found := dotenv.dotenv_values(".env").get(name):
            return found
    value: Any = _read(Path("prefect.toml"))
    for key in IN_TOML.get(name, ()):
        value = value.get(key, {}) if isinstance(value, dict) else {}
    return value if isinstance(value, str) else None


def home() -> Path:
    """Where Prefect keeps its database: beside the project, unless the user has named another place."""
    return Path(set_by_user("PREFECT_HOME") or HOME).expanduser().absolute()


def profiles_path() -> Path:
    """The file of address and auth string."""
    return Path(set_by_user("PREFECT_PROFILES_PATH") or f"{HOME}/profiles.toml").expanduser().absolute()


def ensure_profile() -> dict[str, str]:
    """The active profile. What is missing in it is made; what the user's own profile says is taken over at first."""
    with _locked_profiles() as path:
        known = _read(path)
        name, settings = _active(known)
        if not known:
            settings = {key: value for key, value in _active(_read(_users_own()))[1].items() if key != URL}
        string = (
            settings.get(AUTH_STRING) or settings.get(SERVER_AUTH_STRING) or f"{PROFILE}:{secrets.token_urlsafe(24)}"
        )
        full = {URL: DEFAULT_URL, AUTH_STRING: string, SERVER_AUTH_STRING: string} | settings
        if full != settings or not known:
            _write(path, known, name, full)
        return full


def remember(url: str) -> None:
    """From now on the server of this project is there."""
    ensure_profile()
    with _locked_profiles() as path:
        known = _read(path)
        name, settings = _active(known)
        if settings[URL] != url:
            _write(path, known, name, settings | {URL: url})


@contextlib.contextmanager
def _locked_profiles() -> Iterator[Path]:
    """The file, for one process at a time, readable by its owner alone."""
    path = profiles_path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.parent == Path(HOME).absolute():
        path.parent.chmod(0o700)
    with open(path.with_suffix(".lock"), "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            path.chmod(0o600)
        yield path


def _active(profiles: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """(Name of the profile in use, its settings)."""
    name = os.environ.get("PREFECT_PROFILE") or profiles.get("active") or PROFILE
    return name, profiles.get("profiles", {}).get(name, {})


def _users_own() -> Path:
    """The profiles of this user for all directories, which Prefect does not read where a project has its own."""
    return Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser() / "profiles.toml"


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, tomllib.TOMLDecodeError):
        return tomllib.loads(path.read_text(encoding="utf-8"))
    return {}


def _write(path: Path, profiles: dict[str, Any], name: str, settings: dict[str, str]) -> None:
    """All profiles, this one changed. Strings of JSON are strings of TOML."""
    everything = {**profiles.get("profiles", {}), name: settings}
    lines = [f"active = {json.dumps(profiles.get('active') or name)}"]
    for profile, content in everything.items():
        lines += ["", f"[profiles.{json.dumps(profile)}]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in content.items()]
    write_atomically(path, "\n".join([*lines, ""]), 0o600)
