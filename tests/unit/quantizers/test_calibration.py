import json
import os
from pathlib import Path

import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.quantizers.calibration import GENERAL, read_texts
from weightsmith.quantizers.running import equal_length, samples
from weightsmith.recipe.schema import TextBounds

LONG = "Some words that are long enough to count, and then some more of them. " * 3


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "texts.jsonl", [{"text": f"{LONG} {n}"} for n in range(20)])


def test_no_text_is_in_both_parts_and_the_seed_decides_which_are_held_out(data):
    first, second = (read_texts(data, TextBounds(seed=seed)) for seed in (0, 1))

    assert (len(first.held_out), len(first.calibration)) == (5, 15)
    assert not {r["text"] for r in first.held_out} & {r["text"] for r in first.calibration}
    assert read_texts(data, TextBounds()) == first
    assert first.held_out_digest != second.held_out_digest


def test_a_text_that_is_added_moves_no_other_and_one_that_is_there_twice_is_used_once(data):
    before = read_texts(data, TextBounds())
    data.write_text(data.read_text() * 2)
    assert read_texts(data, TextBounds()).held_out == before.held_out
    with data.open("a") as file:
        file.write(json.dumps({"text": LONG + "new"}) + "\n")

    after = read_texts(data, TextBounds())

    assert len(after.held_out) + len(after.calibration) == 21
    assert after.general == 0
    old, new = ({row["text"] for row in texts.held_out} for texts in (before, after))
    assert len(new - old) <= 1


def test_long_text_is_cut_and_not_dropped(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"text": "".join(f"{n:07d} " for n in range(1000))}])

    texts = read_texts(path, TextBounds(max_length=800))

    pieces = [r["text"] for r in (*texts.calibration, *texts.held_out)]
    assert min(pieces).startswith("0000000")
    assert sum(map(len, pieces)) == 8000


def test_a_file_without_usable_text_and_a_missing_one_are_refused(data):
    with pytest.raises(InputRefused, match=r"texts\.jsonl has no usable"):
        read_texts(data, TextBounds(min_length=10_000))
    data.unlink()
    with pytest.raises(InputRefused, match="cannot read"):
        read_texts(data, TextBounds())


def test_general_texts_make_up_for_too_few(tmp_path):
    few = [{"text": f"Text {n}."} for n in range(4)]

    texts = read_texts(write(tmp_path / "few.jsonl", few), TextBounds())

    assert all(row in (*texts.calibration, *texts.held_out) for row in few)
    assert texts.general == len(texts.calibration) + len(texts.held_out) - 4
    assert texts.warning().startswith("few.jsonl has only 4 texts")
    general = read_texts(GENERAL, TextBounds())
    assert (general.source, general.warning()) == ("general", "")
    assert len(general.held_out) >= 8
    assert len(general.calibration) >= 24


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "no usable calibration text"),
        (b'{"text": "\xff"}\n', r"t\.jsonl:1 is not UTF-8"),
        (b"not json\n", r"t\.jsonl:1: invalid JSON"),
        (b'{"text": 5}\n', "neither text nor messages"),
        (b'{"messages": []}\n', "neither text nor messages"),
        (b'{"messages": [{"role": "user"}]}\n', "neither text nor messages"),
        (b'{"text": "a", "messages": [{"role": "user", "content": "b"}]}\n', "neither"),
        (b'["text"]\n', "neither text nor messages"),
    ],
)
def test_bad_files_are_refused_with_their_line(tmp_path, raw, says):
    path = tmp_path / "t.jsonl"
    path.write_bytes(raw)

    with pytest.raises(InputRefused, match=says):
        read_texts(path, TextBounds())


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    rows = "".join(json.dumps({"text": f"text {n} " * 40}) + "\r\n" for n in range(12))
    plain, marked = tmp_path / "plain.jsonl", tmp_path / "marked.jsonl"
    plain.write_bytes(rows.encode())
    marked.write_bytes(rows.encode("utf-8-sig"))

    first, second = (read_texts(path, TextBounds()) for path in (plain, marked))

    assert first.calibration == second.calibration
    assert first.held_out == second.held_out


def test_texts_come_through_a_pipe(data):
    reading, writing = os.pipe()
    os.write(writing, data.read_bytes())
    os.close(writing)

    texts = read_texts(Path(f"/dev/fd/{reading}"), TextBounds())

    os.close(reading)
    assert texts.calibration == read_texts(data, TextBounds()).calibration


def letters(text, *, add_special_tokens):
    return {"input_ids": [] if add_special_tokens else [ord(c) for c in text]}


def test_texts_stay_apart_long_ones_are_cut_and_none_is_dropped():
    found = samples(["a" * 1200, "", "b" * 30], letters)

    assert found == [[ord("a")] * 512, [ord("a")] * 512, [ord("a")] * 176, [ord("b")] * 30]
    with pytest.raises(InputRefused, match="30 tokens"):
        samples(["b" * 15, "c" * 15], letters)


@pytest.mark.parametrize("count", [256, 511, 512, 513, 1025, 2013, 4096])
def test_joined_texts_fill_samples_of_one_length_and_none_is_dropped(count):
    tokens = list(range(count))

    found = equal_length([tokens[:100], tokens[100:]])

    assert len({len(sample) for sample in found}) == 1
    assert len(found[0]) <= 512
    joined = [token for sample in found for token in sample]
    assert joined[:count] == tokens
    assert joined[count:] == tokens[: len(joined) - count]
    assert len(joined) - count < len(found)
