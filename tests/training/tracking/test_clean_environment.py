"""A registered model loads in a virtual environment that has what its requirements name, and nothing else.

The environment is made without a network: it links the distributions that are installed here and that
`requirements.txt` of the model names, directly or through others. This project, its own dependencies beyond those and
the working directory are not in it.
"""

import importlib.metadata
import os
import re
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.tiny_models import save_adapter, save_full_model
from tests.training.registry.test_register import greedy, tracked_run
from training.registry.register import register

ASK = """
import importlib.util
import sys
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
print(repr(model.predict({"prompt": ["hello"]}, params={"max_new_tokens": 8})[0]))
print(model.predict({"messages": [{"role": "user", "content": "hello"}]}, params={"max_tokens": 3})["usage"])
found = [name for name in sys.argv[3:] if importlib.util.find_spec(name)]
assert not found, found
"""
ABSENT = ["training", "data_prep", "flows", "prefect", "deepspeed", "bitsandbytes", "hydra", "datasets", "pytest"]


def named_by(requirements: list[str]) -> set[str]:
    """Names of the distributions that requirements name, and those they need in turn."""
    found: set[tuple[str, ...]] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        wanted = waiting.pop()
        distribution = importlib.metadata.distribution(wanted.name)
        assert wanted.specifier.contains(distribution.version, prereleases=True), f"{wanted}: {distribution.version}"
        if (wanted.name, *wanted.extras) not in found:
            found.add((wanted.name, *wanted.extras))
            needed = [Requirement(line) for line in distribution.requires or []]
            waiting += [one for one in needed if applies(one, {"", *wanted.extras})]
    return {name for name, *_ in found}


def applies(requirement: Requirement, extras: set[str]) -> bool:
    """Whether it is needed on this machine, for one of these extras."""
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)


def environment_of(names: set[str], directory: Path) -> Path:
    """A new virtual environment with links to these distributions; returns its Python."""
    venv.create(directory, with_pip=False, symlinks=True)
    paths = {"base": str(directory), "platbase": str(directory)}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    for name in names:
        distribution = importlib.metadata.distribution(name)
        parts = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
        for part in parts:
            if not (site / part).exists():
                (site / part).symlink_to(Path(str(distribution.locate_file(part))).resolve())
    return directory / "bin" / "python"


@pytest.mark.usefixtures("load_back_here")
@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_it_loads_with_only_what_its_requirements_name(kind, run_dir, tmp_path):
    model = save_full_model(run_dir / "model" if kind == "full" else tmp_path / "base")
    if kind == "adapter":
        model = save_adapter(tmp_path / "base", run_dir / "model")
    tracked = tracked_run(run_dir)
    version = register(run_dir, tracked.run_id, "panda-tiny", {}, tracked.uri)
    (file,) = (run_dir.parent / "mlartifacts").rglob("requirements.txt")
    requirements = file.read_text().splitlines()
    assert all(re.fullmatch(r"[a-z]+==[\d.]+", line) for line in requirements), requirements
    few = {"mlflow", "torch", "transformers", "safetensors", "accelerate", *(["peft"] if kind == "adapter" else [])}
    assert {line.partition("==")[0] for line in requirements} == few
    names = named_by(requirements)
    absent = [*ABSENT, *(["peft"] if kind == "full" else [])]
    python = environment_of(names, tmp_path / "clean")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(python), "-c", ASK, tracked.uri, version.uri, *absent],
        cwd=elsewhere, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text, usage = done.stdout.splitlines()[-2:]
    assert text == repr(greedy(model, run_dir / "model", "hello", 8)) and "'completion_tokens': 3" in usage
