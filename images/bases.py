"""Pins upstream's base images in `bases.lock` by digest, or says which have none.

python images/bases.py            # ask the registries; a digest that moved is printed
python images/bases.py --check    # for a release: refuse what is not pinned
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from weightsmith.building.wiring import make_registry
from weightsmith.core.errors import WeightsmithError
from weightsmith.core.files import replace_file
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry

LOCK = Path(__file__).with_name("bases.lock")


def pin(file: Path, registry: Registry) -> list[str]:
    """Write each image's digest by platform; return what could not be asked.

    What a reference has only for other platforms is left out of the lock.
    """
    lock, missed = json.loads(file.read_text("utf-8")), []
    for purpose, entry in lock.items():
        try:
            images = registry.pull_all(Reference.parse(entry["reference"]))
        except WeightsmithError as error:
            missed.append(f"{purpose}: {error.message}")
            continue
        found = {image.platform: str(image.digest) for image in images}
        digests = {platform: found[platform] for platform in entry["digests"] if platform in found}
        for platform, digest in digests.items():
            if (before := entry["digests"][platform]) not in (None, digest):
                print(f"{purpose} {platform}: {before} -> {digest}")
        entry["digests"] = digests
    replace_file(file, [(json.dumps(lock, indent=2, sort_keys=True) + "\n").encode()], 0o644)
    return missed


def unpinned(file: Path) -> list[str]:
    """Return each image and platform without a digest."""
    lock = json.loads(file.read_text("utf-8"))
    return [
        f"{purpose} for {platform} has no digest"
        for purpose, entry in lock.items()
        for platform, digest in (entry["digests"] or {"any platform": None}).items()
        if not digest
    ]


def main() -> int:
    """Pin or check; return 0 if every image has its digests, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="ask nobody; name what is not pinned")
    parser.add_argument("--insecure", action="store_true", help="ask registries by plain HTTP")
    parser.add_argument("--lock", type=Path, default=LOCK)
    given = parser.parse_args()
    if given.check:
        missing = unpinned(given.lock)
    else:
        with make_registry(insecure=given.insecure) as registry:
            missing = pin(given.lock, registry)
    for line in missing:
        print(f"error: {line}", file=sys.stderr)
    if missing and given.check:
        print("hint: run `make bases` where the registries can be reached", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
