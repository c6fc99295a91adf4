"""Unpacking: what an engine would see, and nothing outside the root."""

import gzip
import tarfile
from pathlib import Path

import pytest
from weightsmith.core.errors import EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.values import Blob, Digest
from weightsmith.oci import unpack as unpacking
from weightsmith.oci.image import Image
from weightsmith.oci.layers import BlobLayer
from weightsmith.oci.streams import can_read_zstd
from weightsmith.oci.unpack import unpack

from tests.fakes.images import FILES, entry, foreign_image, tar_of, tiny_image

DIR, SYM, LNK = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "work" / "root"


def test_our_own_image(tmp_path, root):
    unpack(tiny_image(tmp_path / "model"), root)
    for name, data in FILES.items():
        assert (root / "models" / name).read_bytes() == data
    assert list(root.parent.iterdir()) == [root]


@pytest.mark.parametrize("packed", [True, False])
def test_modes_links_and_whiteouts(root, packed):
    lower = tar_of(
        entry("usr", DIR, 0o755),
        entry("usr/lib", DIR, 0o555),
        entry("lib", SYM, to="usr/lib"),
        (entry("usr/lib/a"), b"a"),
        (entry("usr/lib/b"), b"b"),
        entry("old", DIR),
        (entry("old/x"), b"x"),
        (entry("bin/su", mode=0o4755), b"su"),
        entry("bin/hard", LNK, to="bin/su"),
        entry("dev/null", tarfile.CHRTYPE),
    )
    upper = tar_of(
        entry("usr/lib/.wh.a"),
        (entry("lib/c", mode=0o600), b"c"),
        (entry("old/new"), b"new"),
        entry("old/.wh..wh..opq"),
        entry("./bin/x", mode=0o755),
    )
    unpack(foreign_image(lower, upper, packed=packed), root)
    assert sorted(p.name for p in (root / "usr/lib").iterdir()) == ["b", "c"]
    assert (root / "lib").is_symlink()
    assert (root / "usr/lib").stat().st_mode & 0o7777 == 0o555
    assert (root / "usr/lib/c").stat().st_mode & 0o7777 == 0o600
    assert [p.name for p in (root / "old").iterdir()] == ["new"]
    assert (root / "bin/su").stat().st_mode & 0o7777 == 0o755, "no set-user-id"
    assert (root / "bin/su").stat().st_nlink == 2
    assert not (root / "dev/null").exists()
    (root / "usr/lib").chmod(0o755)  # so that the folder can be removed


@pytest.mark.parametrize(
    "entries",
    [
        [(entry("../evil"), b"1")],
        [(entry("a/../../evil"), b"1")],
        [entry("a/.wh..", DIR), entry(".wh...")],
        [entry("x/.wh.")],
        [entry("hard", LNK, to="../../evil")],
        [entry("hard", LNK, to="absent")],
        [entry("a", SYM, to="b"), entry("b", SYM, to="a"), (entry("a/x"), b"1")],
    ],
)
def test_escapes_are_refused(root, entries):
    with pytest.raises(InputRefused):
        unpack(foreign_image(tar_of(*entries)), root)
    assert list(root.parent.iterdir()) == [], "nothing is left behind"


def test_more_files_than_any_image_has_are_refused(root, monkeypatch):
    """In all layers together: each entry costs an inode, and an empty file nothing in the layer."""
    monkeypatch.setattr(unpacking, "_MOST_ENTRIES", 3)
    unpack(foreign_image(tar_of(entry("a"), entry("b")), tar_of(entry("c"))), root)

    with pytest.raises(InputRefused, match="more than 3 files"):
        unpack(foreign_image(tar_of(entry("a"), entry("b")), tar_of(entry("c"), entry("d"))),
               root.with_name("second"))  # fmt: skip

    assert [path.name for path in root.parent.iterdir()] == [root.name]


@pytest.mark.parametrize("to", ["..", "../../..", "/", "OUT"])
def test_links_are_followed_only_inside(root, tmp_path, to):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"kept")
    before = sorted(tmp_path.rglob("*"))
    place = str(outside) if to == "OUT" else to
    layer = tar_of(
        entry("door", SYM, to=place), (entry("door/evil"), b"1"),
        entry("file", SYM, to=f"{outside}/kept"), (entry("file"), b"2"), (entry("/abs/file"), b"3"),
    )  # fmt: skip
    upper = tar_of(entry("door/.wh.kept"), entry("hard", LNK, to="abs/file"))
    unpack(foreign_image(layer, upper), root)
    inside = root / (place.lstrip("/") if to == "OUT" else "")
    assert (inside / "evil").read_bytes() == b"1"
    assert (outside / "kept").read_bytes() == b"kept"
    assert [p for p in sorted(tmp_path.rglob("*")) if root.parent not in (p, *p.parents)] == before
    assert (root / "file").read_bytes() == b"2"
    assert (root / "abs/file").read_bytes() == b"3"


def test_a_hard_link_to_a_link_does_not_reach_out(root, tmp_path):
    (tmp_path / "secret").write_bytes(b"s")
    layer = tar_of(
        entry("l", SYM, to=str(tmp_path / "secret")), entry("h", LNK, to="l"), (entry("h"), b"x")
    )
    unpack(foreign_image(layer), root)
    assert (tmp_path / "secret").read_bytes() == b"s"
    assert (tmp_path / "secret").stat().st_nlink == 1


def _image(data: bytes, media_type: str, diff_id: Digest) -> Image:
    blob = Blob(digest=Digest.of(data), size=len(data), media_type=media_type)
    return Image(
        layers=(BlobLayer(blob=blob, diff_id=diff_id, opener=lambda: iter((data,))),), settings={}
    )


GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"


@pytest.mark.parametrize("harm", ["diff", "cut", "noise", "header"])
def test_damaged_layers_are_refused(root, harm):
    tar = tar_of((entry("a"), b"1" * 5000))
    data = gzip.compress(tar)
    data, diff = {
        "diff": (data, Digest.of(b"")),
        "cut": (data[:-20], Digest.of(tar)),
        "noise": (b"noise" * 100, Digest.of(tar)),
        "header": (gzip.compress(b"x" * 2048), Digest.of(b"x" * 2048)),
    }[harm]
    with pytest.raises(InputRefused, match="cannot be unpacked"):
        unpack(_image(data, GZIP, diff), root)
    assert not root.exists()


def test_gzip_of_several_members(root):
    tar = tar_of((entry("a"), b"1" * 5000))
    data = gzip.compress(tar[:700]) + gzip.compress(tar[700:])
    unpack(_image(data, GZIP, Digest.of(tar)), root)
    assert (root / "a").read_bytes() == b"1" * 5000


def test_zstd_is_refused_with_what_to_do(root, monkeypatch):
    monkeypatch.setattr("weightsmith.oci.streams.can_read_zstd", lambda: False)
    with pytest.raises(InputRefused, match="zstd") as caught:
        unpack(_image(b"x", ZSTD, Digest.of(b"x")), root)
    assert "libzstd" in caught.value.hint


def _frame(*blocks: tuple[int, bytes]) -> bytes:
    """Return a zstd frame of raw (0) and repeated (1) blocks, RFC 8878."""
    packed = b"\x28\xb5\x2f\xfd\x00\x70"  # magic, no size or checksum, a window of 16 MiB
    for number, (kind, data) in enumerate(blocks, 1):
        head = len(data) << 3 | kind << 1 | (number == len(blocks))
        packed += head.to_bytes(3, "little") + (data[:1] if kind else data)
    return packed


needs_zstd = pytest.mark.skipif(not can_read_zstd(), reason="no libzstd")


@needs_zstd
def test_zstd_of_several_frames(root):
    data = tar_of((entry("a"), b"1" * 5000), (entry("b"), bytes(4 << 20)))
    zeros = 4_100_000
    assert not any(data[-zeros:])
    blocks = [(0, data[at : at + 100_000]) for at in range(3000, len(data) - zeros, 100_000)]
    blocks[-1] = (0, blocks[-1][1][: (len(data) - zeros - 3000) % 100_000])
    packed = _frame((0, data[:3000])) + _frame(*blocks, *[(1, bytes(100_000))] * 41)
    unpack(_image(packed, ZSTD, Digest.of(data)), root)
    assert (root / "a").read_bytes() == b"1" * 5000
    assert (root / "b").read_bytes() == bytes(4 << 20)


@needs_zstd
@pytest.mark.parametrize("packed", [b"", b"no zstd at all", _frame((0, b"x" * 600))[:-100]])
def test_damaged_zstd_is_refused(root, packed):
    with pytest.raises(InputRefused, match="cannot be unpacked"):
        unpack(_image(packed, ZSTD, Digest.of(b"x")), root)


def test_a_folder_in_use_is_left_alone(root, tmp_path):
    root.mkdir(parents=True)
    (root / "mine").write_bytes(b"")
    with pytest.raises(UsageError, match="not empty"):
        unpack(tiny_image(tmp_path / "model"), root)
    assert (root / "mine").exists()
    with pytest.raises(EnvironmentFailure):
        unpack(tiny_image(tmp_path / "model"), root / "mine" / "below")
