"""Finds files of a base where the image puts its own: the upper file would hide the lower one."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator

from weightsmith.oci.image import Image
from weightsmith.oci.layers import Layer, Memo
from weightsmith.oci.streams import entries


def first_collision(base: Image, folders: Collection[str], memo: Memo) -> str:
    """Return a path of the base in one of the folders, or in place of one; empty if there is none.

    `folders` have no leading or trailing slash. Each layer is read once; the result is cached.
    Raises InputRefused for a damaged layer.
    """
    for layer in base.layers:
        key = json.dumps(["collisions", layer.digest, sorted(folders)])
        if found := memo(key, lambda layer=layer: _first(layer, folders)):  # type: ignore[misc]
            return found
    return ""


def _first(layer: Layer, folders: Collection[str]) -> str:
    """Return the first collision; the whole layer is read, so its digest is verified."""
    found = ""
    for path in _collisions(layer, folders):
        found = found or path
    return found


def _collisions(layer: Layer, folders: Collection[str]) -> Iterator[str]:
    for entry in entries(layer):
        path = "/".join(part for part in entry.name.split("/") if part not in ("", "."))
        shown = path.replace(".wh..wh..opq", "").replace(".wh.", "")
        for folder in folders:
            inside = f"{shown}/".startswith(f"{folder}/")
            above = f"{folder}/".startswith(f"{shown}/") and bool(shown)
            if (inside or above) and not (entry.isdir() and path == shown):
                yield path
