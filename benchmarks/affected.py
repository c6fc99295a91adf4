"""How long `affected` takes over many images in a registry, and how many bytes it reads.

Run from a checkout, with docker-registry: `python benchmarks/affected.py [--images 1000]`.
The images have a layer of 8 bytes each, since no layer is read, and the signed statements, the bill
of materials and the tags of a build: 20 images for each of the adapters, in a repository each.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bake_acts import WORK
from bake_servers import registry
from weightsmith.api.commands.affected import find_affected
from weightsmith.core.ports import Signer, Silent
from weightsmith.core.values import Digest, FileEntry, Tree
from weightsmith.oci.image import Image, ImageConfig, assemble
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry, RegistryLocation
from weightsmith.outside.signer import open_signer
from weightsmith.provenance import sealing, statements
from weightsmith.provenance.bills import MEDIA_TYPE, MODEL_BILL
from weightsmith.provenance.evidence import Evidence, resource_of, titled
from weightsmith.provenance.origins import wanted
from weightsmith.provenance.signing import read_public_key
from weightsmith.provenance.statements import provenance, tree_resource

LABEL = "dev.weightsmith."
OF_AN_ADAPTER = 20


def main() -> None:
    """Fill a registry, ask it thrice, print a Markdown table, clean up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    count = parser.parse_args().images
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    try:
        key, public = make_key(WORK)
        with registry() as (host, servers), Registry() as client:
            signer = open_signer(str(key))
            checks = {"key": read_public_key(public)}
            began = time.monotonic()
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda n: publish(client, host, n, signer), range(count)))
            print(f"{count} images pushed in {time.monotonic() - began:.0f} s")
            print(
                "| asked | keys | found | s | CPU s | of the registry |\n|---|---|---|---|---|---|"
            )
            for kind, value, keys in (
                ("adapter", "hf://acme/lora-1", checks),
                ("adapter", "hf://acme/lora-1", {}),
                ("engine", "llamacpp<b9000", checks),
                ("cve_package", "openssl<3.0.12", checks),
            ):
                began, cpu = time.monotonic(), cpu_seconds()
                theirs = cpu_of(servers["registry"])
                with Registry() as fresh:
                    found = find_affected(wanted(kind, value), [host], keys, fresh, Silent())
                spent = f"{time.monotonic() - began:.1f} | {cpu_seconds() - cpu:.1f}"
                spent += f" | {cpu_of(servers['registry']) - theirs:.1f}"
                print(f"| {kind} {value} | {len(keys)} | {len(found.images)} | {spent} |")
                assert not found.problems, found.problems[:3]
                assert len(found.images) == (OF_AN_ADAPTER if kind == "adapter" else count)
    finally:
        shutil.rmtree(WORK, ignore_errors=True)


def cpu_seconds() -> float:
    """Return the CPU time of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def cpu_of(process: int) -> float:
    """Return the CPU time of another process."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def make_key(folder: Path) -> tuple[Path, Path]:
    """Write a key pair; return its files."""
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / "key.pem", folder / "key.pub"
    plain = forms.NoEncryption()
    private.write_bytes(key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, plain))
    public.write_bytes(
        key.public_key().public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)
    )
    private.chmod(0o600)
    return private, public


def publish(client: Registry, host: str, number: int, signer: Signer) -> None:
    """Push one image, as a build does."""
    adapter = f"hf://acme/lora-{number // OF_AN_ADAPTER}@{'a' * 40}"
    image, tree = made(number, adapter)
    name = f"{host}/acme/lora-{number // OF_AN_ADAPTER}"
    reference = Reference.parse(f"{name}:1.{number}-llamacpp")
    place = RegistryLocation(client, reference)
    client.push(image, reference, also_tags=[f"1.{number}-llamacpp-{image.digest.short}"])
    bill = titled(MEDIA_TYPE, MODEL_BILL, {"components": [*packages()]})
    stated = (
        provenance(
            "merge",
            statements.file_resources(tree),
            parameters={},
            dependencies=[
                tree_resource("base", Digest.of(b"base"), f"hf://acme/base@{'b' * 40}"),
                tree_resource("adapter:0", Digest.of(adapter.encode()), adapter),
            ],
        ),
        provenance(
            "bake",
            [
                statements.image_resource(image.manifest_blob),
                *statements.layer_resources(image),
            ],
            parameters={"target": "llamacpp"},
            dependencies=[tree_resource("artifact", tree.digest)],
            byproducts=[resource_of(bill)],
        ),
        statements.statement(
            [statements.image_resource(image.manifest_blob)],
            statements.TEST_RESULT,
            {"result": "PASSED"},
        ),
    )
    evidence = Evidence(statements=stated, documents=(bill,))
    sealing.attach(evidence, image.manifest_blob, reference.name, place, signer)


def made(number: int, adapter: str) -> tuple[Image, Tree]:
    """Return an image and the files that its statements name."""
    data = number.to_bytes(8, "big")
    tree = Tree(root=WORK, files=(FileEntry(path="x", size=8, digest=Digest.of(data)),))
    labels = {
        "engine": "llamacpp",
        "engine.version": "b8000",
        "adapter.0.pin": adapter,
        "adapter.0.digest": Digest.of(adapter.encode()),
        "base.pin": f"hf://acme/base@{'b' * 40}",
        "base.digest": Digest.of(b"base"),
        "artifact.digest": tree.digest,
        "verdict": "passed",
    }
    layer = TarLayer(members=(Member.of_bytes("models/x", data),), epoch=0)
    config = ImageConfig(labels={LABEL + key: text for key, text in labels.items()})
    return assemble((layer,), config=config, epoch=0), tree


def packages() -> Iterator[dict[str, str]]:
    """Yield the packages of a small base."""
    yield {"type": "library", "name": "openssl", "version": "3.0.11-1~deb12u2"}
    for number in range(200):
        yield {"type": "library", "name": f"package-{number}", "version": f"1.{number}"}


if __name__ == "__main__":
    main()
