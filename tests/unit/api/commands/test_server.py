"""Images that `evaluate` and `bench` start: in the engine, in a layout, in a registry."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from weightsmith.api.commands.server import served_model, session_with
from weightsmith.core.errors import UsageError
from weightsmith.evaluating.client import ask
from weightsmith.evaluating.items import Item
from weightsmith.oci.image import Image
from weightsmith.oci.layout import write_layout
from weightsmith.steps.tools import Tools

from tests.fakes.baking import Bakery
from tests.fakes.engine import MemoryEngine
from tests.fakes.memory import memory_tools

QUESTION = Item(messages=({"role": "user", "content": "Which port?"},), expected=("x",), line=1)


def tools_of(bakery: Bakery, *, engine: bool) -> tuple[Tools, MemoryEngine]:
    tools = memory_tools(bakery.folder, registry=bakery.client)
    assert isinstance(tools.engine, MemoryEngine)
    tools.engine.answering = engine
    return replace(tools, images_in_engine=engine), tools.engine


def answer_of(image: str, tools: Tools) -> str:
    with session_with(tools, image=image) as session:
        served = served_model(session, "", may_ask=True)
        return str(ask(session, served, QUESTION, 8)["answer"])


@pytest.mark.parametrize("engine", [False, True])
def test_an_image_of_a_registry_is_read_and_started(bakery: Bakery, engine: bool) -> None:
    """As after `build --push`, which leaves no image in the engine."""
    digest = bakery.bake("team/app:1").digest
    tools, held = tools_of(bakery, engine=engine)
    before = {path.name for path in bakery.folder.iterdir()}
    for name in (f"{bakery.fake.host}/team/app:1", f"{bakery.fake.host}/team/app@{digest}"):
        assert answer_of(name, tools) == "7481"
    assert held.names == {}
    assert len(held.sent) == 2 * engine
    assert {path.name for path in bakery.folder.iterdir()} <= before | {"store"}


def test_a_port_that_is_none_is_not_taken(bakery: Bakery) -> None:
    """Docker's own files name ranges, too."""
    bakery.bake("team/app:1")
    image = bakery.image("team/app:1")
    ports = {"8000-8010/tcp": {}, "http": {}, "99999/tcp": {}, "8080/tcp": {}}
    settings = {**image.settings, "config": {**image.config, "ExposedPorts": ports}}
    write_layout(Image(layers=image.layers, settings=settings), bakery.folder / "layout")
    tools, _ = tools_of(bakery, engine=False)
    assert answer_of(f"oci:{bakery.folder}/layout", tools) == "7481"


def test_a_layout_is_started_by_its_folder_and_by_its_name(bakery: Bakery) -> None:
    folder = bakery.folder / "layout"
    bakery.bake("team/app:1", layout=folder)
    tools, _ = tools_of(bakery, engine=False)
    for name in (f"oci:{folder}", str(folder), f"oci:{folder}:latest"):
        assert answer_of(name, tools) == "7481"


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:1",
        "http://127.0.0.1:port",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:0",
        "http://[::1",
        "http://127.0.0.1:1\n",
        "http://a..b",
        f"http://{'a' * 64}.example",
        "http://xn--zz--",
        "http://\udcff",
        "http:///v1",
        "http://ann:s3cret@127.0.0.1:port",
    ],
)
def test_what_is_no_address(tmp_path: Path, url: str) -> None:
    tools = memory_tools(tmp_path)
    with (
        pytest.raises(UsageError, match="invalid URL") as caught,
        session_with(tools, url=url),
    ):
        pass
    assert "s3cret" not in caught.value.message


def test_what_is_nowhere_or_no_server(bakery: Bakery) -> None:
    layout = bakery.folder / "layout"
    bakery.bake("team/app:pack", base="", kind="modelpack", layout=layout)
    tools, _ = tools_of(bakery, engine=True)
    for name, says in (
        ("support-bot", "the container engine has no image support-bot"),
        (f"{bakery.fake.host}/team/app:none", "no image .*404"),
        (f"{bakery.fake.host}/team/app:pack", "no program to start"),
        (f"oci:{layout}", "no program to start"),
    ):
        with pytest.raises(UsageError, match=says):
            answer_of(name, tools)
    assert not [path for _, path in bakery.fake.log if "support-bot" in path]
