"""The arrows of the layers point one way: train.py -> flows -> tasks -> training -> data_prep, configs beside."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from flows.cli.main import STANDING, VERBS
from training import run_files
from training.tracking import tags

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "data_prep": set(),
    "training": {"data_prep"},
    "configs": {"data_prep", "training"},
    "tasks": {"data_prep", "training", "configs"},
    "flows": {"data_prep", "training", "configs", "tasks"},
}
CONFIGS_MAY_SEE = {"data_prep.settings", "data_prep.errors", "training.settings", "training.planning.compatibility"}
FLOORS = {
    "data_prep": [
        "errors", "settings store processes owner", "allowed intact in_use", "targets", "tokenizer", "places",
        "records", "tokens", "plan", "inspection pipeline sample",
    ],
    "training": [
        "errors settings lean_imports run_files", "cost", "rendezvous", "distributed devices", "launch models",
        "engines bases", "planning", "trainer", "tracking", "comparison", "export", "registry", "serving",
        "worker evaluate compare gpu_check",
    ],
    "configs": ["errors settings", "field_types guide_names", "load", "cli", "docs"],
    "tasks": ["bar account", "stage reporting cluster", "assets prepare train register gate alarm spikes"],
    "flows": ["stack", "parts", "report", "panda_train panda_prepare panda_evaluate watch", "cli", "retention"],
}  # fmt: skip
"""The rooms of a package, ground floor first: a room imports only rooms of lower floors."""
TRAINS = {"trainer", "engines", "models", "bases", "planning", "launch", "worker"}
USES_WHAT_WAS_TRAINED = {"tracking", "registry", "comparison", "export", "serving"}
MAX_MODULES = 12
SOURCES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]
ALL_SOURCES = [
    *SOURCES,
    ROOT / "train.py",
    *(p for name in ("tests", "benchmarks") for p in sorted((ROOT / name).rglob("*.py"))),
]


def imported_modules(path: Path) -> set[str]:
    """Every module a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {_module(node.module, alias.name) for alias in node.names}
    return names


def _module(module: str, name: str) -> str:
    """``from a.b import c`` imports a.b.c if that is a module, else a.b."""
    below = ROOT / module.replace(".", "/") / name
    return f"{module}.{name}" if below.with_suffix(".py").exists() or below.is_dir() else module


def ours(path: Path) -> set[str]:
    return {name for name in imported_modules(path) if name.split(".")[0] in MAY_IMPORT}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_arrows_point_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    wrong = {name for name in ours(path) if name.split(".")[0] not in {package, *MAY_IMPORT[package]}}
    assert not wrong, f"{package} may import {MAY_IMPORT[package]}, but {path.name} imports {wrong}"
    if package == "configs":
        seen = {name for name in ours(path) if name.split(".")[0] != "configs"}
        assert seen <= CONFIGS_MAY_SEE, (
            f"configs sees only settings, their rules and errors, not {seen - CONFIGS_MAY_SEE}"
        )


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name != "__init__.py"], ids=name_of)
def test_rooms_import_only_rooms_of_lower_floors(path):
    package, room = path.relative_to(ROOT).with_suffix("").parts[:2]
    floor_of = {name: floor for floor, names in enumerate(FLOORS[package]) for name in names.split()}
    for name in ours(path):
        other = (*name.split("."), "")[1]
        if name.split(".")[0] == package and other and other != room:
            assert floor_of[other] < floor_of[room], f"{package}.{room} stands below {other}, but imports {name}"
            assert not (room in TRAINS and other in USES_WHAT_WAS_TRAINED), f"{room} trains; it must not need {name}"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_every_room_has_a_floor_and_room_for_a_person(package):
    folders = [ROOT / package, *(path for path in (ROOT / package).iterdir() if (path / "__init__.py").exists())]
    rooms = {path.stem for path in (ROOT / package).glob("*.py")} | {path.name for path in folders[1:]}
    assert rooms - {"__init__"} == set(" ".join(FLOORS[package]).split())
    for folder in folders:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= MAX_MODULES, f"{folder} has {len(modules)} modules: more than a person can keep in mind"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_modules_import_each_other(package):
    """Also not in a circle, and also not inside functions."""
    arrows = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): ours(path)
        for path in SOURCES
        if path.relative_to(ROOT).parts[0] == package and path.name != "__init__.py"
    }
    reach = {name: targets & arrows.keys() for name, targets in arrows.items()}
    while True:
        further = {name: targets.union(*(reach[target] for target in targets)) for name, targets in reach.items()}
        if further == reach:
            break
        reach = further
    assert not {name for name, targets in reach.items() if name in targets}


@cache
def defined_in(module: str) -> set[str] | None:
    """Names at the top level of a module of ours, and what lies below it; None: there is no such module."""
    place = ROOT / module.replace(".", "/")
    path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if not (path.exists() or place.is_dir()):
        return None
    names = {below.stem for below in place.glob("*") if below.suffix == ".py" or below.is_dir()}
    nodes = list(ast.parse(path.read_text(encoding="utf-8")).body) if path.exists() else []
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        nodes.extend(ast.iter_child_nodes(node))
    return names


def unresolved(node: ast.AST) -> list[str]:
    """What an import, or the text that a test replaces something by, names and we do not have."""
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        wanted = [(node.module, alias.name) for alias in node.names]
    elif isinstance(node, ast.Import):
        wanted = [(alias.name, "") for alias in node.names]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
        wanted = [tuple(node.args[0].value.rsplit(".", 1))] if node.args and _is_text(node.args[0]) else []
    else:
        return []
    mine = [(module, name) for module, name in wanted if (ROOT / module.split(".")[0] / "__init__.py").exists()]
    return [f"{module}.{name}" for module, name in mine if not is_there(module, name)]


def is_there(module: str, name: str) -> bool:
    known = defined_in(module)
    return known is not None and (not name or name in known)


@pytest.mark.parametrize("path", ALL_SOURCES, ids=name_of)
def test_every_import_of_ours_is_there(path):
    """Also in a function that no test calls: mypy takes what it cannot find for somebody else's."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wrong = {node.lineno: names for node in ast.walk(tree) if (names := unresolved(node))}
    assert not wrong, f"{path}: {wrong}"


def test_every_verb_is_there():
    for module, _, function in (where.partition(":") for where in (STANDING, *(where for where, _ in VERBS.values()))):
        assert is_there(f"flows.{module}", function)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_file_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} has no module docstring"


def loaded_by(statement: str) -> set[str]:
    """Top-level names of the modules a fresh interpreter has after a statement."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
    )


def test_data_prep_needs_neither_torch_nor_prefect_nor_mlflow():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "data_prep").rglob("*.py")
        if path.stem != "__init__"
    ]
    assert not loaded_by(f"import {', '.join(modules)}") & {"torch", "prefect", "mlflow", "transformers"}


def test_command_line_is_light():
    heavy = {"torch", "prefect", "mlflow", "transformers", "hydra", "pyarrow", "deepspeed"}
    assert not loaded_by("import flows.cli.main, configs.cli") & heavy


def test_verbs_import_what_is_heavy_when_they_need_it():
    """Prefect above all: it reads the address of its server when it is imported, and a direct run sets that first."""
    verbs = ("run", "plan", "data", "registry", "reproduce", "schedule")
    loaded = loaded_by(f"import flows.stack.up, flows.stack.serve, {', '.join(f'flows.cli.{verb}' for verb in verbs)}")
    assert not loaded & {"torch", "prefect", "mlflow", "transformers", "deepspeed"}


def test_training_never_loads_prefect():
    assert "prefect" not in loaded_by(
        "import training.worker, training.launch.launcher, training.tracking.run, training.registry.register"
    )


@pytest.mark.parametrize("owner", [run_files, tags], ids=["files of a run", "tags of MLflow"])
def test_names_that_outlive_us_are_written_in_one_place(owner):
    names = {value for name, value in vars(owner).items() if name.isupper() and "." in value}
    assert len(names) > 10
    for path in SOURCES:
        texts = {node.value for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if _is_text(node)}
        assert path == Path(str(owner.__file__)) or not names & texts, f"{path}: use the names of {owner.__name__}"


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
