"""Proposes newer pins, and accepts those that resolve together and pass their tests.

python images/update.py                           # the table; nothing changes
python images/update.py --accept builders/merge   # writes pins and runs tests, or puts them back
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from weightsmith.building.wiring import make_registry
from weightsmith.core.errors import WeightsmithError
from weightsmith.oci.catalog import tags
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry

ROOT = Path(__file__).resolve().parents[1]
_EXACT = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;,\\]+)", re.MULTILINE)
_BY_HAND = frozenset({"torch"})
"""Its CPU wheels are not on PyPI: requirements-cpu.txt and -cuda.txt pin them by hash."""
# For the oldest Python that is supported: what it can have, later ones have wheels for.
_COMPILE = (
    "--python-version", "3.11", "--python-platform", "linux", "--upgrade", "--generate-hashes",
    "--no-annotate", "--no-header", "--quiet", "--no-emit-index-url", "--no-emit-find-links",
)  # fmt: skip
_REAL = "python -m pytest -q tests/real/test_compressor.py -k"
ACCEPTED_BY: Mapping[str, tuple[str, ...]] = {
    "constraints": ("make lock", "make setup-dev", "make check", "make test-fast"),
    "builders/merge": ("make setup-dev", "python -m pytest -q tests/builds/test_whole_builds.py"),
    "builders/gguf": ("python -m pytest -q tests/builds -k gguf",),
    "builders/compressor": (f"{_REAL} 'awq-compressed or fp8-static or reads'",),
    "builders/gptqmodel": (f"{_REAL} gptqmodel",),
    "builders/autoawq": (f"{_REAL} autoawq",),
}
"""Part -> commands that must succeed with its newer pins. Other parts are moved by hand."""
BY_HAND: Mapping[str, str] = {
    "torch": "its wheels for CPUs, by hash in requirements-cpu.txt, once pytorch.org has them",
    "sources": "requirements-source.txt, with the torch that it asks for",
    "engines": "its folder's README, then the tests of `make test-all` that start it",
    "bases": "edit images/bases.lock, `make bases`, then `make gpu-day` on a GPU",
    "debian": "edit the `debian.json` files, then the tests of images that hold these packages",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One pin: where, what, and which version is newer; `newest` is empty if nobody answered."""

    part: str
    name: str
    pinned: str
    newest: str = ""
    note: str = ""

    @property
    def moves(self) -> bool:
        """Whether there is another version."""
        return bool(self.newest) and self.newest != self.pinned


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What a part's pins become, and the files that say so."""

    rows: tuple[Row, ...]
    files: Mapping[Path, str]
    locks: tuple[Path, ...] = ()
    """What the accepting commands write from these files."""


def pins(text: str) -> dict[str, str]:
    """Return name -> version of exact pins, by the names as an index has them."""
    found = ((canonical(m["name"]), m["version"]) for m in _EXACT.finditer(text))
    return {name: version.partition("+")[0] for name, version in found}


def canonical(name: str) -> str:
    """Return a package's name as PEP 503 normalises it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def compiled(requirements: str, *words: str, root: Path = ROOT) -> str:
    """Return uv's newest versions of requirements that work together; RuntimeError says why not."""
    wheels = os.environ.get("WEIGHTSMITH_WHEELS") or os.environ.get("PIP_FIND_LINKS")
    torch = ("--find-links", wheels) if wheels else ("--torch-backend", "cpu")
    command = [sys.executable, "-m", "uv", "pip", "compile", *_COMPILE, *torch, *words, "-"]
    done = subprocess.run(
        command, input=requirements, cwd=root, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["uv failed"]
        raise RuntimeError(" ".join(line.strip() for line in lines[-3:]))
    return done.stdout


def constraints(root: Path = ROOT) -> Resolved:
    """Resolve the tool's packages and its tests' anew, as pyproject.toml allows; torch stays."""
    file = root / "constraints.txt"
    text = file.read_text("utf-8")
    stays = [pin[0] for pin in _EXACT.finditer(text) if canonical(pin["name"]) in _BY_HAND]
    wanted = "\n".join(["hatchling", "editables", *stays])
    found = pins(
        compiled(wanted, "--extra", "dev", "--extra", "keyless", "--no-emit-package", "torch",
                 "pyproject.toml", root=root)
    )  # fmt: skip
    rows = tuple(_rows("constraints", text, found))
    return Resolved(
        rows=rows,
        files={file: _EXACT.sub(lambda pin: _moved(pin, found), text)},
        locks=tuple(sorted(root.glob("requirements*.lock"))),
    )


def builder(folder: Path, root: Path = ROOT) -> Resolved:
    """Resolve a builder's packages anew, each at least as new as its pin; torch stays."""
    part = folder.relative_to(root / "images").as_posix()
    wanted, file = folder / "requirements.in", folder / "requirements.txt"
    text = wanted.read_text("utf-8")
    left_out = sorted({*re.findall(r"--unsafe-package (\S+)", text), *_BY_HAND})
    free = _EXACT.sub(_loosened, text)
    words = [word for name in left_out for word in ("--no-emit-package", name)]
    made = compiled(free, *words, root=root)
    found = pins(made)
    rows = tuple(_rows(part, file.read_text("utf-8"), found))
    lines = file.read_text("utf-8").splitlines(keepends=True)
    head = "".join(takewhile(lambda line: line.startswith("#"), lines))
    return Resolved(
        rows=rows,
        files={wanted: _EXACT.sub(lambda m: _moved(m, found), text), file: head + made},
    )


def _loosened(pin: re.Match[str]) -> str:
    return pin[0] if canonical(pin["name"]) in _BY_HAND else (
        f"{pin['name']}>={pin['version'].removesuffix('.*')}"
    )  # fmt: skip


def _moved(pin: re.Match[str], found: Mapping[str, str]) -> str:
    new = found.get(canonical(pin["name"]), pin["version"])
    if pin["version"].endswith(".*") and new != pin["version"]:
        new = ".".join(new.split(".")[: pin["version"].count(".")]) + ".*"
    return f"{pin['name']}=={new}"


def _rows(part: str, text: str, found: Mapping[str, str]) -> Iterator[Row]:
    before = pins(text)
    for name in sorted(before.keys() & found.keys()):
        yield Row(part=part, name=name, pinned=before[name], newest=found[name])


def engines(root: Path = ROOT) -> Iterator[Row]:
    """Yield what is moved by hand: packages of engines, builders' sources, torch.

    Each has the newest version of its own, whatever it works with.
    """
    pinned = pins((root / "constraints.txt").read_text("utf-8"))
    known = {name: (name, pinned[name]) for name in sorted(_BY_HAND & pinned.keys())}
    for file in sorted(root.glob("images/builders/*/requirements-source.txt")):
        for name, version in pins(file.read_text("utf-8")).items():
            known[name] = (f"sources/{file.parent.name}", version)
    for file in sorted(root.glob("images/engines/*/source.json")):
        told, part = json.loads(file.read_text("utf-8")), f"engines/{file.parent.name}"
        for tool, version in told.get("compiler", {}).items():
            known.setdefault(tool, (part, version))
        if "package" in told:
            known[told["package"]] = (part, told["version"])
    for file in sorted(root.glob("images/engines/*/requirements.in")):
        for name, version in pins(file.read_text("utf-8")).items():
            known[name] = (f"engines/{file.parent.name}", version)
    if not known:
        return
    try:
        found = pins(compiled("\n".join(known), "--no-deps", root=root))
    except RuntimeError as error:
        found, why = {}, f"not asked: {error}"
    else:
        why = ""
    for name, (part, version) in sorted(known.items()):
        yield Row(part=part, name=name, pinned=version, newest=found.get(name, ""), note=why)


def bases(registry: Registry, root: Path = ROOT) -> Iterator[Row]:
    """Yield upstream's images; newer is a tag of the same shape with a higher version."""
    lock = json.loads((root / "images/bases.lock").read_text("utf-8"))
    for purpose, entry in lock.items():
        reference = Reference.parse(entry["reference"])
        row = Row(part="bases", name=purpose, pinned=reference.tag or "")
        try:
            there = tags(registry, reference)
        except WeightsmithError as error:
            yield replace(row, note=f"not asked: {error.message}")
            continue
        yield replace(row, newest=newest_tag(row.pinned, there or []))


def newest_tag(pinned: str, there: Sequence[str]) -> str:
    """Return the highest tag that differs from the pinned one in its numbers alone."""
    shape = re.compile(re.sub(r"\d+", r"\\d+", re.escape(pinned)) + r"\Z")
    alike = [tag for tag in there if shape.match(tag)]
    return max([pinned, *alike], key=lambda tag: [int(n) for n in re.findall(r"\d+", tag)])


def debian(root: Path = ROOT) -> Iterator[Row]:
    """Yield the days of Debian's archive that packages are from."""
    for file in sorted(root.glob("images/**/debian.json")):
        archive = json.loads(file.read_text("utf-8"))["archive"]
        place, _, day = archive.rpartition("/")
        row = Row(part="debian", name=file.parent.relative_to(root).as_posix(), pinned=day)
        try:
            with urllib.request.urlopen(f"{place}/", timeout=30) as page:
                text = page.read(1 << 20).decode("utf-8", "replace")
            years = re.findall(r"\?year=(\d+)(?:&amp;|&)month=(\d+)", text)
            year, month = max((int(y), int(m)) for y, m in years)
            with urllib.request.urlopen(f"{place}/?year={year}&month={month}", timeout=30) as page:
                days = re.findall(r"\d{8}T\d{6}Z", page.read(1 << 20).decode("utf-8", "replace"))
            yield replace(row, newest=max(days))
        except (OSError, ValueError, http.client.HTTPException) as error:
            yield replace(row, note=f"not asked: {error}")


def accepted(
    resolved: Resolved, part: str, run: Callable[[str], int], commands: Sequence[str]
) -> tuple[Row, ...]:
    """Write a part's pins and run what must succeed.

    Puts the pins and what was made from them back if something fails or the run is interrupted.
    """
    moving = [row for row in resolved.rows if row.moves]
    if not moving:
        return resolved.rows
    before = {file: file.read_bytes() for file in (*resolved.files, *resolved.locks)}
    done, note = False, "accepted"
    try:
        for file, text in resolved.files.items():
            file.write_text(text, "utf-8")
        for command in commands:
            print(f"{part}: {command}", file=sys.stderr, flush=True)
            if run(command):
                note = f"refused: `{command}` failed"
                break
        else:
            done = True
    finally:
        if not done:
            for file, data in before.items():
                file.write_bytes(data)
    return tuple(replace(r, note=note) if r.moves else r for r in resolved.rows)


def table(rows: Sequence[Row]) -> str:
    """Return what is newer, and what could not be asked, as a table in Markdown."""
    lines = ["| part | name | pinned | newest | |", "|---|---|---|---|---|"]
    for row in rows:
        if row.moves or row.note:
            how = row.note or (ACCEPTED_BY.get(row.part) and f"`--accept {row.part}`")
            how = how or BY_HAND.get(row.part.partition("/")[0], "")
            lines.append(f"| {row.part} | {row.name} | {row.pinned} | {row.newest} | {how} |")
    same = sum(not (row.moves or row.note) for row in rows)
    return "\n".join([*lines, "", f"{same} pins are the newest that work together."]) + "\n"


def main() -> int:
    """Print and write the table; return 1 if pins that were to be accepted were refused."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--accept", nargs="*", default=[], help=", ".join(ACCEPTED_BY))
    parser.add_argument("--only", nargs="*", default=[], help="parts to ask for; default: all")
    parser.add_argument("--insecure", action="store_true", help="ask registries by plain HTTP")
    parser.add_argument("--out", type=Path, default=ROOT / "dist" / "updates.md")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := sorted(set(given.accept) - ACCEPTED_BY.keys()):
        parser.error(f"--accept {unknown[0]}: choose from {', '.join(ACCEPTED_BY)}")
    root, rows = given.root, list[Row]()
    parts: dict[str, Callable[[], Resolved]] = {"constraints": lambda: constraints(root)}
    for file in sorted(root.glob("images/builders/*/requirements.in")):
        parts[f"builders/{file.parent.name}"] = lambda folder=file.parent: builder(folder, root)

    def run(command: str) -> int:
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
        return subprocess.run(
            ["bash", "-c", command], cwd=root, env={**os.environ, "PATH": path}, check=False
        ).returncode

    def asked(part: str) -> bool:
        return not given.only or part in given.only or part.partition("/")[0] in given.only

    for part, resolve in parts.items():
        if not (asked(part) or part in given.accept):
            continue
        try:
            found = resolve()
        except RuntimeError as error:
            rows.append(Row(part=part, name="all", pinned="", note=f"not resolved: {error}"))
            continue
        done = part in given.accept
        rows += accepted(found, part, run, ACCEPTED_BY[part]) if done else found.rows
    rows += engines(root) if asked("engines") else []
    if asked("bases"):
        with make_registry(insecure=given.insecure) as registry:
            rows += bases(registry, root)
    rows += debian(root) if asked("debian") else []
    text = table(rows)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text, "utf-8")
    print(text, end="")
    refused = any(row.note.startswith(("refused", "not resolved")) for row in rows)
    return 1 if given.accept and refused else 0


if __name__ == "__main__":
    raise SystemExit(main())
