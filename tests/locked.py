"""Whether the locks are what the tool needs, without a network: `python -m tests.locked`."""

import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.paths import ROOT

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
_HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")


def locked(text: str) -> dict[str, tuple[Requirement, int]]:
    """Return the locked packages by name, each with its number of hashes."""
    joined = text.replace("\\\n", " ")
    rows = [row for row in joined.splitlines() if row.strip() and not row.startswith("#")]
    found = {}
    for row in rows:
        requirement = Requirement(row.partition("--hash")[0].strip())
        found[canonicalize_name(requirement.name)] = (requirement, len(_HASH.findall(row)))
    return found


def faults(root: Path = ROOT) -> Iterator[str]:
    yield from _faults(root, "requirements.lock")
    yield from _faults(root, "requirements-keyless.lock", "keyless")


def _faults(root: Path, file: str, *extras: str) -> Iterator[str]:
    lock = locked((root / file).read_text())
    project = tomllib.loads((root / "pyproject.toml").read_text())
    constraints = [Requirement(row) for row in (root / "constraints.txt").read_text().splitlines()]
    versions = {canonicalize_name(r.name): str(r.specifier) for r in constraints}
    for name, (requirement, hashes) in lock.items():
        if not re.fullmatch(r"==[^*,]+", str(requirement.specifier)) or not hashes:
            yield f"{name} is not pinned to one version by hash"
        if versions.get(name, str(requirement.specifier)) != str(requirement.specifier):
            yield f"{name} is {requirement.specifier}, in constraints.txt {versions[name]}"
    asked = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    for extra in extras:
        asked += project["project"]["optional-dependencies"][extra]
    for python in PYTHONS:
        yield from _missing([Requirement(text) for text in asked], lock, python)


def _missing(
    asked: list[Requirement], lock: dict[str, tuple[Requirement, int]], python: str
) -> Iterator[str]:
    """Yield what a Python version would need that the lock has not, as the packages here say."""
    rest, seen = list(asked), set()
    while rest:
        wanted = rest.pop()
        name = canonicalize_name(wanted.name)
        if name not in lock or not _holds(lock[name][0], python):
            yield f"{wanted} is not locked for Python {python}"
            continue
        version = Version(str(lock[name][0].specifier).removeprefix("=="))
        if not wanted.specifier.contains(version, prereleases=True):
            yield f"{wanted} is wanted, and {version} locked"
        key = (name, frozenset(wanted.extras))
        if key in seen:
            continue
        seen.add(key)
        rest += _needs(name, version, wanted.extras, python)


def _needs(name: str, version: Version, extras: set[str], python: str) -> list[Requirement]:
    """Return what a package needs; nothing where it is not here in that version."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return []
    if Version(found.version) != version:
        return []
    rows = [Requirement(text) for text in found.requires or ()]
    return [row for row in rows if any(_holds(row, python, e) for e in {"", *extras})]


def _holds(requirement: Requirement, python: str, extra: str = "") -> bool:
    marker = requirement.marker
    there = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": extra,
    }
    return marker is None or marker.evaluate(there)


if __name__ == "__main__":
    wrong = sorted(set(faults()))
    sys.exit("\n".join([*wrong, "`make lock` writes requirements.lock anew"]) if wrong else 0)
