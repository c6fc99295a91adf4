"""Trees of an image: their depth, and the modes of their folders."""

from __future__ import annotations

import os
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from weightsmith.api.commands.recipes import _write
from weightsmith.core.errors import InputRefused
from weightsmith.core.files import _new_name
from weightsmith.core.trees import discard, walk
from weightsmith.oci.attachments import AttachmentPart
from weightsmith.oci.layers import TITLE
from weightsmith.oci.unpack import unpack
from weightsmith.outside.ownership import private_folder
from weightsmith.outside.permissions import owned_by
from weightsmith.provenance.evidence import AttachedDocument

from tests.fakes.deep import NOBODY, closed_folders, nested, somebody_else
from tests.fakes.images import entry, foreign_image, tar_of


def test_a_layer_of_1500_nested_folders_is_refused(tmp_path: Path) -> None:
    """A layer nests its folders too deep for any program: refused before they are made."""
    deep = entry("/".join(["deep"] * 1500), tarfile.DIRTYPE)
    with pytest.raises(InputRefused, match="256"):
        unpack(foreign_image(tar_of(deep)), tmp_path / "work" / "root")
    assert not list((tmp_path / "work").iterdir())


def test_folders_nested_through_links_are_refused(tmp_path: Path) -> None:
    """No path of the layer is long, but a link leads to where the last one ended."""
    links = [
        entry(f"link{n}", tarfile.SYMTYPE, to=f"link{n - 1}/" + "a/" * 99) for n in range(1, 9)
    ]
    folders = [entry(f"link{n}/" + "a/" * 99, tarfile.DIRTYPE) for n in range(9)]
    with pytest.raises(InputRefused, match="256"):
        unpack(foreign_image(tar_of(*links, *folders)), tmp_path / "work" / "root")
    assert not list((tmp_path / "work").iterdir())


def test_a_name_that_no_file_system_holds_is_refused(tmp_path: Path) -> None:
    """A layer has a name of 300 bytes: the image is at fault, not this machine's disk."""
    with pytest.raises(InputRefused, match=r"n{80}"):
        unpack(foreign_image(tar_of(entry("n" * 300))), tmp_path / "work" / "root")


@pytest.mark.slow
def test_cleaning_gets_through_a_tree_of_any_depth(tmp_path: Path) -> None:
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
def test_cleaning_opens_folders_that_are_closed_to_their_owner() -> None:
    """A layer has folders without any right: whoever unpacked them can delete them."""
    with somebody_else() as home:
        closed_folders(home / "tree")
        assert discard(home / "tree") is None
        assert not list(home.iterdir())


def test_cleaning_follows_no_link(tmp_path: Path) -> None:
    """A tree links to folders outside it, which stay as they are."""
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
def test_what_cannot_be_deleted_stops_no_job() -> None:
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
def test_a_deep_output_is_taken_back_from_its_container(tmp_path: Path) -> None:
    """A job's container nests folders in its output: the hand-over reaches the last of them."""
    output = tmp_path / "out"
    output.mkdir()
    nested(output, 1500)
    try:
        with owned_by(output, NOBODY, NOBODY):
            owners = {os.lstat(step.name, dir_fd=step.parent).st_uid for step in walk(output)}
            assert owners == {NOBODY}
    finally:
        discard(output)


def test_an_attached_adapter_has_no_deep_names(tmp_path: Path) -> None:
    """An image attaches an adapter whose file lies in a thousand folders: refused at once."""
    part = replace(AttachmentPart.of_bytes(b"x", ""), annotations={TITLE: "a/" * 1000 + "x"})
    document = AttachedDocument(artifact_type="", parts=(part,))
    with pytest.raises(InputRefused, match="a/a/a/"):
        _write(document, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
