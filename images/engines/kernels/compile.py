"""Compile the libraries that our workers load: libkernels.so, and ggml's rows as libggml.so.

    python compile.py --source TREE --out DIR [--arch x86_64|aarch64]

TREE is what fetch.py wrote. The Python that runs this file needs ziglang as pinned in
requirements.txt; neither a system compiler nor root is needed. Exit codes: 0 done, 2 wrong usage,
3 not the pinned source or compiler, 5 a compilation failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import zig  # noqa: E402 - it lies beside the engines' folders
from zig import ENVIRONMENT, REFUSED, fail  # noqa: E402

GLIBC = "2.28"
"""The oldest C library that the libraries load with; the builders' wheels need no older one."""
CPU = {"x86_64": "x86_64_v2", "aarch64": "generic"}
"""What code that is not compiled per variant may use, as llama-quantize's own."""
KERNELS = ("quants", "sums", "products", "tiles", "rounding", "comparing")
MUSL_PARTS = (
    "stdlib/qsort",
    "stdlib/qsort_nr",
    "math/log2f",
    "math/log2f_data",
    "math/__math_divzerof",
    "math/__math_invalidf",
)


@dataclass(frozen=True)
class Job:
    """One compilation: from which tree, with what, for which machine, in which folder."""

    source: Path
    work: Path
    arch: str
    zig: Path

    def cc(self, libc: str, cpu: str, *words: str | Path) -> None:
        """Compile; floats are computed as written, which the same bytes everywhere need."""
        flags = ["-std=gnu11", "-g0", "-DNDEBUG", "-fPIC", "-ffp-contract=off"]
        flags += ["-fno-sanitize=undefined", f"-ffile-prefix-map={self.source}=llama.cpp"]
        flags += [f"-ffile-prefix-map={HERE}=.", "-target", f"{self.arch}-linux-{libc}"]
        done = subprocess.run(
            [str(self.zig), "cc", *flags, f"-mcpu={cpu}", *map(str, words)],
            env=zig.environment(self.work),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            print(done.stdout[-8000:], file=sys.stderr)
            fail(ENVIRONMENT, f"compiling {words[-1]} failed, see the compiler's output above")


def build_kernels(job: Job, variants: list[dict[str, Any]], out: Path) -> None:
    """Compile our kernels once per CPU level, and the function that chooses among them."""

    def build(name: str, variant: dict[str, Any]) -> Path:
        cpu, lanes = variant["cpu"], variant["lanes"]
        made = job.work / f"{name}-{cpu}.o"
        # Else clang halves vectors of 512 bits.
        words = ["-mprefer-vector-width=512"] if lanes == 16 else []
        words += ["-O3", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", f"-DWIDTH={lanes}"]
        words += [f"-DSEARCHES={variant['searches']}", "-c", "-o", str(made)]
        job.cc(f"gnu.{GLIBC}", cpu, *words, HERE / f"{name}.c")
        return made

    each = [(name, variant) for name in KERNELS for variant in variants]
    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(build, *zip(*each, strict=True)))
    words = ["-O2", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-shared", "-s"]
    job.cc(f"gnu.{GLIBC}", CPU[job.arch], *words, "-o", out, *objects, HERE / "dispatch.c")


def build_ggml(job: Job, out: Path) -> None:
    """Compile ggml's own quantization of rows, for types and CPUs that our kernels do not do.

    As in llama-quantize: same CPU, no fused multiply-add, and musl's sorting and logarithm, because
    some types depend on the order of equal weights. Everything else is the loading process's glibc.
    """
    libc, ggml = job.zig.parent / "lib" / "libc", job.source / "ggml"
    folders = [libc / "musl" / name for name in (f"arch/{job.arch}", "arch/generic")]
    folders += [libc / "musl" / "src" / name for name in ("include", "internal")]
    folders += [libc / "include" / name for name in ("generic-musl", f"{job.arch}-linux-musl")]
    objects = []
    for name in MUSL_PARTS:
        objects.append(job.work / f"{Path(name).name}.o")
        words = ["-O2", "-D_XOPEN_SOURCE=700", *(f"-I{folder}" for folder in folders)]
        source = libc / "musl" / "src" / f"{name}.c"
        job.cc("musl", CPU[job.arch], *words, "-c", "-o", objects[-1], source)
    # CMake would write it; only the version that ggml can be asked for stands in it.
    (job.work / "ggml-version.h").write_text('#define GGML_VERSION ""\n#define GGML_COMMIT ""\n')
    words = [f"-I{folder}" for folder in (job.work, ggml / "include", ggml / "src")]
    words += ["-O2", "-D_GNU_SOURCE", "-ffunction-sections", "-shared", "-s", "-Wl,--gc-sections"]
    words += [f"-Wl,--version-script={HERE / 'ggml.map'}", "-lm", "-o", str(out)]
    sources = [ggml / "src" / "ggml.c", ggml / "src" / "ggml-quants.c", HERE / "ggml_rows.c"]
    job.cc(f"gnu.{GLIBC}", CPU[job.arch], *words, *objects, *sources)


def compile_all(source: Path, out: Path, arch: str) -> None:
    """Compile both libraries into a new folder; it appears only when all is well."""
    pins = json.loads((HERE / "source.json").read_text())
    if not (source / "ggml" / "src" / "ggml-quants.c").is_file():
        fail(REFUSED, f"{source} is not a llama.cpp tree: run fetch.py --out {source} first")
    if out.exists():
        fail(REFUSED, f"{out} exists: delete it or give another --out")
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        compiler = zig.find_compiler(pins["compiler"], HERE / "requirements.txt")
        job = Job(source, Path(scratch), arch, compiler)
        made = job.work / "made"
        made.mkdir()
        build_kernels(job, pins["variants"][arch], made / "libkernels.so")
        build_ggml(job, made / "libggml.so")
        shutil.copyfile(source / "LICENSE", made / "LICENSE")
        for path in (made, *made.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        made.rename(out)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = zig.parser("Compile the libraries that our workers load.")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Compile."""
    options = parse(arguments)
    compile_all(options.source.resolve(), options.out.resolve(), zig.arch_of(options.arch))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
