"""A cache that is slow, or whose uploads do not end; two who upload the same; how much is read."""

import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from weightsmith.cache import uploads as module
from weightsmith.cache.cache import SharedCache
from weightsmith.cache.document import layers_of, read_document
from weightsmith.cache.store import SharedStore
from weightsmith.cache.uploads import Uploads
from weightsmith.core.errors import CacheLost, EnvironmentFailure
from weightsmith.core.time_limits import within
from weightsmith.core.values import Stream, key_of
from weightsmith.outside.folder_cache import FolderCache

from tests.fakes.cache import MemoryCache
from tests.fakes.store import MemoryStore

NOTE, OTHER_NOTE = ({"stage": "merge", "inputs": {"of": name}} for name in ("one", "other"))
KEY, OTHER = key_of(NOTE), key_of(OTHER_NOTE)


class Stuck(MemoryCache):
    """Answers when it is let go."""

    def __init__(self):
        super().__init__()
        self.go = threading.Event()

    def find(self, key):
        self.go.wait(60)
        return super().find(key)


@pytest.fixture
def stuck():
    cache = Stuck()
    yield cache
    cache.go.set()


def made(folder, size=3000):
    store = MemoryStore(folder)
    return store, store.produce(KEY, NOTE, weights(size))


def uploads_to(cache, store, warn=print):
    return Uploads(SharedCache(cache, None, warn, 60), store.memo)


def weights(size):
    def make(partial):
        (partial / "model.safetensors").write_bytes(bytes(size))
        return {}

    return make


def test_a_slow_cache_is_asked_once(stuck, tmp_path):
    warnings: list[str] = []
    remote = SharedCache(stuck, None, warnings.append, seconds=0.05)
    store = SharedStore(MemoryStore(tmp_path / "store"), [remote], lambda: tmp_path)
    began = time.monotonic()
    assert [store.find(KEY), store.find(OTHER)] == [None, None]

    assert time.monotonic() - began < 30
    (warning,) = warnings
    assert "no answer within 0.05 s" in warning


def test_the_end_waits_for_uploads_only_so_long(stuck, tmp_path):
    store, entry = made(tmp_path / "store")
    uploads = uploads_to(stuck, store)
    uploads.add(KEY, NOTE, entry)
    began = time.monotonic()

    assert uploads.close(0.05) == 1
    assert time.monotonic() - began < 30


GIVEN_UP = """
import sys
from pathlib import Path
from weightsmith.outside.store import FileStore
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.oci.registry_cache import RegistryCache
from weightsmith.cache.cache import SharedCache
from weightsmith.cache.uploads import Uploads
from weightsmith.core.values import key_of

def make(folder):
    (folder / "model.safetensors").write_bytes(bytes(32 << 20))
    return {}

note = {"stage": "merge", "inputs": {}}
store = FileStore(Path(sys.argv[2]))
entry = store.produce(key_of(note), note, make)
with Registry() as registry:
    cache = RegistryCache(registry, Reference.parse(sys.argv[1] + "/team/cache"))
    uploads = Uploads(SharedCache(cache, None, print, 60), store.memo)
    uploads.add(key_of(note), note, entry)
    sys.stdin.readline()
    print(uploads.close(0.05))
"""


@pytest.mark.slow
def test_a_process_ends_though_a_registry_takes_nothing_more(tmp_path):
    taking = threading.Event()

    class Registry(BaseHTTPRequestHandler):
        def reply(self, code, **headers):
            self.send_response(code)
            for name, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(name, value)
            self.end_headers()

        def do_GET(self):
            self.reply(200 if self.path == "/v2/" else 404)

        def do_HEAD(self):
            self.reply(404)

        def do_POST(self):
            self.reply(202, Location="/v2/team/cache/blobs/uploads/1")

        def do_PATCH(self):
            taking.set()
            ended.wait(600)

        def do_PUT(self):
            self.do_PATCH()

        def log_message(self, *_):
            pass

    ended = threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        words = [sys.executable, "-c", GIVEN_UP, f"127.0.0.1:{server.server_port}", str(tmp_path)]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert taking.wait(60)
            said, _ = process.communicate(b"\n", timeout=240)
        ended.set()
        server.shutdown()
    assert said == b"1\n"


def test_uploads_are_tried_again(tmp_path, monkeypatch):
    class Hiccup(MemoryCache):
        def write(self, *args, **choices):
            if not self.asked[1:]:
                self.asked.append(KEY)
                raise ConnectionResetError("reset")
            return super().write(*args, **choices)

    monkeypatch.setattr(module, "_PAUSE_SECONDS", 0.0)
    store, entry = made(tmp_path / "store")
    warnings: list[str] = []
    cache = Hiccup()
    uploads = uploads_to(cache, store, warnings.append)
    uploads.add(KEY, NOTE, entry)

    assert uploads.close(60) == 0
    assert cache.documents.keys() == {KEY}
    assert not warnings


def test_a_cache_that_cannot_be_written_is_still_read(tmp_path):
    store, entry = made(tmp_path / "store")
    cache, warnings = MemoryCache(), list[str]()
    uploads_to(cache, store).upload(KEY, NOTE, entry)

    cache.faults["write"] = PermissionError(13, "Permission denied")
    remote = SharedCache(cache, None, warnings.append, 60)
    uploads = Uploads(remote, store.memo)
    uploads.add(OTHER, OTHER_NOTE, entry)
    assert uploads.close(60) == 0

    mine = SharedStore(MemoryStore(tmp_path / "mine"), [remote], lambda: tmp_path)
    found = mine.find(KEY)
    assert found is not None
    assert found.tree.path("model.safetensors").read_bytes() == bytes(3000)
    (warning,) = warnings
    assert "cannot be written" in warning
    assert "Permission denied" in warning


def other_byte(blob):
    data = bytearray(blob.read_bytes())
    data[1000] ^= 1
    blob.write_bytes(data)


@pytest.mark.parametrize("damage", [Path.unlink, other_byte])
def test_a_result_with_a_damaged_blob_is_made_and_uploaded_again(tmp_path, damage):
    store, entry = made(tmp_path / "store")
    cache = MemoryCache()
    uploads_to(cache, store).upload(KEY, NOTE, entry)
    whole = dict(cache.blobs)
    remote = SharedCache(FolderCache(tmp_path / "shared"), None, print, 60)
    Uploads(remote, store.memo).upload(KEY, NOTE, entry)
    (blob,) = (path for path in (tmp_path / "shared" / "blobs").rglob("*") if path.is_file())
    damage(blob)

    mine = MemoryStore(tmp_path / "mine")
    uploads = Uploads(remote, mine.memo)
    shared = SharedStore(mine, [remote], lambda: tmp_path / "scratch", uploads)
    found = shared.find(KEY)
    assert found is not None
    with pytest.raises(CacheLost):
        found.tree.path("model.safetensors")
    shared.produce(KEY, NOTE, weights(3000))
    assert uploads.close(60) == 0
    assert blob.read_bytes() in whole.values()


@pytest.mark.parametrize("fault", ["only read", "on the way", "not allowed"])
def test_a_blob_is_left_where_it_may_be_right_or_is_not_ours(tmp_path, fault):
    """Of a cache that is only read, by a faulty connection, or without the right to delete."""

    class Faulty(MemoryCache):
        def read(self, blob):
            chunks = b"".join(super().read(blob))
            wrong = fault != "on the way" or not self.read_bytes > blob.size
            yield bytes(len(chunks)) if wrong else chunks

    store, entry = made(tmp_path / "store")
    cache, mine = Faulty(), MemoryStore(tmp_path / "mine")
    uploads_to(cache, store).upload(KEY, NOTE, entry)
    whole = dict(cache.blobs)
    warnings: list[str] = []
    remote = SharedCache(cache, None, warnings.append, 60)
    other = SharedCache(MemoryCache(), None, print, 60)
    uploads = Uploads(other if fault == "only read" else remote, mine.memo)
    if fault == "not allowed":
        cache.faults["write"] = PermissionError(13, "Permission denied")
    shared = SharedStore(mine, [remote], lambda: tmp_path / "scratch", uploads)

    found = shared.find(KEY)
    assert found is not None
    with pytest.raises(CacheLost):
        found.tree.path("model.safetensors")

    assert cache.blobs == whole
    assert len(warnings) == 1
    assert shared.find(KEY) is None


def test_two_upload_the_same_at_once(tmp_path):
    """Without locks, in one folder: what is there in the end is whole."""
    stores = [made(tmp_path / f"store{number}", 3 << 20) for number in range(2)]
    folder = tmp_path / "shared"
    caches = [SharedCache(FolderCache(folder), None, print, 60) for _ in stores]
    both = [Uploads(remote, store.memo) for remote, (store, _) in zip(caches, stores, strict=True)]
    for uploads, (_, entry) in zip(both, stores, strict=True):
        uploads.add(KEY, NOTE, entry)
    assert [uploads.close(60) for uploads in both] == [0, 0]

    mine = SharedStore(MemoryStore(tmp_path / "mine"), caches[:1], lambda: tmp_path)
    found = mine.find(KEY)
    assert found is not None
    assert found.tree.path("model.safetensors").read_bytes() == bytes(3 << 20)


def test_a_call_that_fails_says_why():
    def fails():
        raise PermissionError(13, "no")

    with pytest.raises(PermissionError):
        within(60, fails, "")
    with pytest.raises(EnvironmentFailure):
        within(0.01, lambda: time.sleep(1), "")


ENGINE_NOTE = {"stage": "base", "inputs": {"engine": "vllm"}}
ENGINE_KEY = key_of(ENGINE_NOTE)
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
    entry = store.produce(ENGINE_KEY, ENGINE_NOTE, engine)
    Uploads(SharedCache(cache, None, print, 60), store.memo).upload(ENGINE_KEY, ENGINE_NOTE, entry)
    return cache


@pytest.fixture
def tree(tmp_path, cache):
    """The engine as another machine sees it."""
    store = MemoryStore(tmp_path / "mine")
    shared = SharedStore(store, [SharedCache(cache, None, print, 60)], lambda: tmp_path)
    found = shared.find(ENGINE_KEY)
    assert found is not None
    return found.tree


def content(tree, name):
    source = tree.source(name)
    assert isinstance(source, Stream)
    return b"".join(source.open())


def test_a_layer_is_read_once_to_be_written_somewhere(cache, tree):
    (blob,) = cache.blobs.values()
    (layer,) = layers_of(read_document(cache.documents[ENGINE_KEY], ENGINE_KEY, None), tree)

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
