"""The arrows of the layers point one way: train.py -> flows -> tasks -> training -> data_prep, configs beside."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "data_prep": set(),
    "training": {"data_prep"},
    "configs": {"data_prep", "training"},
    "tasks": {"data_prep", "training", "configs"},
    "flows": {"data_prep", "training", "configs", "tasks"},
}
CONFIGS_MAY_SEE = {"data_prep.settings", "data_prep.errors", "training.settings"}
SOURCES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def imported_modules(path: Path) -> set[str]:
    """Every module a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    ours = {name for name in imported_modules(path) if name.split(".")[0] in MAY_IMPORT}
    wrong = {name for name in ours if name.split(".")[0] not in {package, *MAY_IMPORT[package]}}
    assert not wrong, f"{package} may import {MAY_IMPORT[package]}, but {path.name} imports {wrong}"
    if package == "configs":
        seen = {name for name in ours if name.split(".")[0] != "configs"}
        assert seen <= CONFIGS_MAY_SEE, f"configs sees only settings and errors, not {seen - CONFIGS_MAY_SEE}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_says_what_it_is(path):
    text = path.read_text(encoding="utf-8")
    assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{path} has no module docstring"


def loaded_by(statement: str) -> set[str]:
    """Top-level names of the modules a fresh interpreter has after a statement."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
    )


def test_data_prep_needs_neither_torch_nor_prefect_nor_mlflow():
    modules = [f"data_prep.{path.stem}" for path in (ROOT / "data_prep").glob("*.py") if path.stem != "__init__"]
    assert not loaded_by(f"import {', '.join(modules)}") & {"torch", "prefect", "mlflow", "transformers"}


def test_command_line_is_light():
    heavy = {"torch", "prefect", "mlflow", "transformers", "hydra", "pyarrow", "deepspeed"}
    assert not loaded_by("import flows.cli.main, configs.cli") & heavy


def test_training_never_loads_prefect():
    assert "prefect" not in loaded_by(
        "import training.worker, training.launch.launcher, training.tracking.run, training.registry.register"
    )
