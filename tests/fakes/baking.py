"""Bakes small images without a container engine, and spoils them."""

import json
import struct
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from weightsmith.api.commands.bake import bake_model
from weightsmith.api.commands.requests import BakeCommand
from weightsmith.core.ports import Progress, SignatureFormat, Signer, Silent
from weightsmith.oci.image import Image, ImageConfig, assemble
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.recipe.schema import ImageNames

from tests.fakes.memory import memory_tools
from tests.fakes.registry import FakeRegistry

ENGINE = {"dev.weightsmith.engine": "llamacpp"}
_I8 = 24
"""ggml's number of the type."""
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
}


def make_model(folder: Path) -> Path:
    """Write a folder that looks like a GGUF model, of two files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tiny.gguf").write_bytes(gguf_of(bytes(range(256)) * 200))
    return folder


def gguf_of(data: bytes) -> bytes:
    """Return a GGUF file of one tensor of bytes, without metadata."""
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)  # version, tensors, fields
    tensor = struct.pack("<Q1sIQIQ", 1, b"t", 1, len(data), _I8, 0)  # dimensions, type, offset
    return (header + tensor).ljust(64, b"\0") + data


def make_key(folder: Path, name: str = "key") -> tuple[Path, Path]:
    """Write a private and public key, made by openssl once for each name; return their files."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    for file, text in zip((private, public), _openssl_key(name), strict=True):
        file.write_bytes(text)
    private.chmod(0o600)
    return private, public


@cache
def _openssl_key(_name: str) -> tuple[bytes, bytes]:
    make = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout"]
    private = subprocess.run(make, check=True, capture_output=True).stdout
    show = ["openssl", "ec", "-pubout"]
    return private, subprocess.run(show, input=private, check=True, capture_output=True).stdout


def push_base(
    registry: Registry,
    reference: str,
    labels: Mapping[str, str],
    files: Mapping[str, bytes],
    platform: str = "linux/amd64",
) -> str:
    """Push an engine base of a few files; return its digest."""
    layer = TarLayer(members=tuple(Member.of_bytes(p, b) for p, b in files.items()), epoch=0)
    image = assemble((), (layer,), config=ImageConfig(labels=labels), platform=platform, epoch=0)
    return registry.push(image, Reference.parse(reference), force=True).digest


def bake(
    registry: Registry,
    model: Path,
    base: str,
    key: Path | None = None,
    progress: Progress | None = None,
    form: SignatureFormat = "cosign",
    **more: Any,
) -> Any:
    platform = more.pop("platform", "")
    own = {name: more.pop(name) for name in ("order", "max_layer_size") if name in more}
    image = ImageNames(base=base, platforms=(platform,) if platform else (), **own)
    request = BakeCommand(**{"model": model, "target": "llamacpp-q8_0", "image": image, **more})
    tools = memory_tools(model.parent, registry=registry, key=key)
    if isinstance(tools.signer, Signer):
        tools = replace(tools, signer=replace(tools.signer, format=form))
    return bake_model(request, replace(tools, progress=progress or Silent()))


class Bakery:
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
