"""Small images for tests, made of files in a folder."""

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

from weightsmith.core.values import Blob, Digest, FileEntry, Tree
from weightsmith.oci.image import Healthcheck, Image, ImageConfig, assemble, load_image
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.weights import weight_layers

FILES = {
    "model-00001-of-00002.safetensors": b"\x01" * 70_000,
    "model-00002-of-00002.safetensors": b"\x02" * 70_001,
    "config.json": b'{"model_type": "llama"}\n',
    "tokenizer/vocab.json": b"{}",
}


def tree_of(root: Path, files: dict[str, bytes]) -> Tree:
    entries = []
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        entries.append(FileEntry(path=name, size=len(data), digest=Digest.of(data)))
    return Tree(root=root, files=tuple(entries))


def tiny_image(root: Path, **options: object) -> Image:
    """Return an image of two weight layers, a bundle and a configuration layer, epoch 0."""
    layers = weight_layers(tree_of(root, FILES), own_layer=50_000, epoch=0)
    config = TarLayer(members=(Member.of_bytes("/etc/weightsmith/serve.yaml", b"a: 1\n"),), epoch=0)
    settings = ImageConfig(
        user="1000:1000",
        env={"HF_HUB_OFFLINE": "1"},
        entrypoint=("/models/serve",),
        cmd=("--port", "8000"),
        ports=(8000,),
        healthcheck=Healthcheck(command=("/bin/true",)),
        labels={"org.opencontainers.image.version": "1.2.0"},
        working_dir="/models",
    )
    return assemble(layers, [config], **{"config": settings, "epoch": 0, **options})


def tar_of(*entries: tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]) -> bytes:
    """Return a tar made by Python's own writer: an independent one."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for entry in entries:
            info, data = entry if isinstance(entry, tuple) else (entry, b"")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def entry(
    name: str, kind: bytes = tarfile.REGTYPE, mode: int = 0o644, to: str = ""
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.linkname = kind, mode, to
    return info


def foreign_image(
    *tars: bytes, packed: bool = True, docker: bool = False, config: dict[str, object] | None = None
) -> Image:
    """Return an image as another tool would have written it, gzip layers by default."""
    blobs: dict[str, bytes] = {}
    prefix = "application/vnd.docker." if docker else "application/vnd.oci."

    def put(data: bytes, kind: str) -> dict[str, object]:
        digest = str(Digest.of(data))
        blobs[digest] = data
        return {"mediaType": prefix + kind, "digest": digest, "size": len(data)}

    layer = "image.rootfs.diff.tar" if docker else "image.layer.v1.tar"
    gz = ".gzip" if docker else "+gzip"
    rows = [
        put(gzip.compress(data, mtime=0) if packed else data, layer + (gz if packed else ""))
        for data in tars
    ]
    ids = ["sha256:" + hashlib.sha256(data).hexdigest() for data in tars]
    settings = {
        "os": "linux",
        "architecture": "amd64",
        "rootfs": {"type": "layers", "diff_ids": ids},
        "config": config
        or {"Env": ["PATH=/bin", "A=old"], "Cmd": ["/bin/sh"], "Labels": {"from": "base"}},
    }
    kind = "container.image.v1+json" if docker else "image.config.v1+json"
    head = "distribution.manifest.v2+json" if docker else "image.manifest.v1+json"
    document = {
        "schemaVersion": 2,
        "mediaType": prefix + head,
        "config": put(json.dumps(settings).encode(), kind),
        "layers": rows,
    }

    def opener(blob: Blob) -> object:
        return lambda: iter((blobs[blob.digest],))

    return load_image(
        json.dumps(document).encode(),
        prefix + head,
        read=lambda blob: blobs[blob.digest],
        opener=opener,  # type: ignore[arg-type]
        where="a foreign image",
    )
