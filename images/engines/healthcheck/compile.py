"""Compile the health check that images have beside their engine into one static program.

    python compile.py --source TREE --out DIR [--arch x86_64|aarch64]

TREE is what fetch.py wrote: an empty folder, since all sources lie here. The Python that runs this
file needs ziglang as pinned in requirements.txt; neither a system compiler nor root is needed. Exit
codes: 0 done, 2 wrong usage, 3 not the pinned compiler, 5 the compilation failed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import zig  # noqa: E402 - it lies beside the engines' folders
from zig import ENVIRONMENT, REFUSED, fail  # noqa: E402

CPU = {"x86_64": "x86_64", "aarch64": "generic"}
"""It must run on every CPU: only then it can say what is wrong."""
SOURCES = ("healthcheck", "compare", "http", "json")
PROGRAMS = {"healthcheck": (), "healthcheck-weights": ("-DWEIGHTS", "weights.c", "sha256.c")}
"""Each with what it is compiled of further; the second looks at the weights' files, too."""


def compile_all(out: Path, arch: str) -> None:
    """Compile the program into a new folder; it appears only when all is well."""
    pins = json.loads((HERE / "source.json").read_text())
    compiler = zig.find_compiler(pins["compiler"], HERE / "requirements.txt")
    if out.exists():
        fail(REFUSED, f"{out} exists: delete it or give another --out")
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        words = ["-target", f"{arch}-linux-musl", f"-mcpu={CPU[arch]}", "-static", "-s", "-g0"]
        words += ["-std=gnu11", "-Os", "-Wall", "-Wextra", "-Werror", "-fno-sanitize=undefined"]
        words += [
            f"-ffile-prefix-map={HERE}=.",
            "-lm",
            *(str(HERE / f"{name}.c") for name in SOURCES),
        ]
        for name, more in PROGRAMS.items():
            own = [str(HERE / word) if word.endswith(".c") else word for word in more]
            done = subprocess.run(
                [str(compiler), "cc", *words, *own, "-o", str(made / name)],
                env=zig.environment(Path(scratch)),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            if done.returncode != 0:
                print(done.stdout[-8000:], file=sys.stderr)
                fail(ENVIRONMENT, f"compiling {name} failed, see the compiler's output above")
            (made / name).chmod(0o755)
        shutil.copyfile(compiler.parent / "lib/libc/musl/COPYRIGHT", made / "LICENSE.musl")
        (made / "LICENSE.musl").chmod(0o644)
        made.chmod(0o755)
        made.rename(out)


def main(arguments: list[str] | None = None) -> int:
    """Compile."""
    options = zig.parser("Compile the health check of images.").parse_args(arguments)
    compile_all(options.out.resolve(), zig.arch_of(options.arch))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
