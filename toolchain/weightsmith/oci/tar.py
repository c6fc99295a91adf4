"""Writes tar archives with our own code, so that the bytes are the same everywhere.

POSIX.1-2001 ustar and pax: https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html
A size of 8 GiB or more is a binary number in the header itself, as GNU tar writes it:
https://www.gnu.org/software/tar/manual/html_node/Extensions.html. Clair finds entries by that field
alone (quay/claircore, pkg/tarfs/parse.go): with a pax record, and 0 in the field, it fails.
"""

from __future__ import annotations

import os

from weightsmith.core.errors import UsageError

BLOCK = 512
END = bytes(2 * BLOCK)
"""End of an archive; longer padding is only useful on tape drives."""

_LARGEST_USTAR = 8**11 - 1
LARGEST_TIME = _LARGEST_USTAR
"""Seconds since 1970."""
_NAME, _PREFIX = 100, 155


def header(path: str, *, size: int, mode: int, mtime: int, folder: bool = False) -> bytes:
    """Return an entry's header: 512 bytes, or more if a long name needs a pax record.

    `path` is a relative POSIX path without a trailing slash; owner and group are 0, without names.
    """
    name = path + "/" if folder else path
    raw = name.encode()
    extended = b""
    split: tuple[bytes, bytes] | None = None
    if raw.isascii():
        split = raw, b""
        if len(raw) > _NAME:
            # The name is as long as possible, so that each path has exactly one encoding.
            slash = raw.find(b"/", len(raw) - _NAME - 1, len(raw) - 1)
            split = (raw[slash + 1 :], raw[:slash]) if 0 < slash <= _PREFIX else None
    if split is None:
        split = raw.decode().encode("ascii", "replace")[:_NAME], b""
        record, entry = _record("path", name), (b"PaxHeaders/entry", b"")
        extended = _block(entry, kind=b"x", size=len(record), mode=0o644, mtime=mtime)
        extended += record + padding(len(record))
    kind = b"5" if folder else b"0"
    return extended + _block(split, kind=kind, size=size, mode=mode, mtime=mtime)


def padding(size: int) -> bytes:
    """Return the zeros that fill the last block of `size` bytes."""
    return bytes(-size % BLOCK)


def source_date_epoch() -> int:
    """Return SOURCE_DATE_EPOCH in seconds, 0 if it is not set; UsageError if it is no number.

    https://reproducible-builds.org/specs/source-date-epoch/
    """
    text = os.environ.get("SOURCE_DATE_EPOCH", "").strip() or "0"
    if not (text.isascii() and text.isdigit()) or int(text) > _LARGEST_USTAR:
        raise UsageError(
            f"SOURCE_DATE_EPOCH is {text[:40]!r}, not a number of seconds since 1970",
            hint="unset it, or set it to e.g. $(git log -1 --pretty=%ct)",
        )
    return int(text)


def _record(key: str, value: str) -> bytes:
    """Return a pax record; its length counts its own digits."""
    body = f" {key}={value}\n".encode()
    length = len(body)
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return str(length).encode() + body


def _block(name: tuple[bytes, bytes], *, kind: bytes, size: int, mode: int, mtime: int) -> bytes:
    fields = (
        name[0].ljust(_NAME, b"\0"),
        b"%07o\0" % mode,
        b"%07o\0" % 0,
        b"%07o\0" % 0,
        b"%011o\0" % size if size <= _LARGEST_USTAR else b"\x80" + size.to_bytes(11),
        b"%011o\0" % mtime,
        b" " * 8,
        kind,
        bytes(100),
        b"ustar\x0000",
        bytes(64),
        b"%07o\0" % 0,
        b"%07o\0" % 0,
        name[1].ljust(_PREFIX, b"\0"),
        bytes(12),
    )
    block = b"".join(fields)
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]
