"""Docker's config.json and its helpers, as users and programs leave them."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest
from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.outside import checkup
from weightsmith.outside.docker import engine_host
from weightsmith.outside.registries import ask_helper, docker_config


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    return tmp_path


def test_doctor_names_the_registries_and_no_secret(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = base64.b64encode(b"ann:s3cret").decode()
    rows = {"auths": {"r.example": {"auth": secret}}, "credHelpers": {"h.example": "odd"}}
    (folder / "config.json").write_text(json.dumps(rows))
    found = checkup._credentials()
    assert (found.ok, found.found) == (False, "h.example, r.example")
    assert "install docker-credential-odd" in found.todo

    (folder / "docker-credential-odd").touch(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    found = checkup._credentials()
    assert (found.ok, found.found) == (True, "h.example, r.example")
    assert not [text for text in (secret, "s3cret", "ann") if text in found.found + found.todo]


@pytest.mark.parametrize(
    "rows",
    [
        {"auths": [{}]},
        {"auths": 5, "credHelpers": ["odd"]},
        {"credHelpers": {"h.example": {}, "g.example": 5}},
        {"credsStore": ["odd"]},
        {"credsStore": {"a": 1}, "credHelpers": {"h.example": "odd"}},
    ],
)
def test_doctor_reads_whatever_is_in_it(folder: Path, rows: object) -> None:
    (folder / "config.json").write_text(json.dumps(rows))
    found = checkup._credentials()
    assert found.ok or found.todo


def test_a_context_that_is_no_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.delenv("DOCKER_CONTEXT", raising=False)
    (folder / "config.json").write_text('{"currentContext": 5}')
    assert engine_host() == "unix:///var/run/docker.sock"


@pytest.mark.parametrize("data", [b"[]", b"{", b"\xff\xfe{}", b"[" * 100_000])
def test_none_and_an_empty_one_are_empty_and_a_damaged_one_is_refused(
    folder: Path, data: bytes
) -> None:
    assert docker_config() == {}
    (folder / "config.json").write_bytes(b"\n")
    assert docker_config() == {}
    (folder / "config.json").write_bytes(data)
    with pytest.raises(InputRefused, match=r"config\.json is not a JSON object"):
        docker_config()


def test_one_that_cannot_be_read(folder: Path) -> None:
    (folder / "config.json").mkdir()  # as an engine makes of a mount whose source is missing
    with pytest.raises(EnvironmentFailure, match=r"cannot read .*config\.json"):
        docker_config()


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program `docker-credential-odd`, to be written."""
    program = tmp_path / "docker-credential-odd"
    program.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return program


@pytest.mark.parametrize("said", ["[]", "7", '"x"', "", '{"Username": "a"}'])
def test_a_helper_that_says_something_else(helper: Path, said: str) -> None:
    helper.write_text(f"#!/bin/sh\nprintf '%s' '{said}'\n")
    assert ask_helper("odd", "r.example") is None


def test_a_helper_may_warn_on_standard_error(helper: Path) -> None:
    """As gcloud's does, for example of a newer version."""
    said = json.dumps({"ServerURL": "r.example", "Username": "ann", "Secret": "s3cret"}, indent=2)
    helper.write_text(f"#!/bin/sh\necho WARNING: old >&2\ncat <<END\n{said}\nEND\necho x >&2\n")
    assert ask_helper("odd", "r.example") == ("ann", "s3cret")
