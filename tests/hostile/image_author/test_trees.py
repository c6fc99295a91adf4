"""Layers of an image: what they unfold into, their depth, and the modes of their folders."""

from __future__ import annotations

import os
import tarfile
from dataclasses import replace

import pytest
from weightsmith.api.commands.recipes import _write
from weightsmith.api.commands.verify import _read_layer
from weightsmith.core.errors import InputRefused
from weightsmith.core.files import _new_name
from weightsmith.core.trees import discard, walk
from weightsmith.oci.attachments import Attachment, AttachmentPart
from weightsmith.oci.layers import TITLE, Layer
from weightsmith.oci.streams import entries
from weightsmith.oci.unpack import unpack
from weightsmith.outside.ownership import owned_by, private_folder

from tests.fakes.images import entry, foreign_image, tar_of
from tests.fakes.users import NOBODY, closed_folders, nested, somebody_else


def test_a_layer_of_1500_nested_folders_is_refused(tmp_path):
    deep = entry("/".join(["deep"] * 1500), tarfile.DIRTYPE)
    with pytest.raises(InputRefused, match="256"):
        unpack(foreign_image(tar_of(deep)), tmp_path / "work" / "root")
    assert not list((tmp_path / "work").iterdir())


def test_folders_nested_through_links_are_refused(tmp_path):
    """No path of the layer is long, but a link leads to where the last one ended."""
    links = [
        entry(f"link{n}", tarfile.SYMTYPE, to=f"link{n - 1}/" + "a/" * 99) for n in range(1, 9)
    ]
    folders = [entry(f"link{n}/" + "a/" * 99, tarfile.DIRTYPE) for n in range(9)]
    with pytest.raises(InputRefused, match="256"):
        unpack(foreign_image(tar_of(*links, *folders)), tmp_path / "work" / "root")
    assert not list((tmp_path / "work").iterdir())


def test_a_name_that_no_file_system_holds_is_refused(tmp_path):
    """A layer has a name of 300 bytes: the image is at fault, not this machine's disk."""
    with pytest.raises(InputRefused, match=r"n{80}"):
        unpack(foreign_image(tar_of(entry("n" * 300))), tmp_path / "work" / "root")


@pytest.mark.slow
def test_cleaning_gets_through_a_tree_of_any_depth(tmp_path):
    """A started image nested folders until it was killed: the next job cleans up and runs."""
    left = _new_name(tmp_path / "jobs")
    left.mkdir(parents=True)
    nested(left, 1500)
    try:
        with private_folder(tmp_path) as folder:
            assert list((tmp_path / "jobs").iterdir()) == [folder]
    finally:
        discard(left)  # else it is pytest that does not get through it


@pytest.mark.root
def test_cleaning_opens_folders_that_are_closed_to_their_owner():
    """A layer has folders without any right: whoever unpacked them can delete them."""
    with somebody_else() as home:
        closed_folders(home / "tree")
        assert discard(home / "tree") is None
        assert not list(home.iterdir())


def test_cleaning_follows_no_link(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_bytes(b"kept")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "link").symlink_to(kept)
    (tmp_path / "top").symlink_to(kept)
    assert discard(tree) is None
    assert discard(tmp_path / "top") is None
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept / "file").read_bytes() == b"kept"


@pytest.mark.root
def test_what_cannot_be_deleted_stops_no_job():
    """Somebody else's file lies in a killed job's folder: it is passed over."""
    with somebody_else() as home:
        left = _new_name(home / "jobs")
        (left / "sub").mkdir(parents=True)
        (left / "sub" / "file").write_bytes(b"")
        os.seteuid(0)
        os.chown(left / "sub", 0, 0)
        os.seteuid(NOBODY)
        with private_folder(home) as folder:
            assert folder.is_dir()
        assert (left / "sub" / "file").exists()


@pytest.mark.root
def test_a_deep_output_is_taken_back_from_its_container(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    nested(output, 1500)
    try:
        with owned_by(output, NOBODY, NOBODY):
            owners = {os.lstat(step.name, dir_fd=step.parent).st_uid for step in walk(output)}
            assert owners == {NOBODY}
    finally:
        discard(output)


def test_an_attached_adapter_has_no_deep_names(tmp_path):
    part = replace(AttachmentPart.of_bytes(b"x", ""), annotations={TITLE: "a/" * 1000 + "x"})
    document = Attachment(artifact_type="", parts=(part,))
    with pytest.raises(InputRefused, match="a/a/a/"):
        _write(document, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def pax(kind: bytes = tarfile.XHDTYPE, **facts: str) -> bytes:
    """Return an extended header that says these things of the next entry."""
    return tarfile.TarInfo._create_pax_generic_header(facts, kind, "utf-8")


def layers_of(data: bytes, packed: bool = False) -> Layer:
    return foreign_image(data, packed=packed).layers[0]


HEADERS = {
    "2,000 extended headers": pax(comment="x") * 2000 + entry("a").tobuf(),
    "2 MB of an extended header": tar_of((entry("x", tarfile.XHDTYPE), bytes(2 << 20))),
    "2 MB of a global header": tar_of((entry("x", tarfile.XGLTYPE), bytes(2 << 20))),
    "2 MB of a long name": tar_of((entry("x", tarfile.GNUTYPE_LONGNAME), bytes(2 << 20))),
    "2,000 long names": (entry("././@LongLink", tarfile.GNUTYPE_LONGNAME).tobuf()) * 2000,
    "2,000 global headers": pax(tarfile.XGLTYPE, comment="x") * 2000,
    "a size below nothing": pax(size="-1024") + entry("a").tobuf(),
    "an old sparse file of 4 TiB": entry("a", tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT),
    "a sparse file of 4 TiB": pax(
        **{"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,0"}
        | {"GNU.sparse.size": str(4 << 40), "GNU.sparse.numblocks": "1"}
    )
    + entry("a").tobuf(),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_unfold_are_refused(tmp_path, case):
    """Half a kilobyte is a file of terabytes, or a thousand headers stand before one file."""
    layer = HEADERS[case] + bytes(1024)
    with pytest.raises(InputRefused):
        unpack(foreign_image(layer, packed=False), tmp_path / "work" / "root")
    with pytest.raises(InputRefused):
        list(entries(layers_of(layer)))
    fault, _ = _read_layer(layers_of(layer), "x", look_inside=True)
    assert fault, "verify finds it, too"


@pytest.mark.slow
def test_a_layer_that_unfolds_into_gigabytes_is_refused(tmp_path):
    """300 kB of gzip hold 300 MB of zeros: refused, and what was written is deleted."""
    layer = tar_of((entry("zeros"), bytes(300 << 20)))
    image = foreign_image(layer)
    with pytest.raises(InputRefused, match=str(image.layers[0].size)):
        unpack(image, tmp_path / "work" / "root")
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("again", ["models/a", "./models/a", "models/x/../a"])
def test_weights_that_are_there_twice_do_not_verify(again):
    """The layer has a file that is right, and after it another that an engine would read."""
    layer = tar_of((entry("models/a"), b"right"), (entry(again), b"other"))
    fault, _ = _read_layer(layers_of(layer), "x", look_inside=True)
    assert "models/a" in fault
