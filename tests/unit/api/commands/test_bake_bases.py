"""What an image has of its base, and what not."""

from __future__ import annotations

from pathlib import Path

import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.oci.configuration import ImageConfig
from weightsmith.oci.image import Image, assemble
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.layout import write_layout
from weightsmith.oci.references import Reference

from tests.fakes.baking import ENGINE, Bakery, push_base


def weights(image: Image) -> set[str]:
    return {layer.digest for layer in image.layers if layer.file.startswith("models/")}


def test_a_base_in_a_layout_folder(bakery: Bakery, tmp_path: Path) -> None:
    base = tmp_path / "engine"
    write_layout(bakery.image("base/engine:1"), base)
    for source in (f"oci:{base}", str(base), f"{base}:latest"):
        digest = bakery.bake("team/app:1", base=source).digest
        image = bakery.image("team/app:1")
        assert image.digest == digest
        assert str(tmp_path) not in str(image.labels), "it is a folder of this machine"


def test_the_version_of_the_base_is_not_the_images(bakery: Bakery) -> None:
    version = "org.opencontainers.image.version"
    push_base(bakery.client, bakery.base, {**ENGINE, version: "1.4.0", "vendor": "x"}, {"a": b"2"})
    bakery.bake("team/app:1")

    labels = bakery.image("team/app:1").labels
    assert version not in labels
    assert (labels["dev.weightsmith.engine.version"], labels["vendor"]) == ("1.4.0", "x")


def test_the_release_of_ubuntu_is_not_the_engines_version(bakery: Bakery) -> None:
    """Images made from Ubuntu's inherit its labels, unless they set their own."""
    version = "org.opencontainers.image.version"
    inherited = {**ENGINE, "org.opencontainers.image.ref.name": "ubuntu"}
    for tag, said in enumerate(("22.04", "24.04", "0.11.0"), 1):
        push_base(bakery.client, bakery.base, {**inherited, version: said}, {"a": b"2"})
        bakery.bake(f"team/app:{tag}")

    found = [bakery.image(f"team/app:{tag}").labels for tag in (1, 2, 3)]
    assert [one.get("dev.weightsmith.engine.version") for one in found] == [None, None, "0.11.0"]


def test_weights_below_a_base_that_hides_them(bakery: Bakery) -> None:
    base = f"{bakery.fake.host}/base/engine:hides"
    push_base(bakery.client, base, ENGINE, {"models/config.json": b"{}"})
    bakery.bake("team/app:1", base=base)
    with pytest.raises(InputRefused, match=r"models/config\.json"):
        bakery.bake("team/app:2", base=base, order="weights-first")


@pytest.mark.slow
def test_a_base_of_many_layers_leaves_few_to_the_weights(bakery: Bakery) -> None:
    (bakery.model / "tiny.gguf").unlink()
    names = [f"tiny-{number:05}-of-00031.gguf" for number in range(1, 32)]
    for number, part in enumerate(names):
        (bakery.model / part).write_bytes(b"GGUF" + bytes([number]))
    layers = tuple(
        TarLayer(members=(Member.of_bytes(f"app/{n}", b"%d" % n),), epoch=0) for n in range(110)
    )
    base = assemble((), layers, config=ImageConfig(labels=ENGINE), epoch=0)
    name = f"{bakery.fake.host}/base/deep:1"
    bakery.client.push(base, Reference.parse(name))
    bakery.bake("team/app:1", base=name)
    image = bakery.image("team/app:1")
    assert len(image.layers) <= 125
    whole = b"".join(b"".join(layer.open()) for layer in image.layers)
    assert all(f"models/{part}".encode() in whole for part in names)
    assert len(weights(image)) == 12, "eleven of three files each, and the small ones"
