"""Small pictures of one shape, written as PNG without a library (RFC 2083)."""

import struct
import zlib
from pathlib import Path

SHAPES = ("square", "circle", "cross", "bars")
WHITE = (255, 255, 255)
Colour = tuple[int, int, int]


def draw(
    path: Path,
    shape: str,
    colour: Colour,
    size: tuple[int, int] = (56, 56),
    place: tuple[float, float, float] = (0.5, 0.5, 0.35),
) -> Path:
    """Write a shape on white; `place` is its middle and half its width, in shares of the size."""
    width, height = size
    rows = (
        [_inside(shape, (x + 0.5) / width, (y + 0.5) / height, place) for x in range(width)]
        for y in range(height)
    )
    data = (b"".join(bytes(colour if one else WHITE) for one in row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(width, height, b"".join(b"\0" + row for row in data)))
    return path


def png(width: int, height: int, rows: bytes) -> bytes:
    """Return a file of RGB rows, each behind its filter's byte."""
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _inside(shape: str, x: float, y: float, place: tuple[float, float, float]) -> bool:
    across, down, half = place
    dx, dy = abs(x - across) / half, abs(y - down) / half
    if max(dx, dy) > 1:
        return False
    if shape == "circle":
        return dx * dx + dy * dy <= 1
    if shape == "cross":
        return min(dx, dy) <= 0.35
    return shape == "square" or int((y - down + half) / half * 2.5) % 2 == 0
