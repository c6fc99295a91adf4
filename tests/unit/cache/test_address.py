"""Where a cache is: flag, environment, configuration, and what is refused before any work."""

from dataclasses import replace
from pathlib import Path

import pytest
from weightsmith.building.wiring import cache_folder
from weightsmith.cache.address import Address, chosen, of_nodes, parse_address, required
from weightsmith.core.errors import UsageError
from weightsmith.provenance.signing import check_of
from weightsmith.recipe.user_config import CacheSettings, RunOptions, read_config

from tests.fakes.memory import new_signer


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    monkeypatch.delenv("WEIGHTSMITH_CACHE", raising=False)
    monkeypatch.delenv("WEIGHTSMITH_HOME", raising=False)
    monkeypatch.delenv("WEIGHTSMITH_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("oci://registry.example.com/team/cache", "oci registry.example.com/team/cache"),
        ("oci://127.0.0.1:5000/cache", "oci 127.0.0.1:5000/cache"),
        ("s3://bucket", "s3 bucket"),
        ("s3://bucket/a/b/", "s3 bucket/a/b"),
        ("/mnt/cache", "folder /mnt/cache"),
        ("file:///mnt/cache", "folder /mnt/cache"),
    ],
)
def test_addresses(text, address):
    found = parse_address(text, "--cache")
    assert f"{found.kind} {found.place}" == address


@pytest.mark.parametrize(
    "text",
    [
        *("oci://", "oci://registry.example.com", "oci://registry.example.com/team/cache:tag"),
        "oci://registry.example.com/Team/Cache",
        "oci://user:password@registry.example.com/team/cache",
        *("s3://", "s3://b", "s3://bucket/../other", "http://cache.example.com", "redis://host/0"),
    ],
)
def test_wrong_addresses_are_named_without_passwords(text):
    with pytest.raises(UsageError, match="--cache") as refused:
        parse_address(text, "--cache")
    assert "password" not in refused.value.message.replace("a password", "")


def test_the_flag_comes_before_the_environment_and_that_before_the_configuration(monkeypatch):
    nothing, settings = chosen("", "", read_config().cache), CacheSettings(where="/configured")
    assert (nothing.both, nothing.read) == (None, None)
    with pytest.raises(UsageError, match="no cache is named"):
        required("", read_config().cache)
    assert chosen("", "", settings).both == Address("folder", "/configured")
    monkeypatch.setenv("WEIGHTSMITH_CACHE", "file:///environment")
    assert chosen("", "", settings).both == Address("folder", "/environment")
    assert chosen("/flag", "", settings).both == Address("folder", "/flag")
    assert chosen("off", "", settings).both is None


def test_the_folder_of_this_machine_is_no_shared_cache(monkeypatch):
    monkeypatch.setenv("WEIGHTSMITH_HOME", "/mine")
    assert chosen("", "", CacheSettings()).both is None
    monkeypatch.setenv("WEIGHTSMITH_CACHE", "oci://registry.example.com/team/cache")
    assert cache_folder() == Path("/mine")
    monkeypatch.delenv("WEIGHTSMITH_HOME")
    assert cache_folder().name == "weightsmith"
    monkeypatch.setenv("WEIGHTSMITH_CACHE", "/mine")
    assert cache_folder().name == "weightsmith"
    with pytest.raises(UsageError, match="WEIGHTSMITH_CACHE '/mine'") as refused:
        chosen("", "", CacheSettings())
    assert "file:///mine" in refused.value.hint
    assert "WEIGHTSMITH_HOME" in refused.value.hint
    assert chosen("/flag", "", CacheSettings()).both == Address("folder", "/flag")
    monkeypatch.setenv("WEIGHTSMITH_CACHE", "off")
    assert chosen("", "", CacheSettings(where="/configured")).both is None


def test_the_configuration(tmp_path):
    file = tmp_path / "weightsmith" / "config.yaml"
    file.parent.mkdir()
    file.write_text("cache: oci://registry.example.com/team/cache")
    assert read_config().cache.where == "oci://registry.example.com/team/cache"
    file.write_text("cache: {where: /a, from: /b, upload_seconds: 5}")
    assert read_config().cache.read_from == "/b"
    file.write_text("")
    assert read_config().cache.where == ""


@pytest.mark.parametrize(
    "text", ["cache: {wher: /a}", "cache: [1]", "- a", "cache: {upload_seconds: -1}", "a: {", "\0"]
)
def test_a_wrong_configuration_is_named(tmp_path, monkeypatch, text):
    file = tmp_path / "config.yaml"
    monkeypatch.setenv("WEIGHTSMITH_CONFIG", str(file))
    with pytest.raises(UsageError, match="does not exist"):
        read_config()
    file.write_text(text)
    with pytest.raises(UsageError, match=r"config\.yaml"):
        read_config()


def test_nodes_of_a_fleet_get_what_this_command_has(tmp_path, monkeypatch):
    """What is off here is off for them, whatever their own configuration says."""
    monkeypatch.setenv("WEIGHTSMITH_CACHE", "file:///mnt/cache")
    here, off, half = RunOptions(), RunOptions(cache="off"), RunOptions(cache_from="off")
    shared = "/mnt/cache"
    assert of_nodes("local", here, CacheSettings()) == RunOptions(cache=shared).given()
    assert of_nodes("local", off, CacheSettings()) == off.given()
    assert of_nodes("ray", half, CacheSettings()) == replace(half, cache=shared).given()
    with pytest.raises(UsageError, match="--on ray needs a shared cache"):
        of_nodes("ray", off, CacheSettings())


def test_nodes_of_a_fleet_trust_the_key_of_this_command(tmp_path):
    """As text: its file is on this machine only. Without a cache there is nothing to trust."""
    key = tmp_path / "cache.pub"
    key.write_bytes(new_signer().public)
    settings = CacheSettings(verify_key=str(key))

    shared, off = RunOptions(cache="/mnt/cache"), RunOptions(cache="off")
    told = of_nodes("ray", shared, settings)
    assert told == {**shared.given(), "verify_key": key.read_text()}
    assert check_of(told["verify_key"])(b"text", b"no signature") is False
    assert of_nodes("local", off, settings) == off.given()
    whoever = CacheSettings(certificate_identity="me", certificate_oidc_issuer="https://x")
    named = {"certificate_identity": "me", "certificate_oidc_issuer": "https://x"}
    assert of_nodes("local", shared, whoever) == {**shared.given(), **named}
    missing = of_nodes("ray", shared, CacheSettings(verify_key="/nowhere"))
    with pytest.raises(UsageError, match="the public key /nowhere cannot be read"):
        check_of(missing["verify_key"])
    with pytest.raises(UsageError, match="no public key"):
        check_of("-----BEGIN PUBLIC KEY-----\nno")


def test_nodes_elsewhere_have_no_identity_to_sign_with():
    shared = RunOptions(cache="/mnt/cache", keyless=True)
    assert of_nodes("local", shared, CacheSettings())["keyless"] is True
    for on in ("ray", "slurm"):
        with pytest.raises(UsageError, match="do not have this job's identity"):
            of_nodes(on, shared, CacheSettings())
