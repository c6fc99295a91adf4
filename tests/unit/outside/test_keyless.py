"""An identity signs with certificates of the tests' own Sigstore; what is not its own is refused.

The services' certificates and proofs are made by `tests/fakes/sigstore.py` of the standards;
Sigstore's library checks them, and so does cosign in `tests/contracts/test_cosign.py`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from weightsmith.building.wiring import signer_of
from weightsmith.core.errors import EnvironmentFailure, UsageError
from weightsmith.core.ports import IdentitySigner
from weightsmith.core.values import canonical
from weightsmith.outside import keyless
from weightsmith.outside.keyless import TOKEN, identity_check, open_identity_signer
from weightsmith.outside.signer import open_signer
from weightsmith.provenance.signing import bundle
from weightsmith.recipe.user_config import RunOptions, WantedIdentity

from tests.fakes.baking import make_key
from tests.fakes.sigstore import ISSUER, OLD_ISSUER_OID, WORKFLOW, Sigstore, sigstore, token

STATEMENT = canonical(
    {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "image", "digest": {"sha256": "a" * 64}}],
        "predicateType": "https://example.com/seen",
        "predicate": {},
    }
)


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sigstore]:
    monkeypatch.setenv(TOKEN, token())
    with sigstore() as made:
        yield made


def test_bundles_are_what_sigstores_own_models_read(services: Sigstore, tmp_path: Path) -> None:
    """Of a key, too: Sigstore's command in Python believes no keys, but others read with these."""
    models = pytest.importorskip("sigstore_models.bundle.v1")
    (key, _), read = make_key(tmp_path), models.Bundle.from_json
    made = (
        bundle(STATEMENT, open_signer(str(key))),
        signer_at(services, tmp_path).bundle(STATEMENT),
    )
    for one, of_key in zip(map(read, made), (True, False), strict=True):
        assert one.dsse_envelope.payload == STATEMENT
        assert (one.verification_material.public_key is not None) is of_key
        assert len(one.verification_material.tlog_entries) == (not of_key)


def signer_at(services: Sigstore, folder: Path) -> IdentitySigner:
    return open_identity_signer(str(services.write(folder)[1]))


def wanted(folder: Path, identity: str = WORKFLOW, issuer: str = ISSUER) -> WantedIdentity:
    return WantedIdentity(
        certificate_identity=identity,
        certificate_oidc_issuer=issuer,
        trusted_root=str(folder / "root.json"),
    )


def test_an_identity_signs(services: Sigstore, tmp_path: Path) -> None:
    signer = signer_at(services, tmp_path)
    assert (signer.identity, signer.issuer) == (WORKFLOW, ISSUER)
    made = [signer.bundle(STATEMENT) for _ in range(3)]
    services.url = ""  # nothing is asked of the network to verify
    check = identity_check(wanted(tmp_path))
    assert [check.read(one) for one in made] == [(STATEMENT, "")] * 3
    assert services.asked == ["/api/v2/signingCert", *["/api/v1/log/entries"] * 3]


@pytest.mark.parametrize(
    ("identity", "issuer", "fits"),
    [
        ("acme/models", "githubusercontent", True),
        (r"@refs/heads/main$", "^https://token", True),
        ("acme/others", "githubusercontent", False),
        ("acme/models", "^https://gitlab", False),
    ],
)
def test_expressions(
    services: Sigstore, tmp_path: Path, identity: str, issuer: str, fits: bool
) -> None:
    """They may match a part, as cosign's."""
    made = signer_at(services, tmp_path).bundle(STATEMENT)
    asked = WantedIdentity(
        certificate_identity_regexp=identity,
        certificate_oidc_issuer_regexp=issuer,
        trusted_root=str(tmp_path / "root.json"),
    )
    assert asked.asked()
    assert (identity_check(asked).read(made)[1] == "") is fits


def test_an_address_and_the_older_extension(
    services: Sigstore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN, token("ann@example.com", "https://login.example.com"))
    services.by_extension = OLD_ISSUER_OID
    made = signer_at(services, tmp_path).bundle(STATEMENT)
    check = identity_check(wanted(tmp_path, "ann@example.com", "https://login.example.com"))
    assert check.read(made)[1] == ""


@pytest.mark.parametrize(
    ("identity", "issuer"), [(f"{WORKFLOW}2", ISSUER), (WORKFLOW, "https://gitlab.com")]
)
def test_another_identity_or_provider(
    services: Sigstore, tmp_path: Path, identity: str, issuer: str
) -> None:
    made = signer_at(services, tmp_path).bundle(STATEMENT)
    payload, fault = identity_check(wanted(tmp_path, identity, issuer)).read(made)
    assert (payload, fault) == (b"", f"signed by {WORKFLOW} of {ISSUER}")


def test_an_expired_certificate(services: Sigstore, tmp_path: Path) -> None:
    """The log says that the signature came to it after the ten minutes."""
    services.late = 660
    made = signer_at(services, tmp_path).bundle(STATEMENT)
    assert "certificate" in identity_check(wanted(tmp_path)).read(made)[1]


def test_an_entry_that_is_not_in_the_log(services: Sigstore, tmp_path: Path) -> None:
    """The log promises it, and its tree has another."""
    services.keeps = False
    made = signer_at(services, tmp_path).bundle(STATEMENT)
    assert "inclusion proof" in identity_check(wanted(tmp_path)).read(made)[1]


def test_another_sigstore(services: Sigstore, tmp_path: Path) -> None:
    """A CA or a log that the trusted root does not have."""
    signer_at(services, tmp_path)
    check = identity_check(wanted(tmp_path))
    for part in ("ca", "certificates", "log"):
        with sigstore() as other:
            for same in {"ca", "certificates", "log"} - {part}:
                setattr(other, same, getattr(services, same))
            (tmp_path / part).mkdir()
            assert check.read(signer_at(other, tmp_path / part).bundle(STATEMENT))[1]


def _edited(bundle: bytes, *path: str | int, value: Any) -> bytes:
    document = json.loads(bundle)
    place = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return json.dumps(document).encode()


def test_what_was_changed_afterwards(services: Sigstore, tmp_path: Path) -> None:
    signer = signer_at(services, tmp_path)
    made, other = signer.bundle(STATEMENT), signer.bundle(STATEMENT.replace(b"aaaa", b"bbbb"))
    material, envelope = "verificationMaterial", "dsseEnvelope"
    theirs = json.loads(other)
    entry = (material, "tlogEntries", 0)
    promise = (*entry, "inclusionPromise", "signedEntryTimestamp")
    changed = [
        _edited(made, envelope, "payload", value=theirs[envelope]["payload"]),
        _edited(made, envelope, value=theirs[envelope]),
        _edited(made, envelope, "signatures", value=[]),
        _edited(made, material, "tlogEntries", value=theirs[material]["tlogEntries"]),
        _edited(made, material, "tlogEntries", value=[]),
        _edited(made, *entry, "logIndex", value="-1"),
        _edited(made, *entry, "integratedTime", value="9" * 30),
        _edited(made, *entry, "inclusionProof", "hashes", value=["AA=="] * 1000),
        _edited(made, *promise, value="AA=="),
        _edited(made, material, "certificate", "rawBytes", value="AA=="),
        _edited(made, material, value={"publicKey": {"hint": "x"}}),
        _edited(made, "mediaType", value="application/vnd.dev.sigstore.bundle.v9+json"),
        b"[]",
        b"",
    ]
    for number, one in enumerate(changed):
        assert signer.check.read(one)[0] == b"", number
        assert signer.check.read(one)[1], number
    assert signer.check.read(made) == (STATEMENT, "")


def test_the_token_is_shown_nowhere(
    services: Sigstore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not in logs at their most, not in bundles, not in what is said of a refusal."""
    caplog.set_level(logging.DEBUG)
    secret = token()
    monkeypatch.setenv(TOKEN, secret)
    signer = signer_at(services, tmp_path)
    said = [signer.bundle(STATEMENT).decode(), caplog.text]
    services.status = 400
    for call in (lambda: signer.bundle(STATEMENT), lambda: signer_at(services, tmp_path)):
        with pytest.raises(EnvironmentFailure) as refused:
            call()
        said += [refused.value.message, refused.value.hint, repr(refused.value)]
    assert services.tokens == [secret]
    assert secret not in "".join(said)
    assert secret.split(".")[1] not in "".join(said)


@pytest.mark.parametrize("raw", ["", "garbage", "a.b.c", token(seconds=-60)])
def test_no_identity(
    services: Sigstore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: str
) -> None:
    for name in ("GITHUB_ACTIONS", "GITLAB_CI", "BUILDKITE", "CIRCLECI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_NAME", "")
    monkeypatch.setenv(TOKEN, raw)
    with pytest.raises(UsageError, match="identity") as refused:
        signer_at(services, tmp_path)
    assert "id-token: write" in refused.value.hint
    assert not services.asked


def test_a_job_of_github(
    services: Sigstore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its token is asked for; without the permission, the refusal says which."""
    monkeypatch.setenv(TOKEN, "")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.delenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", raising=False)
    with pytest.raises(UsageError) as refused:
        signer_at(services, tmp_path)
    assert "id-token: write" in refused.value.hint


def test_a_service_that_hangs(
    services: Sigstore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyless, "_SECONDS", 0.05)
    services.hangs = 1.0
    with pytest.raises(EnvironmentFailure, match="no answer within"):
        signer_at(services, tmp_path)


def test_a_certificate_that_grew_old(
    services: Sigstore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build takes longer than a certificate lasts."""
    monkeypatch.setattr(keyless, "_RENEWED", -1.0)
    signer = signer_at(services, tmp_path)
    made = [signer.bundle(STATEMENT) for _ in range(2)]
    assert [signer.check.read(one)[1] for one in made] == ["", ""]
    assert services.asked.count("/api/v2/signingCert") >= 3


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"mediaType": "x"}', "\x00"])
def test_files_that_are_none(services: Sigstore, tmp_path: Path, text: str) -> None:
    (tmp_path / "root.json").write_text(text)
    with pytest.raises(UsageError, match=r"root.json is not"):
        identity_check(wanted(tmp_path))
    with pytest.raises(UsageError, match=r"root.json is not"):
        open_identity_signer(str(tmp_path / "root.json"))
    with pytest.raises(UsageError, match="No such file"):
        open_identity_signer(str(tmp_path / "absent.json"))


def test_a_trusted_root_without_keys(services: Sigstore, tmp_path: Path) -> None:
    """As an empty one, which serves to verify keys' signatures with cosign."""
    services.write(tmp_path)
    root = json.loads((tmp_path / "root.json").read_text())
    for part in ("tlogs", "certificateAuthorities"):
        (tmp_path / "root.json").write_text(json.dumps({**root, part: []}))
        with pytest.raises(UsageError, match="not usable"):
            identity_check(wanted(tmp_path))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"certificate_identity": "x"}, "--certificate-oidc-issuer is missing"),
        ({"certificate_oidc_issuer": "x"}, "--certificate-identity is missing"),
        ({"trusted_root": "x"}, "--certificate-identity is missing"),
        ({"certificate_identity_regexp": "("}, "--certificate-identity-regexp"),
    ],
)
def test_half_an_identity(given: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        WantedIdentity(**given).asked()


@pytest.mark.parametrize(
    "run",
    [
        RunOptions(keyless=True, sign_key="key.pem"),
        RunOptions(keyless=True, signature_format="both"),
        RunOptions(trust_config="trust.json"),
    ],
)
def test_options_that_exclude_each_other(run: RunOptions) -> None:
    with pytest.raises(UsageError, match="keyless"):
        signer_of(run, pytest.fail)


def test_without_the_package(
    services: Sigstore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyless, "find_spec", lambda _: None)
    for call in (lambda: signer_at(services, tmp_path), lambda: identity_check(wanted(tmp_path))):
        with pytest.raises(EnvironmentFailure) as refused:
            call()
        assert "weightsmith[keyless]" in refused.value.hint
