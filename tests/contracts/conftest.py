"""The registries that the same tests run against: ours in this process, and what others wrote."""

import gc
import uuid
import warnings
from collections.abc import Iterator

import pytest
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry

from tests.fakes.real_registries import (
    KINDS,
    Given,
    given_registries,
    other_registry,
    real_registry,
)
from tests.fakes.registry import fake_registry

REGISTRIES = [
    "fake",
    pytest.param("docker-registry", marks=pytest.mark.registry),
    *(pytest.param(kind, marks=pytest.mark.other_registries) for kind in KINDS),
    *(pytest.param(given, id=given.place) for given in given_registries()),
]


@pytest.fixture(scope="module", params=REGISTRIES)
def there(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Given]:
    """A registry that runs: in this process, started for the tests, or named by the environment."""
    match request.param:
        case Given(place, pair):
            yield Given(f"{place}/{uuid.uuid4().hex[:8]}", pair)
        case "fake":
            with fake_registry() as state:
                yield Given(state.host)
        case "docker-registry":
            with real_registry(tmp_path_factory.mktemp("registry")) as address:
                yield Given(address)
        case kind:
            with other_registry(kind) as address:
                yield Given(address, kind=kind)


@pytest.fixture
def client(there: Given) -> Iterator[Registry]:
    with Registry(pause=lambda _: None, credentials=lambda _: there.pair) as registry:
        yield registry


@pytest.fixture
def place(there: Given, request: pytest.FixtureRequest) -> Reference:
    """A repository of this test's own."""
    name = request.node.originalname.replace("_", "-")
    return Reference.parse(f"{there.place}/{name}/app:1")


@pytest.fixture
def forgiven(request: pytest.FixtureRequest) -> Iterator[None]:
    """The client library leaves its socket open where no engine answers; no leak of ours."""
    yield
    if request.node.get_closest_marker("docker") is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
