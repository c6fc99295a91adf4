"""What `bake.py` measures of ours, each run in its own process: `bake_acts.py NAME WORD…`."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORK = HERE / "work" / "bake"
DIGESTS = "WEIGHTSMITH_BENCH_DIGESTS"


def act(*words: object) -> list[str]:
    """Return the command that runs one of our acts in its own process."""
    return [sys.executable, __file__, *map(str, words)]


def push(folder: str, reference: str, streams: str = "4", label: str = "1") -> None:
    """Assemble and push, as `bake --push` does."""
    from weightsmith.oci.image import ImageConfig, assemble
    from weightsmith.oci.references import Reference
    from weightsmith.oci.registry import Registry

    config = ImageConfig(env={"HF_HUB_OFFLINE": "1"}, labels={"label": label})
    with Registry() as registry:
        place = Reference.parse(reference)
        registry.push(assemble(layers(folder), config=config), place, parallel=int(streams))


def layers(folder: str) -> list[Any]:
    """Return one layer per file; its digest is known if `known_digests` has it."""
    from weightsmith.core.values import Digest
    from weightsmith.oci.layers import Member, TarLayer

    paths = sorted(Path(folder).glob("*.safetensors"))
    known = os.environ.get(DIGESTS)
    told = known.split(",") if known else [""] * len(paths)
    return [
        TarLayer(
            members=(Member.of_file(f"/models/{path.name}", path),),
            known_digest=Digest(digest) if digest else None,
        )
        for path, digest in zip(paths, told, strict=True)
    ]


def digests(folder: str) -> None:
    """Print the layers' digests."""
    print(",".join(layer.digest for layer in layers(folder)))


def layout(folder: str, out: str) -> None:
    """Write the same image as a layout, for tools that copy layouts."""
    from weightsmith.oci.image import ImageConfig, assemble
    from weightsmith.oci.layout import write_layout

    write_layout(assemble(layers(folder), config=ImageConfig()), Path(out), ref="v1")


def rebase(source: str, onto: str, to: str) -> None:
    """Replace the base of an image in the registry, as `rebase` does."""
    from weightsmith.oci.image import ImageConfig, assemble
    from weightsmith.oci.references import Reference
    from weightsmith.oci.registry import Registry

    with Registry() as registry:
        old = registry.pull(Reference.parse(source))
        base = registry.pull(Reference.parse(onto))
        new = assemble(old.layers, config=ImageConfig(), base=base)
        registry.push(new, Reference.parse(to))


def load(folder: str, reference: str) -> None:
    """Assemble and stream into the engine, as `bake --load` does; no tar is written."""
    from weightsmith.building.wiring import open_tools
    from weightsmith.core.ports import Silent
    from weightsmith.oci.image import ImageConfig, assemble
    from weightsmith.provenance.evidence import Evidence
    from weightsmith.recipe.user_config import RunOptions
    from weightsmith.steps.outputs import ImageOutputs, deliver

    image = assemble(layers(folder), config=ImageConfig())
    with open_tools(RunOptions(runner="docker"), Silent()) as tools:
        deliver(image, reference, ImageOutputs(load=True), [Evidence()], tools)


def plan() -> None:
    """Plan the layers of 100 GB in 20 sparse files, each split to 4 GB at most."""
    from weightsmith.core.values import Digest, FileEntry, Tree
    from weightsmith.models.reshard import reshard
    from weightsmith.oci.weights import weight_layers

    folder = WORK / "huge"
    folder.mkdir(exist_ok=True)
    tensor, count, files = 50 << 20, 95, []
    for n in range(20):
        rows = {
            f"{n}.{i}": {
                "dtype": "BF16", "shape": [tensor // 2],
                "data_offsets": [i * tensor, (i + 1) * tensor],
            }
            for i in range(count)
        }  # fmt: skip
        head = json.dumps(rows).encode()
        path = folder / f"model-{n:05}.safetensors"
        with path.open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            file.truncate(8 + len(head) + tensor * count)
        digest = Digest.of(path.name.encode())
        files.append(FileEntry(path=path.name, size=path.stat().st_size, digest=digest))
    began, spent = time.perf_counter(), time.process_time()
    tree = Tree(root=folder, files=tuple(files))
    cut = reshard(tree, lambda _: 4 * 10**9, lambda key, _: str(Digest.of(key.encode())))
    layers = weight_layers(cut.tree, contents=cut.contents, largest=4 * 10**9)
    total = sum(layer.size for layer in layers)
    told = f"{total / 1e9:.0f} GB in {len(layers)} layers"
    print(f"{told}: {time.perf_counter() - began:.3f} s, CPU {time.process_time() - spent:.3f} s")
    shutil.rmtree(folder)


def base(reference: str) -> None:
    """Push a small base."""
    from weightsmith.oci.image import ImageConfig, assemble
    from weightsmith.oci.layers import Member, TarLayer
    from weightsmith.oci.references import Reference
    from weightsmith.oci.registry import Registry

    layer = TarLayer(members=(Member.of_bytes("/app/engine", bytes(1 << 20)),))
    with Registry() as registry:
        registry.push(assemble((), (layer,), config=ImageConfig()), Reference.parse(reference))


ACTS = {
    "push": push, "layout": layout, "rebase": rebase, "base": base, "load": load, "plan": plan,
    "digests": digests,
}  # fmt: skip

if __name__ == "__main__":
    WORK.mkdir(parents=True, exist_ok=True)
    ACTS[sys.argv[1]](*sys.argv[2:])
