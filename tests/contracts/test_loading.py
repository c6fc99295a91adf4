"""Engines with either image store take an image once, and of another only what they lack."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from weightsmith.api.commands.images import inspect_image
from weightsmith.oci import layout
from weightsmith.oci.image import Image, ImageConfig, assemble
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.registry import Registry
from weightsmith.outside.docker import DockerEngine
from weightsmith.outside.ownership import is_dead, owner_token
from weightsmith.provenance.evidence import Evidence
from weightsmith.steps.outputs import ImageOutputs, candidate, deliver, discard_candidate, is_held
from weightsmith.steps.tools import Tools

from tests.fakes.images import entry, foreign_image, tar_of
from tests.fakes.memory import memory_tools
from tests.paths import ROOT

pytestmark = [pytest.mark.docker, pytest.mark.root]
LOAD = ImageOutputs(load=True)


@dataclass
class Counting:
    """An engine that counts what is sent to it: the bytes of each load, and its archives."""

    engine: DockerEngine
    sent: list[int] = field(default_factory=list)
    archives: list[int] = field(default_factory=list)

    def __getattr__(self, name: str) -> object:
        return getattr(self.engine, name)

    def load(self, archives: Iterable[Iterator[bytes]], reference: str) -> str:
        self.sent.append(0)
        self.archives.append(0)

        def counted(archive: Iterator[bytes]) -> Iterator[bytes]:
            self.archives[-1] += 1
            for chunk in archive:
                self.sent[-1] += len(chunk)
                yield chunk

        return self.engine.load(map(counted, archives), reference)


@pytest.fixture(scope="module")
def containerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a dockerd of our own that keeps images in containerd, as Docker 29 does by default."""
    if not shutil.which("dockerd") or not shutil.which("ip"):
        pytest.skip("dockerd or ip is not installed")
    folder = tmp_path_factory.mktemp("d")
    number = os.getpid() % 100_000
    bridge, namespace = f"wst{number}", f"wst{number}"
    (folder / "daemon.json").write_text('{"features": {"containerd-snapshotter": true}}')
    where = f"unix://{folder}/docker.sock"
    words = [
        "dockerd", f"--config-file={folder}/daemon.json", f"--data-root={folder}/data",
        f"--exec-root={folder}/exec", f"--host={where}", f"--pidfile={folder}/pid",
        f"--bridge={bridge}", "--iptables=false", "--ip6tables=false",
        f"--containerd-namespace={namespace}",
        f"--containerd-plugins-namespace={namespace}-plugins",
    ]  # fmt: skip
    # With no bridge, dockerd would take away the default one of the host's daemon.
    subprocess.run(["ip", "link", "add", bridge, "type", "bridge"], check=True)
    try:
        # Of the range for benchmarks (RFC 2544), which leads nowhere on any machine.
        address = f"198.18.{number % 250}.1/24"
        subprocess.run(["ip", "addr", "add", address, "dev", bridge], check=True)
        with started_daemon(words, where, folder / "log"):
            yield where
    finally:
        subprocess.run(["ip", "link", "delete", bridge], check=False)


@contextlib.contextmanager
def started_daemon(words: list[str], where: str, log: Path) -> Iterator[None]:
    """Start it, once more where its containerd was not up in time; skip where it cannot start."""
    for _ in range(3):
        with log.open("wb") as stream:
            server = subprocess.Popen(words, stdout=stream, stderr=stream)
        try:
            if answers(server, where):
                yield
                return
        finally:
            server.terminate()
            try:
                server.wait(120)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
    pytest.skip(f"no second engine starts here: {log.read_text(errors='replace')[-500:]}")


def answers(server: subprocess.Popen[bytes], where: str) -> bool:
    until = time.monotonic() + 180
    while server.poll() is None and time.monotonic() < until:
        if subprocess.run(["docker", "-H", where, "info"], capture_output=True).returncode == 0:
            return True
        time.sleep(0.2)
    return False


@pytest.fixture(params=["docker", "containerd"])
def tools(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    monkeypatch.setenv("WEIGHTSMITH_STORE", str(tmp_path / "store"))
    if request.param == "containerd":
        monkeypatch.setenv("DOCKER_HOST", request.getfixturevalue("containerd"))
    return replace(memory_tools(tmp_path), engine=Counting(DockerEngine()))


@pytest.fixture
def name(tools: Tools) -> Iterator[str]:
    made = f"weightsmith-test/{uuid.uuid4().hex[:12]}"
    yield made
    for tag in ("1", "2"):
        tools.engine.untag(f"{made}:{tag}")


def image(content: bytes, label: str = "", base: Image | None = None) -> Image:
    layer = TarLayer(members=(Member.of_bytes("/models/weights", content),), epoch=0)
    return assemble((layer,), config=ImageConfig(labels={"x": label}), base=base, epoch=0)


def load(made: Image, reference: str, tools: Tools) -> None:
    deliver(made, reference, LOAD, [Evidence()], tools)


def test_an_image_is_sent_once(tools: Tools, name: str) -> None:
    weights = os.urandom(1 << 20)
    first, final = image(weights), image(weights, "scored")
    with candidate(first, None, tools):
        load(final, f"{name}:1", tools)
    assert is_held(final, f"{name}:1", LOAD, tools)
    assert not is_held(first, f"{name}:1", LOAD, tools)
    load(final, f"{name}:1", tools)
    assert [size > 1 << 20 for size in tools.engine.sent] == [True, False]
    with Registry() as registry:
        found = inspect_image(f"{name}:1", registry, tools.engine)
    assert {found["digest"], found["config_digest"]} in (
        {final.digest, ""}, {"", final.config_blob.digest},
    )  # fmt: skip
    assert found["digest"] in (final.digest, "")
    assert "models/weights" in _files(f"{name}:1")


def test_what_is_held_in_another_form_is_taken(tools: Tools, name: str) -> None:
    """A layer that is held compressed, as of a pulled image, and comes as it is."""
    tar = tar_of(entry("app", b"5", 0o755), (entry("app/x"), b"1" * 5000))
    load(foreign_image(tar), f"{name}:1", tools)
    load(image(b"w", base=foreign_image(tar, packed=False)), f"{name}:2", tools)
    assert {"app/x", "models/weights"} <= set(_files(f"{name}:2"))


def _files(reference: str) -> list[str]:
    """Return what a container of an image has; it is not started."""
    made = subprocess.run(
        ["docker", "create", reference, "x"], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        out = subprocess.run(["docker", "export", made], check=True, capture_output=True).stdout
        told = subprocess.run(["tar", "-t"], input=out, check=True, capture_output=True)
        return told.stdout.decode().splitlines()
    finally:
        subprocess.run(["docker", "rm", made], check=True, capture_output=True)


def test_layers_that_are_gone_by_then_are_sent_after_all(tools: Tools, name: str) -> None:
    """Another build took the image away that the engine said it held."""
    weights = os.urandom(5000)
    first, second = image(weights), image(weights, "second")
    chain = tuple(layer.diff_id for layer in first.layers)
    tools.engine.chains_of = lambda *_: (chain,)  # type: ignore[attr-defined]
    load(second, f"{name}:1", tools)
    assert len(tools.engine.sent) == 2
    assert "models/weights" in _files(f"{name}:1")
    assert tools.engine.inspect(f"{name}:1")["Config"]["Labels"] == {"x": "second"}


@pytest.fixture
def all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightsmith.oci.layout._LARGE", 1)


def layered(contents: Sequence[bytes], label: str = "") -> Image:
    layers = [
        TarLayer(members=(Member.of_bytes(f"/models/{n}", content),), epoch=0)
        for n, content in enumerate(contents)
    ]
    return assemble(layers, config=ImageConfig(labels={"x": label}), epoch=0)


@pytest.mark.usefixtures("all_are_large")
def test_layers_come_one_after_the_other(tools: Tools, name: str) -> None:
    contents = [os.urandom(100_000) for _ in range(4)]
    made = layered(contents)
    load(made, f"{name}:1", tools)
    assert tools.engine.archives == [4]
    assert 400_000 < tools.engine.sent[0] < 450_000
    assert tools.engine.inspect(f"{name}:1")["Id"] in (made.config_blob.digest, made.digest)
    assert {f"models/{n}" for n in range(4)} <= set(_files(f"{name}:1"))
    assert not [tag for tag in passing_tags() if tag.endswith(owner_token())]


def four_layers(seed: str) -> list[bytes]:
    return [random.Random(f"{seed}{n}").randbytes(100_000) for n in range(4)]


def load_and_die(name: str) -> None:
    """What a process does that is killed while it sends the last of four layers."""
    layout._LARGE = 1  # type: ignore[misc]

    class Killing(Counting):
        def load(self, archives: Iterable[Iterator[bytes]], reference: str) -> str:
            def watched(each: Iterator[bytes]) -> Iterator[bytes]:
                for chunk in each:
                    yield chunk
                    if self.sent[-1] > 350_000:
                        os.kill(os.getpid(), signal.SIGKILL)

            return super().load(map(watched, archives), reference)

    tools = replace(memory_tools(Path()), engine=Killing(DockerEngine()))
    load(layered(four_layers(name)), f"{name}:1", tools)


@pytest.mark.usefixtures("all_are_large")
def test_a_killed_load_goes_on_where_it_was(tools: Tools, name: str) -> None:
    act = f"from tests.contracts.test_loading import load_and_die; load_and_die({name!r})"
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'toolchain'}:{ROOT}"}  # wherever we are started
    killed = subprocess.run([sys.executable, "-c", act], env=env, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert tools.engine.inspect(f"{name}:1") == {}

    load(layered(four_layers(name)), f"{name}:1", tools)
    assert tools.engine.sent[-1] < 350_000
    assert {f"models/{n}" for n in range(4)} <= set(_files(f"{name}:1"))
    # Other tests are at work beside this one.
    assert not [tag for tag in passing_tags() if is_dead(tag.partition("-")[2])]


def passing_tags() -> list[str]:
    words = ["docker", "images", "--format", "{{.Tag}}", "weightsmith-candidate"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()


@pytest.mark.usefixtures("all_are_large")
def test_an_engine_that_wants_archives_whole_gets_one(tools: Tools, name: str) -> None:
    tools.engine.describe = dict  # type: ignore[attr-defined]
    load(layered(four_layers(name)), f"{name}:1", tools)
    assert tools.engine.archives == [1]
    assert {f"models/{n}" for n in range(4)} <= set(_files(f"{name}:1"))


def test_two_builds_of_one_image_have_a_candidate_each(
    tools: Tools, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one publishes, and then forgets, is not what the other is about to start."""
    made = image(os.urandom(5000))
    with candidate(made, None, tools) as mine:
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(tools.engine.engine, "owner", "0123456789ab-1-2")  # type: ignore[attr-defined]
            with candidate(made, None, tools) as theirs:
                load(made, f"{name}:1", tools)
            assert theirs != mine
            assert tools.engine.inspect(theirs) == {}
        assert tools.engine.inspect(mine)
    discard_candidate(made, None, tools)
    assert tools.engine.inspect(mine) == {}
