"""What an image was made from, by every name that a person may know it under.

A name comes from a label, a statement or a bill of materials; whoever asks says which of them to
believe. Debian's order of versions: https://man7.org/linux/man-pages/man7/deb-version.7.html
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from urllib.parse import unquote

from weightsmith.core.errors import UsageError
from weightsmith.core.values import JsonValue
from weightsmith.provenance.labels import (
    BASE_DIGEST,
    BASE_NAME,
    ENGINE_LABEL,
    ENGINE_VERSION,
    PREFIX,
)
from weightsmith.provenance.statements import Statement

KINDS = ("adapter", "base", "engine", "builder", "dataset_run", "license", "cve_package")
IN_BILLS = ("license", "cve_package")
"""Kinds that only bills of materials name."""
_HEX = re.compile(r"(?:sha256:)?([0-9a-f]{7,64})")
_DIGEST = re.compile(r"(?:sha256:)?([0-9a-f]{64}|[0-9a-f]{40})")
"""A digest, or a commit."""
_PAGE = re.compile(
    r"https://(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+?)/?(?:/(?:tree|commit)/(\w+))?"
)
_PIN = re.compile(r"(?P<source>.+?)(?:@(?P<revision>[^@/]+)|#sha256=(?P<sha256>[0-9a-f]{64}))?")
_BOUND = re.compile(r"\s*(<=|>=|==|!=|<|>)\s*([^\s<>=!,]+)\s*")
_EPOCH = re.compile(r"(?:(\d+):)?v?(.*)", re.DOTALL)
_PRE = re.compile(r"(?<=\d)[._-]?((?:alpha|beta|preview|pre|dev|rc)(?![a-z])|[abc](?=\d))[._-]?")
_PRE_WORD = re.compile(r"(?:alpha|beta|preview|pre|dev|rc)[.\d]*")
_RUN = re.compile(r"runs:/([\w-]+)", re.ASCII)
"""Of MLflow, in an adapter's pin."""
_PART = re.compile(r"(\D*)(\d*)")
_PURL = re.compile(r"pkg:[^/]+/[^@?#]")
"""How a package URL begins: `pkg:TYPE/NAME`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """One thing that an image was made from."""

    role: str
    """What it is in the image: `adapter:0`, `base`, or a component's name."""
    names: frozenset[str]
    """Digest, source with and without its pin, revision, run, licence: whatever names it."""
    version: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is asked for: a kind, a name of it as people type it, and bounds of its version."""

    kind: str
    name: str
    bounds: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> str:
        """Name and bounds: all that was asked for."""
        return self.name + ",".join(operator + version for operator, version in self.bounds)

    def matches(self, one: Named) -> bool:
        """Say whether a thing is the one that is asked for; of unknown version, it is."""
        if any(_same(self.name, name) for name in one.names):
            return not one.version or all(_holds(one.version, *bound) for bound in self.bounds)
        return not self.bounds and self.name == one.version


def wanted(kind: str, text: str) -> Wanted:
    """Return what a flag asks for: `NAME`, `NAME@VERSION`, `NAME==1.2` or `NAME>=1.2,<1.5`.

    Raises UsageError for an empty name, and for bounds that cannot be read or exclude each other.
    """
    text = text.strip()
    if page := _PAGE.fullmatch(text):
        text = f"hf://{page[1]}" + (f"@{page[2]}" if page[2] and page[2] != "main" else "")
    at = re.search(r"(?<![#?])(?:<=|>=|==|!=|<|>)", text) if "://" not in text else None
    name, rest = (text[: at.start()], text[at.start() :]) if at else (text, "")
    bounds = tuple(
        (found[1], found[2]) for found in map(_BOUND.fullmatch, rest.split(",")) if found
    )
    purl = _PURL.match(name) or not name.startswith("pkg:")
    if not name.strip() or not purl or (rest and len(bounds) != len(rest.split(","))):
        raise UsageError(
            f"--{kind.replace('_', '-')} {text!r} is no name with a version",
            hint="write NAME, NAME@VERSION, or NAME with bounds in quotes: 'openssl>=3.0,<3.0.14'",
        )
    if _exclude_each_other(bounds):
        raise UsageError(
            f"--{kind.replace('_', '-')} {text!r}: no version is within these bounds",
            hint="all bounds must hold at once, as in 'openssl>=3.0,<3.0.14'",
        )
    name = name.strip().rstrip("/")
    if kind in ("engine", "builder", "cve_package") and not bounds and not _is_image(name):
        name, _, version = name.partition("@") if not name.startswith("pkg:") else _purl(name)
        bounds = (("==", version),) if version else ()
    return Wanted(kind=kind, name=name, bounds=bounds)


def origins(
    kind: str,
    labels: Mapping[str, str],
    stated: Sequence[Statement],
    bills: Iterable[JsonValue] = (),
    own: Statement | None = None,
) -> Iterator[Named]:
    """Yield what an image was made from of one kind.

    `own` is the statement about the image itself: only its engine is in the image, whatever those
    before a rebase say.
    """
    match kind:
        case "adapter":
            yield from _adapters(labels, stated)
        case "base":
            yield from _bases(labels, stated)
        case "engine":
            yield from _engines(labels, [own] if own else [])
        case "builder":
            yield from _builders(stated)
        case "dataset_run":
            yield from _runs(labels, stated)
        case "license":
            yield from (one for bill in bills for one in _licensed(bill))
        case _:
            yield from (one for bill in bills for one in _packages(bill))


def _adapters(labels: Mapping[str, str], stated: Sequence[Statement]) -> Iterator[Named]:
    own = {key.removeprefix(PREFIX): text for key, text in labels.items() if key.startswith(PREFIX)}
    numbers = {key.split(".")[1] for key in own if key.startswith("adapter.")}
    for number in sorted(numbers):
        stem = f"adapter.{number}."
        version = own.get(f"{stem}version", "")
        texts = (own.get(stem + key, "") for key in ("pin", "digest"))
        yield known_as(f"adapter:{number}", version, *texts)
    for one in stated:
        for name, digest in one.dependencies.items():
            if name.startswith("adapter:"):
                yield known_as(name, "", digest, one.dependency_uris.get(name, ""))
        for place, row in enumerate(_rows(_recipe(one).get("adapters"))):
            source, revision = str(row.get("source", "")), str(row.get("revision", ""))
            version = str(row.get("version", ""))
            yield known_as(f"adapter:{place}", version, source, f"{source}@{revision}", revision)


def _bases(labels: Mapping[str, str], stated: Sequence[Statement]) -> Iterator[Named]:
    texts = (labels.get(f"{PREFIX}base.{key}", "") for key in ("source", "pin", "digest"))
    yield known_as("base", "", *texts)
    for one in stated:
        if digest := one.dependencies.get("base"):
            yield known_as("base", "", digest, one.dependency_uris.get("base", ""))
        base = _recipe(one).get("base")
        if isinstance(base, dict):
            source, revision = str(base.get("source", "")), str(base.get("revision", ""))
            yield known_as("base", "", source, f"{source}@{revision}", revision)


def _engines(labels: Mapping[str, str], own: Sequence[Statement]) -> Iterator[Named]:
    version, image = labels.get(ENGINE_VERSION, ""), labels.get(BASE_NAME, "")
    names = {labels.get(ENGINE_LABEL, ""), *_image_names(image, labels.get(BASE_DIGEST, ""))}
    yield Named(role="engine", names=frozenset(names - {""}), version=version)
    for one in own:
        if digest := one.dependencies.get("base image"):
            uri = one.dependency_uris.get("base image", "")
            yield Named(role="engine", names=frozenset(_image_names(uri, digest)))


def _builders(stated: Sequence[Statement]) -> Iterator[Named]:
    for one in stated:
        if one.kind:
            yield Named(role="weightsmith", names=frozenset({"weightsmith"}), version=one.made_by)
        for name, digest in one.builders.items():
            kind = name.rpartition(":")[2]
            yield Named(role=name, names=frozenset({name, kind, digest}))


def _runs(labels: Mapping[str, str], stated: Sequence[Statement]) -> Iterator[Named]:
    for key, text in labels.items():
        parts = key.removeprefix(PREFIX).split(".")
        if not key.startswith(PREFIX) or parts[0] != "adapter":
            continue
        run = _RUN.search(text)
        if parts[-1] == "run_id":
            yield known_as(f"adapter:{parts[1]}", "", text)
        elif parts[-1] == "pin" and run:
            yield known_as(f"adapter:{parts[1]}", "", run[0], run[1])
    for one in stated:
        if digest := one.dependencies.get("calibration"):
            found = one.parameters.get("calibration")
            named = found.values() if isinstance(found, dict) else ()
            texts = (text for text in named if isinstance(text, str))
            yield known_as("calibration", "", digest, *texts)
        recipe = _recipe(one)
        for number, row in enumerate(_rows(recipe.get("adapters"))):
            yield known_as(f"adapter:{number}", "", str(row.get("run_id", "")))
        for section in ("evaluate", "calibration"):
            for row in _rows(recipe.get(section)):
                yield known_as(
                    section, "", *(str(row.get(key, "")) for key in ("data", "training"))
                )


def _licensed(bill: JsonValue) -> Iterator[Named]:
    for one in _components(bill):
        stated = _rows(one.get("licenses"))
        inner = [row.get("license") for row in stated]
        texts = [row.get(key) for row in inner if isinstance(row, dict) for key in ("id", "name")]
        texts += [row.get("expression") for row in stated]
        texts += [one.get(key) for key in ("licenseConcluded", "licenseDeclared")]
        whole = {text for text in texts if isinstance(text, str)}
        words = {word for text in whole for word in re.split(r"[\s()]+", text)}
        if names := (whole | words) - {"", "AND", "OR", "WITH", "NOASSERTION", "NONE"}:
            yield Named(role=str(one.get("name", "")), names=frozenset(names))


def _packages(bill: JsonValue) -> Iterator[Named]:
    for one in _components(bill):
        name, version = str(one.get("name", "")), one.get("version") or one.get("versionInfo") or ""
        found = {name}
        links = [str(row.get("referenceLocator", "")) for row in _rows(one.get("externalRefs"))]
        for text in (str(one.get("purl", "")), *links):
            if text.startswith("pkg:"):
                package, _, stated = _purl(text)
                found |= {package, package.rpartition("/")[2]}
                version = version or stated
        if name:
            yield Named(role=name, names=frozenset(found), version=str(version))


def _components(bill: JsonValue) -> Iterator[Mapping[str, JsonValue]]:
    """Yield every component of a CycloneDX or SPDX document, with a model's ancestors."""
    if not isinstance(bill, dict):
        return
    meta, pending = bill.get("metadata"), list[JsonValue]()
    pending += [meta.get("component")] if isinstance(meta, dict) else []
    pending += [*_rows(bill.get("components")), *_rows(bill.get("packages"))]
    while pending:
        one = pending.pop()
        if not isinstance(one, dict):
            continue
        yield one
        pedigree = one.get("pedigree")
        inner = pedigree.get("ancestors") if isinstance(pedigree, dict) else None
        pending += [*_rows(one.get("components")), *_rows(inner)]


def _recipe(one: Statement) -> Mapping[str, JsonValue]:
    found = one.parameters.get("recipe")
    return found if isinstance(found, dict) else {}


def _rows(value: JsonValue) -> list[Mapping[str, JsonValue]]:
    """Return the objects of a list; a single object is a list of itself."""
    rows = [value] if isinstance(value, dict) else value if isinstance(value, list) else []
    return [row for row in rows if isinstance(row, dict)]


def known_as(role: str, version: str, *texts: str) -> Named:
    """Return a thing by all names that texts give it: whole, without pin, by the last part."""
    names = {name for text in texts for name in _aliases(text)}
    versioned = {f"{name}@{version}" for name in names} if version else set()
    return Named(role=role, names=frozenset(names | versioned), version=version)


def _aliases(text: str) -> Iterator[str]:
    """Yield a source by its whole name, without its pin, without its scheme, by its last part."""
    if not text or text.endswith("@"):
        return
    yield text
    if _DIGEST.fullmatch(text):
        return
    pin = _PIN.fullmatch(text)
    source, revision = (pin["source"], pin["revision"] or pin["sha256"]) if pin else (text, None)
    short = source.partition("://")[2] or source
    last = short.rstrip("/").rpartition("/")[2]
    yield from (source, short, last, last.partition("==")[0])
    if revision:
        yield revision
        yield from (f"{short}@{revision}", f"{last}@{revision}")


def _same(asked: str, name: str) -> bool:
    """Say whether two names are one: a digest or a commit may be shortened to seven digits."""
    if asked.casefold() == name.casefold():
        return True
    short, whole = _HEX.fullmatch(asked), _DIGEST.fullmatch(name)
    if short and whole:
        return whole[1].startswith(short[1])
    source, at, revision = asked.rpartition("@")
    if at and (short := _HEX.fullmatch(revision)):
        begin, _, end = name.rpartition("@")
        return source.casefold() == begin.casefold() and end.startswith(short[1])
    return False


def _purl(text: str) -> tuple[str, str, str]:
    """Return a package URL without version and qualifiers, and its version.

    https://github.com/package-url/purl-spec
    """
    bare = text.partition("#")[0].partition("?")[0]
    name, at, version = bare.rpartition("@")
    return (unquote(name), at, unquote(version)) if at and "/" in name else (unquote(bare), "", "")


def _is_image(name: str) -> bool:
    return "@sha256:" in name or ("/" in name.partition("@")[0] and not name.startswith("pkg:"))


def _image_names(image: str, digest: str) -> set[str]:
    """Return what an image may be called: with and without its tag and its digest."""
    name = image.partition("@")[0]
    head, colon, tag = name.rpartition(":")
    bare = head if colon and "/" not in tag and head != "engine" else name
    return {digest, image, name, bare, f"{name}@{digest}", f"{bare}@{digest}"} - {"", "@"}


def _exclude_each_other(bounds: Iterable[tuple[str, str]]) -> bool:
    """Say whether no version is within bounds: a lower one is above an upper one."""
    bounds = tuple(bounds)
    for low, least in bounds:
        for high, most in bounds:
            if low in (">", ">=", "==") and high in ("<", "<=", "=="):
                order = compare(least, most)
                if order > 0 or (order == 0 and (low == ">" or high == "<")):
                    return True
    return False


def _holds(version: str, operator: str, bound: str) -> bool:
    order = compare(version, bound)
    return {
        "<": order < 0, "<=": order <= 0, ">": order > 0, ">=": order >= 0,
        "==": order == 0, "!=": order != 0,
    }[operator]  # fmt: skip


def compare(one: str, other: str) -> int:
    """Return -1, 0 or 1 as one version is before, equal to or after another.

    By Debian's rules, with what PyPI and npm release before a version (`1.0rc1`, `1.0-beta.2`)
    before it, and without zeros at the end: `1.0` is `1.0.0`.
    """
    for left, right in zip(_split(one), _split(other), strict=True):
        if order := _order(left, right):
            return order
    return 0


def _split(version: str) -> tuple[str, str, str]:
    """Return a version's epoch, the version upstream, and the package's revision."""
    epoch, rest = _EPOCH.fullmatch(version.strip()).groups("")  # type: ignore[union-attr]  # any text
    upstream, dash, revision = rest.rpartition("-")
    if not dash or _PRE_WORD.fullmatch(revision):
        upstream, revision = rest, ""
    if not revision:
        upstream = upstream.partition("+")[0]  # a build of the same version, such as +cpu
    upstream = _PRE.sub(r"~\1", upstream.lower())
    return epoch.lstrip("0"), re.sub(r"(\.0)+(?=$|~)", "", upstream), revision


def _order(left: str, right: str) -> int:
    """Compare as dpkg does: texts by character, a tilde before the end, numbers by value."""
    pairs = zip_longest(_PART.findall(left), _PART.findall(right), fillvalue=("", ""))
    for (text, number), (text2, number2) in pairs:
        ranks, ranks2 = [*map(_rank, text), 0], [*map(_rank, text2), 0]
        if ranks != ranks2:
            return -1 if ranks < ranks2 else 1
        with suppress(ValueError):
            value, value2 = int(number or 0), int(number2 or 0)
            if value != value2:
                return -1 if value < value2 else 1
    return 0


def _rank(character: str) -> int:
    if character == "~":
        return -1
    return ord(character) if character.isalpha() else ord(character) + 256
