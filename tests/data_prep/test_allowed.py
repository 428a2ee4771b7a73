"""What `_target_` may name: by the name alone, before anything is imported, and by what the name stands for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.allowed import OURS
from data_prep.errors import PandaError
from data_prep.targets import load_target, problems_of, target_fingerprint

ROOT = Path(__file__).parents[2]
MINE = """
import functools, operator, os, subprocess
from os import system
from subprocess import getoutput
from data_prep.targets import load_target
from xxhash import xxh32

open("imported.txt", "a").write("x")
shell = functools.partial(subprocess.run, shell=True)
nested = functools.partial(functools.partial(getoutput))
call = operator.methodcaller("upper")
method = "".join
printer = print
Process = subprocess.Popen
home = os.environ.get

def read(path, sep=","):
    return [path, sep]

tabs = functools.partial(read, sep="\\t")

@functools.lru_cache
def cached(path):
    return path

@functools.wraps(getoutput)
def dressed(cmd):
    return getoutput(cmd)

class Rows:
    def __init__(self, path, sep=","):
        self.path = path

    def __call__(self, path):
        return path

    @classmethod
    def of(cls, path):
        return cls(path)

rows = Rows("here")
of = Rows.of
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A project whose module is `mine_<test>`; nothing of it is imported yet."""
    name = f"mine_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return name


NEVER = [
    *("builtins.print", "builtins.eval", "os.system", "posix.system", "subprocess.getoutput", "shutil.rmtree"),
    *("importlib.import_module", "functools.partial", "operator.methodcaller", "runpy.run_path", "pathlib.Path"),
    *("pickle.loads", "sys.exit", "__main__.x", "hydra.utils.call", "hydra.utils.instantiate", "torch.load"),
    *(
        "data_prep.targets.load_target",
        "training.launch.supervisor.start",
        "flows.parts.run_dir.write_atomically",
        "train.main",
        "deploy.lock.main",
        "benchmarks.prepare.main",
        "tests.support.stack.Stack",
    ),
    *("mine.__builtins__.get", "torch.hub.load", "joblib.load", "cloudpickle.loads"),
]


@pytest.mark.parametrize("name", NEVER)
def test_never_whatever_the_owner_says(name, tmp_path, monkeypatch):
    (tmp_path / "panda.toml").write_text(f'allowed_targets = ["{name}", "{name.split(".")[0]}"]')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PandaError, match=r"reader: .* may not be named by `_target_`: .* never may"):
        load_target({"_target_": name}, "reader")
    with pytest.raises(PandaError, match="never may"):
        target_fingerprint({"_target_": name}, "reader")


@pytest.mark.parametrize(
    "field",
    [
        {"x": {"_target_": "subprocess.getoutput", "cmd": "touch pwned"}},
        {"x": {"deep": [1, {"er": {"_target_": "subprocess.getoutput", "cmd": "touch pwned"}}]}},
        {"x": ({"_target_": "subprocess.getoutput", "cmd": "touch pwned"},)},
        {"x": {"_target_": "{mine}.read", "path": {"_target_": "subprocess.getoutput", "cmd": "touch pwned"}}},
    ],
)
def test_nested_nodes_are_refused_before_anything_is_imported_or_run(mine, field):
    if inner := field["x"].get("_target_") if isinstance(field["x"], dict) else None:
        field = {"x": {**field["x"], "_target_": inner.format(mine=mine)}}
    with pytest.raises(PandaError, match=r"template: subprocess\.getoutput may not be named"):
        load_target({"_target_": f"{mine}.read", **field}, "template")
    assert not Path("imported.txt").exists() and not Path("pwned").exists() and mine not in sys.modules


@pytest.mark.parametrize("name", ["read", "tabs", "cached", "Rows", "rows", "of"])
def test_what_the_working_directory_defines_is_allowed(mine, name):
    assert load_target({"_target_": f"{mine}.{name}"}, "reader")("a") is not None


@pytest.mark.parametrize(
    ("name", "home"),
    [
        ("getoutput", "subprocess"), ("system", "posix"), ("shell", "subprocess"), ("nested", "subprocess"),
        ("call", "operator"), ("method", "builtin_function_or_method"), ("printer", "builtins"),
        ("Process", "subprocess"), ("dressed", "subprocess"), ("load_target", r"data_prep\.target"),
        ("xxh32", "xxhash"), ("subprocess", "builtins"),
    ],
)  # fmt: skip
def test_what_it_has_imported_is_not(mine, name, home):
    with pytest.raises(PandaError, match=rf"reader: {mine}\.{name} is not what its name says: it comes from {home}"):
        load_target({"_target_": f"{mine}.{name}"}, "reader")


@pytest.mark.parametrize("name", ["subprocess.getoutput", "os.path.join", "Rows.of", "rows.path", "home"])
def test_names_through_a_module_lead_nowhere(mine, name):
    with pytest.raises(PandaError, match=rf"reader: (cannot import {mine}|{mine}\.home is not what its name says)"):
        load_target({"_target_": f"{mine}.{name}"}, "reader")


def test_a_package_that_puts_another_one_under_its_name(mine, monkeypatch):
    monkeypatch.setitem(sys.modules, f"{mine}.shell", subprocess)
    with pytest.raises(PandaError, match="it comes from subprocess"):
        load_target({"_target_": f"{mine}.shell.getoutput"}, "reader")


def test_an_installed_library_is_allowed_by_the_file_of_the_owner(mine, tmp_path):
    node = {"_target_": "xxhash.xxh64"}
    with pytest.raises(PandaError) as caught:
        load_target(node, "reader")
    assert f'a line in {tmp_path}/panda.toml: allowed_targets = ["xxhash"]' in str(caught.value)
    Path("panda.toml").write_text('allowed_targets = ["xxhash"]')
    assert load_target(node, "reader")(b"a").hexdigest()


def test_an_object_from_elsewhere_is_allowed_by_its_own_name_only(mine):
    node = {"_target_": "pyarrow.json.read_json"}  # compiled: it comes from a module of another name
    Path("panda.toml").write_text('allowed_targets = ["pyarrow.json"]')
    with pytest.raises(PandaError, match=r"allowed_targets = \[\"pyarrow\.json\.read_json\"\]"):
        load_target(node, "reader")
    Path("panda.toml").write_text('allowed_targets = ["pyarrow.json.read_json"]')
    assert load_target(node, "reader")
    with pytest.raises(PandaError, match=r"pyarrow\.json\.open_json may not be named"):
        load_target({"_target_": "pyarrow.json.open_json"}, "reader")


def test_an_environment_in_the_working_directory_is_not_the_users_code(mine, tmp_path, monkeypatch):
    installed = tmp_path / ".venv" / "lib" / "python3.11" / "site-packages"
    installed.mkdir(parents=True)
    (installed / "some_library.py").write_text("def run(): pass")
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "evil.py").write_text("def run(): pass")
    monkeypatch.syspath_prepend(str(installed))
    assert "outside of the working directory" in problems_of({"_target_": "some_library.run"})[0]
    assert problems_of({"_target_": "dataset.evil.run"})


def test_a_link_in_the_working_directory_is_the_owners_doing(tmp_path_factory, mine):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "linked_module.py"
    elsewhere.write_text("def run(): return 1")
    os.symlink(elsewhere, "linked_module.py")
    assert load_target({"_target_": "linked_module.run"}, "reader")() == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("allowed_target = []", "'allowed_target' is none of allowed_targets, allowed_roots, allowed_addresses"),
        ('allowed_targets = "os"', "a list of texts is expected"),
        ("allowed_targets = [", "panda.toml: "),
    ],
)
def test_a_file_that_says_nothing_sensible(mine, text, message):
    Path("panda.toml").write_text(text)
    with pytest.raises(PandaError, match=message):
        load_target({"_target_": f"{mine}.read"}, "reader")


def test_all_problems_of_a_value_are_told_once():
    node = {"_target_": "os.system", "a": [{"_target_": "os.system"}, {"_target_": 3}]}
    assert len(problems_of(node)) == 2


def test_all_code_of_this_project_is_known_as_such():
    """Whatever is added beside the packages starts processes as well, and lies in the working directory of a clone."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {Path(path).parts[0].removesuffix(".py") for path in listed.split()} == set(OURS)
