"""One suite for every container engine: the fake and Docker."""

import os
import uuid
from collections.abc import Iterator

import pytest
from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.core.ports import ContainerEngine
from weightsmith.oci.image import Image, ImageConfig, assemble
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.layout import docker_archive
from weightsmith.oci.references import Reference
from weightsmith.outside.docker import DockerEngine

from tests.fakes.engine import MemoryEngine

pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.usefixtures("forgiven"),
]


@pytest.fixture(params=["memory", pytest.param("docker", marks=pytest.mark.docker)])
def engine(request: pytest.FixtureRequest) -> ContainerEngine:
    return MemoryEngine() if request.param == "memory" else DockerEngine()


@pytest.fixture
def name(engine: ContainerEngine) -> Iterator[str]:
    """A name for one test, without the registry that Docker adds to it."""
    made = f"weightsmith-test/{uuid.uuid4().hex[:12]}:1"
    yield made
    engine.untag(made)
    engine.untag(f"{made}0")


def image(*contents: bytes, label: str = "") -> Image:
    layers = [
        TarLayer(members=(Member.of_bytes(f"/file-{number}", content),), epoch=0)
        for number, content in enumerate(contents)
    ]
    config = ImageConfig(labels={"said": label}, cmd=("/file-0",))
    return assemble(layers, config=config, epoch=0)


def archive(made: Image, name: str, *held: str) -> Iterator[bytes]:
    return docker_archive(made, Reference.parse(name), held)


def test_an_image_is_loaded_named_and_forgotten(engine: ContainerEngine, name: str) -> None:
    made = image(os.urandom(1000), label="here")
    loaded = engine.load([archive(made, name)], name)

    assert loaded in {made.config_blob.digest, made.digest}
    assert engine.inspect(name)["Id"] == loaded
    assert engine.inspect(f"docker.io/{name}")["Id"] == loaded
    assert engine.inspect(name)["Config"]["Labels"] == {"said": "here"}

    engine.untag(name)
    engine.untag(name)
    assert engine.inspect(name) == {}


def test_an_image_with_two_names_outlives_one(engine: ContainerEngine, name: str) -> None:
    made = image(os.urandom(1000))
    for each in (name, f"{name}0"):
        engine.load([archive(made, each)], each)
    engine.untag(name)

    assert engine.inspect(name) == {}
    assert engine.inspect(f"{name}0")["Id"]


def test_a_name_is_given_to_what_was_loaded_last(engine: ContainerEngine, name: str) -> None:
    first, second = (image(os.urandom(1000)) for _ in range(2))
    engine.load([archive(first, name)], name)

    assert engine.load([archive(second, name)], name) == engine.inspect(name)["Id"]


def test_an_archive_may_leave_out_what_an_engine_of_layers_holds(
    engine: ContainerEngine, name: str
) -> None:
    if not engine.describe().get("layerwise"):
        pytest.skip("this engine takes whole archives alone")
    below = os.urandom(1000)
    first, second = image(below), image(below, os.urandom(1000))
    engine.load([archive(first, name)], name)
    (chain,) = engine.chains_of(name.removesuffix(":1"))
    assert chain == tuple(layer.diff_id for layer in first.layers)

    engine.load([archive(second, f"{name}0", *chain)], f"{name}0")

    assert tuple(layer.diff_id for layer in second.layers) in engine.chains_of(
        name.removesuffix(":1")
    )


def test_an_archive_that_is_none_is_refused(engine: ContainerEngine) -> None:
    with pytest.raises(EnvironmentFailure, match="nonsense") as caught:
        engine.load([iter([b"no tar"] * 200)], "nonsense:1")
    assert caught.value.hint


def test_a_broken_off_archive_has_no_name(engine: ContainerEngine, name: str) -> None:
    def broken() -> Iterator[bytes]:
        yield next(archive(image(os.urandom(1000)), name))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.load([broken()], name)

    assert engine.inspect(name) == {}


def test_an_engine_says_what_it_is(engine: ContainerEngine) -> None:
    assert engine.answers()
    assert {"version", "storage", "gpu"} <= engine.describe().keys()
    assert engine.owner


def test_an_engine_that_is_not_there_says_so(
    engine: ContainerEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    if isinstance(engine, MemoryEngine):
        engine.answering = False
    else:
        monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
        engine = DockerEngine()

    assert not engine.answers()
    assert engine.describe() == {}
    with pytest.raises(EnvironmentFailure, match="no container engine answers") as caught:
        engine.inspect("x")
    assert "--runner local" in caught.value.hint


def test_a_file_is_read_out_of_an_image_without_starting_it(
    engine: ContainerEngine, name: str
) -> None:
    engine.load([archive(image(b"first", b"second"), name)], name)

    assert engine.read_file(name, "/file-1", 100) == b"second"
    assert engine.read_file(name, "/etc/none", 100) == b""


def test_a_file_that_is_too_large_is_not_read(engine: ContainerEngine, name: str) -> None:
    engine.load([archive(image(b"x" * 300_000), name)], name)

    with pytest.raises(InputRefused, match="more than 1000 bytes"):
        engine.read_file(name, "/file-0", 1000)
