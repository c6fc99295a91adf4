import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from weightsmith.core.json_objects import INLINE, OMITTED, JsonObject, Measured
from weightsmith.core.values import Digest, Json
from weightsmith.validating.result import Validation

DIGEST = "sha256:" + "ab" * 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Size(JsonObject):
    width: float
    height: Measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing(JsonObject):
    name: str
    count: int = 0
    nothing: float | None = None
    ok: bool = True
    size: Size | None = field(default=None, metadata=INLINE)
    digest: Digest | None = field(default=None, metadata=OMITTED)
    pair: tuple[int, str] = field(default=(0, ""), metadata=OMITTED)
    sizes: tuple[Size, ...] = ()
    by_name: Mapping[str, Size] | None = None
    any: Json = None


FULL = Thing(
    name="a",
    size=Size(width=1, height=2.5),
    digest=Digest(DIGEST),
    pair=(1, "x"),
    sizes=(Size(width=1.0, height=2.0),),
    by_name={"b": Size(width=0.5, height=1.0)},
    any={"free": [1, None]},
)


def test_what_was_written_reads_back_the_same():
    for thing in (FULL, Thing(name="small")):
        assert Thing.from_json(json.loads(json.dumps(thing.to_json()))) == thing


def test_the_json_is_flat_and_leaves_out_what_is_not_there():
    assert list(FULL.to_json()) == [
        "name", "count", "nothing", "ok", "width", "height", "digest", "pair", "sizes", "by_name",
        "any",
    ]  # fmt: skip
    assert Thing(name="a").to_json() == {
        "name": "a", "count": 0, "nothing": None, "ok": True, "sizes": [], "by_name": None,
        "any": None,
    }  # fmt: skip


def test_numbers_that_json_has_not_are_null_and_read_back_as_nan():
    """Those of others, which Python reads, too: no other reader takes them."""
    written = Size(width=1.0, height=math.inf).to_json()

    assert written == {"width": 1.0, "height": None}
    assert math.isnan(Size.from_json(written).height)
    read = Thing.from_json({"name": "a", "any": {"x": [math.nan, -math.inf, 1]}})
    assert read.any == {"x": [None, None, 1]}


def test_an_earlier_version_may_lack_keys_and_a_later_one_have_more():
    assert Thing.from_json({"name": "a", "count": None, "later": [1]}) == Thing(name="a")


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"name": None}, "name"),
        ({"name": 1}, "name"),
        ({"count": True}, "count"),
        ({"count": 1.5}, "count"),
        ({"nothing": "1"}, "nothing"),
        ({"ok": 1}, "ok"),
        ({"width": 1}, "height"),
        ({"width": None, "height": 1}, "width"),
        ({"width": math.nan, "height": 1}, "width"),
        ({"width": 1, "height": float("1e999")}, "height"),
        ({"digest": "sha256:1"}, "digest"),
        ({"pair": [1]}, "pair"),
        ({"pair": [1, 2]}, r"pair\[1\]"),
        ({"sizes": {}}, "sizes"),
        ({"sizes": [{"width": 1, "height": "2"}]}, r"sizes\[0\]\.height"),
        ({"by_name": []}, "by_name"),
        ({"by_name": {"b": {"width": [], "height": 1}}}, r"by_name\.b\.width"),
    ],
)
def test_another_type_is_refused_with_its_place(change, place):
    with pytest.raises(ValueError, match=f"^{place} is|^{place}: |^{place} has"):
        Thing.from_json({"name": "a", **change})


def test_what_is_not_an_object_or_lacks_a_key_is_refused():
    for value in (None, [], "text", 1):
        with pytest.raises(ValueError, match="it is not an object"):
            Thing.from_json(value)
    with pytest.raises(ValueError, match="passed"):
        Validation.from_json({"findings": []})
