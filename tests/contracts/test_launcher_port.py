"""One suite for every launcher: the fake and a container engine's."""

import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from weightsmith.core.cpus import flags
from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.ports import Launcher, StartSpec
from weightsmith.evaluating.client import wait_until_healthy
from weightsmith.oci.image import ImageConfig, assemble
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.layout import docker_archive
from weightsmith.oci.references import Reference
from weightsmith.outside.docker import DockerEngine
from weightsmith.outside.docker_containers import DockerLauncher
from weightsmith.outside.docker_images import base_reference

from tests.fakes.engine import MemoryEngine
from tests.fakes.launcher import MemoryLauncher
from tests.fakes.started import until

pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.usefixtures("forgiven"),
]
PATIENCE = 120.0
SPEC = StartSpec(port=8080, env={}, memory_bytes=256 << 20)
SERVER = """
FROM {base}
RUN mkdir /served && echo ok > /served/health
USER 1234:1234
WORKDIR /served
ENTRYPOINT ["python3", "-m", "http.server", "8080"]
"""
ENDS = """
FROM {base}
USER 1234:1234
ENTRYPOINT ["python3", "-c", "raise SystemExit('no such file in the image')"]
"""


@dataclass
class LauncherCase:
    """A launcher, and two images that it can start: one serves, the other ends at once."""

    launcher: Launcher
    serves: str = "weightsmith-test/serves:1"
    ends: str = "weightsmith-test/ends:1"
    close: list[Callable[[], object]] = field(default_factory=list)


def in_memory() -> LauncherCase:
    """Images of our own making; one lacks its model."""
    engine = MemoryEngine()
    case = LauncherCase(MemoryLauncher(engine))
    env = {"LLAMA_ARG_MODEL": "/models/tiny.gguf", "LLAMA_ARG_ALIAS": "tiny"}
    labels = {"dev.weightsmith.plan": json.dumps({"max_model_len": 8})}
    config = ImageConfig(entrypoint=("/app/llama-server",), env=env, labels=labels)
    program, model = "/app/llama-server", "/models/tiny.gguf"
    for name, paths in ((case.serves, (program, model)), (case.ends, (program,))):
        members = tuple(Member.of_bytes(path, b"x") for path in paths)
        made = assemble((), (TarLayer(members=members, epoch=0),), config=config, epoch=0)
        engine.load([docker_archive(made, Reference.parse(name))], name)
    return case


def in_docker() -> LauncherCase:
    engine = DockerEngine()
    case = LauncherCase(DockerLauncher(engine))
    images = engine.client.images
    for name, text in (("serves", SERVER), ("ends", ENDS)):
        tag = f"weightsmith-test-{name}:{os.getpid()}"
        recipe = text.format(base=base_reference("cpu")).encode()
        images.build(fileobj=io.BytesIO(recipe), rm=True, tag=tag)
        setattr(case, name, tag)
        case.close.append(lambda tag=tag: images.remove(tag, force=True))
    return case


@pytest.fixture(scope="module", params=["memory", pytest.param("docker", marks=pytest.mark.docker)])
def case(request: pytest.FixtureRequest) -> Iterator[LauncherCase]:
    found = in_memory() if request.param == "memory" else in_docker()
    yield found
    for close in found.close:
        close()


def test_an_image_serves_as_long_as_its_context_lasts(case: LauncherCase) -> None:
    with case.launcher.serve(case.serves, SPEC) as endpoint:
        assert wait_until_healthy(endpoint, "/health", PATIENCE) >= 0
        assert endpoint.alive()
        assert endpoint.url.startswith("http://")
        assert endpoint.confinement
    assert not endpoint.alive()


def test_two_servers_of_one_image_are_apart(case: LauncherCase) -> None:
    serve = case.launcher.serve
    with serve(case.serves, SPEC) as one, serve(case.serves, SPEC) as other:
        assert one.url != other.url


def test_a_server_is_stopped_where_its_user_fails(case: LauncherCase) -> None:
    with pytest.raises(KeyboardInterrupt), case.launcher.serve(case.serves, SPEC) as endpoint:
        raise KeyboardInterrupt
    assert not endpoint.alive()


def test_a_server_that_ends_leaves_its_last_lines(case: LauncherCase) -> None:
    with case.launcher.serve(case.ends, SPEC) as endpoint:
        until(lambda: not endpoint.alive())
        assert "no such file in the image" in endpoint.logs(5)


def test_an_image_that_is_not_there_is_named(case: LauncherCase) -> None:
    with (
        pytest.raises(EnvironmentFailure, match="no-such-image") as caught,
        case.launcher.serve("no-such-image:1", SPEC),
    ):
        pytest.fail("it was started")
    assert "load or pull" in caught.value.hint


def test_the_cpu_is_known_only_where_images_are_started_on_this_machine(
    case: LauncherCase,
) -> None:
    assert case.launcher.cpu_flags() in (None, frozenset(), flags())
    here = case.launcher.devices("oci:anything")
    assert here is None or here.cpus > 0
