"""A real container engine: taking archives, starting servers, and going away in mid-job."""

import io
import json
import os
import signal
import socket
import threading
from contextlib import suppress

import httpx
import pytest
from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.ports import Silent, StartSpec
from weightsmith.outside.docker import LABEL_OWNER, ArchiveUpload, DockerEngine, engine_host
from weightsmith.outside.docker_containers import DockerLauncher, DockerRunner
from weightsmith.outside.docker_images import base_reference
from weightsmith.outside.ownership import is_dead, owner_token

from tests.contracts.test_runner import CACHE
from tests.fakes.bare_builder import echo_job
from tests.fakes.echo import let_runners_start_it
from tests.fakes.journal import RecordingProgress
from tests.fakes.started import hear_interrupts, until
from tests.faults.relay import way_to_engine

PATIENCE = 120
"""Seconds in which what is sure to come must have come, however busy the machine is."""
pytestmark = [
    pytest.mark.docker,
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.usefixtures("forgiven"),
]


@pytest.fixture(scope="module")
def engine():
    return DockerEngine()


@pytest.fixture(scope="module")
def server_image(engine):
    """A small web server as a plain user on the builders' base."""
    recipe = f"""
        FROM {base_reference("cpu")}
        USER 1234:1234
        WORKDIR /etc
        ENTRYPOINT ["python3", "-m", "http.server", "8000"]
    """
    tag = f"weightsmith-test-server:{os.getpid()}"
    engine.client.images.build(fileobj=io.BytesIO(recipe.encode()), rm=True, tag=tag)
    yield tag
    engine.client.images.remove(tag, force=True)


def test_an_image_that_another_build_removes_is_passed_over(engine, server_image, monkeypatch):
    """Between the list and the look at it."""
    image = engine.client.images.get(server_image)
    api, listed = engine.client.api, engine.client.api.images
    gone = {"Id": f"sha256:{os.urandom(32).hex()}"}
    monkeypatch.setattr(api, "images", lambda **wanted: [gone, *listed(**wanted)])
    if engine.describe()["storage"] == "overlay2":
        assert engine.chains_of(server_image) == (tuple(image.attrs["RootFS"]["Layers"]),)


@pytest.mark.parametrize("sent", ["half", "all"])
def test_an_interrupted_load_is_over_when_it_ends(engine, server_image, monkeypatch, sent):
    """What the engine has whole it names, however late: then it is there to be removed."""
    monkeypatch.setattr("weightsmith.outside.docker.LAST_SECONDS", PATIENCE)
    hear_interrupts()
    name = f"weightsmith-test-interrupted:{os.getpid()}"
    engine.client.images.get(server_image).tag(*name.split(":"))
    archive = list(engine.client.images.get(name).save(named=name))
    engine.untag(name)
    told, give_up = threading.Event(), ArchiveUpload.give_up

    def tell(taking):
        taking.given_up.set()
        told.set()
        give_up(taking)

    monkeypatch.setattr(ArchiveUpload, "give_up", tell)

    def chunks():
        for number, chunk in enumerate(archive):
            if sent == "half" and number == len(archive) // 2:
                os.kill(os.getpid(), signal.SIGINT)  # wakes the main thread
                assert told.wait(PATIENCE)
            yield chunk
        if sent == "all":
            os.kill(os.getpid(), signal.SIGINT)  # wakes the main thread

    with pytest.raises(KeyboardInterrupt):
        engine.load([chunks()], name)

    assert bool(engine.inspect(name)) == (sent == "all")
    engine.untag(name)
    assert engine.inspect(name) == {}


def fetch(url: str) -> str:
    found = []

    def fetched() -> bool:
        with suppress(httpx.HTTPError):  # refused, reset, too slow
            found.append(httpx.get(url, timeout=60).text)
        return bool(found)

    until(fetched, PATIENCE)
    return found[0]


def test_a_server_cannot_reach_the_world_and_writes_nowhere(engine, server_image):
    """Asked from inside: no way out, a read-only root, process 1 without an init, its limit."""
    look = """
import http.server, json, os, pathlib, socket
def reach(place=("192.0.2.1", 80)):
    try:
        socket.create_connection(place, 2)
    except OSError as error:
        return error.strerror or str(error)
    return "reached"
def machine():  # its address on the network's bridge
    own = socket.gethostbyname(socket.gethostname())
    return reach((own.rpartition(".")[0] + ".1", int(os.environ["NEIGHBOUR"])))
def write():
    try:
        pathlib.Path("/etc/x").touch()
    except OSError as error:
        return error.strerror
    return "written"
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        routes = pathlib.Path("/proc/net/route").read_text().splitlines()[1:]
        out = any(route.split()[1] == "00000000" for route in routes)
        self.wfile.write(json.dumps({"reach": reach(), "machine": machine(),
            "write": write(), "pid": os.getpid(), "uid": os.getuid(), "default": out}).encode())
http.server.HTTPServer(("0.0.0.0", 8000), Handler).serve_forever()
"""
    image = engine.client.images.get(server_image)
    recipe = f"""
        FROM {image.id}
        ENTRYPOINT ["python3", "-c", {json.dumps(look)}]
    """
    tag = f"weightsmith-test-look:{os.getpid()}"
    engine.client.images.build(fileobj=io.BytesIO(recipe.encode()), rm=True, tag=tag)
    try:
        with socket.create_server(("0.0.0.0", 0)) as neighbour:
            env = {"NEIGHBOUR": str(neighbour.getsockname()[1])}
            spec = StartSpec(port=8000, env=env, memory_bytes=256 << 20)
            with DockerLauncher(engine).serve(tag, spec) as endpoint:
                seen = json.loads(fetch(endpoint.url))
                confinement = endpoint.confinement
    finally:
        engine.client.images.remove(tag, force=True)

    assert (seen["write"], seen["pid"], seen["uid"]) == ("Read-only file system", 1, 1234)
    assert "no network" not in confinement or seen["machine"] != "reached"
    if "no internet" in confinement:
        assert not seen["default"]
        assert seen["reach"] != "reached"
    assert "256 MiB of memory" in confinement
    assert not [n for n in engine.client.networks.list() if n.name.startswith("weightsmith-")
                and is_dead(n.attrs["Labels"][LABEL_OWNER])]  # fmt: skip


def test_a_server_is_stopped_and_started_again(engine, server_image):
    spec = StartSpec(port=8000, env={})

    with DockerLauncher(engine).serve(server_image, spec) as endpoint:
        fetch(f"{endpoint.url}/os-release")
        # Python's web server, process 1, has no handler for SIGTERM: the kernel then ignores it.
        assert endpoint.stop(0.5) is None
        assert endpoint.alive()
    assert not endpoint.alive()


def test_containers_of_dead_owners_are_reaped_and_others_left_alone(engine, server_image):
    realm, pid, started = owner_token().split("-")
    owners = {"dead": f"{realm}-{pid}-{int(started) + 1}", "alive": owner_token()}
    made = {
        name: engine.client.containers.create(server_image, labels={LABEL_OWNER: owner})
        for name, owner in owners.items()
    }
    try:
        engine.reap()

        left = {c.id for c in engine.client.containers.list(all=True, ignore_removed=True)}
        assert made["dead"].id not in left
        assert made["alive"].id in left
    finally:
        made["alive"].remove(force=True)


@pytest.mark.builders
def test_an_engine_that_goes_away_in_mid_job_is_an_environment_failure(
    tmp_path, monkeypatch, engine
):
    if not engine_host().startswith("unix://"):
        pytest.skip("the engine is not on a local socket")
    DockerRunner(engine, CACHE).prepare("merge", RecordingProgress())
    let_runners_start_it()
    socket = engine_host().removeprefix("unix://")
    with way_to_engine(tmp_path, socket) as (address, relay):
        monkeypatch.setenv("DOCKER_HOST", address)

        class Cutting(Silent):
            def note(self, text):
                relay.cut()

        with pytest.raises(
            EnvironmentFailure, match="lost the connection to the container engine"
        ) as caught:
            DockerRunner(DockerEngine(), CACHE).run(echo_job(tmp_path, sleep=600), Cutting())
    assert "finished stages are kept" in caught.value.hint
    assert (tmp_path / "out").stat().st_uid == os.getuid()
