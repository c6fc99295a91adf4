"""One suite for every shared cache: the fake, and those that machines really share."""

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.core.ports import Cache
from weightsmith.core.values import Blob, Digest, key_of
from weightsmith.oci.layers import LAYER_TAR
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.oci.registry_cache import RegistryCache
from weightsmith.outside import folder_cache, s3_cache
from weightsmith.outside.folder_cache import FolderCache
from weightsmith.outside.s3_cache import S3Cache

from tests.fakes.cache import MemoryCache
from tests.fakes.real_registries import real_registry
from tests.fakes.s3_server import s3_server

KEY, OTHER = key_of("one"), key_of("other")
SMALL, LARGE = b"small", bytes(range(256)) * 20_000


def blob_of(data: bytes) -> Blob:
    return Blob(digest=Digest.of(data), size=len(data), media_type=LAYER_TAR)


def body(data: bytes) -> tuple[Blob, Callable[[], Iterator[bytes]]]:
    return blob_of(data), lambda: iter((data[:100], data[100:]))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with real_registry(tmp_path_factory.mktemp("registry")) as host:
        yield host


@pytest.fixture(scope="module")
def s3() -> Iterator[Mapping[str, str]]:
    with s3_server("cache") as variables:
        yield variables


@pytest.fixture(scope="module")
def client() -> Iterator[Registry]:
    with Registry(pause=lambda _: None) as registry:
        yield registry


@pytest.fixture(
    params=["memory", "folder", "s3", pytest.param("registry", marks=pytest.mark.registry)],
)
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    match request.param:
        case "memory":
            return MemoryCache()
        case "folder":
            return FolderCache(tmp_path / "cache")
        case "s3":
            for name, value in request.getfixturevalue("s3").items():
                monkeypatch.setenv(name, value)
            return S3Cache(f"cache/{tmp_path.name}")
        case _:
            name = f"{request.getfixturevalue('host')}/team/{tmp_path.name.replace('_', '-')}"
            return RegistryCache(request.getfixturevalue("client"), Reference.parse(name))


def test_what_is_written_is_found_read_and_listed(cache: Cache) -> None:
    assert cache.find(KEY) is None
    assert list(cache.entries()) == []
    assert cache.remove([KEY]) == 0

    sent = cache.write(KEY, b'{"document": 1}', [body(SMALL), body(LARGE)])

    assert sent >= len(SMALL) + len(LARGE)
    assert cache.find(KEY) == b'{"document": 1}'
    assert cache.find(OTHER) is None
    assert b"".join(cache.read(blob_of(LARGE))) == LARGE
    assert b"".join(cache.read(blob_of(SMALL))) == SMALL
    (entry,) = cache.entries()
    assert entry.key == KEY
    assert entry.size >= len(LARGE)
    assert entry.used > 1e9


def test_blobs_that_are_there_are_not_sent_again(cache: Cache) -> None:
    cache.write(KEY, b"{}", [body(LARGE)])

    assert cache.write(OTHER, b"{}", [body(LARGE), body(SMALL)]) < len(LARGE)
    assert {entry.key for entry in cache.entries()} == {KEY, OTHER}


@pytest.mark.parametrize("cache", ["memory", "folder", "s3"], indirect=True)
def test_a_damaged_blob_is_sent_again_once_it_was_discarded(cache: Cache) -> None:
    """Not in a registry, which never replaces a blob that it has."""
    other = bytes(reversed(LARGE))
    cache.write(KEY, b"{}", [(blob_of(LARGE), lambda: iter((other,)))])
    assert b"".join(cache.read(blob_of(LARGE))) == other

    assert cache.write(KEY, b"{}", [body(LARGE)]) < len(LARGE)
    assert b"".join(cache.read(blob_of(LARGE))) == other
    cache.discard(blob_of(LARGE))
    cache.discard(blob_of(LARGE))  # another one found it too
    assert cache.write(KEY, b"{}", [body(LARGE)]) > len(LARGE)
    assert b"".join(cache.read(blob_of(LARGE))) == LARGE


def test_two_writers_of_one_key_are_fine(cache: Cache) -> None:
    cache.write(KEY, b'{"by": 1}', [body(LARGE)])
    cache.write(KEY, b'{"by": 2}', [body(SMALL)])

    assert cache.find(KEY) == b'{"by": 2}'
    assert b"".join(cache.read(blob_of(SMALL))) == SMALL


def test_an_entry_whose_blob_cannot_be_read_is_not_written(cache: Cache) -> None:
    def breaks() -> Iterator[bytes]:
        yield b"sm"
        raise OSError("the disk broke")

    with pytest.raises(OSError, match="the disk broke"):
        cache.write(KEY, b"{}", [body(LARGE), (blob_of(SMALL), breaks)])
    assert cache.find(KEY) is None
    assert list(cache.entries()) == []


def test_what_is_removed_is_gone_and_the_rest_is_whole(cache: Cache) -> None:
    cache.write(KEY, b"{}", [body(LARGE), body(SMALL)])
    cache.write(OTHER, b"{}", [body(SMALL)])
    freed = cache.remove([KEY])

    assert freed >= len(LARGE)
    assert cache.find(KEY) is None
    assert cache.find(OTHER) == b"{}"
    assert b"".join(cache.read(blob_of(SMALL))) == SMALL


@pytest.mark.parametrize("cache", ["folder", "s3"], indirect=True)
def test_what_is_being_written_is_kept_by_a_machine_whose_clock_is_ahead(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The place's own clock says how old a blob is, since that also stamped it."""

    def breaks() -> Iterator[bytes]:
        yield b"sm"
        raise OSError("the disk broke")

    with pytest.raises(OSError, match="the disk broke"):
        cache.write(KEY, b"{}", [body(LARGE), (blob_of(SMALL), breaks)])
    ahead = SimpleNamespace(time=lambda: time.time() + 3 * 86400)
    for module in (folder_cache, s3_cache):
        monkeypatch.setattr(module, "time", ahead, raising=False)
    cache.remove([])

    assert b"".join(cache.read(blob_of(LARGE))) == LARGE
    assert list(cache.entries()) == []


@pytest.mark.slow
def test_an_endpoint_that_is_no_address_is_an_error_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "tests")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nowhere")
    cache = S3Cache("bucket/prefix")

    with pytest.raises(EnvironmentFailure, match="Invalid endpoint: nowhere"):
        cache.find(KEY)
    with pytest.raises(EnvironmentFailure, match="Invalid endpoint: nowhere"):
        list(cache.entries())


@pytest.mark.parametrize("cache", ["s3"], indirect=True)
def test_objects_of_another_size_are_not_read(cache: S3Cache) -> None:
    """A document, a list of blobs or a blob that somebody exchanged: that result alone is lost."""
    cache.write(KEY, b"{}", [body(SMALL)])
    cache.write(OTHER, b"{}", [body(LARGE)])
    place = cache.where.removeprefix("s3://")
    cache._files.pipe_file(f"{place}/entries/{KEY.hex}.json", bytes((16 << 20) + 1))
    cache._files.pipe_file(
        f"{place}/blobs/{blob_of(SMALL).digest.hex[:2]}/{blob_of(SMALL).digest.hex}", SMALL + b"x"
    )

    with pytest.raises(InputRefused, match="more than"):
        cache.find(KEY)
    with pytest.raises(InputRefused, match="bytes, not"):
        b"".join(cache.read(blob_of(SMALL)))
    cache._files.pipe_file(f"{place}/entries/{KEY.hex}.blobs", b"no list")
    assert [entry.key for entry in cache.entries()] == [OTHER]
    cache.remove([])
    assert (cache.find(KEY), cache.find(OTHER)) == (None, b"{}")
