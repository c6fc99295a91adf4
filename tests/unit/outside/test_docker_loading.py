"""Archives that rest on each other go to an engine two at a time, and one's end after another's."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from weightsmith.core.errors import EnvironmentFailure
from weightsmith.outside.docker import load_in_order

PATIENCE = 60


class Engine:
    """An engine that reads each archive, unpacks it when allowed to, and writes down the order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.may_unpack = threading.Event()
        self.refused = ""
        self.refusal = {"error": "no space left on device"}

    @property
    def api(self) -> Engine:
        return self

    def close(self) -> None:
        pass

    def load_image(self, chunks: Iterator[bytes]) -> Iterator[dict[str, str]]:
        name = b"".join(chunks).decode()[0]
        self.events.append(f"whole {name}")
        assert self.may_unpack.wait(PATIENCE)
        if name == self.refused:
            yield self.refusal
            return
        self.events.append(f"unpacked {name}")
        yield {"stream": "Loaded"}


def archive(name: str, engine: Engine) -> Iterator[bytes]:
    engine.events.append(f"begun {name}")
    for number in range(3):
        yield f"{name}{number}".encode()
    engine.events.append(f"sent {name}")


def load(engine: Any, archives: Iterable[Iterator[bytes]], parallel: int = 1) -> None:
    load_in_order(lambda: engine, archives, "app:1", parallel)


def test_one_is_sent_while_the_one_before_is_unpacked_and_not_more() -> None:
    engine = Engine()
    second_is_sent = threading.Event()

    def archives() -> Iterator[Iterator[bytes]]:
        yield archive("1", engine)

        def second() -> Iterator[bytes]:
            yield from archive("2", engine)
            second_is_sent.set()

        yield second()
        yield archive("3", engine)

    def unpack() -> None:
        assert second_is_sent.wait(PATIENCE)
        engine.events.append("go")
        engine.may_unpack.set()

    thread = threading.Thread(target=unpack)
    thread.start()
    load(engine, archives())
    thread.join()

    order = engine.events
    assert order.index("sent 2") < order.index("go") < order.index("unpacked 1")
    for before, after in (("1", "2"), ("2", "3")):
        assert order.index(f"unpacked {before}") < order.index(f"whole {after}")
    assert order.index("unpacked 1") < order.index("begun 3")
    assert order[-1] == "unpacked 3"


def test_two_are_sent_at_once_where_that_is_asked_for() -> None:
    engine = Engine()
    engine.may_unpack.set()
    second_has_begun = threading.Event()

    def first() -> Iterator[bytes]:
        yield b"1"
        assert second_has_begun.wait(PATIENCE)

    def second() -> Iterator[bytes]:
        second_has_begun.set()
        yield from archive("2", engine)

    load(engine, [first(), second(), archive("3", engine)], 2)

    unpacked = [event for event in engine.events if event.startswith("unpacked")]
    assert unpacked == ["unpacked 1", "unpacked 2", "unpacked 3"]


@pytest.mark.parametrize(
    "refusal",
    [
        {"error": "no space left on device"},
        {"stream": "Error unpacking image app:1: no space left on device\n"},  # with containerd
    ],
)
def test_what_rests_on_a_refused_one_is_not_given_whole(refusal: dict[str, str]) -> None:
    engine = Engine()
    engine.may_unpack.set()
    engine.refused, engine.refusal = "2", refusal
    archives = (archive(name, engine) for name in "1234")

    with pytest.raises(EnvironmentFailure, match=r"app:1: .*no space left") as caught:
        load(engine, archives)

    assert "docker system df" in caught.value.hint
    assert "unpacked 1" in engine.events
    assert not {"whole 3", "begun 4"} & set(engine.events)


def test_an_archive_that_breaks_off_is_reported() -> None:
    engine = Engine()
    engine.may_unpack.set()

    def broken() -> Iterator[bytes]:
        yield b"2"
        raise EnvironmentFailure("the file shrank", hint="")

    with pytest.raises(EnvironmentFailure, match="shrank"):
        load(engine, [archive("1", engine), broken()])

    assert engine.events[-1] == "unpacked 1"
    assert "whole 2" not in engine.events
