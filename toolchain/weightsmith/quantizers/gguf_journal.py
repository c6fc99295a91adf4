"""What an interrupted pass has written, with the digests that it is held to before it goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO

from weightsmith.core.safe_parse import parse

_SOME = 1 << 20
"""Bytes that are read at a time."""


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """Bytes of a tensor that were written at once."""

    at: int
    size: int
    sha256: str

    @staticmethod
    def of(data: memoryview, at: int) -> Piece:
        """Return the piece of bytes that go to an offset of the file."""
        return Piece(at, len(data), hashlib.sha256(data).hexdigest())


def line_of(name: str, pieces: Sequence[Piece]) -> bytes:
    """Return the journal's line of a tensor whose pieces are on the disk."""
    return json.dumps([name, *map(astuple, sorted(pieces))]).encode() + b"\n"


def reached(
    journal: Path, key: str, partial: Path, spans: Mapping[str, tuple[int, int]]
) -> set[str]:
    """Return the tensors that an interrupted run of the same inputs finished, read back.

    `spans` are offset and bytes of each tensor. Those whose bytes are not the ones that were
    written are left out, as are lines that were cut off.
    """
    if not journal.is_file() or not partial.is_file():
        return set()
    first, *lines = journal.read_text("utf-8", errors="replace").split("\n")
    if first != key:
        return set()
    with partial.open("rb") as file:
        return {name for line in lines if (name := _finished(line, file, spans))}


def _finished(line: str, file: IO[bytes], spans: Mapping[str, tuple[int, int]]) -> str:
    """Return a line's tensor if the file has what it says, or an empty name."""
    try:
        name, *found = parse(line)
        pieces, (at, size) = [Piece(*piece) for piece in found], spans[name]
        end = at + size
        for piece in pieces:
            if piece.at != at or piece.sha256 != _sha256(file, at, piece.size):
                return ""
            at += piece.size
    except (ValueError, TypeError, KeyError):
        return ""
    return str(name) if at == end else ""


def _sha256(file: IO[bytes], at: int, size: int) -> str:
    found = hashlib.sha256()
    file.seek(at)
    for start in range(0, size, _SOME):
        found.update(file.read(min(_SOME, size - start)))
    return found.hexdigest()
