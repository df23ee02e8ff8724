"""Python and the libraries against the ranges that MegaKD declares; none of them is imported here."""

import platform
import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from megakd.doctor.findings import Finding, fault, ok

PROJECT = Path(__file__).parents[2] / "pyproject.toml"  # of a checkout
SHOWN = ("torch", "transformers", "deepspeed")


class Declared(NamedTuple):
    """python: like ">=3.11,<3.13". needed, optional: requirements, and those of extras without development tools."""

    python: str
    needed: list[str]
    optional: list[str]


def check_libraries() -> Iterator[Finding]:
    """One row for Python, one for all libraries that fit, one for each that is missing or outside of its range."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    declared = read_declared()
    python = platform.python_version()
    if SpecifierSet(declared.python).contains(python, prereleases=True):
        yield ok("Python", python)
    else:
        yield fault("Python", f"{python}, MegaKD needs {declared.python}", "make an environment with another Python")
    needed, optional = map(Requirement, declared.needed), map(Requirement, declared.optional)
    absent, good, unfit = [], [], []
    for requirement, is_needed in [*((each, True) for each in needed), *((each, False) for each in optional)]:
        version = installed_version(requirement.name)
        if version is None and not is_needed:
            absent.append(requirement.name)
        elif version is not None and requirement.specifier.contains(version, prereleases=True):
            good.append(requirement.name)
        else:
            found = f"{version or 'not installed'}, MegaKD needs {requirement.specifier}"
            unfit.append(fault(requirement.name, found, f"pip install '{requirement.name}{requirement.specifier}'"))
    versions = ", ".join(f"{name} {installed_version(name)}" for name in SHOWN if name in good)
    missing = f"; optional, not installed: {', '.join(absent)}" if absent else ""
    yield ok("libraries", f"{len(good)} in their ranges ({versions}){missing}")
    yield from unfit


def installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def read_declared() -> Declared:
    """From pyproject.toml where MegaKD runs from a checkout, else from the installed package."""
    if PROJECT.is_file():
        project = tomllib.loads(PROJECT.read_text("utf-8"))["project"]
        extras = project["optional-dependencies"]
        optional = [each for name, requirements in extras.items() if name != "dev" for each in requirements]
        return Declared(project["requires-python"], project["dependencies"], optional)
    found = metadata.metadata("megakd")
    requirements = found.get_all("Requires-Dist") or []
    extra = re.compile(r"extra\s*==\s*['\"](\w+)['\"]")
    needed = [each for each in requirements if not extra.search(each)]
    optional = [each.partition(";")[0] for each in requirements if (name := extra.search(each)) and name[1] != "dev"]
    return Declared(found["Requires-Python"], needed, optional)
