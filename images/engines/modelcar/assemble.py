"""Assembles the root file system of a modelcar from one pinned package: a shell and nothing else.

    python assemble.py --out FOLDER [--arch x86_64|aarch64]

KServe starts a modelcar with `sh -c "ln -sf … && sleep …"`. Debian's static busybox is all of that
in one program, whose shell finds its own commands. Needs Python alone, no root and no container
engine, and nothing of the machine it is for; the same pins give the same files.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import debs  # noqa: E402 - it lies beside the engines' folders


def main() -> None:
    """Parse the arguments, and assemble."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="new or empty folder")
    parser.add_argument("--find-links", default="", help="accepted for every engine, not needed")
    parser.add_argument("--arch", default="x86_64", choices=sorted(debs.MACHINES.values()))
    given = parser.parse_args()
    out = given.out
    lock = json.loads((HERE / "debian.json").read_text("utf-8"))
    print("[1/2] Debian's busybox", flush=True)
    (package,) = debs.packages_for(lock, given.arch)
    with debs.open_package(lock, package) as archive:
        for source, target in package["files"].items():
            mode = 0o755 if target.startswith("bin/") else 0o644
            debs.write(archive, f"./{source}", out / target, mode)
    print("[2/2] done", flush=True)


if __name__ == "__main__":
    main()
