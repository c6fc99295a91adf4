"""Pictures in questions: which file, which bytes, and their size, by header and end alone.

The pixels are decoded where the references are asked, in a builder without a network. Here they are
bytes with a digest, and a header of an untrusted file.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.jobs import SeenPicture
from weightsmith.core.safe_parse import content
from weightsmith.core.values import Digest, JsonValue

FOLDER = "pictures"
"""Of a record's or an image's questions: where their pictures lie beside them."""
KINDS = ("png", "jpeg", "webp")
"""Formats, which are also the files' endings and MIME types in the house."""
MOST_BYTES = 16 << 20
MOST_PIXELS = 1 << 25
"""Of one picture, 33 million: a camera's 24 megapixels pass, and decoded they take 100 MB."""
_MOST_TOKENS, _LEAST_TOKENS, _TOKEN_PIXELS = 16384, 256, 28 * 28
"""A picture is so many tokens: Gemma 3 has 256, Qwen-VL one for 28 x 28 pixels."""
_DATA = "data:"
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"
_JPEG_END = b"\xff\xd9"
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SCAN = 0xDA
_ALONE = frozenset({0x01, *range(0xD0, 0xD8)})
"""Markers of JPEG without a length."""
_FORMAT = "save it again, as PNG, JPEG or WebP"


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A picture in a question."""

    seen: SeenPicture
    digest: Digest
    kind: str
    """One of KINDS."""
    size: int
    """Bytes."""
    path: Path | None = None
    """Its file; None for one that lies in the row itself."""
    data: bytes = b""

    @property
    def name(self) -> str:
        """What the row calls it, or what stands for one that lies in the row."""
        return self.seen.name

    @property
    def tokens(self) -> int:
        """An estimate of the tokens that a model reads it as."""
        pixels = self.seen.width * self.seen.height
        return min(_MOST_TOKENS, max(_LEAST_TOKENS, pixels // _TOKEN_PIXELS))

    @property
    def shown(self) -> str:
        """Name and digest, for people."""
        return f"[{self.name}, {self.digest.short}]"

    def read(self) -> bytes:
        """Return its bytes; raise InputRefused if its file has others by now."""
        if self.path is None:
            return self.data
        found = b""
        with suppress(OSError, ValueError):
            found = content(self.path, MOST_BYTES)
        if Digest.of(found) != self.digest:
            raise InputRefused(
                f"{self.path} changed while the build ran",
                hint="build again, and leave the questions' pictures alone meanwhile",
            )
        return found

    def url(self) -> str:
        """Return it as a data URL."""
        return f"data:image/{self.kind};base64,{base64.b64encode(self.read()).decode()}"

    def at(self, message: int, at: int) -> Picture:
        """Return the same picture in another place."""
        return replace(self, seen=replace(self.seen, message=message, at=at))


UNPREPARED = frozenset(
    {
        "Apertus1p5ForConditionalGeneration",
        "Cohere2VisionForConditionalGeneration",
        "Gemma4UnifiedForConditionalGeneration",
        "Inkling2ForConditionalGeneration",
        "Inkling2LoopForConditionalGeneration",
        "InklingForConditionalGeneration",
        "Kimi_K25ForConditionalGeneration",
        "Lfm2VlForConditionalGeneration",
        "Llama4ForConditionalGeneration",
        "MiniCPMOcrForConditionalGeneration",
        "MiniMaxM3SparseForConditionalGeneration",
        "Mistral3ForConditionalGeneration",
        "MistralLarge4ForConditionalGeneration",
        "Molmo2ForConditionalGeneration",
        "MuseGlimmerForConditionalGeneration",
        "MuseSparkForConditionalGeneration",
        "NemotronH_Omni_Reasoning_V3",
        "PI0ForConditionalGeneration",
        "PPFormulaNetForConditionalGeneration",
        "PerceptionLMForConditionalGeneration",
        "Step3p7ForConditionalGeneration",
        "UnlimitedOcrForConditionalGeneration",
    }
)
"""Models whose pictures transformers prepares with torchvision alone.

The builder has none: its builds for CPUs are not on PyPI.
"""


def named_part(picture: Picture) -> JsonValue:
    """Return the part of a message's content that names a picture by its file's name."""
    return {"type": "image_url", "image_url": {"url": f"{FOLDER}/{picture.seen.file}"}}


def picture_in(folder: Path, name: str, where: str) -> Picture:
    """Return the picture that a row names: a path below `folder`, or a data URL.

    Raises UsageError for another address, InputRefused for a file outside the folder, one that is
    no picture, or a larger one than is decoded. `where` is the row, for the message.
    """
    if name.startswith(_DATA):
        data = _of_url(name, where)
        kind, width, height = _checked(data, "the picture in the row", where)
        return _picture("picture", data, kind, width, height, None)
    if "://" in name:
        raise UsageError(
            f"{where}: {name[:200]} is an address, and builds load nothing from the network",
            hint="put the picture beside the questions, and give its path",
        )
    path = _inside(folder, name, where)
    try:
        status = path.stat()
        if status.st_size > MOST_BYTES:
            raise ValueError(f"it has {status.st_size} bytes; at most {MOST_BYTES} are read")
        return _look(path, name, (status.st_size, status.st_mtime_ns, status.st_ino), where)
    except OSError as error:
        raise UsageError(
            f"{where}: cannot read the picture {path}: {error.strerror}",
            hint="give its path relative to the file of questions",
        ) from None
    except ValueError as error:
        hint = "make the picture smaller" if path.is_file() else "name a file of a picture"
        raise InputRefused(f"{where}: {path}: {error}", hint=hint) from None


@lru_cache(maxsize=4096)  # a build asks for them ten times
def _look(path: Path, name: str, _status: tuple[int, int, int], where: str) -> Picture:
    data = content(path, MOST_BYTES)
    kind, width, height = _checked(data, str(path), where)
    return _picture(name, data, kind, width, height, path)


def _picture(
    name: str, data: bytes, kind: str, width: int, height: int, path: Path | None
) -> Picture:
    digest = Digest.of(data)
    seen = SeenPicture(
        file=f"{digest.hex}.{kind}", name=name, width=width, height=height, message=0, at=0
    )
    kept = b"" if path is not None else data
    return Picture(seen=seen, digest=digest, kind=kind, size=len(data), path=path, data=kept)


def _inside(folder: Path, name: str, where: str) -> Path:
    parts = PurePosixPath(name).parts
    unsafe = name.startswith("/") or ".." in parts or not parts or "\0" in name
    home = folder.resolve()
    path = home if unsafe else home / name
    with suppress(RuntimeError):  # of links in a circle, before Python 3.13; they have no status
        path = path.resolve()
    if unsafe or not path.is_relative_to(home):
        raise InputRefused(
            f"{where}: the picture {name[:200]!r} is outside of {folder}, the folder of the"
            " questions",
            hint="put it there, or into a folder below",
        )
    return path


def _of_url(url: str, where: str) -> bytes:
    head, _, body = url.partition(",")
    kinds = [f"data:image/{kind};base64" for kind in KINDS]
    try:
        if head not in kinds:
            raise ValueError(f"it begins with {head[:60]!r}")
        return base64.b64decode(body, validate=True)
    except (ValueError, binascii.Error) as error:
        raise UsageError(
            f"{where}: a data URL is not one of a picture: {error}",
            hint=f"write {kinds[0]},… (or jpeg, webp)",
        ) from None


def _checked(data: bytes, what: str, where: str) -> tuple[str, int, int]:
    """Return format, width and height of a picture that may be decoded."""
    try:
        kind, width, height = header(data)
    except ValueError as error:
        raise InputRefused(f"{where}: {what}: {error}", hint=_FORMAT) from None
    if width * height > MOST_PIXELS:
        raise InputRefused(
            f"{where}: {what} has {width} x {height} pixels; at most {MOST_PIXELS} are decoded",
            hint="make the picture smaller",
        )
    return kind, width, height


def header(data: bytes) -> tuple[str, int, int]:
    """Return a picture's format, width and height in pixels, by its header.

    PNG: RFC 2083, 11.2.2. JPEG: ITU-T T.81, B.2.2. WebP: RFC 9649, 2.5 to 2.7. Raises ValueError
    for other files, for a header that is cut off or says no size, and for a file without its end.
    """
    kind, read = next(
        (one for magic, one in _READERS.items() if data.startswith(magic)), ("", None)
    )
    if read is None:
        raise ValueError("it is neither a PNG, a JPEG nor a WebP file")
    try:
        (width, height), whole = read(data), _has_end(kind, data)
    except (struct.error, IndexError):
        raise ValueError(f"its {kind.upper()} header is cut off") from None
    if width < 1 or height < 1:
        raise ValueError(f"its {kind.upper()} header has no size")
    if not whole:
        raise ValueError(f"it is cut off: the end of its {kind.upper()} data is missing")
    return kind, width, height


def _has_end(kind: str, data: bytes) -> bool:
    """Return whether a file has its end; more may follow it."""
    match kind:
        case "png":
            return _PNG_END in data
        case "jpeg":
            scan = next(place for marker, place in _segments(data) if marker == _SCAN)
            # A preview in the header has an end of its own; a scan's data has 0 after each 0xFF.
            return data.find(_JPEG_END, scan) >= 0
        case _:
            (length,) = struct.unpack_from("<I", data, 4)
            return int(length) + 8 <= len(data)


def _png(data: bytes) -> tuple[int, int]:
    length, name, width, height, bits, colour = struct.unpack_from(">I4s2I2B", data, 8)
    if length != 13 or name != b"IHDR":
        raise ValueError("it has no PNG header")
    if (bits, colour) == (16, 0):
        # Pillow (13) turns all but the darkest greys white; llama.cpp's server does not.
        raise ValueError("it is 16-bit grey, which servers read differently: save it as 8-bit grey")
    return width, height


def _jpeg(data: bytes) -> tuple[int, int]:
    for marker, place in _segments(data):
        if marker in _START_OF_FRAME:
            height, width = struct.unpack_from(">2H", data, place + 3)
            return width, height
        if marker in (0xD9, _SCAN):
            break
    raise ValueError("it has no JPEG header")


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield each marker of a JPEG file and the place of its segment's length."""
    place = 2
    while True:
        if data[place] != 0xFF:
            raise ValueError("its JPEG header is damaged")
        while data[place] == 0xFF:
            place += 1
        marker, place = data[place], place + 1
        yield marker, place
        if marker not in _ALONE:
            (length,) = struct.unpack_from(">H", data, place)
            place += max(2, length)


def _webp(data: bytes) -> tuple[int, int]:
    _, name, chunk = struct.unpack_from("<I4s4s", data, 4)
    if name != b"WEBP":
        raise ValueError("it is neither a PNG, a JPEG nor a WebP file")
    if chunk == b"VP8X":
        low, high, *rest = struct.unpack_from("<HBHB", data, 24)
        return (low | high << 16) + 1, (rest[0] | rest[1] << 16) + 1
    if chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<2H", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError("it has no WebP header")


_READERS: Mapping[bytes, tuple[str, Callable[[bytes], tuple[int, int]]]] = {
    _PNG: ("png", _png),
    b"\xff\xd8\xff": ("jpeg", _jpeg),
    b"RIFF": ("webp", _webp),
}
"""First bytes -> format and what reads its size."""
