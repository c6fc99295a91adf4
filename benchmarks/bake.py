"""Weights into a registry: our assembly against `docker build` and `docker push`.

Run as root from a checkout: `python benchmarks/bake.py [--rounds 3] [--gib 2]`. Needs docker,
dockerd and docker-registry, and about seven times the weights' size of free disk. Every round has
a fresh registry, and docker's also a fresh daemon with its own folder; all is deleted at the end.
"""

from __future__ import annotations

import argparse
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

HERE = Path(__file__).resolve().parent
WORK = HERE / "work" / "bake"
BRIDGE = "wsbench0"
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
    parser.add_argument("--push", nargs=2, metavar=("DIR", "REF"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.push:
        push(Path(options.push[0]), options.push[1])
        return
    need = int(7 * options.gib * 2**30)
    WORK.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(WORK).free < need:
        raise SystemExit(f"needs {need >> 30} GiB of free disk under {WORK}")
    rows: dict[str, list[dict[str, float]]] = {"ours": [], "docker": []}
    try:
        weights = make_weights(int(options.gib * 2**30))
        for n in range(options.rounds):
            for name, measure in (("ours", ours), ("docker", docker)):
                rows[name].append(measure(weights))
                print(f"round {n + 1} {name}: {rows[name][-1]}", file=sys.stderr)
    finally:
        shutil.rmtree(WORK)
    print(table(rows, options))


def push(folder: Path, reference: str) -> None:
    """Assemble and push, as `bake --push` does, with no digest known before."""
    sys.path.insert(0, str(HERE.parent))
    from toolchain.oci.image import ImageConfig, assemble
    from toolchain.oci.layers import Member, TarLayer
    from toolchain.oci.references import Reference
    from toolchain.oci.registry import Registry

    layers = [
        TarLayer(members=(Member.of_file(f"/models/{path.name}", path),))
        for path in sorted(folder.glob("*.safetensors"))
    ]
    image = assemble(layers, config=ImageConfig(env={"HF_HUB_OFFLINE": "1"}))
    with Registry() as registry:
        print(registry.push(image, Reference.parse(reference)).digest)


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
    (folder / "Dockerfile").write_text(f"FROM scratch\n{copies}ENV HF_HUB_OFFLINE=1\n")
    os.sync()
    return folder


def ours(weights: Path) -> dict[str, float]:
    """Time one assembly and push."""
    with registry() as (host, pids):
        command = [sys.executable, __file__, "--push", str(weights), f"{host}/bench/app:1"]
        return timed([(command, {})], pids, {})


def docker(weights: Path) -> dict[str, float]:
    """Time one `docker build` and `docker push` on an empty daemon."""
    with ExitStack() as stack:
        host, pids = stack.enter_context(registry())
        where, daemon = stack.enter_context(daemon_of_our_own())
        name = f"{host}/bench/app:1"
        env = {"DOCKER_HOST": where, "DOCKER_BUILDKIT": "1"}
        build = ["docker", "build", "-q", "-t", name, str(weights)]
        return timed([(build, env), (["docker", "push", "-q", name], env)], pids, daemon)


def timed(
    commands: list[tuple[list[str], dict[str, str]]],
    registry: dict[str, int],
    daemon: dict[str, int],
) -> dict[str, float]:
    """Run the commands; return seconds of wall and of CPU per party."""
    before = [cpu(registry), cpu(daemon), children()]
    start = time.perf_counter()
    for command, env in commands:
        subprocess.run(command, check=True, env={**os.environ, **env}, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - start
    after = [cpu(registry), cpu(daemon), children()]
    spent = [b - a for a, b in zip(before, after, strict=True)]
    return {"wall": wall, "client": spent[2], "daemon": spent[1], "registry": spent[0]}


def cpu(pids: dict[str, int]) -> float:
    """Return the CPU seconds of processes and of the children that they waited for."""
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
    """Start a dockerd that shares nothing with the host's: no images, no build cache."""
    folder = WORK / "docker"
    folder.mkdir()
    where = f"unix://{folder}/docker.sock"
    words = [
        "dockerd", f"--data-root={folder}/data", f"--exec-root={folder}/exec", f"--host={where}",
        f"--pidfile={folder}/pid", f"--bridge={BRIDGE}", "--iptables=false", "--ip6tables=false",
        "--containerd-namespace=wsbench", "--containerd-plugins-namespace=wsbench-plugins",
    ]  # fmt: skip
    # A bridge of its own: with none, dockerd takes away the default bridge of the host's daemon.
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
    """Call `ready` until it raises nothing, for up to 30 seconds."""
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
    """End a server and delete what it kept."""
    server.terminate()
    server.wait(60)
    shutil.rmtree(folder)


def table(rows: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> str:
    """Return medians as Markdown."""
    keys = ("wall", "client", "daemon", "registry")
    titles = {"ours": "assemble + push", "docker": "docker build + docker push"}
    lines = [
        f"Medians, seconds: {options.gib:g} GiB, {options.rounds} rounds, {os.cpu_count()} cores.",
        "",
        "| | wall | wall of each round | CPU client | CPU dockerd | CPU registry |",
        "|---|---|---|---|---|---|",
    ]
    middle = {n: {k: statistics.median(r[k] for r in rows[n]) for k in keys} for n in rows}
    for name, found in middle.items():
        each = ", ".join(f"{row['wall']:.1f}" for row in rows[name])
        cells = " | ".join(f"{found[key]:.1f}" for key in keys[1:])
        lines.append(f"| {titles[name]} | {found['wall']:.1f} | {each} | {cells} |")
    ratio = middle["docker"]["wall"] / middle["ours"]["wall"]
    spent = [sum(middle[n][k] for k in keys[1:]) for n in ("docker", "ours")]
    lines += [
        "",
        f"Docker takes {ratio:.1f} times the wall and {spent[0] / spent[1]:.1f} times the CPU.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
