"""A container's user can read what it is handed, and nothing is changed for it at the source."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from weightsmith.core.errors import EnvironmentFailure, UsageError
from weightsmith.core.files import _new_name
from weightsmith.core.values import Digest
from weightsmith.outside.docker_images import BaseImage, base, read_bases
from weightsmith.outside.ownership import is_dead, owned_by, owner_token, private_folder, readable


@pytest.fixture
def model(tmp_path):
    root = tmp_path / "model"
    (root / "sub").mkdir(parents=True)
    (root / "config.json").write_text("{}")
    (root / "sub" / "more.json").write_text("[]")
    for folder in (root, root / "sub"):
        folder.chmod(0o755)
    return root


def test_what_everybody_can_read_is_handed_over_as_it_is(model, tmp_path):
    assert readable(model, tmp_path / "staging", by_others=True) == model
    assert not (tmp_path / "staging").exists()


def test_private_files_are_copied_and_stay_private_at_the_source(model, tmp_path):
    file = model / "config.json"
    file.chmod(0o600)

    given = readable(model, tmp_path / "staging", by_others=True)
    alone = readable(file, tmp_path / "alone", by_others=True)

    assert given == tmp_path / "staging"
    for copy in (given / "config.json", alone):
        assert copy.stat().st_mode & 0o777 == 0o444
    assert (given / "sub" / "more.json").read_text() == "[]"
    assert file.stat().st_mode & 0o777 == 0o600
    assert readable(model, tmp_path / "unused", by_others=False) == model


def test_links_that_lead_out_are_resolved_for_the_container(tmp_path):
    home = tmp_path / "models--org--m"
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots" / "abc").mkdir(parents=True)
    (home / "blobs" / "1").write_text("{}")
    (home / "snapshots" / "abc" / "config.json").symlink_to("../../blobs/1")

    given = readable(home / "snapshots" / "abc", tmp_path / "staging", by_others=False)

    assert not (given / "config.json").is_symlink()
    assert (given / "config.json").read_text() == "{}"


def test_a_copy_that_would_fill_the_disk_is_refused_with_the_cheaper_way(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    file.write_text("weights")
    file.chmod(0o600)
    full = shutil._ntuple_diskusage(10, 10, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)

    def refuse(*arguments):
        raise OSError

    monkeypatch.setattr("fcntl.ioctl", refuse)

    with pytest.raises(EnvironmentFailure, match="no space") as caught:
        readable(file, tmp_path / "staging", by_others=True)
    assert "chmod o+r" in caught.value.hint


@pytest.mark.root
@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_a_folder_is_given_and_taken_back_even_after_an_error(model, tmp_path):
    target = tmp_path / "elsewhere"
    target.write_text("")
    (model / "link").symlink_to(target)

    def fail_inside():
        with owned_by(model, 65532, 65532):
            assert (model / "sub" / "more.json").stat().st_uid == 65532
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_inside()
    assert (model / "sub" / "more.json").stat().st_uid == 0
    assert target.stat().st_uid == 0


def test_a_living_owner_and_one_that_cannot_be_seen_are_not_dead_and_an_ended_one_is():
    mine = owner_token()
    realm, pid, started = mine.split("-")

    for other in (mine, f"anotherboot-{pid}-1{started}", "nonsense"):
        assert not is_dead(other)
    assert is_dead(f"{realm}-{pid}-{int(started) + 1}")
    assert is_dead(f"{realm}-4194399-{started}")


def test_folders_of_dead_owners_are_deleted_and_others_left_alone(tmp_path):
    with private_folder(tmp_path) as alive:
        jobs = alive.parent
        for name in (_new_name(jobs).name, "something else"):
            (jobs / name / "inside").mkdir(parents=True)
        with private_folder(tmp_path) as folder:
            assert folder.stat().st_mode & 0o777 == 0o700
            there = {path.name for path in jobs.iterdir()}
            assert there == {alive.name, "something else", folder.name}
        assert not folder.exists()


def test_a_base_is_pinned_where_its_digest_is_known():
    digest = Digest.of(b"")
    found = BaseImage(reference="r:1", digests={"linux/amd64": digest, "linux/arm64": None})

    assert found.pinned("linux/amd64") == f"r:1@{digest}"
    assert found.pinned("linux/arm64") == "r:1"


def test_an_unknown_base_and_a_damaged_lock_are_named(tmp_path: Path):
    with pytest.raises(UsageError, match="nope"):
        base("nope")
    (tmp_path / "bases.lock").write_text('{"a": 1}')
    with pytest.raises(UsageError, match=r"bases\.lock"):
        read_bases(tmp_path / "bases.lock")
