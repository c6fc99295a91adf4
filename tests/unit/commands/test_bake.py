"""Kinds, platforms, orders, and what must not change an image."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from weightsmith.commands.images import copy_image
from weightsmith.commands.verify import verify_image
from weightsmith.errors import EnvironmentFailure, InputRefused, UsageError
from weightsmith.oci.image import Image, ImageConfig, assemble
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.layout import read_layout, write_layout
from weightsmith.oci.locations import open_location
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.ports import Silent

from tests.fakes.baking import bake, make_key, make_model, push_base
from tests.fakes.registry import FakeRegistry, fake_registry
from tests.fakes.tiny import write_model

ENGINE = {"dev.weightsmith.engine": "llamacpp"}


class Scene:
    def __init__(self, fake: FakeRegistry, client: Registry, folder: Path) -> None:
        self.fake, self.client, self.folder = fake, client, folder
        self.model = make_model(folder / "model")
        self.base = f"{fake.host}/base/engine:1"
        push_base(client, self.base, ENGINE, {"app/llama-server": b"1"})

    def bake(self, name: str, **more: Any) -> Any:
        push = f"{self.fake.host}/{name}"
        return bake(self.client, self.model, more.pop("base", self.base), push=push, **more)

    def image(self, name: str, platform: str = "linux/amd64") -> Image:
        return self.client.pull(Reference.parse(f"{self.fake.host}/{name}"), platform=platform)


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setenv("WEIGHTSMITH_STORE", str(tmp_path / "store"))
    with fake_registry() as fake, Registry(pause=lambda _: None) as client:
        yield Scene(fake, client, tmp_path)


def weights(image: Image) -> set[str]:
    return {layer.digest for layer in image.layers if layer.file.startswith("models/")}


def test_every_kind_has_the_same_weight_layers(scene: Scene) -> None:
    scene.bake("team/app:image")
    shell = f"{scene.fake.host}/base/shell:1"
    push_base(scene.client, shell, {}, {"bin/sh": b"sh"})
    car = scene.bake("team/app:car", kind="modelcar", base=shell)
    volume = scene.bake("team/app:volume", kind="volume", base="")
    found = [scene.image(f"team/app:{tag}") for tag in ("image", "car", "volume")]
    assert len({frozenset(weights(image)) for image in found}) == 1
    assert car["uploaded_bytes"] < 10_000
    assert volume["uploaded_bytes"] == found[2].config_blob.size
    assert [layer.file for layer in found[2].layers] == ["models/tiny.gguf", "models/config.json"]
    assert found[1].layers[0].file == "bin/sh"
    assert "Entrypoint" not in found[1].config
    for tag in ("image", "car", "volume"):
        name = f"{scene.fake.host}/team/app:{tag}"
        assert verify_image(name, None, scene.client, Silent())["ok"]


@pytest.mark.parametrize("kind", ["modelpack", "modelpack-tar", "ollama"])
def test_forms_for_runners_can_be_verified_and_copied(scene: Scene, kind: str) -> None:
    made = scene.bake(f"team/app:{kind}", kind=kind, base="")
    name = f"{scene.fake.host}/team/app:{kind}"
    checks = verify_image(name, None, scene.client, Silent())
    assert checks["ok"], checks
    copied = copy_image(name, f"{scene.fake.host}/prod/app:1", scene.client, Silent(), force=False)
    assert copied["digest"] == made["digest"]
    image = scene.image("prod/app:1", "linux/amd64")
    assert image.labels["dev.weightsmith.kind"] == kind


@pytest.mark.parametrize("kind", ["modelpack", "modelpack-tar", "ollama"])
def test_an_engine_is_not_given_what_it_cannot_load(scene: Scene, kind: str) -> None:
    with pytest.raises(UsageError, match=f"cannot load the kind {kind}"):
        bake(scene.client, scene.model, "", kind=kind, load="app:1")


def test_ollama_gets_the_licence_beside_a_file(scene: Scene) -> None:
    (scene.model / "LICENSE").write_text("You may.")
    scene.bake("team/app:1", base="", kind="ollama")

    model, licence = scene.image("team/app:1").layers
    assert model.file == "tiny.gguf"
    assert b"".join(licence.open()) == b"You may."
    verify_image(f"{scene.fake.host}/team/app:1", None, scene.client, Silent())


def test_ollama_takes_gguf_only(scene: Scene, tmp_path: Path) -> None:
    scene.model = write_model(tmp_path / "checkpoint")
    with pytest.raises(UsageError, match="one GGUF file"):
        scene.bake("team/app:1", kind="ollama", base="", target="vllm")


def test_an_index_stays_one_and_shares_the_weights(scene: Scene, tmp_path: Path) -> None:
    key, public = make_key(tmp_path)
    rows = []
    for machine in ("amd64", "arm64"):
        name = f"{scene.fake.host}/base/multi:{machine}"
        files = {"app/llama-server": machine.encode()}
        push_base(scene.client, name, ENGINE, files, platform=f"linux/{machine}")
        data, kind = scene.client.read_manifest(Reference.parse(name))
        rows.append({"mediaType": kind, "size": len(data),
                     "digest": scene.client.digest_of(Reference.parse(name)),
                     "platform": {"os": "linux", "architecture": machine}})  # fmt: skip
    rows.append({**rows[0], "platform": {"os": "unknown", "architecture": "unknown"}})
    kind = "application/vnd.oci.image.index.v1+json"
    index = json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": rows}).encode()
    base = f"{scene.fake.host}/base/multi:1"
    scene.client.push_manifest(Reference.parse(base), index, kind)
    done = scene.bake("team/app:1", base=base, key=key)
    assert (
        scene.client.digest_of(Reference.parse(f"{scene.fake.host}/team/app:1")) == done["digest"]
    )
    each = [scene.image("team/app:1", f"linux/{machine}") for machine in ("amd64", "arm64")]
    assert weights(each[0]) == weights(each[1])
    assert each[0].layers[0].digest != each[1].layers[0].digest
    name = f"{scene.fake.host}/team/app:1"
    assert verify_image(name, public, scene.client, Silent())["ok"]
    again = scene.bake("team/app:1", base=base, key=key)
    assert (again["digest"], again["uploaded_bytes"]) == (done["digest"], 0)
    bake(scene.client, scene.model, base, key, layout=tmp_path / "layout")
    for machine, image in zip(("amd64", "arm64"), each, strict=True):
        read = read_layout(tmp_path / "layout", platform=f"linux/{machine}")
        assert read.digest == image.digest
    for source, to in ((name, "prod/app:1"), (str(tmp_path / "layout"), "prod/other:1")):
        place = f"{scene.fake.host}/{to}"
        copied = copy_image(source, place, scene.client, Silent(), force=False)
        assert copied["digest"] == scene.client.digest_of(Reference.parse(place)) == done["digest"]
        assert weights(scene.image(to, "linux/arm64")) == weights(each[1])
    if shutil.which("skopeo"):
        skopeo = ["skopeo", "copy", "-q", "--all", "--preserve-digests"]
        places = [f"oci:{tmp_path}/layout:latest", f"dir:{tmp_path}/dir"]
        subprocess.run([*skopeo, *places], check=True, capture_output=True)
        written = (tmp_path / "dir" / "manifest.json").read_bytes()
        assert len(json.loads(written)["manifests"]) == 2
        assert verify_image(place, public, scene.client, Silent())["ok"]
    one = scene.bake("team/app:2", base=base, platform="linux/arm64")
    assert one["digest"] == each[1].digest
    with pytest.raises(UsageError, match="linux/s390x"):
        scene.bake("team/app:3", base=base, platform="linux/s390x")


def test_the_layout_and_the_registry_have_the_same_digest(scene: Scene, tmp_path: Path) -> None:
    pushed = scene.bake("team/app:1")
    written = bake(scene.client, scene.model, scene.base, layout=tmp_path / "layout")
    assert written["digest"] == pushed["digest"]
    assert open_location(str(tmp_path / "layout"), scene.client).image().digest == pushed["digest"]


def test_a_model_of_a_name_that_no_image_has(scene: Scene, tmp_path: Path) -> None:
    odd = scene.model.with_name("Modèle 7B")
    scene.model.rename(odd)
    (odd / "tiny.gguf").rename(odd / "Modèle 7B.gguf")
    made = bake(scene.client, odd, "", layout=tmp_path / "out", kind="volume")
    assert read_layout(tmp_path / "out").digest == made["digest"]


def test_a_base_in_a_layout_folder(scene: Scene, tmp_path: Path) -> None:
    base = tmp_path / "engine"
    write_layout(scene.image("base/engine:1"), base)
    for source in (f"oci:{base}", str(base), f"{base}:latest"):
        digest = scene.bake("team/app:1", base=source)["digest"]
        image = scene.image("team/app:1")
        assert image.digest == digest
        assert str(tmp_path) not in str(image.labels), "it is a folder of this machine"


BAKE = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.fakes.baking import bake
from weightsmith.oci.registry import Registry
with Registry() as client:
    print(bake(client, Path(sys.argv[2]), sys.argv[3], layout=Path(sys.argv[4]))["digest"])
"""


def test_nothing_of_the_surroundings_is_in_the_digest(scene: Scene, tmp_path: Path) -> None:
    """Other folder, file order, times, modes, umask, locale, time zone and store."""
    first = bake(scene.client, scene.model, scene.base, layout=tmp_path / "first")["digest"]
    other = tmp_path / "elsewhere" / "another name"
    other.mkdir(parents=True)
    for path in sorted(scene.model.iterdir(), reverse=True):
        (other / path.name).write_bytes(path.read_bytes())
        (other / path.name).chmod(0o700)
        os.utime(other / path.name, (1e9, 1e9))
    env = {**os.environ, "WEIGHTSMITH_STORE": str(tmp_path / "other"), "LC_ALL": "tr_TR.UTF-8",
           "TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "7", "HOME": str(tmp_path)}  # fmt: skip
    words = [sys.executable, "-c", BAKE, str(Path(__file__).parents[3]), str(other), scene.base,
             str(tmp_path / "second")]  # fmt: skip
    said = subprocess.run(
        words, check=True, capture_output=True, text=True, env=env, cwd=tmp_path, umask=0o077
    )
    assert said.stdout.strip() == first
    read_layout(tmp_path / "second", platform="linux/amd64")


def hostile(folder: Path, kind: str) -> None:
    match kind:
        case "fifo":
            os.mkfifo(folder / "pipe.json")
        case "link out":
            (folder / "a.json").symlink_to("/etc/passwd")
        case "link up":
            (folder / "a.json").symlink_to("../secret")
            (folder.parent / "secret").write_text("s")
        case "case":
            (folder / "Config.json").write_text("{}")
        case "newline":
            (folder / "a\nb.json").write_text("{}")
        case "not utf-8":
            (Path(os.fsdecode(os.fsencode(folder) + b"/a\xff.json"))).write_text("{}")
        case "device":
            os.mknod(folder / "null.json", 0o666 | 0o020000, os.makedev(1, 3))


@pytest.mark.parametrize(
    "kind", ["fifo", "link out", "link up", "case", "newline", "not utf-8", "device"]
)
def test_hostile_folders_are_refused(scene: Scene, kind: str) -> None:
    if kind == "device" and os.geteuid() != 0:
        pytest.skip("needs root")
    hostile(scene.model, kind)
    with pytest.raises(InputRefused):
        scene.bake("team/app:1")
    assert not scene.fake.manifests.get(("team/app", "1"))


@pytest.mark.parametrize("how", ["shrinks", "changes", "vanishes", "becomes a pipe"])
def test_a_file_that_changes_while_it_is_sent(scene: Scene, how: str) -> None:
    weights = scene.model / "tiny.gguf"
    promised = b"GGUF" + bytes(4 << 20)
    weights.write_bytes(promised)

    class Meddling(Silent):
        def advance(self, done: int, total: int, unit: str) -> None:
            match how:
                case "shrinks":
                    os.truncate(weights, 1 << 20)
                case "changes":
                    weights.write_bytes(b"EVIL" + bytes(4 << 20))
                case "vanishes" if weights.is_file():
                    weights.unlink()
                    weights.mkdir()
                case "becomes a pipe" if weights.is_file():
                    weights.unlink()
                    os.mkfifo(weights)

    try:
        scene.bake("team/app:1", progress=Meddling())
        refused = None
    except InputRefused as error:
        refused = error
    if refused:
        assert refused.exit_code == 3
        assert "tiny.gguf" in refused.message or "digest" in refused.message
        assert ("team/app", "1") not in scene.fake.manifests
    else:
        # Whoever had the file open already still reads what it was: then the image holds that.
        assert how in ("vanishes", "becomes a pipe")
        sent = [layer.open() for layer in scene.image("team/app:1").layers]
        assert any(promised in b"".join(chunks) for chunks in sent)


def test_modes_links_and_empty_files(scene: Scene, tmp_path: Path) -> None:
    before = scene.bake("team/app:1")["digest"]
    (scene.model / "config.json").chmod(0o6755)
    os.link(scene.model / "config.json", tmp_path / "elsewhere.json")
    assert scene.bake("team/app:2")["digest"] == before
    (scene.model / "empty.txt").write_bytes(b"")
    scene.bake("team/app:3")
    assert verify_image(f"{scene.fake.host}/team/app:3", None, scene.client, Silent())["ok"]


def test_a_model_that_cannot_be_planned_is_baked_with_a_warning(scene: Scene) -> None:
    (scene.model / "config.json").write_text("{}")
    scene.bake("team/app:1")
    image = scene.image("team/app:1")
    assert "LLAMA_ARG_MODEL=/models/tiny.gguf" in image.config["Env"]


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_an_image_without_a_plan_has_the_file_that_its_process_reads(
    scene: Scene, engine: str
) -> None:
    model = write_model(scene.folder / "unknown")
    (model / "config.json").write_text('{"model_type": "mystery"}')
    base = f"{scene.fake.host}/base/{engine}:1"
    push_base(scene.client, base, {"dev.weightsmith.engine": engine}, {"usr/bin/server": b"1"})
    scene.model = model
    scene.bake("team/app:1", base=base, target=engine)
    image = scene.image("team/app:1")
    words = image.config["Cmd"]
    (path,) = [word for word in words if word.endswith(".yaml")]
    with tarfile.open(fileobj=BytesIO(b"".join(image.layers[-1].open()))) as layer:
        file = layer.extractfile(path.lstrip("/"))
        assert file is not None
        settings = yaml.safe_load(file)

    assert "/models" in [*words, settings.get("model"), settings.get("model-path")]
    assert not [key for key in (*settings, *words) if "len" in key or "seq" in key]


def test_weights_below_a_base_that_hides_them(scene: Scene) -> None:
    base = f"{scene.fake.host}/base/engine:hides"
    push_base(scene.client, base, ENGINE, {"models/config.json": b"{}"})
    scene.bake("team/app:1", base=base)
    with pytest.raises(InputRefused, match=r"models/config\.json"):
        scene.bake("team/app:2", base=base, order="weights-first")


def test_weights_that_were_cut_off(scene: Scene, tmp_path: Path) -> None:
    tiny = Path(__file__).parents[3] / "examples" / "tiny" / "base"
    shutil.copytree(tiny, tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "model.safetensors", 1_000_000)
    base = f"{scene.fake.host}/base/vllm:1"
    push_base(scene.client, base, {"dev.weightsmith.engine": "vllm"}, {"app/x": b"1"})
    with pytest.raises(InputRefused, match=r"model\.safetensors"):
        bake(scene.client, tmp_path / "cut", base, target="vllm", layout=tmp_path / "out")


def test_weights_that_are_of_no_known_kind(scene: Scene, tmp_path: Path) -> None:
    tiny = Path(__file__).parents[3] / "examples" / "tiny" / "base"
    shutil.copytree(tiny, tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").write_bytes(bytes(1000))
    base = f"{scene.fake.host}/base/vllm:1"
    push_base(scene.client, base, {"dev.weightsmith.engine": "vllm"}, {"app/x": b"1"})
    made = bake(scene.client, tmp_path / "other", base, target="vllm", layout=tmp_path / "out")
    assert "model.safetensors" in str(made)


def test_layouts_that_cannot_be(scene: Scene, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailure, match="/proc/there"):
        bake(scene.client, scene.model, scene.base, layout=Path("/proc/there/is/none"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="mine"):
        bake(scene.client, scene.model, scene.base, layout=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").is_file()


@pytest.mark.parametrize("platform", ["arm64", "linux/arm64/v8", "linux/", "Linux/arm64"])
def test_a_volume_for_what_is_no_platform(scene: Scene, platform: str) -> None:
    with pytest.raises(UsageError, match="not a platform"):
        scene.bake("team/app:1", base="", kind="volume", platform=platform)


def test_what_is_asked_wrongly(scene: Scene) -> None:
    with pytest.raises(UsageError, match="unknown") as caught:
        scene.bake("team/app:1", kind="car")
    assert "modelcar" in caught.value.hint


def test_a_layout_takes_room_on_its_own_disk(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = tmp_path / "full"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda path: usage._replace(free=100 if Path(path).is_relative_to(full) else 1 << 20),
    )
    with pytest.raises(EnvironmentFailure, match=r"needs .* of disk, .*full has 100 B"):
        bake(scene.client, scene.model, scene.base, layout=full / "layout")
    assert bake(scene.client, scene.model, scene.base, layout=tmp_path / "layout")["digest"]


def test_a_base_of_many_layers_leaves_few_to_the_weights(scene: Scene) -> None:
    for number in range(30):
        (scene.model / f"tiny-{number:02}.gguf").write_bytes(b"GGUF" + bytes([number]))
    layers = tuple(
        TarLayer(members=(Member.of_bytes(f"app/{n}", b"%d" % n),), epoch=0) for n in range(110)
    )
    base = assemble((), layers, config=ImageConfig(labels=ENGINE), epoch=0)
    name = f"{scene.fake.host}/base/deep:1"
    scene.client.push(base, Reference.parse(name))
    scene.bake("team/app:1", base=name)
    image = scene.image("team/app:1")
    assert len(image.layers) <= 125
    whole = b"".join(b"".join(layer.open()) for layer in image.layers)
    assert all(f"models/tiny-{n:02}.gguf".encode() in whole for n in range(30))
    assert len(weights(image)) == 12, "eleven of three files each, and the small ones"
