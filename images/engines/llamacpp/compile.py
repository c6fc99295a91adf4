"""Compile llama.cpp into static programs that are the same bytes wherever they are compiled.

    python compile.py --source TREE --out DIR [--arch x86_64|aarch64] [--engine-only] [--jobs N]

TREE is what fetch.py wrote. The Python that runs this file needs ziglang, cmake and ninja as pinned
in requirements.txt; neither a system compiler nor root is needed. The standard library does the
rest. Exit codes: 0 done, 2 wrong usage, 3 not the pinned source or compiler, 5 the build failed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import drain  # noqa: E402 - it lies beside this file
import zig  # noqa: E402 - it lies beside the engines' folders
from zig import ENVIRONMENT, REFUSED, fail  # noqa: E402

EVERY_SECONDS = 5.0
ENGINE = "llama-server"
PER_VARIANT = (ENGINE, "llama-imatrix", "llama-perplexity")
BASELINE_ONLY = ("llama-quantize",)
CONVERTER = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion", "gguf-py")
# Code from elsewhere inside the programs, and where its licence lies: below the source tree ("src")
# or below the compiler's library folder ("zig"), whose C and C++ libraries are linked in.
LICENSES = {
    "nlohmann-json": ("src", "licenses/LICENSE-jsonhpp"),
    "cpp-httplib": ("src", "vendor/cpp-httplib/LICENSE"),
    "sha256": ("src", "vendor/hash/sha256/LICENSE"),
    "rotate-bits": ("src", "vendor/hash/rotate-bits/LICENSE.md"),
    "xxhash": ("src", "vendor/hash/xxhash/LICENSE"),
    "gguf-py": ("src", "gguf-py/LICENSE"),
    "musl": ("zig", "libc/musl/COPYRIGHT"),
    "libcxx": ("zig", "libcxx/LICENSE.TXT"),
    "libcxxabi": ("zig", "libcxxabi/LICENSE.TXT"),
    "libunwind": ("zig", "libunwind/LICENSE.TXT"),
    "zig-compiler-rt": ("zig", "../LICENSE"),
}


@dataclass(frozen=True)
class Compiler:
    """Where the pinned build tools lie."""

    zig: Path
    cmake: Path
    ninja: Path


@dataclass(frozen=True)
class Job:
    """One compilation: from which tree, with what, for which machine, into which folders."""

    source: Path
    work: Path
    arch: str
    variants: dict[str, str]
    commit: str
    compiler: Compiler
    jobs: int
    engine_only: bool = False

    @property
    def per_variant(self) -> tuple[str, ...]:
        """The programs that are compiled for each variant."""
        return (ENGINE,) if self.engine_only else PER_VARIANT

    @property
    def once(self) -> tuple[str, ...]:
        """The programs that are compiled for the baseline alone."""
        return () if self.engine_only else BASELINE_ONLY

    @property
    def baseline(self) -> str:
        """The variant that every supported CPU of this architecture can run."""
        return next(iter(self.variants))

    @property
    def oldest(self) -> str:
        """The CPU that the launcher must run on to say that a CPU is too old."""
        return "x86_64" if self.arch == "x86_64" else "generic"

    @property
    def build(self) -> Path:
        """CMake's build tree."""
        return self.work / "build"

    @property
    def edited(self) -> Path:
        """The files of the source tree that are changed, see drain.py."""
        return self.work / "edited"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the compiler: its caches stay inside the work folder."""
        return {**zig.environment(self.work), "NINJA_STATUS": "[%f/%t] "}

    def target(self, cpu: str) -> list[str]:
        """Give the flags that choose operating system, C library and CPU."""
        return ["-target", f"{self.arch}-linux-musl", f"-mcpu={cpu}"]


def note(message: str) -> None:
    """Say what goes on."""
    print(message, file=sys.stderr, flush=True)


def find_compiler(pins: dict[str, str]) -> Compiler:
    """Find the build tools in this Python and make sure that they are the pinned ones."""
    found = zig.find_compiler(pins, HERE / "requirements.txt")
    return Compiler(
        zig=found,
        cmake=Path(importlib.import_module("cmake").CMAKE_BIN_DIR) / "cmake",
        ninja=Path(importlib.import_module("ninja").BIN_DIR) / "ninja",
    )


def write_wrappers(job: Job) -> dict[str, Path]:
    """Write the scripts by which CMake calls zig as compiler and archiver.

    CMake links a file to learn the compiler's name; with zig that would compile a shared C++
    library which nothing uses, so that file is only compiled.
    """
    wrappers = {}
    for tool in ("cc", "c++", "ar", "ranlib"):
        path = job.work / f"zig-{tool}"
        only = 'case "$*" in *CompilerId.c*) set -- "$@" -c ;; esac' if tool.startswith("c") else ""
        path.write_text(f'#!/bin/sh\n{only}\nexec "{job.compiler.zig}" {tool} "$@"\n')
        path.chmod(0o755)
        wrappers[tool] = path
    return wrappers


def cmake_settings(job: Job, wrappers: dict[str, Path]) -> dict[str, str]:
    """All settings of the build, so that nothing is taken from the host."""
    flags = [
        *job.target(job.variants[job.baseline]),
        "-g0",
        "-fno-sanitize=undefined",  # zig turns it on by default
        f"-ffile-prefix-map={job.source}=llama.cpp",
        f"-ffile-prefix-map={job.edited}=llama.cpp",
        f"-ffile-prefix-map={job.build}=build",
    ]
    x86 = "ON" if job.arch == "x86_64" else "OFF"
    others = {name: "-mcpu=" + cpu for name, cpu in job.variants.items() if name != job.baseline}
    off = (
        "BUILD_SHARED_LIBS GGML_NATIVE GGML_OPENMP GGML_CCACHE GGML_AVX GGML_AVX2 GGML_FMA "
        "GGML_F16C GGML_BMI2 LLAMA_ALL_WARNINGS LLAMA_OPENSSL LLAMA_SUBPROCESS LLAMA_BUILD_TESTS "
        "LLAMA_BUILD_EXAMPLES LLAMA_BUILD_APP LLAMA_BUILD_UI LLAMA_USE_PREBUILT_UI "
        "LLAMA_TOOLS_INSTALL MTMD_VIDEO"
    )
    return {
        **dict.fromkeys(off.split(), "OFF"),
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": str(job.compiler.ninja),
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": job.arch,
        "CMAKE_C_COMPILER": str(wrappers["cc"]),
        "CMAKE_CXX_COMPILER": str(wrappers["c++"]),
        "CMAKE_ASM_COMPILER": str(wrappers["cc"]),
        "CMAKE_AR": str(wrappers["ar"]),
        "CMAKE_RANLIB": str(wrappers["ranlib"]),
        "CMAKE_C_FLAGS": " ".join(flags),
        "CMAKE_CXX_FLAGS": " ".join(flags),
        "CMAKE_C_FLAGS_RELEASE": "-O2 -DNDEBUG",
        "CMAKE_CXX_FLAGS_RELEASE": "-O2 -DNDEBUG",
        # musl gives threads 128 KiB of stack unless told; deep regular expressions need more.
        # The C and C++ libraries are compiled once, for the oldest CPU: the launcher needs that.
        "CMAKE_EXE_LINKER_FLAGS": f"-static -s -Wl,-z,stack-size=8388608 -mcpu={job.oldest}",
        "CMAKE_TRY_COMPILE_TARGET_TYPE": "STATIC_LIBRARY",  # checks need no C library yet
        "CMAKE_PROJECT_llama.cpp_INCLUDE": str(HERE / "variants.cmake"),
        # Without git, or the commit of whatever repository is around the tree would be compiled in.
        "GIT_EXE": "OFF",
        "GIT_EXECUTABLE": "OFF",
        "GGML_SSE42": x86,
        "LLAMA_BUILD_NUMBER": "0",
        "LLAMA_BUILD_COMMIT": job.commit[:9],
        "WEIGHTSMITH_SERVER": str(job.edited / drain.SERVER),
        "WEIGHTSMITH_HTTP": str(job.edited / drain.HTTP),
        "WEIGHTSMITH_VARIANTS": ";".join(f"{name}={flag}" for name, flag in others.items()),
        "WEIGHTSMITH_PROGRAMS": ";".join(job.per_variant),
    }


def run_quietly(job: Job, command: list[str], what: str) -> None:
    """Run a command; show its output only when it fails."""
    done = subprocess.run(
        command, env=job.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        note(done.stdout[-8000:])
        fail(ENVIRONMENT, f"{what} failed with exit code {done.returncode}, see its output above")


def configure(job: Job) -> None:
    """Write the files that are changed, and the build tree."""
    try:
        drain.write_edited(job.source, job.edited)
    except ValueError as problem:
        fail(REFUSED, f"{problem}: bring drain.py in line with this source")
    settings = cmake_settings(job, write_wrappers(job))
    note(f"configuring llama.cpp {job.commit[:9]} for {job.arch}: {', '.join(job.variants)}")
    definitions = [f"-D{name}={value}" for name, value in settings.items()]
    sides = ["-S", str(job.source), "-B", str(job.build)]
    run_quietly(job, [str(job.compiler.cmake), "-G", "Ninja", *sides, *definitions], "cmake")


def build_programs(job: Job) -> None:
    """Compile all programs of all variants, with a line of progress every few seconds."""
    others = [name for name in job.variants if name != job.baseline]
    targets = [*job.once, *job.per_variant]
    targets += [f"{program}-{name}" for name in others for program in job.per_variant]
    command = [str(job.compiler.ninja), "-C", str(job.build), "-j", str(job.jobs), *targets]
    process = subprocess.Popen(
        command, env=job.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    shown, tail, line = 0.0, [], ""
    for line in process.stdout:
        if not line.startswith("["):
            tail = [*tail, line][-200:]
        elif time.monotonic() - shown >= EVERY_SECONDS:
            shown = time.monotonic()
            note(line.rstrip())
    if process.wait() != 0:
        note("".join(tail))
        fail(ENVIRONMENT, "ninja could not build llama.cpp, see the compiler's output above")
    note(line.rstrip())


def build_launcher(job: Job, out: Path) -> None:
    """Compile the launcher for the oldest CPU of the architecture."""
    flags = ["-std=gnu11", "-O2", "-g0", "-s", "-static", "-Wall", "-Wextra", "-Werror"]
    flags += ["-fno-sanitize=undefined", f"-ffile-prefix-map={HERE}=."]
    # As C++ in name only: that way zig takes the C library it has compiled for the large programs.
    command = [str(job.compiler.zig), "c++", "-x", "c", *job.target(job.oldest), *flags]
    run_quietly(job, [*command, str(HERE / "launcher.c"), "-o", str(out)], "compiling launcher.c")


def install(source: Path, target: Path) -> None:
    """Copy a program to its place, readable and runnable by everyone."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755)


def lay_out_programs(job: Job, out: Path) -> None:
    """Put the programs where they are looked for: variants below cpu/, the launcher in front."""
    launcher = job.work / "launcher"
    build_launcher(job, launcher)
    for program in job.once:
        install(job.build / "bin" / program, out / "bin" / program)
    for program in job.per_variant:
        folder = out / ("app" if program == ENGINE else "bin")
        install(launcher, folder / program)
        for name in job.variants:
            built = program if name == job.baseline else f"{program}-{name}"
            install(job.build / "bin" / built, folder / "cpu" / name / program)


def copy_texts(job: Job, out: Path) -> None:
    """Copy the licences, and the converter unless only the engine is wanted."""
    skip = shutil.ignore_patterns("__pycache__", "tests", "examples")
    for name in () if job.engine_only else CONVERTER:
        origin, target = job.source / name, out / "convert" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if origin.is_dir():
            shutil.copytree(origin, target, ignore=skip)
        else:
            shutil.copyfile(origin, target)
    shutil.copyfile(job.source / "LICENSE", out / "LICENSE")
    (out / "licenses").mkdir()
    roots = {"src": job.source, "zig": job.compiler.zig.parent / "lib"}
    for name, (root, path) in LICENSES.items():
        shutil.copyfile(roots[root] / path, out / "licenses" / name)


def set_modes(out: Path) -> None:
    """Give folders and files the same modes everywhere, whatever the umask."""
    for path in [out, *out.rglob("*")]:
        runnable = path.is_dir() or path.stat().st_mode & stat.S_IXUSR
        path.chmod(0o755 if runnable else 0o644)


def describe(job: Job, pins: dict[str, object], out: Path) -> None:
    """Write tools.json: what was compiled, with what, and the digest of each program."""
    programs = sorted(
        path for folder in ("app", "bin") for path in (out / folder).rglob("*") if path.is_file()
    )
    files = {
        str(path.relative_to(out)): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size": path.stat().st_size,
        }
        for path in programs
    }
    report = {**pins, "arch": job.arch, "variants": job.variants, "files": files}
    (out / "tools.json").write_text(json.dumps(report, indent=2) + "\n")


def publish(ready: Path, out: Path) -> None:
    """Put the finished folder in its place in one step; an older one goes away after that."""
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    ready.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def compile_tree(source: Path, out: Path, arch: str, jobs: int, *, engine_only: bool) -> None:
    """Compile the tree and write the engine layer and the licences, the tools and the converter."""
    pins = json.loads((HERE / "source.json").read_text())
    if not (source / "ggml").is_dir() or not (source / "convert_hf_to_gguf.py").is_file():
        fail(REFUSED, f"{source} is not a llama.cpp tree: run fetch.py --out {source} first")
    work = out.with_name(out.name + ".building")
    shutil.rmtree(work, ignore_errors=True)
    (work / "out").mkdir(parents=True)
    compiler, commit = find_compiler(pins["compiler"]), pins["llama_cpp"]["commit"]
    job = Job(source, work, arch, pins["variants"][arch], commit, compiler, jobs, engine_only)
    configure(job)
    build_programs(job)
    lay_out_programs(job, work / "out")
    copy_texts(job, work / "out")
    describe(job, pins, work / "out")
    set_modes(work / "out")
    publish(work / "out", out)
    shutil.rmtree(work)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = zig.parser("Compile llama.cpp into static programs.")
    parser.add_argument("--engine-only", action="store_true", help="no tools and no converter")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Compile, and say how long it took."""
    options = parse(arguments)
    source, out, arch = options.source.resolve(), options.out.resolve(), zig.arch_of(options.arch)
    started = time.monotonic()
    compile_tree(source, out, arch, options.jobs, engine_only=options.engine_only)
    used = sum(os.times()[2:4])
    took = time.monotonic() - started
    note(f"wrote {options.out} in {took:.0f} s ({used:.0f} s of CPU time)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
