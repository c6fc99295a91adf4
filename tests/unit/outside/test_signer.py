"""Every kind of key signs, and its public half is told with it."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner, SSlibKey
from weightsmith.api.commands.verify import key_path
from weightsmith.building.wiring import make_signer
from weightsmith.core.errors import EnvironmentFailure, UsageError
from weightsmith.core.ports import Signer
from weightsmith.outside.signer import is_open_to_all, open_signer
from weightsmith.provenance.signing import (
    check_by,
    countersign,
    read_public_key,
    sign_statement,
)
from weightsmith.provenance.statements import Statement

from tests.fakes.auth_server import KeyService, key_service
from tests.fakes.baking import make_key

TEXT = b"what is signed"
STATEMENT = Statement({"_type": "https://in-toto.io/Statement/v1", "subject": []})
KINDS = {
    "ECDSA": ("EC", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
    "RSA": ("RSA", "-pkeyopt", "rsa_keygen_bits:2048"),
    "Ed25519": ("ED25519",),
}
needs_cosign = pytest.mark.skipif(not shutil.which("cosign"), reason="cosign is not installed")


def openssl(*words: str | Path) -> bytes:
    return subprocess.run(["openssl", *words], check=True, capture_output=True).stdout


@pytest.mark.parametrize("kind", KINDS)
def test_a_pem_file(kind: str, tmp_path: Path) -> None:
    openssl("genpkey", "-algorithm", *KINDS[kind], "-out", tmp_path / "key.pem")
    signer = open_signer(str(tmp_path / "key.pem"))
    assert check_by(signer.public)(TEXT, signer.sign(TEXT))
    assert not check_by(signer.public)(b"else", signer.sign(TEXT))
    # The same push adds nothing.
    assert signer.sign(TEXT) == signer.sign(TEXT)
    assert signer.public == openssl("pkey", "-in", tmp_path / "key.pem", "-pubout")


@pytest.mark.parametrize("kind", KINDS)
def test_a_statement_is_read_by_securesystemslib(kind: str, tmp_path: Path) -> None:
    """The library of in-toto and TUF chooses the key by the id that it makes itself."""
    keys = []
    told = b""
    for name in ("one", "two"):
        openssl("genpkey", "-algorithm", *KINDS[kind], "-out", tmp_path / name)
        signer = open_signer(str(tmp_path / name))
        told = countersign(told, signer) if told else sign_statement(STATEMENT, signer)
        scheme = "rsa-pkcs1v15-sha256" if kind == "RSA" else None
        keys.append(SSlibKey.from_crypto(load_pem_public_key(signer.public), scheme=scheme))

    envelope = Envelope.from_dict(json.loads(told))
    assert envelope.payload == STATEMENT.content
    assert set(envelope.verify(keys, 2)) == {key.keyid for key in keys}


@pytest.mark.parametrize("form", ["PKCS 8", "traditional"])
def test_an_encrypted_pem_file(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """openssl checks the signature; without its password the key is named."""
    private, public = make_key(tmp_path)
    convert = ["ec"] if form == "traditional" else ["pkcs8", "-topk8"]
    closed = tmp_path / "closed.pem"
    words = ["-in", private, "-out", closed, "-passout", "pass:pa55"]
    words += ["-aes256"] if form == "traditional" else []
    openssl(*convert, *words)
    assert b"ENCRYPTED" in closed.read_bytes()

    monkeypatch.setenv("COSIGN_PASSWORD", "pa55")
    (tmp_path / "text").write_bytes(TEXT)
    (tmp_path / "signature").write_bytes(open_signer(str(closed)).sign(TEXT))
    check = ["openssl", "dgst", "-sha256", "-verify", public, "-signature"]
    subprocess.run([*check, tmp_path / "signature", tmp_path / "text"], check=True)

    for password in ("wrong", ""):
        monkeypatch.setenv("COSIGN_PASSWORD", password)
        with pytest.raises(UsageError, match="is encrypted") as caught:
            open_signer(str(closed))
        assert "COSIGN_PASSWORD" in caught.value.hint


@pytest.mark.parametrize(
    ("make", "public_is"),
    [
        (["ecparam", "-name", "sect163k1", "-genkey", "-noout"], "not a public key"),
        (["genpkey", "-algorithm", "X25519"], "neither ECDSA, RSA nor Ed25519"),
    ],
)
def test_a_curve_that_the_library_lacks_and_a_key_that_signs_nothing(
    tmp_path: Path, make: list[str], public_is: str
) -> None:
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    openssl(*make, "-out", private)
    openssl("pkey", "-in", private, "-pubout", "-out", public)

    with pytest.raises(UsageError, match="not a private key of a supported kind"):
        open_signer(str(private))
    with pytest.raises(UsageError, match=public_is):
        read_public_key(public)


@needs_cosign
def test_a_key_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference and the service's own variables go to cosign; the key stays where it is."""
    with key_service(tmp_path) as service:
        for name, value in service.environment.items():
            monkeypatch.setenv(name, value)
        signer = open_signer(service.reference)
        assert check_by(signer.public)(TEXT, signer.sign(TEXT))
    assert service.asked.count("Sign") == 1


LATER = """#!/bin/sh
told="$COSIGN_NEW_BUNDLE_FORMAT $COSIGN_USE_SIGNING_CONFIG"
[ "$1" != sign-blob ] || [ "$told" = "false false" ] || {
  echo "Error: must specify --bundle with --new-bundle-format" >&2; exit 1; }
exec REAL "$@"
"""
"""cosign 3's own default, before it does what earlier versions do."""


@pytest.mark.slow
@needs_cosign
def test_cosign_3_is_told_to_write_a_signature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COSIGN_PASSWORD", "pa55")
    subprocess.run(["cosign", "generate-key-pair"], check=True, capture_output=True, cwd=tmp_path)
    program = tmp_path / "bin" / "cosign"
    program.parent.mkdir()
    program.write_text(LATER.replace("REAL", str(shutil.which("cosign"))))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    signer = open_signer(str(tmp_path / "cosign.key"))
    assert check_by(signer.public)(TEXT, signer.sign(TEXT))
    assert signer.public == (tmp_path / "cosign.pub").read_bytes()


def test_a_key_whose_signatures_verify_would_not_believe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a key service that signs with another hash."""
    _, public = make_key(tmp_path)
    other = Signer(sign=lambda text: text, public=public.read_bytes())
    monkeypatch.setattr("weightsmith.building.wiring.open_signer", lambda _: other)
    with pytest.raises(UsageError, match="cannot check"):
        make_signer("awskms:///alias/release", pytest.fail)


@needs_cosign
def test_a_key_service_that_cannot_be_reached_is_reported_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VAULT_ADDR", "http://127.0.0.1:1")
    monkeypatch.setenv("VAULT_TOKEN", "s3cret")
    monkeypatch.setenv("VAULT_MAX_RETRIES", "0")
    with pytest.raises(EnvironmentFailure, match="signing with hashivault") as caught:
        open_signer("hashivault://release")
    assert "COSIGN_PASSWORD" in caught.value.hint
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("key", ["nokms://release", "foo://x", "://"])
def test_a_service_that_nobody_knows(key: str) -> None:
    with pytest.raises(UsageError, match="no key service that is known") as caught:
        open_signer(key)
    assert "awskms://…, gcpkms://…, azurekms://…, hashivault://…" in caught.value.hint


def test_a_service_of_a_plugin_of_cosign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It finds `sigstore-kms-NAME` on the path; here cosign itself is missing there."""
    (tmp_path / "sigstore-kms-nokms").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentFailure, match="cosign"):
        open_signer("nokms://release")


def test_the_text_of_a_key_is_never_shown(tmp_path: Path) -> None:
    """As `--sign-key "$(cat key.pem)"` gives it."""
    text = make_key(tmp_path)[0].read_text()
    with pytest.raises(UsageError, match="given as its text") as caught:
        open_signer(text)
    with pytest.raises(UsageError, match="given as its text") as named:
        key_path(text)
    secret = text.splitlines()[1]
    assert secret not in f"{caught.value}{caught.value.hint}{named.value}{named.value.hint}"


def test_a_key_that_everybody_can_read(tmp_path: Path) -> None:
    """Not one in a folder that only its owner enters; nor one with a password."""
    told = list[str]()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        private, public = make_key(Path(folder))
        make_signer(str(private), told.append)
        assert told == []
        private.chmod(0o644)
        make_signer(str(private), told.append)
        assert len(told) == 1
        assert f"can read the signing key {private}: run `chmod 600`" in told[0]
        openssl("ec", "-in", private, "-aes256", "-passout", "pass:x", "-out", public)
        public.chmod(0o644)
        assert not is_open_to_all(str(public))
        Path(folder).chmod(0o700)
        make_signer(str(private), told.append)
    assert len(told) == 1


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "it has no line -----BEGIN PUBLIC KEY-----"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "it is damaged"),
        (b"-----BEGIN PUBLIC KEY-----\nAA*A\n-----END PUBLIC KEY-----\n", "it is damaged"),
        (b"-----BEGIN PUBLIC KEY-----\nMFk", "it is damaged"),
        (b"-----BEGIN EC PRIVATE KEY-----\nAAAA\n", "it is a private key"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n", "it is a certificate"),
    ],
)
def test_what_is_no_public_key(data: bytes, says: str, tmp_path: Path) -> None:
    """In our words: those of the library name its parser."""
    (tmp_path / "key.pub").write_bytes(data)
    with pytest.raises(UsageError) as caught:
        read_public_key(tmp_path / "key.pub")
    assert caught.value.message.endswith(f"key.pub is not a public key in PEM form: {says}")


@pytest.mark.parametrize(
    ("given", "says", "hint"),
    [
        ("awskms:///alias/x", "checked with a file", "cosign public-key --key awskms:///alias/x"),
        ("/", "it is a folder", "PEM file"),
        ("/missing/key.pub", "no such file", "PEM file"),
    ],
)
def test_what_names_no_public_key(given: str, says: str, hint: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        key_path(given, "--proof-key")
    assert caught.value.message.startswith(f"--proof-key {given}: ")
    assert hint in caught.value.hint


def test_a_key_service_without_cosign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("weightsmith.outside.signer.find_spec", lambda _: None)
    for key in ("awskms:///alias/release", "hashivault://release"):
        with pytest.raises(EnvironmentFailure, match="cosign") as caught:
            open_signer(key)
        assert "weightsmith[kms]" in caught.value.hint


@pytest.fixture(params=["ECDSA", "RSA"])
def cloud(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[KeyService]:
    """Yield AWS's key service, where boto3 finds it; there is no cosign."""
    pytest.importorskip("boto3", reason="boto3 is not installed")
    with key_service(tmp_path) as service:
        if request.param == "RSA":
            service.key = rsa.generate_private_key(65537, 2048)
        host = service.reference.split("/")[2]
        for name, value in service.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", f"https://{host}")
        monkeypatch.setenv("PATH", str(tmp_path))
        yield service


def test_a_cloud_s_key_without_cosign(cloud: KeyService, tmp_path: Path) -> None:
    """It signs there, and only digests are sent; openssl checks the signature."""
    signer = make_signer("awskms:///alias/release", pytest.fail)
    assert signer
    for name, data in (("text", TEXT), ("sig", signer.sign(TEXT)), ("key", signer.public)):
        (tmp_path / name).write_bytes(data)
    assert cloud.asked.count("Sign") == 2
    subprocess.run(
        ["/usr/bin/openssl", "dgst", "-sha256", "-verify", tmp_path / "key",
         "-signature", tmp_path / "sig", tmp_path / "text"],
        check=True,
    )  # fmt: skip


def test_a_cloud_that_cannot_be_reached(cloud: KeyService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", "https://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(EnvironmentFailure, match="EndpointConnectionError") as caught:
        open_signer("awskms:///alias/release")
    assert "s3cret" not in str(caught.value)
    assert cloud.asked == []


GOOGLE = "projects/p/locations/global/keyRings/r/cryptoKeys/k"


@pytest.mark.parametrize(
    ("key", "asked"),
    [
        (f"gcpkms://{GOOGLE}/versions/3", (f"{GOOGLE}/cryptoKeyVersions/3",)),
        (f"gcpkms://{GOOGLE}/cryptoKeyVersions/3", (f"{GOOGLE}/cryptoKeyVersions/3",)),
        ("azurekms://team.vault.azure.net/release", ("team", "release")),
    ],
)
def test_references_of_other_clouds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str, asked: tuple[str, ...]
) -> None:
    """Written as for cosign; what the library is asked is what it names the key by."""
    signed, seen = CryptoSigner.generate_ecdsa(), []

    def import_(*words: str) -> tuple[str, SSlibKey]:
        seen.append(words)
        return "fake:", signed.public_key

    for one in ("GCPSigner", "AzureSigner"):
        monkeypatch.setattr(f"securesystemslib.signer.{one}.import_", import_)
    monkeypatch.setattr("securesystemslib.signer.Signer.from_priv_key_uri", lambda *_: signed)
    monkeypatch.setattr("weightsmith.outside.signer.find_spec", lambda _: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    signer = make_signer(key, pytest.fail)
    assert seen == [asked]
    assert signer
    assert check_by(signer.public)(TEXT, signer.sign(TEXT))


@pytest.mark.parametrize(
    "key", ["hashivault://release", "awskms://localhost:4566/release", f"gcpkms://{GOOGLE}"]
)
def test_what_only_cosign_uses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentFailure, match="cosign"):
        open_signer(key)


@pytest.mark.parametrize("data", [b"", b"no key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n"])
def test_what_is_no_key(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_bytes(data)
    with pytest.raises(UsageError, match="private key"):
        open_signer(str(tmp_path / "key.pem"))
