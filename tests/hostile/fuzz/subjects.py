"""What is fuzzed: each makes an input from a seed, and reads it as the program does.

A reader may refuse with a WeightsmithError. Anything else is a finding.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import numpy as np
from safetensors.numpy import save
from tests.unit.stages.test_report import BUILD
from weightsmith.building.targets import all_targets
from weightsmith.checkpoints.facts import read_facts
from weightsmith.checkpoints.gguf_config import gguf_config, gguf_file_type, gguf_tensor_types
from weightsmith.checkpoints.gguf_import import import_gguf
from weightsmith.checkpoints.safetensors import open_checkpoint
from weightsmith.commands.report import report_builds
from weightsmith.errors import WeightsmithError
from weightsmith.oci.image import load_image
from weightsmith.oci.unpack import unpack
from weightsmith.provenance.labels import plan_in
from weightsmith.provenance.roles import roles_of
from weightsmith.provenance.signing import open_envelope
from weightsmith.serving.engine import ServeOptions
from weightsmith.serving.parameters import weights_from_config
from weightsmith.stages.render import render
from weightsmith.values import Digest, canonical

from tests.fakes.images import entry, foreign_image, tar_of
from tests.golden.cases import MODELS, model
from tests.hostile.fuzz.mutations import bytes_changed, early, json_changed
from tests.unit.checkpoints.test_gguf_import import weights, write

Make = Callable[[Random], bytes]
Read = Callable[[bytes, Path], None]


@cache
def safetensors_file() -> bytes:
    """Return a file of some tensors."""
    return save({f"t{n}": np.zeros((n + 1, 3), np.float16) for n in range(5)}, {"format": "pt"})


def read_safetensors(data: bytes, folder: Path) -> None:
    """Open the file as a checkpoint."""
    (folder / "model.safetensors").write_bytes(data)
    open_checkpoint(folder)


@cache
def gguf_model() -> bytes:
    """Return a whole GGUF model."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        write(path, weights())
        return path.read_bytes()


def changed_gguf(random: Random) -> bytes:
    """Change entries and tensors' places, and seldom the tensors."""
    data = gguf_model()
    return early(random, data, random.choice((400, 12_000, len(data))))


def read_gguf(data: bytes, folder: Path) -> None:
    """Read its shape and its type, and import it."""
    path = folder / "x.gguf"
    path.write_bytes(data)
    gguf_file_type(path)
    for read in (gguf_config, gguf_tensor_types, lambda path: import_gguf(path, folder / "out")):
        try:
            read(path)
        except WeightsmithError:
            continue


@cache
def layer() -> bytes:
    """Return a layer with entries of every kind."""
    return tar_of(
        entry("a", tarfile.DIRTYPE),
        (entry("a/file"), b"x" * 700),
        (entry("a/" + "long" * 40), b"y"),
        entry("link", tarfile.SYMTYPE, to="a"),
        entry("hard", tarfile.LNKTYPE, to="a/file"),
        entry("pipe", tarfile.FIFOTYPE),
        entry("a/.wh.gone"),
        (entry("link/ä"), b"z"),
    )


def read_layer(data: bytes, folder: Path) -> None:
    """Unpack an image of this one layer; nothing may be written beside its root."""
    root = folder / "work" / "root"
    try:
        unpack(foreign_image(data, packed=bool(len(data) % 2)), root)
    finally:
        assert {path.name for path in folder.iterdir()} <= {"work"}, "written outside the root"


def changed_config(random: Random) -> bytes:
    """Change a known model's configuration, its target after it."""
    config = json_changed(random, model(random.choice(MODELS))["config"])
    target = random.choice(sorted(all_targets()))
    gpu = random.choice(("", "nvidia-l40s", "nvidia-h100-80gb"))
    return json.dumps({"config": config, "target": target, "gpu": gpu}).encode()


def read_config(data: bytes, folder: Path) -> None:
    """Weigh, plan and render the model for the target."""
    asked = json.loads(data)
    (folder / "config.json").write_text(json.dumps(asked["config"]))
    model = read_facts(folder)
    for work in (weights_from_config, lambda model: rendered(model, asked)):
        try:
            work(model)
        except WeightsmithError:
            continue


def rendered(model, asked) -> None:
    """Render all files of a target; the plan is JSON."""
    found = render(
        target=all_targets()[asked["target"]],
        name="fuzz",
        version="1",
        model=model,
        model_file="x.gguf",
        weight_bytes=16_000_000_000,
        options=ServeOptions(gpu=asked["gpu"], host_memory_bytes=64 << 30),
        image="",
        made_from=(),
    )
    json.dumps(found.plan.to_json(), allow_nan=False)


def read_report(data: bytes, folder: Path) -> None:
    """Make the report of a build.json; nothing in it becomes markup."""
    (folder / "build.json").write_bytes(data)
    report_builds(folder)
    assert "<script>alert" not in (folder / "report.html").read_text("utf-8")
    lines = (folder / "report.md").read_text("utf-8").splitlines()
    assert not [x for x in lines if "<script>alert" in x and not x.startswith("    ")], "no code"


@cache
def image_parts() -> dict[str, object]:
    """Return manifest and configuration of a small image."""
    labels = {"dev.weightsmith.layers": "base:1", "dev.weightsmith.config": '{"user": "1"}'}
    image = foreign_image(tar_of((entry("a"), b"")), config={"Labels": labels})
    return {"manifest": json.loads(image.manifest_bytes), "config": dict(image.settings)}


def changed_image(random: Random) -> bytes:
    """Change the manifest, the configuration or both."""
    parts, both = image_parts(), random.choice((("manifest",), ("config",), ("manifest", "config")))
    changed = {name: json_changed(random, parts[name]) for name in both}
    return json.dumps({**parts, **changed}).encode()


def read_image(data: bytes, _: Path) -> None:
    """Load an image of these parts, and read what its labels say."""
    parts = json.loads(data)
    raw = canonical(parts["config"])
    manifest = parts["manifest"]
    if isinstance(manifest, dict) and isinstance(manifest.get("config"), dict):
        manifest["config"] |= {"digest": Digest.of(raw), "size": len(raw)}
    image = load_image(
        canonical(manifest),
        "application/vnd.oci.image.manifest.v1+json",
        read=lambda _: raw,
        opener=lambda _: lambda: iter(()),
        where="fuzz",
    )
    plan_in(image.labels)
    roles_of(image, "fuzz")


ENVELOPE = {"payloadType": "application/vnd.in-toto+json", "payload": "e30=", "signatures": []}

SUBJECTS: dict[str, tuple[Make, Read]] = {
    "safetensors": (lambda r: early(r, safetensors_file(), 300), read_safetensors),
    "gguf": (changed_gguf, read_gguf),
    "tar": (lambda r: bytes_changed(r, layer()), read_layer),
    "config": (changed_config, read_config),
    "report": (lambda r: json.dumps(json_changed(r, BUILD)).encode(), read_report),
    "image": (changed_image, read_image),
    "envelope": (
        lambda r: json.dumps(json_changed(r, ENVELOPE)).encode(),
        lambda data, _: open_envelope(data, lambda *_: True) and None,
    ),
}
