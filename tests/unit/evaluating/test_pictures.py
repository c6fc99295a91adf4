"""Pictures in questions: which files, which headers, and what becomes of them."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.values import Digest
from weightsmith.evaluating.client import Served
from weightsmith.evaluating.items import Item, picture_files, read_items, read_prompts, sample
from weightsmith.evaluating.metrics import score_answers
from weightsmith.evaluating.pictures import MOST_BYTES, MOST_PIXELS, header, picture_in
from weightsmith.evaluating.task import Task

from tests.fakes.drawn import draw, png
from tests.fakes.memory import write_rows

RED, BLUE = (200, 30, 30), (30, 30, 220)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw(tmp_path / "shapes" / "red.png", "square", RED, (20, 10))
    draw(tmp_path / "shapes" / "blue.png", "circle", BLUE, (20, 10))
    return tmp_path


def items(folder: Path, *rows: dict[str, Any], metric: str = "contains") -> tuple[Item, ...]:
    write_rows(folder / "eval.jsonl", rows)
    return read_items(folder / "eval.jsonl", metric)


def row(image: str = "shapes/red.png", **more: Any) -> dict[str, Any]:
    return {"prompt": "Which colour?", "image": image, "expected": "red", **more}


def part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def test_a_picture_goes_before_the_question_and_parts_stay_in_their_order(folder: Path) -> None:
    url = data_url(folder / "shapes" / "blue.png")
    chat = [
        {"role": "user", "content": [text("First "), part("shapes/red.png"), text("then")]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [part(url), part("shapes/red.png")]},
    ]
    one, two = items(folder, row(), {"messages": chat, "expected": "no"})

    asked: Any = [Served(name="x").question(each)["messages"] for each in (one, two)]
    red = data_url(folder / "shapes" / "red.png")
    assert asked[0] == [{"role": "user", "content": [part(red), text("Which colour?")]}]
    assert asked[1][0]["content"] == [text("First "), part(red), text("then")]
    assert asked[1][1] == chat[1]
    assert asked[1][2]["content"] == [part(url), part(red)]
    assert (one.pictures[0].seen.width, one.pictures[0].seen.height) == (20, 10)
    assert one.prompt == f"[shapes/red.png, {one.pictures[0].digest.short}] Which colour?"
    assert two.prompt.startswith("[shapes/red.png, ")
    assert [each.name for each in two.pictures] == ["shapes/red.png", "picture", "shapes/red.png"]


def data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def test_what_is_asked_depends_on_the_bytes_and_not_on_the_name(folder: Path) -> None:
    def digest(*rows: dict[str, Any]) -> str:
        return Task(items=items(folder, *rows)).digest

    first = digest(row())
    assert digest(row("shapes/blue.png")) != first
    (folder / "same.png").write_bytes((folder / "shapes" / "red.png").read_bytes())
    assert digest(row("same.png")) == first
    with pytest.raises(UsageError, match=r"eval\.jsonl:2 duplicates the question of line 1"):
        items(folder, row(), row("same.png"))
    draw(folder / "shapes" / "red.png", "cross", RED, (20, 10))
    assert digest(row()) != first  # in the same process, with the same file of questions


def test_a_picture_that_changes_while_it_is_asked_is_refused(folder: Path) -> None:
    (one,) = items(folder, row())
    draw(folder / "shapes" / "red.png", "cross", RED, (20, 10))
    with pytest.raises(InputRefused, match="changed while the build ran"):
        Served(name="x").question(one)


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("../secret.png", InputRefused, "outside of"),
        ("/etc/passwd", InputRefused, "outside of"),
        ("shapes/../../secret.png", InputRefused, "outside of"),
        ("link.png", InputRefused, "outside of"),
        ("folder-link/secret.png", InputRefused, "outside of"),
        ("a\0b.png", InputRefused, "outside of"),
        (".", InputRefused, "outside of"),
        ("shapes", UsageError, "Is a directory"),
        ("pipe", InputRefused, "not a regular file"),
        ("circle", UsageError, "Too many levels"),
        ("nowhere.png", UsageError, "cannot read the picture"),
        ("x" * 5000, UsageError, "cannot read the picture"),
        ("http://example.org/a.png", UsageError, "nothing from the network"),
        ("file:///etc/passwd", UsageError, "nothing from the network"),
        ("text.png", InputRefused, "neither a PNG, a JPEG nor a WebP"),
        ("large.png", InputRefused, "at most"),
        ("bomb.png", InputRefused, "60000 x 60000 pixels"),
        ("cut.png", InputRefused, "header is cut off"),
        ("half.png", InputRefused, "the end of its PNG data is missing"),
        ("flat.png", InputRefused, "has no size"),
        ("data:image/gif;base64,R0lGODlh", UsageError, "data URL"),
        ("data:image/png;base64,!!!", UsageError, "data URL"),
        ("data:image/png;base64,R0lGODlh", InputRefused, "neither a PNG"),
    ],
)
def test_what_is_wrong_with_a_picture_is_said_with_its_line(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, name: str, kind: type, says: str
) -> None:
    import os

    outside = tmp_path_factory.mktemp("outside")
    draw(outside / "secret.png", "square", RED)
    draw(folder.parent / "secret.png", "square", RED)
    (folder / "link.png").symlink_to(outside / "secret.png")
    (folder / "folder-link").symlink_to(outside)
    (folder / "circle").symlink_to("circle")
    os.mkfifo(folder / "pipe")
    (folder / "text.png").write_text("no picture")
    with (folder / "large.png").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    whole = (folder / "shapes" / "red.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:20])
    (folder / "half.png").write_bytes(whole[:-1])
    (folder / "bomb.png").write_bytes(png(60000, 60000, b""))
    (folder / "flat.png").write_bytes(png(0, 5, b""))

    with pytest.raises(kind, match=says) as caught:
        items(folder, {**row(), "prompt": "Hello"}, row(name))
    assert "eval.jsonl:2" in caught.value.message
    assert caught.value.hint
    assert ("smaller" in caught.value.hint) == (name in ("large.png", "bomb.png"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([], "content is not a non-empty string"),
        ([7], "neither a text nor a picture"),
        ([{"type": "input_audio"}], "neither a text nor a picture"),
        ([{"type": "image_url", "image_url": "shapes/red.png"}], "image_url.url is not"),
        ([{"type": "image_url", "image_url": {"url": 5}}], "image_url.url is not"),
        ([{"type": "text", "text": ["x"]}], "text is not a non-empty string"),
        ([part("shapes/red.png")] * 17, "has 17 pictures"),
    ],
)
def test_parts_of_other_forms_are_refused(folder: Path, content: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        items(folder, {"messages": [{"role": "user", "content": content}], "expected": "x"})


def test_likelihoods_are_of_texts_alone(folder: Path) -> None:
    with pytest.raises(UsageError, match="metric choice asks for likelihoods of texts"):
        items(folder, row(choices=["red", "blue"]), metric="choice")


def test_a_record_names_pictures_by_digest_and_can_be_asked_again(folder: Path) -> None:
    asked = items(folder, row(), row("shapes/blue.png"))
    first, second = score_answers(["red", "blue"], asked, "contains").per_item
    assert (first["ok"], second["ok"]) == (True, False)
    (shown,) = first["pictures"]  # type: ignore[misc]
    file = f"{Digest.of((folder / 'shapes' / 'red.png').read_bytes()).hex}.png"
    assert shown == {"name": "shapes/red.png", "file": file, "size": [20, 10]}

    again = folder / "again"
    (again / "pictures").mkdir(parents=True)
    (again / "pictures" / file).write_bytes((folder / "shapes" / "red.png").read_bytes())
    (one,) = items(again, {"messages": first["messages"], "expected": ["red"]})
    assert Task(items=(one,)).digest == Task(items=asked[:1]).digest


def test_samples_and_probes(folder: Path) -> None:
    rows = [row(), row("shapes/blue.png"), {"prompt": "Hello?", "expected": "x"}]
    asked = items(folder, *rows)
    assert sample(asked, 2) == sample(tuple(reversed(asked)), 2)[::-1]
    alone = {"messages": [{"role": "user", "content": [part("shapes/red.png")]}]}
    write_rows(folder / "probes.jsonl", [*rows, alone])
    assert [chat[0]["content"] for chat in read_prompts(folder / "probes.jsonl")] == [
        "Which colour?", "Which colour?", "Hello?",
    ]  # fmt: skip
    assert picture_files(folder / "eval.jsonl") == ("shapes/red.png", "shapes/blue.png")


def jpeg(width: int, height: int, *, before: bytes = b"", marker: int = 0xC0) -> bytes:
    frame = struct.pack(">HB2HB", 8 + 3, 8, height, width, 1) + b"\1\x11\0"
    scan = b"\xff\xda\0\x08\1\1\0\0\x3f\0some\xff\0data"
    return b"\xff\xd8" + before + bytes((0xFF, marker)) + frame + scan + b"\xff\xd9"


def webp(chunk: bytes, body: bytes) -> bytes:
    whole = b"WEBP" + chunk + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(whole)) + whole


@pytest.mark.parametrize(
    ("data", "seen"),
    [
        (png(7, 9, b""), ("png", 7, 9)),
        (jpeg(300, 200), ("jpeg", 300, 200)),
        (jpeg(300, 200, before=b"\xff\xe0\0\4ab\xff\xff\xdb\0\2", marker=0xC2), ("jpeg", 300, 200)),
        (webp(b"VP8 ", b"\0\0\0\x9d\1\x2a" + struct.pack("<2H", 40, 30)), ("webp", 40, 30)),
        (webp(b"VP8L", b"\x2f" + struct.pack("<I", 39 | 29 << 14)), ("webp", 40, 30)),
        (webp(b"VP8X", bytes(4) + b"\x27\0\0\x1d\0\0"), ("webp", 40, 30)),
    ],
)
def test_sizes_are_read_from_headers(data: bytes, seen: tuple[str, int, int]) -> None:
    assert header(data) == header(data + b"and more") == seen
    for length in range(len(data)):
        with pytest.raises(ValueError, match=r"it |its "):
            header(data[:length])


def test_the_end_of_a_jpegs_preview_is_not_its_own() -> None:
    """A camera's file holds a whole small one in its header."""
    preview = b"\xff\xe1" + struct.pack(">H", 2 + len(jpeg(2, 2))) + jpeg(2, 2)
    whole = jpeg(300, 200, before=preview)
    assert header(whole) == ("jpeg", 300, 200)
    with pytest.raises(ValueError, match="the end of its JPEG data is missing"):
        header(whole[:-2])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"progressive": True}])
def test_pillow_reads_the_same_sizes(tmp_path: Path, kind: str, options: dict[str, bool]) -> None:
    image = pytest.importorskip("PIL.Image", reason="the merge builder's Pillow")
    for mode in ("RGB", "L", "RGBA"):
        if mode == "RGBA" and kind == "JPEG":
            continue
        path = tmp_path / f"{mode}.{kind.lower()}"
        image.new(mode, (321, 123)).save(path, kind, **options)
        data = path.read_bytes()
        assert header(data) == (kind.lower(), 321, 123)
        with pytest.raises(ValueError, match="is missing"):
            header(data[:-1])


def test_greys_of_16_bits_are_refused_and_what_pillow_keeps_is_not(tmp_path: Path) -> None:
    """Pillow reads the first as white, whatever they show."""
    image = pytest.importorskip("PIL.Image", reason="the merge builder's Pillow")
    grey = tmp_path / "grey.png"
    image.new("I;16", (9, 9), 100 << 8).save(grey)
    with image.open(grey) as seen:
        assert seen.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(InputRefused, match=r"x:1: .*grey\.png: it is 16-bit grey"):
        picture_in(tmp_path, grey.name, "x:1")

    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        kept = tmp_path / f"{mode}.png"
        image.new("RGB", (9, 9), "white").convert(mode).save(kept)
        assert picture_in(tmp_path, kept.name, "x:1").kind == "png"


def test_a_picture_as_large_as_the_limit_is_read(folder: Path) -> None:
    (folder / "most.png").write_bytes(png(MOST_PIXELS >> 12, 1 << 12, zlib.compress(b"")))
    assert picture_in(folder, "most.png", "x:1").seen.width == MOST_PIXELS >> 12
    assert json.dumps(picture_in(folder, "most.png", "x:1").seen.file)
