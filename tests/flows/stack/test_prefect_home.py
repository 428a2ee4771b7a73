"""One project, one Prefect: its address, auth string and database, whatever else this user and this machine have."""

import os
import shutil
import sqlite3
import subprocess
import sys
import tomllib
import urllib.request
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from configs.settings import PandaSettings
from flows.cli import run
from flows.stack import old_database, prefect_home, services, up
from flows.stack.prefect_home import AUTH_STRING, SERVER_AUTH_STRING, URL
from flows.stack.prefect_server import ServerError, connected, unusable, wait_for_server
from tests.support import warm
from tests.support.stack import ROOT
from training.launch.processes import free_port

REMOTE = "https://prefect.team.example/api"


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """An empty project of a user who has nothing else."""
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return enter(tmp_path / "project", monkeypatch)


def enter(directory: Path, monkeypatch) -> Path:
    directory.mkdir()
    shutil.copy(ROOT / "prefect.toml", directory)
    monkeypatch.chdir(directory)
    return directory


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


class TestAuthString:
    def test_made_once_for_its_owner_alone(self, project):
        string = prefect_home.address().auth_string
        assert len(string) > 30 and string.startswith("panda:")
        assert prefect_home.address().auth_string == prefect_home.server_auth_string() == string
        assert (mode(project / ".prefect"), mode(project / ".prefect" / "profiles.toml")) == (0o700, 0o600)

    def test_a_file_that_others_can_read_is_closed(self, project):
        prefect_home.address()
        (project / ".prefect" / "profiles.toml").chmod(0o644)
        prefect_home.address()
        assert mode(project / ".prefect" / "profiles.toml") == 0o600

    def test_many_at_once_make_one(self, project):
        ask = "from flows.stack.prefect_home import address; print(address().auth_string)"
        command = [sys.executable, "-c", ask]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        started = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(6)]
        assert len({process.communicate()[0] for process in started}) == 1

    def test_what_the_user_sets_wins(self, project, monkeypatch):
        (project / ".env").write_text(f"{AUTH_STRING}=of:env-file\n")
        assert prefect_home.address().auth_string == "of:env-file"
        monkeypatch.setenv(AUTH_STRING, "of:environment")
        assert prefect_home.address().auth_string == prefect_home.server_auth_string() == "of:environment"
        monkeypatch.setenv(SERVER_AUTH_STRING, "of:server")
        assert prefect_home.server_auth_string() == "of:server"

    def test_ours_is_not_sent_to_a_server_of_others(self, project, monkeypatch):
        monkeypatch.setenv(URL, REMOTE)
        assert prefect_home.address().auth_string == ""
        monkeypatch.setenv(AUTH_STRING, "of:team")
        assert prefect_home.address().auth_string == "of:team"

    def test_the_users_own_profile_is_taken_over(self, project):
        (project.parent / "home" / ".prefect").mkdir()
        mine = f'active = "mine"\n[profiles.mine]\n{URL} = "{REMOTE}"\nPREFECT_LOGGING_LEVEL = "DEBUG"\n'
        (project.parent / "home" / ".prefect" / "profiles.toml").write_text(mine)
        assert prefect_home.address().url == prefect_home.DEFAULT_URL  # prefect.toml said so before
        assert prefect_home.ensure_profile()["PREFECT_LOGGING_LEVEL"] == "DEBUG"

    def test_other_profiles_in_the_file_stay(self, project):
        (project / ".prefect").mkdir()
        path = project / ".prefect" / "profiles.toml"
        path.write_text('active = "a b"\n[profiles."a b"]\nPREFECT_API_KEY = "k\\"ey"\n[profiles.other]\nX = 1\n')
        prefect_home.remember("http://127.0.0.1:4300/api")
        read = tomllib.loads(path.read_text())
        assert read["active"] == "a b" and read["profiles"]["other"] == {"X": 1}
        assert read["profiles"]["a b"]["PREFECT_API_KEY"] == 'k"ey'
        assert prefect_home.address().url == "http://127.0.0.1:4300/api" and not prefect_home.address().by_user


@pytest.mark.parametrize("is_up", [True, False])
def test_a_temporary_server_that_is_killed_is_started_again(project, is_up):
    """A request made while nobody is there waits at the socket."""
    with connected() as wait_until_up:
        if is_up:
            wait_until_up()
        url = os.environ[URL]
        server = of_port(urlsplit(url).port)
        server.kill()
        if not is_up:
            wait_until_up()
        server.wait()
        with urllib.request.urlopen(f"{url}/health", timeout=120) as response:
            assert response.status == 200
        again = of_port(urlsplit(url).port)
        assert again.pid != server.pid
    assert not again.is_running()


def of_port(port: int) -> psutil.Process:
    """The server that a process of ours is."""
    words = ["flows.stack.prefect_server", str(port)]
    return next(child for child in psutil.Process().children() if child.cmdline()[2:4] == words)


@pytest.fixture
def neighbour(project, tmp_path, monkeypatch):
    """(Directory, address) of another project of this user whose server is up."""
    directory = enter(tmp_path / "neighbour", monkeypatch)
    there = prefect_home.own_address(free_port())
    prefect_home.remember(there.url)
    log = tmp_path / "state" / "server.log"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in there.variables().items():
            patch.setenv(name, value)
        process = services.start(services.prefect_server(there.url), log)
    try:
        with open(log) as text:
            wait_for_server(process, there.url, text)
        monkeypatch.chdir(project)
        yield directory, there
    finally:
        services.stop(process, 10)


def test_two_projects_of_a_user_do_not_meet(neighbour, project, monkeypatch, capsys):
    directory, there = neighbour
    assert (directory / ".prefect" / "prefect.db").exists()
    prefect_home.remember(there.url)  # as two clones have the same port by default
    assert str(directory) in unusable(prefect_home.address())
    with pytest.raises(up.StackError, match=rf"is that of {directory}; .*PREFECT_PORT=\d+ MLFLOW_PORT=\d+"):
        up.up(["--state_dir", str(project / ".panda")])
    assert not (project / ".panda").exists()
    with connected() as wait_until_up:  # a direct run
        wait_until_up()
        assert os.environ[URL] != there.url
    assert (project / ".prefect" / "prefect.db").exists()
    monkeypatch.setenv(URL, there.url)  # named by the user: used, or an error
    with pytest.raises(ServerError, match="refuses our auth string"), connected():
        pass
    monkeypatch.setenv(AUTH_STRING, there.auth_string)
    with connected():
        assert os.environ[URL] == there.url


def test_prefect_finds_the_server_in_the_projects_directory(neighbour, project):
    directory, _ = neighbour
    command = [sys.executable, "-m", "prefect", "--no-prompt", "work-pool", "ls"]
    done = warm.run(command, directory)
    assert done.returncode == 0, done.stderr


class TestHint:
    """Where a direct run tells people to look at it."""

    def hint(self, project) -> str:
        summary = {"prefect_flow_run_id": "ID", "run_dir": str(project / "outputs" / "run")}
        return run.ui_commands(PandaSettings(model="panda-tiny"), summary)[0]

    def test_of_up_in_a_folder_without_deployments(self, project):
        there, hint = prefect_home.Address("http://127.0.0.1:9/api"), "deployment run panda-train/default"
        assert hint not in up._welcome(project / "state", there, there.url), "there is nothing to run"
        (project / "prefect.yaml").touch()
        without_corpus = up._welcome(project / "state", there, there.url)
        assert hint in without_corpus and "-m data_prep.sample dataset" in without_corpus, "else that run ends at once"
        (project / "dataset").mkdir()
        assert "data_prep.sample" not in up._welcome(project / "state", there, there.url)

    def test_of_a_temporary_server(self, project):
        port = free_port()
        prefect_home.remember(f"http://127.0.0.1:{port}/api")
        assert self.hint(project) == f"panda up    # http://127.0.0.1:{port}/runs/flow-run/ID"

    def test_of_a_server_that_is_up(self, project, prefect_server, use_prefect_server):
        page = prefect_server.url.replace("/api", "/runs/flow-run/ID")
        assert self.hint(project) == f"{page} (Prefect)"


class TestRunsOfEarlierVersions:
    """`~/.prefect/prefect.db`, which all projects of a user shared."""

    @pytest.fixture
    def shared(self, project, prefect_server, prefect_client) -> Path:
        """That of a real server, with a deployment of this project on it."""
        from prefect.client.schemas.actions import DeploymentUpdate

        flow = prefect_client.create_flow_from_name("panda-train")
        deployment = prefect_client.create_deployment(flow, "default")
        step = {"prefect.deployments.steps.set_working_directory": {"directory": str(project)}}
        prefect_client.update_deployment(deployment, DeploymentUpdate(pull_steps=[step]))
        path = Path.home() / ".prefect" / "prefect.db"
        path.parent.mkdir()
        with closing(sqlite3.connect(prefect_server.database)) as real, closing(sqlite3.connect(path)) as copy:
            real.backup(copy)
        return path

    def test_they_are_copied(self, project, shared):
        before = shared.read_bytes()
        old_database.adopt()
        with closing(sqlite3.connect(project / ".prefect" / "prefect.db")) as database:
            copied = database.execute("SELECT name FROM deployment").fetchall()
        with closing(sqlite3.connect(shared)) as database:
            assert copied == database.execute("SELECT name FROM deployment").fetchall() and ("default",) in copied
        assert shared.read_bytes() == before
        assert {path.name for path in (project / ".prefect").iterdir()} == {"prefect.db"}

    def test_not_twice(self, project, shared):
        (project / ".prefect").mkdir()
        (project / ".prefect" / "prefect.db").write_bytes(b"mine")
        old_database.adopt()
        assert (project / ".prefect" / "prefect.db").read_bytes() == b"mine"

    def test_not_into_another_project(self, project, shared, tmp_path, monkeypatch):
        elsewhere = enter(tmp_path / "project-2", monkeypatch)
        old_database.adopt()
        assert not (elsewhere / ".prefect" / "prefect.db").exists()

    def test_not_where_the_user_has_chosen_a_place(self, project, shared, monkeypatch):
        monkeypatch.setenv("PREFECT_HOME", str(project / "mine"))
        old_database.adopt()
        assert not (project / ".prefect" / "prefect.db").exists()

    def test_what_cannot_be_read_stops_nothing(self, project, shared, caplog):
        shared.write_bytes(b"no database" * 1000)
        old_database.adopt()
        assert "cannot be read" in caplog.text and not list((project / ".prefect").iterdir())
