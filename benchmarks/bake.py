"""Pushing weights to a registry: our assembly against docker, buildah, skopeo and oras.

Run as root from a checkout: `python benchmarks/bake.py [--rounds 3] [--gib 2] [--only ours,oras]`.
Needs docker, dockerd and docker-registry, and about seven times the weights' size of free disk;
buildah, skopeo and oras are measured if they are installed. Every round has a new registry, and
docker's also a new daemon with its own folder; everything is deleted at the end.
`python benchmarks/bake_acts.py plan` plans the layers of 100 GB.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from bake_acts import DIGESTS, WORK, act
from bake_servers import daemon_of_our_own, registry, timed


def main() -> None:
    """Measure, print a Markdown table, clean up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--only", default="", help="names with commas between; default: all")
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    wanted = [n for n in options.only.split(",") if n] or list(MEASURES)
    subjects = {name: MEASURES[name] for name in wanted if there(name)}
    need = int(7 * options.gib * 2**30)
    if shutil.disk_usage(WORK).free < need:
        raise SystemExit(f"needs {need >> 30} GiB of free disk under {WORK}")
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in subjects}
    try:
        weights = make_weights(int(options.gib * 2**30))
        for n in range(options.rounds):
            for name, measure in subjects.items():
                rows[name].append(measure(weights))
                print(f"round {n + 1} {name}: {rows[name][-1]}", file=sys.stderr)
    finally:
        shutil.rmtree(WORK)
    print(table(rows, options))


def make_weights(size: int) -> Path:
    """Write four files of random bytes, which do not compress, and a Dockerfile."""
    folder = WORK / "weights"
    folder.mkdir(exist_ok=True)
    names = [f"model-{n:05}-of-00004.safetensors" for n in range(1, 5)]
    for name in names:
        with (folder / name).open("wb") as file:
            for _ in range(size // 4 >> 20):
                file.write(os.urandom(1 << 20))
    copies = "".join(f"COPY --link {name} /models/\n" for name in names)
    text = f"FROM scratch\n{copies}ENV HF_HUB_OFFLINE=1\n"
    (folder / "Dockerfile").write_text(text)
    (folder / "Containerfile").write_text(text.replace("--link ", ""))  # buildah's
    os.sync()
    return folder


def ours(weights: Path) -> dict[str, float]:
    """Time one assembly and push."""
    with registry() as (host, pids):
        return timed([(act("push", weights, f"{host}/bench/app:1"), {})], pids, {})


def one_stream(weights: Path) -> dict[str, float]:
    """Time the same with one upload at a time."""
    with registry() as (host, pids):
        return timed([(act("push", weights, f"{host}/bench/app:1", 1), {})], pids, {})


def known_digests(weights: Path) -> dict[str, str]:
    """Return the arguments with the layers' digests, which a build knows from the merge."""
    told = subprocess.run(act("digests", weights), check=True, capture_output=True, text=True)
    return {DIGESTS: told.stdout.strip()}


def known(weights: Path) -> dict[str, float]:
    """Time the same with known digests, as after a merge."""
    env = known_digests(weights)
    with registry() as (host, pids):
        return timed([(act("push", weights, f"{host}/bench/app:1"), env)], pids, {})


def again(weights: Path) -> dict[str, float]:
    """Time a second push after a change of the configuration, with cached digests."""
    env = known_digests(weights)
    with registry() as (host, pids):
        subprocess.run(act("push", weights, f"{host}/bench/app:1"), check=True)
        return timed([(act("push", weights, f"{host}/bench/app:2", 4, "2"), env)], pids, {})


def rebased(weights: Path) -> dict[str, float]:
    """Time a replacement of the base, into another repository."""
    with registry() as (host, pids):
        for words in (
            act("push", weights, f"{host}/bench/app:1"),
            act("base", f"{host}/bench/base:2"),
        ):
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        words = act("rebase", f"{host}/bench/app:1", f"{host}/bench/base:2", f"{host}/bench/new:2")
        return timed([(words, {})], pids, {})


def skopeo(weights: Path) -> dict[str, float]:
    """Time writing a layout and skopeo's copy of it, with digests preserved."""
    with registry() as (host, pids):
        out = WORK / "layout"
        copy = ["skopeo", "copy", "-q", "--preserve-digests", "--dest-tls-verify=false",
                f"oci:{out}:v1", f"docker://{host}/bench/app:1"]  # fmt: skip
        try:
            return timed([(act("layout", weights, out), {}), (copy, {})], pids, {})
        finally:
            shutil.rmtree(out, ignore_errors=True)


def buildah(weights: Path) -> dict[str, float]:
    """Time buildah's copy, commit and push, with its own storage."""
    with registry() as (host, pids):
        root = WORK / "buildah"
        store = ["buildah", "--root", f"{root}/root", "--runroot", f"{root}/run",
                 "--storage-driver", "vfs"]  # fmt: skip
        build = [*store, "build", "-q", "--isolation", "chroot", "--layers=false",
                 "-t", "bench", str(weights)]  # fmt: skip
        push = [*store, "push", "-q", "--disable-compression", "--tls-verify=false", "bench",
                f"docker://{host}/bench/app:1"]  # fmt: skip
        try:
            return timed([(build, {}), (push, {})], pids, {})
        finally:
            shutil.rmtree(root, ignore_errors=True)


def oras(weights: Path) -> dict[str, float]:
    """Time oras's push of the plain files: an artifact, not a runnable image."""
    with registry() as (host, pids):
        names = [path.name for path in sorted(weights.glob("*.safetensors"))]
        push = ["oras", "push", "--plain-http", f"{host}/bench/app:1", *names]
        return timed([(push, {})], pids, {}, cwd=weights)


def docker(weights: Path) -> dict[str, float]:
    """Time one `docker build` and `docker push` on an empty daemon."""
    with ExitStack() as stack:
        host, pids = stack.enter_context(registry())
        where, daemon = stack.enter_context(daemon_of_our_own())
        name = f"{host}/bench/app:1"
        env = {"DOCKER_HOST": where, "DOCKER_BUILDKIT": "1"}
        build = ["docker", "build", "-q", "-t", name, str(weights)]
        return timed([(build, env), (["docker", "push", "-q", name], env)], pids, daemon)


def loaded(weights: Path) -> dict[str, float]:
    """Time one assembly and `docker load` into an empty daemon, with known digests as in a pull."""
    env = known_digests(weights)
    with daemon_of_our_own() as (where, daemon):
        words = act("load", weights, "bench/app:1")
        return timed([(words, {**env, "DOCKER_HOST": where})], {}, daemon)


def pulled(weights: Path) -> dict[str, float]:
    """Time a `docker pull` of the same from a loopback registry, without the push before it."""
    with ExitStack() as stack:
        host, pids = stack.enter_context(registry())
        name = f"{host}/bench/app:1"
        subprocess.run(act("push", weights, name), check=True, stdout=subprocess.DEVNULL)
        where, daemon = stack.enter_context(daemon_of_our_own())
        return timed([(["docker", "pull", "-q", name], {"DOCKER_HOST": where})], pids, daemon)


TITLES = {
    "ours": "assemble + push",
    "one": "the same, one stream",
    "known": "the same, digests known",
    "again": "second push, configuration changed",
    "rebase": "another base, another repository",
    "docker": "docker build + docker push",
    "skopeo": "write a layout + skopeo copy",
    "buildah": "buildah build + push",
    "oras": "oras push (files, not an image)",
    "load": "assemble + docker load, digests known",
    "pull": "docker pull, pushed before",
}
MEASURES = {
    "ours": ours, "docker": docker, "one": one_stream, "known": known, "again": again,
    "rebase": rebased, "skopeo": skopeo, "buildah": buildah, "oras": oras,
    "load": loaded, "pull": pulled,
}  # fmt: skip


def there(name: str) -> bool:
    """Say whether the tools for a measurement are installed."""
    return name not in ("skopeo", "buildah", "oras") or shutil.which(name) is not None


def table(rows: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> str:
    """Return medians as Markdown."""
    keys = ("wall", "client", "daemon", "registry", "peak")
    lines = [
        f"Medians, seconds: {options.gib:g} GiB, {options.rounds} rounds, {os.cpu_count()} cores.",
        "",
        "| | wall | wall of each round | CPU client | CPU dockerd | CPU registry | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    middle = {n: {k: statistics.median(r[k] for r in rows[n]) for k in keys} for n in rows}
    for name, found in middle.items():
        each = ", ".join(f"{row['wall']:.1f}" for row in rows[name])
        cells = " | ".join(f"{found[key]:.1f}" for key in keys[1:])
        lines.append(f"| {TITLES[name]} | {found['wall']:.1f} | {each} | {cells} |")
    lines.append("")
    pairs = [("ours", n) for n in ("docker", "buildah", "skopeo", "oras", "one")]
    for low, high in [*pairs, ("load", "pull")]:
        if {low, high} <= set(middle):
            ratio = middle[high]["wall"] / middle[low]["wall"]
            spent = [sum(middle[n][k] for k in keys[1:4]) for n in (high, low)]
            told = f"{ratio:.1f} times the wall and {spent[0] / spent[1]:.1f} times the CPU"
            lines.append(f"- {TITLES[high]}: {told} of {TITLES[low]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
