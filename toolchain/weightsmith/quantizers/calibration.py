"""The text that quantizers measure activations on, and the part held out to judge them by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from weightsmith.errors import InputRefused
from weightsmith.foreign import parse
from weightsmith.values import Digest, Json, canonical, key_of

Row = Mapping[str, Json]
"""`{"text": …}` or `{"messages": [{"role", "content"}, …]}`; the builder applies the template."""

GENERAL = Path(__file__).with_name("general.jsonl")
"""Plain text on everyday subjects, for recipes that name none of their own."""

MIN_TEXTS = 8
MIN_CHARACTERS = 1000
_LONGEST_LINE = 4 << 20
_SHAPE = 'a line is {"text": "…"} or {"messages": [{"role": "user", "content": "…"}, …]}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Which texts of a file are used: at most `n`, by length in characters, in `seed`'s order."""

    n: int = 512
    min_length: int = 1
    max_length: int = 8192
    seed: int = 0
    held_out: float = 0.25
    """Share of the texts that no quantizer sees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Texts to calibrate on and texts to judge by; none is in both."""

    source: str
    """The file's name, or `general`."""
    calibration: tuple[Row, ...]
    held_out: tuple[Row, ...]
    general: int = 0
    """How many of them are general texts, which make up for what the file lacks."""

    @property
    def calibration_digest(self) -> Digest:
        """What a calibrated artifact depends on."""
        return key_of(self.calibration)

    @property
    def held_out_digest(self) -> Digest:
        """What a measured quality depends on."""
        return key_of(self.held_out)

    def warning(self) -> str:
        """Say what is used beside the user's file where that has too little; else ''."""
        count = len(self.calibration) + len(self.held_out)
        if not self.general or self.general == count:
            return ""
        return (
            f"{self.source} has {count - self.general} texts, too few to measure on (at least "
            f"{MIN_TEXTS} of {MIN_CHARACTERS} characters together): {self.general} general ones "
            "are used beside them"
        )

    def described(self) -> Mapping[str, Json]:
        """Return what a build records of its texts."""
        return {
            "source": self.source,
            "texts": len(self.calibration),
            "held_out": len(self.held_out),
            "general": self.general,
            "digest": self.calibration_digest,
            "held_out_digest": self.held_out_digest,
        }


def read_texts(path: Path, bounds: Bounds) -> Texts:
    """Return a JSON Lines file's texts, each once, split in an order that only the seed decides.

    The order is by the digest of seed and text, so a text that is added moves no other from one
    part to the other part. Where a file gives less than MIN_TEXTS or MIN_CHARACTERS, the general
    texts are added. Raises InputRefused, with file and line, for what is not UTF-8 JSON Lines and
    for a file without a text.
    """
    chosen = _chosen(_rows(path), bounds)
    if not chosen:
        raise InputRefused(
            f"{path} gives no text to calibrate on",
            hint="add texts like those the model will see, or widen n, min_length and max_length",
        )
    general = list(chosen) if path == GENERAL else []
    if len(chosen) < MIN_TEXTS or sum(map(_length, chosen.values())) < MIN_CHARACTERS:
        added = _chosen(_rows(GENERAL), Bounds(seed=bounds.seed))
        general = [key for key in added if key not in chosen]
        chosen |= added
    ordered = [chosen[key] for key in sorted(chosen, key=_place(bounds.seed))]
    aside = max(1, round(len(ordered) * bounds.held_out))
    return Texts(
        source="general" if path == GENERAL else path.name,
        calibration=tuple(ordered[aside:]),
        held_out=tuple(ordered[:aside]),
        general=len(general),
    )


def _chosen(rows: Iterable[Row], bounds: Bounds) -> dict[bytes, Row]:
    """Return at most `n` rows by what they say, each once."""
    once = {canonical(row): row for row in _pieces(rows, bounds)}
    return {key: once[key] for key in sorted(once, key=_place(bounds.seed))[: bounds.n]}


def _place(seed: int) -> Callable[[bytes], Digest]:
    salt = str(seed).encode()
    return lambda key: Digest.of(salt + key)


def _pieces(rows: Iterable[Row], bounds: Bounds) -> Iterator[Row]:
    """Yield the rows that are long enough; plain text that is too long comes in pieces."""
    for row in rows:
        if _length(row) < bounds.min_length:
            continue
        text = row.get("text")
        if text is None or len(text) <= bounds.max_length:
            yield row
            continue
        for start in range(0, len(text), bounds.max_length):
            piece = text[start : start + bounds.max_length]
            if len(piece) >= bounds.min_length:
                yield {"text": piece}


def _length(row: Row) -> int:
    if "text" in row:
        return len(row["text"])
    return sum(len(message["content"]) for message in row["messages"])


def _rows(path: Path) -> Iterator[Row]:
    try:
        with path.open("rb") as stream:
            number = 0
            while raw := stream.readline(_LONGEST_LINE + 1):
                number += 1
                if raw.strip():
                    yield _row(raw, f"{path}:{number}")
    except OSError as error:
        raise InputRefused(
            f"{path} cannot be read: {error.strerror}", hint="give the path of a JSON Lines file"
        ) from None


def _row(raw: bytes, where: str) -> Row:
    if len(raw) > _LONGEST_LINE:
        raise InputRefused(f"{where} is longer than {_LONGEST_LINE} bytes", hint=_SHAPE)
    try:
        row = parse(raw)
    except UnicodeDecodeError:
        raise InputRefused(f"{where} is not UTF-8", hint="save the file as UTF-8") from None
    except ValueError as error:
        raise InputRefused(f"{where} is not JSON: {error}", hint=_SHAPE) from None
    if isinstance(row, dict):
        text, messages = row.get("text"), row.get("messages")
        if isinstance(text, str) and messages is None and text.strip():
            return {"text": text}
        if text is None and isinstance(messages, list) and _is_chat(messages):
            return {"messages": [{k: m[k] for k in ("role", "content")} for m in messages]}
    raise InputRefused(f"{where} has neither text nor messages", hint=_SHAPE)


def _is_chat(messages: list[Json]) -> bool:
    """Say whether this is a conversation of texts that has something in it."""
    return (
        bool(messages)
        and all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in messages
        )
        and any(m["content"].strip() for m in messages)
    )
