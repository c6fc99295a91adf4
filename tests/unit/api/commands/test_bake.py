"""Kinds, platforms, orders, and what must not change an image."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
import yaml
from weightsmith.api.commands.images import copy_image
from weightsmith.api.commands.render import render_folder
from weightsmith.api.commands.requests import RenderCommand
from weightsmith.api.commands.verify import verify_image
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.ports import Silent
from weightsmith.oci.image import Image, ImageConfig, assemble
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.layout import read_layout, write_layout
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import open_location

from tests.fakes.baking import ENGINE, Bakery, bake, gguf_of, make_key, push_base
from tests.fakes.tiny import write_model
from tests.paths import ROOT


def weights(image: Image) -> set[str]:
    return {layer.digest for layer in image.layers if layer.file.startswith("models/")}


def test_every_kind_has_the_same_weight_layers(bakery: Bakery) -> None:
    bakery.bake("team/app:image")
    shell = f"{bakery.fake.host}/base/shell:1"
    push_base(bakery.client, shell, {}, {"bin/sh": b"sh"})
    car = bakery.bake("team/app:car", kind="modelcar", base=shell)
    volume = bakery.bake("team/app:volume", kind="volume", base="")
    found = [bakery.image(f"team/app:{tag}") for tag in ("image", "car", "volume")]
    assert len({frozenset(weights(image)) for image in found}) == 1
    assert car.uploaded_bytes < 10_000
    assert volume.uploaded_bytes == found[2].config_blob.size
    assert [layer.file for layer in found[2].layers] == ["models/tiny.gguf", "models/config.json"]
    assert found[1].layers[0].file == "bin/sh"
    assert "Entrypoint" not in found[1].config
    assert {image.config["User"] for image in found} == {"65532:65532"}
    for tag in ("image", "car", "volume"):
        name = f"{bakery.fake.host}/team/app:{tag}"
        verify_image(name, None, bakery.client, Silent())


@pytest.mark.parametrize("kind", ["modelpack", "modelpack-tar", "ollama"])
def test_forms_for_runners_can_be_verified_and_copied(bakery: Bakery, kind: str) -> None:
    made = bakery.bake(f"team/app:{kind}", kind=kind, base="")
    name = f"{bakery.fake.host}/team/app:{kind}"
    verify_image(name, None, bakery.client, Silent())
    to = f"{bakery.fake.host}/prod/app:1"
    copied = copy_image(name, to, bakery.client, Silent(), force=False)
    assert copied.digest == made.digest
    image = bakery.image("prod/app:1", "linux/amd64")
    assert image.labels["dev.weightsmith.kind"] == kind


def test_ollama_gets_the_licence_beside_a_file(bakery: Bakery) -> None:
    (bakery.model / "LICENSE").write_text("You may.")
    bakery.bake("team/app:1", base="", kind="ollama")

    model, licence = bakery.image("team/app:1").layers
    assert model.file == "tiny.gguf"
    assert b"".join(licence.open()) == b"You may."
    verify_image(f"{bakery.fake.host}/team/app:1", None, bakery.client, Silent())


@pytest.mark.slow
def test_an_index_stays_one_and_shares_the_weights(bakery: Bakery, tmp_path: Path) -> None:
    key, public = make_key(tmp_path)
    rows = []
    for machine in ("amd64", "arm64"):
        name = f"{bakery.fake.host}/base/multi:{machine}"
        files = {"app/llama-server": machine.encode()}
        push_base(bakery.client, name, ENGINE, files, platform=f"linux/{machine}")
        data, kind = bakery.client.read_manifest(Reference.parse(name))
        rows.append({"mediaType": kind, "size": len(data),
                     "digest": bakery.client.digest_of(Reference.parse(name)),
                     "platform": {"os": "linux", "architecture": machine}})  # fmt: skip
    rows.append({**rows[0], "platform": {"os": "unknown", "architecture": "unknown"}})
    kind = "application/vnd.oci.image.index.v1+json"
    index = json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": rows}).encode()
    base = f"{bakery.fake.host}/base/multi:1"
    bakery.client.push_manifest(Reference.parse(base), index, kind)
    done = bakery.bake("team/app:1", base=base, key=key)
    assert bakery.client.digest_of(Reference.parse(f"{bakery.fake.host}/team/app:1")) == done.digest
    each = [bakery.image("team/app:1", f"linux/{machine}") for machine in ("amd64", "arm64")]
    assert weights(each[0]) == weights(each[1])
    assert each[0].layers[0].digest != each[1].layers[0].digest
    name = f"{bakery.fake.host}/team/app:1"
    verify_image(name, public, bakery.client, Silent())
    again = bakery.bake("team/app:1", base=base, key=key)
    assert (again.digest, again.uploaded_bytes) == (done.digest, 0)
    bake(bakery.client, bakery.model, base, key, layout=tmp_path / "layout")
    for machine, image in zip(("amd64", "arm64"), each, strict=True):
        read = read_layout(tmp_path / "layout", platform=f"linux/{machine}")
        assert read.digest == image.digest
    for source, to in ((name, "prod/app:1"), (str(tmp_path / "layout"), "prod/other:1")):
        place = f"{bakery.fake.host}/{to}"
        copied = copy_image(source, place, bakery.client, Silent(), force=False)
        assert copied.digest == bakery.client.digest_of(Reference.parse(place)) == done.digest
        assert weights(bakery.image(to, "linux/arm64")) == weights(each[1])
        layers = {layer.digest: layer.size for image in each for layer in image.layers}
        assert {row.digest: row.size for row in copied.layers} == layers
        assert len(copied.layers) == len(layers)
    if shutil.which("skopeo"):
        skopeo = ["skopeo", "copy", "-q", "--all", "--preserve-digests"]
        places = [f"oci:{tmp_path}/layout:latest", f"dir:{tmp_path}/dir"]
        subprocess.run([*skopeo, *places], check=True, capture_output=True)
        written = (tmp_path / "dir" / "manifest.json").read_bytes()
        assert len(json.loads(written)["manifests"]) == 2
        verify_image(place, public, bakery.client, Silent())
    one = bakery.bake("team/app:2", base=base, platform="linux/arm64")
    assert one.digest == each[1].digest
    with pytest.raises(UsageError, match="linux/s390x"):
        bakery.bake("team/app:3", base=base, platform="linux/s390x")


def test_the_layout_and_the_registry_have_the_same_digest(bakery: Bakery, tmp_path: Path) -> None:
    pushed = bakery.bake("team/app:1")
    written = bake(bakery.client, bakery.model, bakery.base, layout=tmp_path / "layout")
    assert written.digest == pushed.digest
    assert open_location(str(tmp_path / "layout"), bakery.client).image().digest == pushed.digest


def test_a_model_of_a_name_that_no_image_has(bakery: Bakery, tmp_path: Path) -> None:
    odd = bakery.model.with_name("Modèle 7B")
    bakery.model.rename(odd)
    (odd / "tiny.gguf").rename(odd / "Modèle 7B.gguf")
    made = bake(bakery.client, odd, "", layout=tmp_path / "out", kind="volume")
    assert read_layout(tmp_path / "out").digest == made.digest


BAKE = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.fakes.baking import bake
from weightsmith.oci.registry import Registry
with Registry() as client:
    print(bake(client, Path(sys.argv[2]), sys.argv[3], layout=Path(sys.argv[4])).digest)
"""


@pytest.mark.slow
def test_nothing_of_the_surroundings_is_in_the_digest(bakery: Bakery, tmp_path: Path) -> None:
    """Other folder, file order, times, modes, umask, locale, time zone and store."""
    first = bake(bakery.client, bakery.model, bakery.base, layout=tmp_path / "first").digest
    other = tmp_path / "elsewhere" / "another name"
    other.mkdir(parents=True)
    for path in sorted(bakery.model.iterdir(), reverse=True):
        (other / path.name).write_bytes(path.read_bytes())
        (other / path.name).chmod(0o700)
        os.utime(other / path.name, (1e9, 1e9))
    env = {**os.environ, "WEIGHTSMITH_STORE": str(tmp_path / "other"), "LC_ALL": "tr_TR.UTF-8",
           "TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "7", "HOME": str(tmp_path)}  # fmt: skip
    words = [sys.executable, "-c", BAKE, str(ROOT), str(other), bakery.base,
             str(tmp_path / "second")]  # fmt: skip
    said = subprocess.run(
        words, check=True, capture_output=True, text=True, env=env, cwd=tmp_path, umask=0o077
    )
    assert said.stdout.strip() == first
    read_layout(tmp_path / "second", platform="linux/amd64")


def test_modes_links_and_empty_files(bakery: Bakery, tmp_path: Path) -> None:
    before = bakery.bake("team/app:1").digest
    (bakery.model / "config.json").chmod(0o6755)
    os.link(bakery.model / "config.json", tmp_path / "elsewhere.json")
    assert bakery.bake("team/app:2").digest == before
    (bakery.model / "empty.txt").write_bytes(b"")
    bakery.bake("team/app:3")
    verify_image(f"{bakery.fake.host}/team/app:3", None, bakery.client, Silent())


def test_a_model_that_cannot_be_planned_is_baked_with_a_warning(bakery: Bakery) -> None:
    (bakery.model / "config.json").write_text("{}")
    bakery.bake("team/app:1")
    image = bakery.image("team/app:1")
    assert "LLAMA_ARG_MODEL=/models/tiny.gguf" in image.config["Env"]


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_an_image_without_a_plan_has_the_file_that_its_process_reads(
    bakery: Bakery, engine: str
) -> None:
    model = write_model(bakery.folder / "unknown")
    (model / "config.json").write_text('{"model_type": "mystery"}')
    base = f"{bakery.fake.host}/base/{engine}:1"
    push_base(bakery.client, base, {"dev.weightsmith.engine": engine}, {"usr/bin/server": b"1"})
    bakery.model = model
    bakery.bake("team/app:1", base=base, target=engine)
    image = bakery.image("team/app:1")
    words = image.config["Cmd"]
    (path,) = [word for word in words if word.endswith(".yaml")]
    with tarfile.open(fileobj=BytesIO(b"".join(image.layers[-1].open()))) as layer:
        file = layer.extractfile(path.lstrip("/"))
        assert file is not None
        settings = yaml.safe_load(file)

    assert "/models" in [*words, settings.get("model"), settings.get("model-path")]
    assert not [key for key in (*settings, *words) if "len" in key or "seq" in key]


def test_weights_that_are_of_no_known_kind(bakery: Bakery, tmp_path: Path) -> None:
    tiny = ROOT / "examples" / "tiny" / "base"
    shutil.copytree(tiny, tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").write_bytes(bytes(1000))
    base = f"{bakery.fake.host}/base/vllm:1"
    push_base(bakery.client, base, {"dev.weightsmith.engine": "vllm"}, {"app/x": b"1"})
    made = bake(bakery.client, tmp_path / "other", base, target="vllm", layout=tmp_path / "out")
    assert "model.safetensors" in str(made)


@pytest.mark.parametrize("name", ["linux/arm64/v8", "Linux/arm64", "linux/aarch64"])
def test_a_platform_by_another_name(bakery: Bakery, name: str) -> None:
    """Names that containerd takes for the same platform."""
    usual = bakery.bake("team/app:1", base="", kind="volume", platform="linux/arm64")
    other = bakery.bake("team/app:2", base="", kind="volume", platform=name)
    assert other.digest == usual.digest


def served(image: Image, *keys: str) -> tuple[list[str], list[str]]:
    """The files that the server opens: by its environment, and by the file that lists that."""
    starts = tuple(f"{key}=" for key in keys or ["LLAMA_ARG_MODEL"])
    with tarfile.open(fileobj=BytesIO(b"".join(image.layers[-1].open()))) as layer:
        file = layer.extractfile("etc/weightsmith/llamacpp.env")
        assert file is not None
        lines = file.read().decode().splitlines()
    return tuple([row for row in rows if row.startswith(starts)]
                 for rows in (image.config["Env"], lines))  # type: ignore[return-value]  # fmt: skip


def in_parts(bakery: Bakery) -> tuple[Path, Path]:
    """Make the model one of two files, as `quantize --split-max-size` writes it."""
    first, second = (bakery.model / f"tiny-0000{n}-of-00002.gguf" for n in (1, 2))
    (bakery.model / "tiny.gguf").rename(first)
    second.write_bytes(gguf_of(bytes(5000)))
    return first, second


def test_of_a_model_in_parts_the_first_is_served(bakery: Bakery) -> None:
    """llama.cpp opens the first file, and finds the others by their names."""
    first, second = in_parts(bakery)
    whole = bakery.bake("team/app:1")
    image = bakery.image("team/app:1")
    line = f"LLAMA_ARG_MODEL=/models/{first.name}"
    assert served(image) == ([line], [line])
    assert "LLAMA_ARG_ALIAS=tiny" in image.config["Env"]
    assert {f"models/{first.name}", f"models/{second.name}"} <= {x.file for x in image.layers}

    second.unlink()
    with pytest.raises(InputRefused, match=f"not all the parts of one model: {first.name}"):
        bakery.bake("team/app:2")
    bakery.model = first
    with pytest.raises(InputRefused, match=f"one of 2 parts, and {second.name} is not beside it"):
        bakery.bake("team/app:2")
    assert whole.digest == image.digest


def test_two_models_in_a_folder_are_not_served(bakery: Bakery) -> None:
    shutil.copy(bakery.model / "tiny.gguf", bakery.model / "other.gguf")
    with pytest.raises(InputRefused, match=r"other\.gguf, tiny\.gguf") as caught:
        bakery.bake("team/app:1")
    assert "give the .gguf file itself" in caught.value.hint


def render(model: Path, out: Path, *settings: str, target: str = "llamacpp-q8_0") -> None:
    render_folder(RenderCommand(model=model, target=target, out=out, name="bot", settings=settings))


@pytest.mark.parametrize("parts", [False, True])
def test_a_configuration_is_for_the_file_that_is_baked(bakery: Bakery, parts: bool) -> None:
    """It may have been rendered before the checkpoint was quantized, when there was no file."""
    checkpoint, out = bakery.folder / "checkpoint", bakery.folder / "serving"
    checkpoint.mkdir()
    shutil.copy(bakery.model / "config.json", checkpoint)
    render(checkpoint, out)
    assert "LLAMA_ARG_MODEL=/models\n" in (out / "llamacpp.env").read_text()

    name = in_parts(bakery)[0].name if parts else "tiny.gguf"
    bakery.bake("team/app:1", config=out)
    image = bakery.image("team/app:1")
    line = f"LLAMA_ARG_MODEL=/models/{name}"
    assert served(image) == ([line], [line])
    assert "LLAMA_ARG_ALIAS=bot" in image.config["Env"]


@pytest.mark.parametrize("sees", [False, True])
def test_a_gguf_model_takes_pictures_if_it_has_a_projector(bakery: Bakery, sees: bool) -> None:
    """Whatever the configuration beside it says."""
    path = bakery.model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vision_config": {}}))
    if sees:
        shutil.copy(bakery.model / "tiny.gguf", bakery.model / "mmproj-tiny.gguf")
    bakery.bake("team/app:pack", base="", kind="modelpack")

    said = json.loads(bakery.image("team/app:pack").config_bytes)["config"]["capabilities"]
    assert said["inputTypes"] == ["text", *(["image"] if sees else [])]


@pytest.mark.parametrize("sees", [False, True])
def test_a_configuration_names_the_projector_that_is_baked(bakery: Bakery, sees: bool) -> None:
    """Or none, if llama.cpp's converter could make none after all."""
    checkpoint, out = bakery.folder / "checkpoint", bakery.folder / "serving"
    checkpoint.mkdir()
    config = json.loads((bakery.model / "config.json").read_text())
    tower = {"architectures": ["InternVisionModel"], "hidden_size": 8, "num_hidden_layers": 1}
    (checkpoint / "config.json").write_text(json.dumps({**config, "vision_config": tower}))
    (checkpoint / "preprocessor_config.json").write_text("{}")
    render(checkpoint, out)
    assert "LLAMA_ARG_MMPROJ=/models\n" in (out / "llamacpp.env").read_text()
    if sees:
        shutil.copy(bakery.model / "tiny.gguf", bakery.model / "mmproj-model-f16.gguf")

    bakery.bake("team/app:1", config=out)
    image, lines = bakery.image("team/app:1"), ["LLAMA_ARG_MODEL=/models/tiny.gguf"]
    lines += ["LLAMA_ARG_MMPROJ=/models/mmproj-model-f16.gguf"] if sees else []
    found = served(image, "LLAMA_ARG_MODEL", "LLAMA_ARG_MMPROJ")
    assert tuple(map(sorted, found)) == (sorted(lines), sorted(lines))


def test_a_configuration_of_something_else_is_refused(bakery: Bakery) -> None:
    out, other = bakery.folder / "serving", bakery.folder / "other"
    render(bakery.model, out)
    shutil.copy(bakery.model / "tiny.gguf", bakery.model / "mmproj-tiny.gguf")
    with pytest.raises(UsageError, match=r"rendered without mmproj-tiny\.gguf"):
        bakery.bake("team/app:1", config=out)
    render(write_model(bakery.folder / "model2"), other, "serve.gpu=nvidia-l4", target="sglang")
    with pytest.raises(UsageError, match="rendered for sglang, not for llamacpp-q8_0"):
        bakery.bake("team/app:1", config=other)


def test_a_configuration_keeps_its_options(bakery: Bakery) -> None:
    out = bakery.folder / "serving"
    extra = ("serve.extra.rope-scaling=none", "serve.extra.reasoning-format=none")
    render(bakery.model, out, *extra)
    bakery.bake("team/app:1", config=out)
    lines = ["LLAMA_ARG_ROPE_SCALING_TYPE=none", "LLAMA_ARG_THINK=none"]
    found = served(bakery.image("team/app:1"), *(line.partition("=")[0] for line in lines))
    assert tuple(map(sorted, found)) == (lines, lines)


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
        (bakery.model / part).write_bytes(gguf_of(bytes([number])))
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
