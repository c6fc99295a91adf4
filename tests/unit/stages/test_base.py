"""What a base says of itself is believed; what it does not say is a warning."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from toolchain.errors import InputRefused
from toolchain.oci.image import ImageConfig, assemble
from toolchain.oci.layers import Member, TarLayer
from toolchain.oci.layout import write_layout
from toolchain.ports import Silent
from toolchain.stages.base import ENGINE_LABEL, base_image


class Warnings(Silent):
    def __init__(self):
        self.said = []

    def warn(self, text):
        self.said.append(text)


def layout(folder: Path, labels: dict[str, str]) -> str:
    layer = TarLayer(members=(Member.of_bytes("app/server", b"program"),))
    write_layout(assemble((), (layer,), config=ImageConfig(labels=labels)), folder)
    return f"oci:{folder}"


@pytest.fixture
def tools():
    return SimpleNamespace(progress=Warnings())


def test_a_base_of_the_engine_is_taken_in_silence(tmp_path, tools) -> None:
    base_image(layout(tmp_path, {ENGINE_LABEL: "llamacpp"}), "llamacpp", None, tools)

    assert tools.progress.said == []


def test_a_base_that_says_nothing_is_taken_with_a_warning(tmp_path, tools) -> None:
    image = base_image(layout(tmp_path, {}), "llamacpp", None, tools)

    assert len(image.layers) == 1
    assert "does not say" in tools.progress.said[0]


def test_a_base_of_another_engine_is_refused(tmp_path, tools) -> None:
    with pytest.raises(InputRefused, match="says that it holds vllm") as caught:
        base_image(layout(tmp_path, {ENGINE_LABEL: "vllm"}), "llamacpp", None, tools)
    assert caught.value.hint
