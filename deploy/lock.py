"""Resolve `requirements.lock`: for Python 3.11 to 3.13 on Linux x86-64, with and without the CUDA libraries of torch.

In: the dependencies and extras of this project that `make install` installs, and the carriers. Out:
`requirements.lock`, a line for every release that an environment may need, and `tests/assets/lock-metadata.json`, what
each of them requires. pip takes the lock as constraints: it says which release, the metadata say whether. So CUDA
libraries are in it, and installed only where torch wants them; a carrier is in it, and never installed with
dependencies.

pip resolves for the Python it runs on; what only another one needs is found in the metadata and resolved together with
the rest. Run it by `make lock`, with Python 3.11: the oldest decides which releases all can have. Cost: two minutes,
nothing is installed.
"""

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

LOCK = Path("requirements.lock")
METADATA = Path("tests/assets/lock-metadata.json")
# The public build, asked for by `===`: where a CPU wheel (2.13.0+cpu) is offered the lock is the same. It is the newest
# release that comes as both.
TORCH = "torch===2.13.0"
# The first and the last patch release: a few packages ask for a backport below 3.11.3.
PYTHONS = ("3.11.0", "3.11.99", "3.12.0", "3.13.99")
TARGETS = [
    {
        "python_version": ".".join(python.split(".")[:2]),
        "python_full_version": python,
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
    }
    for python in PYTHONS
]

Metadata = dict[str, dict]  # canonical name -> name, version, requires_python, requires_dist


def applying(requires_dist: Iterable[str], extras: Iterable[str], target: dict[str, str]) -> list[Requirement]:
    """The requirements that hold on a target for a distribution that is wanted with these extras."""
    requirements = [Requirement(line) for line in requires_dist]
    return [
        requirement
        for requirement in requirements
        if requirement.marker is None
        or any(requirement.marker.evaluate({**target, "extra": extra}) for extra in ("", *extras))
    ]


def walk(resolved: Metadata, roots: Iterable[str], target: dict[str, str]) -> tuple[set[str], dict[str, list[str]]]:
    """What the roots need on a target, directly or through others: what of it is there; what is lacking, for whom."""
    lacking: dict[str, list[str]] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [("panda-train", Requirement(root)) for root in roots]
    while waiting:
        by, requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        found = resolved.get(name)
        if found is None or not requirement.specifier.contains(found["version"], prereleases=True):
            lacking.setdefault(f"{requirement.name}{requirement.specifier}", []).append(by)
            continue
        if not SpecifierSet(found["requires_python"]).contains(target["python_full_version"]):
            lacking.setdefault(f"{name} for Python {target['python_version']}", []).append(by)
        new = [extra for extra in ("", *requirement.extras) if (name, extra) not in seen]
        seen |= {(name, extra) for extra in new}
        waiting += [(name, more) for extra in new for more in applying(found["requires_dist"], [extra], target)]
    return {name for name, _ in seen}, lacking


def resolve(*arguments: str) -> Metadata:
    """What pip would install, as metadata."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    answer = subprocess.run([*command, *arguments], stdout=subprocess.PIPE, check=True)
    kept = {}
    for item in json.loads(answer.stdout)["install"]:
        metadata = item["metadata"]
        kept[canonicalize_name(metadata["name"])] = {
            "name": metadata["name"],
            "version": metadata["version"],
            "requires_python": metadata.get("requires_python", ""),
            "requires_dist": metadata.get("requires_dist", []),
        }
    return kept


def resolve_for_all(wanted: list[str]) -> Metadata:
    """A release of everything that any target needs."""
    others: set[str] = set()
    while True:
        resolved = resolve(*wanted, *sorted(others))
        lacking = {name for target in TARGETS for name in walk(resolved, wanted, target)[1]}
        if not lacking:
            return resolved
        if lacking <= others or any(" for Python " in name for name in lacking):
            sys.exit(f"no release for all of {', '.join(PYTHONS)}: {', '.join(sorted(lacking))}")
        others |= lacking


def of_project(extras: str) -> list[str]:
    """What pyproject.toml asks for, with these extras."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    more = [line for extra in extras.split(",") for line in project["optional-dependencies"][extra]]
    return [*project["dependencies"], *more]


def of_any_use(resolved: Metadata, wanted: list[str]) -> Metadata:
    """The same without the requirements of platforms and extras that no target asks for."""
    asking = [Requirement(line) for found in resolved.values() for line in found["requires_dist"]]
    asking += [Requirement(line) for line in wanted]
    extras = {(canonicalize_name(requirement.name), extra) for requirement in asking for extra in requirement.extras}
    short = {}
    for name, found in resolved.items():
        asked = [extra for owner, extra in extras if owner == name]
        lines = [line for line in found["requires_dist"] if any(applying([line], asked, target) for target in TARGETS)]
        short[name] = {**found, "requires_dist": lines}
    return short


def write(resolved: Metadata, wanted: list[str]) -> None:
    """The lock and what is known about its lines."""
    lines = [f"{found['name']}=={found['version']}\n" for found in resolved.values()]
    LOCK.write_text("".join(sorted(lines, key=str.lower)), encoding="utf-8")
    rows = [f"{json.dumps(name)}: {json.dumps(found)}" for name, found in sorted(of_any_use(resolved, wanted).items())]
    METADATA.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


def main(extras: str, carriers: list[str]) -> None:
    """Resolve what the project asks for with its extras, then each carrier alone."""
    if sys.version_info[:2] != (3, 11):
        sys.exit("the oldest Python decides which releases all can have: make PYTHON=python3.11 lock")
    wanted = [*of_project(extras), TORCH]
    resolved = resolve_for_all(wanted)
    for carrier in carriers:
        resolved |= resolve("--no-deps", carrier)
    write(resolved, wanted)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
