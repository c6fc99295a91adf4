"""Models, layouts and wishes of which no image is made, and what a change on the way does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from weightsmith.api.commands.images import copy_image
from weightsmith.core.errors import EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.ports import Silent
from weightsmith.oci.layout import read_layout
from weightsmith.quantizers.gguf_types import FILE_TYPES

from tests.fakes.baking import Bakery, bake, gguf_of, push_base
from tests.fakes.journal import RecordingProgress
from tests.fakes.tiny import write_model
from tests.paths import ROOT


@pytest.mark.parametrize(
    ("options", "why"),
    [
        *(
            ({"kind": kind, "load": "app:1"}, f"cannot load the kind {kind}")
            for kind in ("modelpack", "modelpack-tar", "ollama")
        ),
        *(
            ({"kind": "volume", "platform": name}, "not a platform")
            for name in ("arm64", "linux/arm/v7", "linux/", "windows/amd64")
        ),
        ({"load": f"app:1@sha256:{'0' * 64}"}, "by its tag, not by a digest"),
        ({"kind": "car"}, "unknown"),
        ({"kind": "adapter"}, "tests no adapter"),
    ],
)
def test_what_is_asked_wrongly(bakery: Bakery, options: dict[str, str], why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        bakery.bake("team/app:1", base="", **options)
    assert why != "unknown" or "modelcar" in caught.value.hint


def test_ollamas_form_goes_where_ollama_finds_it(bakery: Bakery, tmp_path: Path) -> None:
    wrong = f"{bakery.fake.host}/team/one/app:1"
    with pytest.raises(UsageError, match="HOST/NAMESPACE/MODEL"):
        bakery.bake("team/one/app:1", kind="ollama", base="")
    assert not any(repository == "team/one/app" for repository, _ in bakery.fake.blobs)

    bake(bakery.client, bakery.model, "", kind="ollama", layout=tmp_path / "layout")
    for name, said in ((wrong, 1), (f"{bakery.fake.host}/team/app:1", 0)):
        progress = RecordingProgress()
        copy_image(str(tmp_path / "layout"), name, bakery.client, progress, force=False)
        assert len([text for text in progress.warnings if "HOST/NAMESPACE/MODEL" in text]) == said


def test_ollama_takes_gguf_only(bakery: Bakery, tmp_path: Path) -> None:
    bakery.model = write_model(tmp_path / "checkpoint")
    with pytest.raises(UsageError, match="one GGUF file"):
        bakery.bake("team/app:1", kind="ollama", base="", target="vllm")


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("vllm", "give the Hugging Face checkpoint"),
        ("vllm-awq", "quantize --format awq"),
        ("llamacpp-lora", "build --target llamacpp-lora"),
        ("llamacpp-q8_0-lora", "build --target llamacpp-q8_0-lora"),
    ],
)
def test_weights_in_another_format_are_refused_with_what_makes_them(
    bakery: Bakery, target: str, hint: str
) -> None:
    with pytest.raises(InputRefused, match=r"has no .* weights, which") as caught:
        bakery.bake("team/app:1", kind="volume", base="", target=target)
    assert hint in caught.value.hint


def write_gguf(path: Path, file_type: int | None) -> None:
    """Write a GGUF file of one q8_0 matrix, whose metadata says this type."""
    writer = gguf.GGUFWriter(path, "llama")
    if file_type is not None:
        writer.add_file_type(file_type)
    blocks = np.zeros((32, 34), np.uint8)
    writer.add_tensor("blk.0.attn_q.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_of_another_type_than_the_targets_is_refused(bakery: Bakery) -> None:
    write_gguf(bakery.model / "tiny.gguf", FILE_TYPES["q8_0"].number)
    with pytest.raises(InputRefused, match=r"type q8_0 .*mostly q8_0.*promises q4_k_m") as caught:
        bakery.bake("team/app:1", kind="volume", base="", target="llamacpp-q4_k_m")
    assert "--target llamacpp-q8_0" in caught.value.hint


@pytest.mark.parametrize("said", [FILE_TYPES["q4_k_s"].number, 999, None])
def test_a_mix_of_the_targets_family_is_baked(bakery: Bakery, said: int | None) -> None:
    write_gguf(bakery.model / "tiny.gguf", said)
    progress = RecordingProgress()
    bakery.bake("team/app:1", kind="volume", base="", target="llamacpp-q4_k_m", progress=progress)
    assert any("labels will say q4_k_m" in text for text in progress.warnings) == (said is not None)


HOSTILE: dict[str, Callable[[Path], object]] = {
    "fifo": lambda folder: os.mkfifo(folder / "pipe.json"),
    "link out": lambda folder: (folder / "a.json").symlink_to("/etc/passwd"),
    "link up": lambda folder: (folder / "a.json").symlink_to(os.path.relpath("/etc/hosts", folder)),
    "case": lambda folder: (folder / "Config.json").touch(),
    "newline": lambda folder: (folder / "a\nb.json").touch(),
    "not utf-8": lambda folder: (folder / os.fsdecode(b"a\xff.json")).touch(),
    "device": lambda folder: os.mknod(folder / "0.json", 0o666 | 0o020000, os.makedev(1, 3)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_folders_are_refused(bakery: Bakery, kind: str) -> None:
    if kind == "device" and os.geteuid() != 0:
        pytest.skip("needs root")
    HOSTILE[kind](bakery.model)
    with pytest.raises(InputRefused):
        bakery.bake("team/app:1")
    assert not bakery.fake.manifests.get(("team/app", "1"))


@pytest.mark.parametrize("how", ["shrinks", "changes", "vanishes", "becomes a pipe"])
def test_a_file_that_changes_while_it_is_sent(bakery: Bakery, how: str) -> None:
    weights = bakery.model / "tiny.gguf"
    promised = gguf_of(bytes(4 << 20))
    weights.write_bytes(promised)

    class Meddling(Silent):
        def advance(self, done: int, total: int, unit: str) -> None:
            match how:
                case "shrinks":
                    os.truncate(weights, 1 << 20)
                case "changes":
                    weights.write_bytes(gguf_of(b"e" * (4 << 20)))
                case "vanishes" if weights.is_file():
                    weights.unlink()
                    weights.mkdir()
                case "becomes a pipe" if weights.is_file():
                    weights.unlink()
                    os.mkfifo(weights)

    said = ""
    try:
        bakery.bake("team/app:1", progress=Meddling())
    except InputRefused as refused:
        said = refused.message
    if said:
        assert "tiny.gguf" in said or "digest" in said
        assert ("team/app", "1") not in bakery.fake.manifests
    else:
        # Whoever had the file open already still reads what it was: then the image holds that.
        assert how in ("vanishes", "becomes a pipe")
        sent = [layer.open() for layer in bakery.image("team/app:1").layers]
        assert any(promised in b"".join(chunks) for chunks in sent)


@pytest.mark.parametrize("there", [True, False])
def test_a_layout_is_written_where_a_link_leads(
    bakery: Bakery, tmp_path: Path, *, there: bool
) -> None:
    """The link, perhaps to a larger disk, had been replaced by a folder beside it."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/image")
    if there:
        bake(bakery.client, bakery.model, bakery.base, layout=tmp_path / "disk" / "image")

    bake(bakery.client, bakery.model, bakery.base, layout=tmp_path / "link", order="weights-first")

    assert (tmp_path / "link").readlink() == Path("disk/image")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["image"]
    assert read_layout(tmp_path / "link").layers[0].file == "models/tiny.gguf"


def test_a_layout_that_fails_on_the_way_leaves_nothing_beside_it(
    bakery: Bakery, tmp_path: Path
) -> None:
    weights, place = bakery.model / "tiny.gguf", tmp_path / "images"
    weights.write_bytes(gguf_of(bytes(4 << 20)))

    class Meddling(Silent):
        def advance(self, done: int, total: int, unit: str) -> None:
            weights.write_bytes(b"EVIL" + bytes(4 << 20))

    with pytest.raises(InputRefused):
        bake(bakery.client, bakery.model, bakery.base, layout=place / "one", progress=Meddling())

    assert list(place.iterdir()) == []


def test_weights_that_were_cut_off(bakery: Bakery, tmp_path: Path) -> None:
    tiny = ROOT / "examples" / "tiny" / "base"
    shutil.copytree(tiny, tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "model.safetensors", 1_000_000)
    base = f"{bakery.fake.host}/base/vllm:1"
    push_base(bakery.client, base, {"dev.weightsmith.engine": "vllm"}, {"app/x": b"1"})
    with pytest.raises(InputRefused, match=r"model\.safetensors"):
        bake(bakery.client, tmp_path / "cut", base, target="vllm", layout=tmp_path / "out")


def test_layouts_that_cannot_be(bakery: Bakery, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailure, match="/proc/there"):
        bake(bakery.client, bakery.model, bakery.base, layout=Path("/proc/there/is/none"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="mine"):
        bake(bakery.client, bakery.model, bakery.base, layout=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").is_file()


def test_a_layout_takes_room_on_its_own_disk(
    bakery: Bakery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, usage = tmp_path / "full", shutil.disk_usage(tmp_path)

    def disk_usage(path: str | Path) -> object:
        return usage._replace(free=100 if Path(path).is_relative_to(full) else 1 << 20)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with pytest.raises(EnvironmentFailure, match=r"needs .* of disk, .*full has 100 B"):
        bake(bakery.client, bakery.model, bakery.base, layout=full / "layout")
    assert list(full.iterdir()) == []
    assert bake(bakery.client, bakery.model, bakery.base, layout=tmp_path / "layout").digest
