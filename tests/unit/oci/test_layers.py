"""Layers: the same bytes everywhere, and nothing read before it has to be."""

import io
import os
import shutil
import subprocess
import tarfile
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.values import Digest, FileEntry, Tree
from weightsmith.oci import tar
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.weights import fastest_layer, weight_layers

from tests.fakes.images import FILES, tree_of


def _bytes(layer: TarLayer) -> bytes:
    return b"".join(layer.open())


def test_golden_digest_of_a_tiny_layer():
    layer = TarLayer(
        members=(Member.of_bytes("/a/b.txt", b"hello\n"), Member.of_bytes("a/run", b"x", 0o700)),
        epoch=0,
    )
    assert layer.digest == "sha256:aa2827f2910396eb898fa02b4c9ad66fd35967abfa7c9980ec0d7f86bda92a48"


def test_size_digest_and_content_as_promised():
    layer = TarLayer(
        members=(Member.of_bytes("/m/x", b"1" * 513), Member.of_bytes("/m/y", b"")), epoch=7
    )
    data = _bytes(layer)
    assert layer.size == len(data)
    assert layer.digest == layer.diff_id == Digest.of(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        rows = [(e.name, e.mode, e.mtime, e.uid, e.uname, e.isdir()) for e in archive]
    assert rows == [
        ("m", 0o755, 7, 0, "", True),
        ("m/x", 0o644, 7, 0, "", False),
        ("m/y", 0o644, 7, 0, "", False),
    ]


def test_nothing_of_the_machine_is_in_the_digest(tmp_path, monkeypatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    first = weight_layers(tree_of(tmp_path / "one", FILES), own_layer=50_000)
    old = os.umask(0o077)
    try:
        other = tree_of(tmp_path / "two", dict(reversed(FILES.items())))
        for entry in other.files:
            os.utime(other.path(entry.path), (5, 5))
            other.path(entry.path).chmod(0o700)
        second = weight_layers(other, own_layer=50_000)
    finally:
        os.umask(old)
    assert [layer.digest for layer in first] == [layer.digest for layer in second]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    third = weight_layers(other, own_layer=50_000)
    assert third[0].digest != first[0].digest
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH"):
        weight_layers(other)


def test_the_members_order_does_not_count():
    members = tuple(Member.of_bytes(path, path.encode()) for path in ("/b", "/a/x", "/a-"))
    one, other = TarLayer(members=members, epoch=0), TarLayer(members=members[::-1], epoch=0)
    assert (one.digest, one.key, one.file) == (other.digest, other.key, other.file)
    assert one.file == "a/x and 2 more"


def test_a_layer_has_as_many_neighbours_as_fit_where_there_are_too_many(tmp_path):
    """158 shards of 4.3 GB, DeepSeek-V3's: three are more than a registry's 10 GB."""
    digest = Digest.of(b"")
    files = [
        FileEntry(path=f"model-{n:05d}.safetensors", size=4_300_000_000, digest=digest)
        for n in range(158)
    ]

    tree = Tree(root=tmp_path, files=tuple(files))
    assert [len(layer.members) for layer in weight_layers(tree, largest=10**10)] == [2] * 79
    assert [len(layer.members) for layer in weight_layers(tree)] == [3] * 52 + [2]


def test_large_files_alone_and_small_ones_together(tmp_path):
    layers = weight_layers(tree_of(tmp_path, FILES), own_layer=50_000)
    assert [layer.file for layer in layers] == [
        "models/model-00001-of-00002.safetensors",
        "models/model-00002-of-00002.safetensors",
        "models/config.json and 1 more",
    ]


@pytest.mark.parametrize(
    ("model", "layer"),
    [(0, 5e8), (3e8, 5e8), (16e9, 5e8), (32e9, 1e9), (140e9, 4.375e9), (810e9, 10e9)],
)
def test_the_size_of_a_layer_grows_with_large_models_only(model, layer):
    assert fastest_layer(int(model)) == layer


def test_long_and_foreign_names_are_read_back():
    names = {"d/" * 60 + "f", "n" * 101, "é/ü.json", "x" * 100 + "/y", "p" * 300}
    names.add("a" * 150 + "/" + "b" * 100)
    members = tuple(Member.of_bytes(name, b"1") for name in names)
    data = _bytes(TarLayer(members=members, epoch=0))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert {one.name for one in archive if one.isfile()} == names
    command = ["tar", "--quoting-style=literal", "-tf", "-"]
    listed = subprocess.run(command, input=data, check=True, capture_output=True)
    assert names < set(listed.stdout.decode().splitlines())
    assert not listed.stderr


_LETTERS = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/")
_PARTS = st.text(_LETTERS, min_size=1, max_size=60).filter(
    lambda text: text not in (".", "..") and not text.startswith(".wh.")
)
_NAMES = st.lists(_PARTS, min_size=1, max_size=4)


@given(_NAMES, st.binary(max_size=1500), st.integers(0, 2**33 - 1))
def test_python_reads_every_member(parts, data, epoch):
    layer = TarLayer(members=(Member.of_bytes("/".join(parts), data),), epoch=epoch)
    whole = _bytes(layer)
    assert layer.size == len(whole)
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        last = archive.getmembers()[-1]
        assert (last.name, last.mtime) == ("/".join(parts), epoch)
        found = archive.extractfile(last)
        assert found is not None
        assert found.read() == data


@pytest.mark.parametrize("path", ["../x", "a/../../x", "", "/", "a//b", "a/./b", "a\0b", "a/.wh.b"])
def test_paths_that_leave_or_hide_are_refused(path):
    with pytest.raises(UsageError):
        TarLayer(members=(Member.of_bytes(path, b""),))


@pytest.mark.parametrize("other", ["a", "a/b"])
def test_a_path_twice_and_a_file_as_folder_are_refused(other):
    with pytest.raises(UsageError, match="twice"):
        TarLayer(members=(Member.of_bytes("/a", b""), Member.of_bytes(other, b"")))


def test_names_that_are_not_text_are_refused():
    with pytest.raises(InputRefused, match="UTF-8"):
        TarLayer(members=(Member.of_bytes("a\udcff", b""),))


def test_a_file_that_changes_is_named(tmp_path):
    path = tmp_path / "w.bin"
    path.write_bytes(bytes(3 << 20))
    layer = TarLayer(members=(Member.of_file("/w.bin", path),))
    chunks = layer.open()
    next(chunks), next(chunks)
    path.write_bytes(bytes([1]) * (3 << 20))
    os.utime(path, (1, 1))
    with pytest.raises(InputRefused, match=r"w\.bin changed"):
        list(chunks)
    chunks = layer.open()
    next(chunks), next(chunks)
    with path.open("r+b") as file:
        file.truncate(1 << 20)
    for _ in range(2):
        with pytest.raises(InputRefused, match=r"w\.bin changed"):
            list(chunks)
        chunks = layer.open()
    path.unlink()
    with pytest.raises(InputRefused, match=r"w\.bin changed"):
        list(layer.open())


def test_a_remembered_digest_is_not_worked_out_again(tmp_path):
    known: dict[str, str] = {}
    calls = []

    def memo(key: str, make: object) -> str:
        calls.append(key)
        if key not in known:
            known[key] = make()
        return known[key]

    tree = tree_of(tmp_path, FILES)
    first = [layer.digest for layer in weight_layers(tree, own_layer=50_000, memo=memo)]
    for entry in tree.files:
        tree.path(entry.path).unlink()
    again = [layer.digest for layer in weight_layers(tree, own_layer=50_000, memo=memo)]
    assert first == again
    other = weight_layers(tree, own_layer=50_000, memo=memo, epoch=1)
    with pytest.raises(InputRefused):
        _ = other[0].digest
    assert len(set(calls)) == 4


def test_many_small_files():
    members = tuple(Member.of_bytes(f"/models/{n % 100}/{n}", b"x") for n in range(20_000))
    layer = TarLayer(members=members, epoch=0)
    with subprocess.Popen(
        ["tar", "-tf", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        listing: list[bytes] = []
        thread = threading.Thread(target=lambda: listing.extend(reader.stdout or ()))
        thread.start()
        writes = [reader.stdin.write(chunk) for chunk in layer.open()]
        reader.stdin.close()
        thread.join()
    assert reader.returncode == 0
    assert len(listing) == 20_000 + 101
    assert sum(writes) == layer.size
    assert len(writes) < 200


@pytest.mark.parametrize(
    "path", ["models/big.bin", "models/größe.bin", f"models/{'n' * 120}/big.bin"]
)
def test_a_file_above_8_gib_is_listed_by_others(tmp_path, path):
    file, archive = tmp_path / "big.bin", tmp_path / "big.tar"
    size = (8 << 30) + 5
    with file.open("wb") as sparse:
        sparse.truncate(size)
    after = Member.of_bytes(f"{path}-and-more", b"more")
    layer = TarLayer(members=(Member.of_file(path, file), after), epoch=0)
    with archive.open("wb") as sparse:
        for head, member in layer.entries():
            sparse.write(head)
            if member and member.size == 4:
                sparse.write(b"more".ljust(512, b"\0"))
            elif member:
                assert head[-388:-376] == b"\x80" + size.to_bytes(11)  # all that Clair reads
                sparse.seek(-(-size // 512) * 512, os.SEEK_CUR)
        sparse.write(bytes(1024))
    assert archive.stat().st_size == layer.size
    with tarfile.open(archive) as opened:
        assert [(x.name, x.size) for x in opened if x.isfile()] == [(path, size), (after.path, 4)]
    listed = subprocess.run(
        ["tar", "--quoting-style=literal", "-tvf", archive],
        check=True,
        capture_output=True,
        text=True,
    )
    rows = [line.split(maxsplit=5) for line in listed.stdout.splitlines() if line[0] == "-"]
    assert [(row[5], int(row[2])) for row in rows] == [(path, size), (after.path, 4)]


_GO_LIST = """package main
import ("archive/tar"; "fmt"; "os")
func main() {
	file, _ := os.Open(os.Args[1])
	for r := tar.NewReader(file); ; {
		entry, err := r.Next()
		if err != nil { fmt.Println(err); return }
		fmt.Println(entry.Name, entry.Size)
	}
}
"""


@pytest.mark.full
@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")
def test_go_lists_a_file_above_8_gib(tmp_path):
    """Go's archive/tar, the language of most container engines."""
    size = (8 << 30) + 5
    with (tmp_path / "big.tar").open("wb") as sparse:
        sparse.write(tar.header("models/big.bin", size=size, mode=0o644, mtime=0))
        sparse.seek(size + len(tar.padding(size)), os.SEEK_CUR)
        sparse.write(tar.header("models/after", size=0, mode=0o644, mtime=0) + tar.END)
    (tmp_path / "main.go").write_text(_GO_LIST, encoding="utf-8")
    listed = subprocess.run(
        ["go", "run", tmp_path / "main.go", tmp_path / "big.tar"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "GOCACHE": str(tmp_path / "go"), "GO111MODULE": "off"},
    )
    assert listed.stdout.splitlines() == [f"models/big.bin {size}", "models/after 0", "EOF"]
