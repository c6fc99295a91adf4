"""How much of a cache's blobs is read: a layer of many files once, whoever reads them."""

import threading

import pytest
from weightsmith.cache.cache import SharedCache
from weightsmith.cache.document import layers_of, read_document
from weightsmith.cache.store import SharedStore
from weightsmith.cache.uploads import Uploads
from weightsmith.core.values import Stream, key_of

from tests.fakes.cache import MemoryCache
from tests.fakes.store import MemoryStore

NOTE = {"stage": "base", "inputs": {"engine": "vllm"}}
KEY = key_of(NOTE)
FILES = {f"lib/{name}": name.encode() * 700 for name in (f"part-{n:03}" for n in range(120))}


def engine(folder):
    for name, data in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return {}


@pytest.fixture
def cache(tmp_path):
    """A cache with an engine of 120 files in one layer."""
    cache, store = MemoryCache(), MemoryStore(tmp_path / "maker")
    entry = store.produce(KEY, NOTE, engine)
    Uploads(SharedCache(cache, None, print, 60), store.memo).upload(KEY, NOTE, entry)
    return cache


@pytest.fixture
def tree(tmp_path, cache):
    """The engine as another machine sees it."""
    store = MemoryStore(tmp_path / "mine")
    found = SharedStore(store, [SharedCache(cache, None, print, 60)], lambda: tmp_path).find(KEY)
    assert found is not None
    return found.tree


def content(tree, name):
    source = tree.source(name)
    assert isinstance(source, Stream)
    return b"".join(source.open())


def test_a_layer_is_read_once_to_be_written_somewhere(cache, tree):
    (blob,) = cache.blobs.values()
    (layer,) = layers_of(read_document(cache.documents[KEY], KEY, None), tree)

    assert b"".join(layer.open()) == blob
    assert cache.read_bytes <= len(blob)


def test_files_are_right_in_any_order_and_at_once(cache, tree):
    """Backwards, a file twice, one that is not read to its end, and from several threads."""
    names = [*FILES][::7][::-1] + [[*FILES][3]] * 2
    half = tree.source([*FILES][50])
    assert isinstance(half, Stream)
    next(half.open())
    assert [content(tree, name) for name in names] == [FILES[name] for name in names]

    wrong: list[str] = []

    def read(part):
        wrong.extend(n for n in [*FILES][part::3] if content(tree, n) != FILES[n])

    threads = [threading.Thread(target=read, args=(part,)) for part in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
