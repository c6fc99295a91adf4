"""Pushing weights to a registry: our assembly against docker, buildah, skopeo and oras.

Run as root from a checkout: `python benchmarks/bake.py [--rounds 3] [--gib 2] [--only ours,oras]`.
Needs docker, dockerd and docker-registry, and about seven times the weights' size of free disk;
buildah, skopeo and oras are measured if they are installed. Every round has a new registry, and
docker's also a new daemon with its own folder; everything is deleted at the end. `--act plan`
plans the layers of 100 GB instead.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORK = HERE / "work" / "bake"
BRIDGE = "wsbench0"
DIGESTS = "WEIGHTSMITH_BENCH_DIGESTS"
TICK = os.sysconf("SC_CLK_TCK")
CONFIG = """version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {folder}}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""


def main() -> None:
    """Measure, print a Markdown table, clean up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--only", default="", help="names with commas between; default: all")
    parser.add_argument("--act", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    if options.act:
        ACTS[options.act[0]](*options.act[1:])
        return
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


def push(folder: str, reference: str, streams: str = "4", label: str = "1") -> None:
    """Assemble and push, as `bake --push` does."""
    sys.path.insert(0, str(HERE.parent))
    from weightsmith.oci.image import ImageConfig, assemble
    from weightsmith.oci.references import Reference
    from weightsmith.oci.registry import Registry

    config = ImageConfig(env={"HF_HUB_OFFLINE": "1"}, labels={"label": label})
    with Registry() as registry:
        place = Reference.parse(reference)
        registry.push(assemble(layers(folder), config=config), place, parallel=int(streams))


def layers(folder: str) -> list[Any]:
    """Return one layer per file; its digest is known if `known_digests` has it."""
    sys.path.insert(0, str(HERE.parent))
    from weightsmith.oci.layers import Member, TarLayer
    from weightsmith.values import Digest

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
    sys.path.insert(0, str(HERE.parent))
    from weightsmith.oci.image import ImageConfig, assemble
    from weightsmith.oci.layout import write_layout

    write_layout(assemble(layers(folder), config=ImageConfig()), Path(out), ref="v1")


def rebase(source: str, onto: str, to: str) -> None:
    """Replace the base of an image in the registry, as `rebase` does."""
    sys.path.insert(0, str(HERE.parent))
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
    sys.path.insert(0, str(HERE.parent))
    from weightsmith.oci.image import ImageConfig, assemble
    from weightsmith.ports import Silent
    from weightsmith.provenance.evidence import Evidence
    from weightsmith.stages.publish import Outputs, publish
    from weightsmith.wiring import open_tools

    image = assemble(layers(folder), config=ImageConfig())
    with open_tools("docker", Silent()) as tools:
        publish(image, reference, Outputs(load=True), [Evidence()], tools)


def plan() -> None:
    """Plan the layers of 100 GB in 20 sparse files, each split to 4 GB at most."""
    sys.path.insert(0, str(HERE.parent))
    from weightsmith.checkpoints.reshard import reshard
    from weightsmith.oci.weights import weight_layers
    from weightsmith.values import Digest, FileEntry, Tree

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
    cut = reshard(tree, 4 * 10**9, lambda key, _: str(Digest.of(key.encode())))
    layers = weight_layers(cut.tree, contents=cut.contents, largest=4 * 10**9)
    total = sum(layer.size for layer in layers)
    told = f"{total / 1e9:.0f} GB in {len(layers)} layers"
    print(f"{told}: {time.perf_counter() - began:.3f} s, CPU {time.process_time() - spent:.3f} s")
    shutil.rmtree(folder)


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


def act(*words: object) -> list[str]:
    """Return the command that runs one of our acts in its own process."""
    return [sys.executable, __file__, "--act", *map(str, words)]


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


def base(reference: str) -> None:
    """Push a small base."""
    sys.path.insert(0, str(HERE.parent))
    from weightsmith.oci.image import ImageConfig, assemble
    from weightsmith.oci.layers import Member, TarLayer
    from weightsmith.oci.references import Reference
    from weightsmith.oci.registry import Registry

    layer = TarLayer(members=(Member.of_bytes("/app/engine", bytes(1 << 20)),))
    with Registry() as registry:
        registry.push(assemble((), (layer,), config=ImageConfig()), Reference.parse(reference))


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


def timed(
    commands: list[tuple[list[str], dict[str, str]]],
    registry: dict[str, int],
    daemon: dict[str, int],
    cwd: Path | None = None,
) -> dict[str, float]:
    """Run the commands; return wall and CPU seconds per party, and the client's peak MB."""
    os.sync()
    before = [cpu(registry), cpu(daemon), children()]
    start, peak = time.perf_counter(), 0
    for command, env in commands:
        process = subprocess.Popen(
            command, env={**os.environ, **env}, stdout=subprocess.DEVNULL, cwd=cwd
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{command[0]} failed")
        peak = max(peak, usage.ru_maxrss)
    wall = time.perf_counter() - start
    after = [cpu(registry), cpu(daemon), children()]
    spent = [b - a for a, b in zip(before, after, strict=True)]
    return {
        "wall": wall, "client": spent[2], "daemon": spent[1], "registry": spent[0],
        "peak": peak / 1000,
    }  # fmt: skip


def cpu(pids: dict[str, int]) -> float:
    """Return the CPU seconds of processes and their reaped children."""
    total = 0
    for pid in pids.values():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += sum(map(int, fields[11:15]))
    return total / TICK


def children() -> float:
    """Return the CPU seconds of this process's finished children."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def registry() -> Iterator[tuple[str, dict[str, int]]]:
    """Serve an empty docker-registry."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = WORK / "registry"
    folder.mkdir()
    (folder / "config.yml").write_text(CONFIG.format(folder=folder, port=port))
    server = subprocess.Popen(
        ["docker-registry", "serve", str(folder / "config.yml")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/", timeout=5).close())
        yield f"127.0.0.1:{port}", {"registry": server.pid}
    finally:
        stop(server, folder)


@contextmanager
def daemon_of_our_own() -> Iterator[tuple[str, dict[str, int]]]:
    """Start a dockerd that shares no images and no build cache with the host's."""
    folder = WORK / "docker"
    folder.mkdir()
    where = f"unix://{folder}/docker.sock"
    words = [
        "dockerd", f"--data-root={folder}/data", f"--exec-root={folder}/exec", f"--host={where}",
        f"--pidfile={folder}/pid", f"--bridge={BRIDGE}", "--iptables=false", "--ip6tables=false",
        "--containerd-namespace=wsbench", "--containerd-plugins-namespace=wsbench-plugins",
    ]  # fmt: skip
    # Its own bridge: without one, dockerd removes the default bridge of the host's daemon.
    subprocess.run(["ip", "link", "add", BRIDGE, "type", "bridge"], check=True)
    subprocess.run(["ip", "addr", "add", "172.31.255.1/24", "dev", BRIDGE], check=True)
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        info = ["docker", "-H", where, "info"]
        wait_for(lambda: subprocess.run(info, check=True, capture_output=True))
        yield where, {"dockerd": server.pid}
    finally:
        stop(server, folder)
        subprocess.run(["ip", "link", "delete", BRIDGE], check=False)


def wait_for(ready: object) -> None:
    """Call `ready` until it succeeds, for up to 30 seconds."""
    for left in range(150, -1, -1):
        try:
            ready()  # type: ignore[operator]
        except (OSError, subprocess.CalledProcessError):
            if not left:
                raise
            time.sleep(0.2)
        else:
            return


def stop(server: subprocess.Popen[bytes], folder: Path) -> None:
    """Stop a server and delete its data."""
    server.terminate()
    server.wait(60)
    shutil.rmtree(folder)


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
ACTS = {
    "push": push, "layout": layout, "rebase": rebase, "base": base, "load": load, "plan": plan,
    "digests": digests,
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
