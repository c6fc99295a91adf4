"""What a recipe names on the asking machine, on its way to a node that shares only the cache."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from weightsmith.cache.document import content_inputs
from weightsmith.core.errors import CacheLost, EnvironmentFailure, UsageError
from weightsmith.core.values import Digest, JsonValue, Tree
from weightsmith.evaluating.items import picture_files
from weightsmith.fleets.requests import TaskRequest
from weightsmith.recipe.sources import is_remote
from weightsmith.steps.tools import Tools

_ALONG = 64 << 10
"""Bytes of a file that goes along with each task; of a larger one, 1,500 tasks would be too much
for memory."""
NAMED = (
    ("evaluate", "data"),
    ("evaluate", "training"),
    ("evaluate", "corpus"),
    ("validate", "probes"),
    ("replay", "data"),
    ("calibration", "data"),
    ("quantize", "imatrix"),
    ("quantize", "mix"),
)
"""Keys of a recipe that name a file."""
WORDS = frozenset({"", "auto", "walk", "off"})
"""Values of these keys that are no file's name."""


def packed(request: TaskRequest, tools: Tools, *, again: bool = False) -> TaskRequest:
    """Return the request for a node that shares no folder with this machine.

    Small files go along; others and folders go into the store, and so into the shared cache. With
    `again`, what the cache has lost since is sent again. Raises UsageError for a file that is
    missing, InputRefused for an unsafe folder, EnvironmentFailure for a cache that cannot be
    written.
    """
    files: dict[str, str] = {}
    payloads: dict[str, Digest] = {}
    data = deepcopy(dict(request.recipe))
    questions = tuple(dict(one) for one in request.questions)
    sections = [(part, key) for section, key in NAMED for part in parts_of(data, section)]
    named = [
        (part, key)
        for part, key in sections
        if isinstance(part, dict) and str(part.get(key) or "") not in WORDS
    ]
    keys = [key for section, key in NAMED if section == "evaluate"]
    asked = [(one, key) for one in questions for key in keys if one.get(key)]
    for part, key in (*named, *asked):
        path = Path(str(part[key]))
        try:
            name, beside = path.name, picture_files(path) if key == "data" else ()
            sent = bool(beside) or path.stat().st_size > _ALONG
            content = b"" if sent else path.read_bytes()
            files_sent = [path, *(path.parent / one for one in beside)] if sent else []
            tree = Tree(
                root=path.parent,
                files=tuple(
                    replace(tools.store.digest_file(one), path=str(one.relative_to(path.parent)))
                    for one in files_sent
                ),
            )
        except OSError as error:
            raise UsageError(
                f"cannot read {path}: {error.strerror}", hint="correct its path in the recipe"
            ) from None
        if sent:
            folder = f"folders/{len(payloads)}/files"
            payloads[folder], part[key] = _sent(tree, tools, again=again), f"{folder}/{name}"
        else:
            place = f"files/{len(files)}/{name}"
            files[place], part[key] = base64.b64encode(content).decode(), place
    for part, key in _sources(data):
        source = str(part[key])
        if not is_remote(source):
            tree = tools.readers[""].fetch(source, "", "", tools.progress).tree
            name = f"folders/{len(payloads)}/{Path(source).name}"
            payloads[name], part[key] = _sent(tree, tools, again=again), name
    return replace(request, recipe=data, questions=questions, files=files, payloads=payloads)


def _sources(recipe: Mapping[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Return the parts of a recipe that name its sources, each with the key that does."""
    found = [(part, "source") for part in (recipe["base"], *recipe["adapters"])]
    drafting = (recipe.get("serve") or {}).get("speculative") or {}
    draft = drafting.get("draft")
    if draft:  # a source alone, or a section
        found.append((draft, "source") if isinstance(draft, dict) else (drafting, "draft"))
    return found


def parts_of(recipe: Mapping[str, JsonValue], section: str) -> Sequence[JsonValue]:
    """Return a section of a recipe, or each one of those of which there may be several."""
    part = recipe.get(section)
    return part if isinstance(part, list) else (part,)


def _sent(tree: Tree, tools: Tools, *, again: bool) -> Digest:
    """Put a folder's files into the shared cache, and return their key."""
    stage = content_inputs(tree.files)

    def copy(folder: Path) -> Mapping[str, JsonValue]:
        for file in tree.files:
            place = folder / file.path
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tree.path(file.path), place)
        return {"sha256": {file.path: file.digest.hex for file in tree.files}}

    def send(*, again: bool) -> None:
        entry = tools.store.find(stage.key) or tools.store.produce(stage.key, stage.note, copy)
        tools.share(stage.key, stage.note, entry, again=again)

    try:
        try:
            send(again=again)
        except CacheLost:  # only the cache had a copy, and lost it: the store offers it no more
            send(again=True)
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot put {tree.root.name} into the shared cache: {error.strerror or error}",
            hint="check that the cache is there, and your access to it",
        ) from None
    return stage.key


def unpack(request: TaskRequest, home: Path, tools: Tools) -> None:
    """Put what a request's recipe names into `home`.

    Raises EnvironmentFailure if the cache lacks a folder, CacheLost if it has a damaged one: after
    all of them were read, so that one retry replaces whatever is damaged.
    """
    for name, text in request.files.items():
        place = _inside(home, name)
        try:
            place.write_bytes(base64.b64decode(text, validate=True))
        except ValueError as error:
            raise EnvironmentFailure(
                f"{name} did not arrive whole: {error}", hint="run the fleet again"
            ) from None
    damaged: list[CacheLost] = []
    for name, key in request.payloads.items():
        entry = tools.store.find(key)
        if entry is None:
            raise EnvironmentFailure(
                f"the cache has no copy of {Path(name).name}, which this task needs",
                hint="check that every node uses the same --cache and may read it",
            )
        try:
            for file in entry.tree.files:  # which brings them, where the cache is lazy
                entry.tree.path(file.path)
            _inside(home, name).symlink_to(entry.tree.root)
        except CacheLost as error:
            damaged.append(error)
    if damaged:
        raise damaged[0]


def _inside(home: Path, name: str) -> Path:
    place = home / name
    place.parent.mkdir(parents=True, exist_ok=True)
    return place
