"""A PostgreSQL server of our own, in a folder, on a free port. Needs PostgreSQL (Debian: `apt-get install postgresql`).

In: an empty folder. Out: its address, with a password; it can be killed and started. Cost: two seconds.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.launch.processes import free_port

PASSWORD = "hunter2"
INSTALLED = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
PATH = os.pathsep.join([os.environ.get("PATH", ""), *map(str, reversed(INSTALLED))])
PG_CTL = shutil.which("pg_ctl", path=PATH)


class Server:
    """It refuses to run as root, so root gives it to the user `postgres`, who must be able to enter the folder."""

    def __init__(self, root: Path):
        assert PG_CTL, "PostgreSQL is not installed"
        self.data, self.port = root / "data", free_port()
        self.user = "postgres" if os.geteuid() == 0 else None
        if self.user:
            shutil.chown(root, self.user)
        (root / "password").write_text(PASSWORD)
        self.call("initdb", "-U", "panda", "--auth=scram-sha-256", f"--pwfile={root / 'password'}")

    def uri(self, database: str = "postgres", driver: str = "psycopg") -> str:
        """What SQLAlchemy calls a database of it."""
        return f"postgresql+{driver}://panda:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def call(self, *arguments: str) -> None:
        command = [str(PG_CTL), "-D", str(self.data), "-w", "-s", *arguments]
        if arguments[0] == "initdb":
            command = [str(Path(str(PG_CTL)).with_name("initdb")), "-D", str(self.data), *arguments[1:]]
        subprocess.run(command, user=self.user, check=True, stdout=subprocess.DEVNULL, cwd="/")

    def start(self) -> None:
        self.call("start", "-l", str(self.data / "log"), "-o", f"-p {self.port} -k {self.data} -h 127.0.0.1")

    def create(self, database: str) -> None:
        import psycopg

        address = self.uri().replace("+psycopg", "")
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{database}"')

    def kill(self) -> None:
        """As by a power cut."""
        self.call("stop", "-m", "immediate")


@contextmanager
def running_server() -> Iterator[Server]:
    """One that lives inside; not below pytest's folders, which the user `postgres` cannot enter."""
    with tempfile.TemporaryDirectory(prefix="panda-pg-") as folder:
        server = Server(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.kill()


@contextmanager
def away(server: Server) -> Iterator[None]:
    """Killed, and started again."""
    server.kill()
    try:
        yield
    finally:
        server.start()
