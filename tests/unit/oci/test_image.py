"""Images: one digest for the same inputs, and a base that stays what it was."""

import json
from dataclasses import replace

import pytest
from weightsmith.api.commands.images import describe
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.oci.image import Healthcheck, ImageConfig, assemble, index_of, load_image
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.layout import read_layout, write_layout

from tests.fakes.images import entry, foreign_image, tar_of, tiny_image


def _layer(name: str) -> TarLayer:
    return TarLayer(members=(Member.of_bytes(name, name.encode()),), epoch=0)


def test_golden_digest(tmp_path):
    assert (
        tiny_image(tmp_path).digest
        == "sha256:7b3420926eda747dfd93c1e3285f8e316bec9cc14c7e712db29495ae5c6872d8"
    )


def test_an_archives_title_says_that_it_is_one(tmp_path):
    """Programs that pull artifacts name the file that they write by it."""
    layer = TarLayer(members=(Member.of_bytes("/models/a.tar", b"a"),), epoch=0)
    image = assemble((), [layer], config=ImageConfig(), epoch=0)
    (row,) = json.loads(image.manifest_bytes)["layers"]
    assert row["annotations"] == {"org.opencontainers.image.title": "models/a.tar.tar"}
    write_layout(image, tmp_path / "oci")
    (back,) = read_layout(tmp_path / "oci").layers
    assert (back.file, dict(back.annotations)) == ("models/a.tar", row["annotations"])


def test_configuration(tmp_path):
    image = tiny_image(tmp_path)
    document = json.loads(image.config_bytes)
    assert document["created"] == "1970-01-01T00:00:00Z"
    assert {row["created"] for row in document["history"]} == {"1970-01-01T00:00:00Z"}
    assert document["rootfs"]["diff_ids"] == [layer.digest for layer in image.layers]
    assert document["config"] == {
        "Env": ["HF_HUB_OFFLINE=1"],
        "Labels": {"org.opencontainers.image.version": "1.2.0"},
        "User": "1000:1000",
        "Entrypoint": ["/models/serve"],
        "Cmd": ["--port", "8000"],
        "WorkingDir": "/models",
        "ExposedPorts": {"8000/tcp": {}},
        "Healthcheck": {
            "Test": ["CMD", "/bin/true"],
            "Interval": 10_000_000_000,
            "Timeout": 5_000_000_000,
            "StartPeriod": 900_000_000_000,
            "Retries": 3,
        },
    }


@pytest.mark.parametrize("order", ["engine-first", "weights-first"])
def test_a_volume_of_the_base_does_not_cover_the_weights(order):
    """An engine would copy them into it whenever it starts a container."""
    volumes = {path: {} for path in ("/", "/models", "models/", "/models/w", "/data", "/mod")}
    base = foreign_image(tar_of((entry("bin/sh"), b"sh")), config={"Volumes": volumes})
    image = assemble([_layer("models/w")], config=ImageConfig(), base=base, order=order, epoch=0)
    assert sorted(image.config["Volumes"]) == ["/data", "/mod"]


def test_a_base_is_kept_and_overridden():
    base = foreign_image(tar_of((entry("bin/sh"), b"sh")))
    said = {**base.config, "Healthcheck": {"Test": ["NONE"]}}
    base = replace(base, settings={**base.settings, "config": said})
    config = ImageConfig(
        entrypoint=("/serve",),
        env={"A": "new", "B": "1"},
        labels={"x": "y"},
        healthcheck=Healthcheck(command=("/h",), retries=9),
    )
    image = assemble([_layer("/w")], [_layer("/c")], config=config, base=base, epoch=0)
    assert image.config["Env"] == ["PATH=/bin", "A=new", "B=1"]
    assert image.config["Healthcheck"]["Retries"] == 9
    assert image.labels == {"from": "base", "x": "y"}
    assert "Cmd" not in image.config, "a base's command was meant for the base's entrypoint"
    manifest = json.loads(image.manifest_bytes)
    kinds = [row["mediaType"].rpartition(".")[2] for row in manifest["layers"]]
    assert kinds == ["tar+gzip", "tar", "tar"]
    assert manifest["layers"][0]["digest"] == base.layers[0].digest
    assert json.loads(image.config_bytes)["rootfs"]["diff_ids"][0] == base.layers[0].diff_id


def test_what_a_base_says_of_itself_alone_is_not_inherited():
    """A base may be an image of ours, with the verdict on another model."""
    standard = {f"org.opencontainers.image.{key}": "its own" for key in ("version", "licenses")}
    labels = {"dev.weightsmith.verdict": "passed", **standard}
    base = foreign_image(tar_of((entry("bin/sh"), b"sh")))
    said = {**base.config, "Labels": {**labels, "team": "a"}, "OnBuild": ["RUN false"]}
    base = replace(base, settings={**base.settings, "config": said})
    image = assemble([_layer("/w")], config=ImageConfig(labels={"x": "y"}), base=base)
    assert image.labels == {"team": "a", "x": "y"}
    assert "OnBuild" not in image.config


def test_an_index_is_annotated_with_what_all_its_images_say():
    """Registries show an index's annotations: the images' are a level further down."""
    said = {"org.opencontainers.image.description": "Answers.", "dev.weightsmith.kind": "image"}
    images = [
        assemble(
            [_layer("/w")],
            config=ImageConfig(),
            annotations={**said, "org.opencontainers.image.base.digest": platform},
            platform=platform,
        )
        for platform in ("linux/amd64", "linux/arm64")
    ]
    document = json.loads(index_of(images).manifest_bytes)
    assert document["annotations"] == {"org.opencontainers.image.description": "Answers."}


def test_weights_below_the_base():
    base = foreign_image(tar_of((entry("bin/sh"), b"sh")))
    weights, files = _layer("/w"), _layer("/c")
    image = assemble(
        [weights], [files], config=ImageConfig(), base=base, order="weights-first", epoch=0
    )
    assert [layer.digest for layer in image.layers] == [
        weights.digest, base.layers[0].digest, files.digest,
    ]  # fmt: skip
    history = json.loads(image.config_bytes)["history"]
    assert [row["created_by"] for row in history] == ["weightsmith: w", "base", "weightsmith: c"]


def test_at_most_125_layers():
    layers = [_layer(f"/{n}") for n in range(125)]
    assemble(layers, config=ImageConfig())
    with pytest.raises(UsageError, match="126 layers") as caught:
        assemble(layers, [_layer("/c")], config=ImageConfig())
    assert caught.value.hint


def test_described_from_the_image_alone(tmp_path):
    image = tiny_image(tmp_path, annotations={"k": "v"})
    found = describe(image)
    assert json.loads(json.dumps(found)) == found
    assert found["digest"] == image.digest
    assert found["config"]["ports"] == ["8000/tcp"]
    assert found["annotations"] == {"k": "v"}
    assert [row["file"] for row in found["layers"]] == [layer.file for layer in image.layers]
    assert found["size"] == sum(layer.size for layer in image.layers)


GOOD = json.loads(foreign_image(b"x").manifest_bytes)


@pytest.mark.parametrize(
    "change",
    [
        {"schemaVersion": 1},
        {"config": None},
        {"config": {**GOOD["config"], "mediaType": "text/html"}},
        {"config": {**GOOD["config"], "size": 1 << 40}},
        {"config": {**GOOD["config"], "digest": "sha256:../../etc/passwd"}},
        {"layers": {}},
        {"layers": []},
        {"layers": [None]},
        {"layers": [{**GOOD["layers"][0], "size": -1}]},
        {"layers": [{**GOOD["layers"][0], "size": True}]},
        {"layers": [{**GOOD["layers"][0], "mediaType": "application/vnd.evil"}]},
        {"layers": [{**GOOD["layers"][0], "annotations": {"org.opencontainers.image.title": 1}}]},
        {"annotations": [1]},
    ],
)
def test_malformed_manifests_are_refused(change):
    good = foreign_image(b"x")
    with pytest.raises(InputRefused):
        load_image(
            json.dumps({**GOOD, **change}).encode(),
            good.media_type,
            read=lambda _: good.config_bytes,
            opener=lambda _: lambda: iter(()),
            where="x",
        )


@pytest.mark.parametrize(
    "config",
    [
        {"Env": "A=1"},
        {"Env": [1]},
        {"Labels": ["a"]},
        {"Labels": {"a": 1}},
        {"Entrypoint": {}},
        {"User": 5},
        {"Volumes": ["/models"]},
    ],
)
def test_malformed_configurations_are_refused(config):
    with pytest.raises(InputRefused):
        foreign_image(b"x", config=config)
