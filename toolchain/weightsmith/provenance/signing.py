"""Signatures in cosign's formats: simple signing of images, DSSE of statements.

https://github.com/sigstore/cosign/blob/main/specs/SIGNATURE_SPEC.md
https://github.com/secure-systems-lab/dsse/blob/master/protocol.md
https://github.com/sigstore/protobuf-specs/blob/main/protos/sigstore_bundle.proto

Signing takes few lines, a PEM key needs no other program, and cosign verifies the result. ECDSA is
deterministic, so pushing again adds nothing. Bundles, cosign 3's own format, are written where they
are asked for.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.ports import AnySigner, IdentityCheck, IdentitySigner, Signer
from weightsmith.core.safe_parse import PART, given_content, parse
from weightsmith.core.values import Blob, Digest, JsonValue, canonical
from weightsmith.oci.attachments import Attachment, AttachmentPart
from weightsmith.provenance.statements import STATEMENT, Statement

Check: TypeAlias = Callable[[bytes, bytes], bool] | IdentityCheck
"""(bytes, signature) -> whether the key made the signature; of an identity, what reads bundles."""

SIGNATURE_TYPE = "application/vnd.dev.cosign.artifact.sig.v1+json"
STATEMENT_TYPE = "application/vnd.in-toto+json"
ENVELOPE_TYPE = "application/vnd.dsse.envelope.v1+json"
SIMPLE_SIGNING = "application/vnd.dev.cosign.simplesigning.v1+json"
BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle"
"""Start of a Sigstore bundle's media type, in any version."""
_BUNDLE = f"{BUNDLE_TYPE}.v0.3+json"
SIGN_PREDICATE = "https://sigstore.dev/cosign/sign/v1"
"""Predicate type of cosign 3's image signatures."""
_SIGNATURE = "dev.cosignproject.cosign/signature"
_CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
_FOREIGN = "ask whoever attached it; `cosign verify-attestation` may say more"
_PAYLOAD = "application/vnd.in-toto+json"


def sign_image(
    image: Blob, name: str, signer: Signer, held: Sequence[AttachmentPart] = ()
) -> AttachmentPart:
    """Return a signature of an image's digest; `name` is its repository.

    An equal signature of the same key in `held` is reused: some keys sign differently each time.
    """
    payload = canonical(
        {
            "critical": {
                "identity": {"docker-reference": name},
                "image": {"docker-manifest-digest": image.digest},
                "type": "cosign container image signature",
            },
            "optional": None,
        }
    )
    check = check_by(signer.public)
    for part in held:
        if part.blob.digest == Digest.of(payload) and signed_digest(part, check):
            return part
    signature = base64.b64encode(signer.sign(payload)).decode()
    return AttachmentPart.of_bytes(payload, SIMPLE_SIGNING, **{_SIGNATURE: signature})


def sign_statement(statement: Statement, signer: Signer) -> bytes:
    """Return a statement in a signed DSSE envelope."""
    return canonical(_envelope(statement.content, _signature(statement.content, signer)))


def sealed(statement: Statement, signer: AnySigner) -> bytes:
    """Return a signed statement by itself: an identity's is a bundle, a key's an envelope."""
    if isinstance(signer, IdentitySigner):
        return signer.bundle(statement.content)
    return sign_statement(statement, signer)


def sign_bundle(statement: Statement, signer: AnySigner) -> AttachmentPart:
    """Return a statement in a signed Sigstore bundle; with a key, no transparency log knows it."""
    if isinstance(signer, IdentitySigner):
        return AttachmentPart.of_bytes(signer.bundle(statement.content), _BUNDLE)
    return AttachmentPart.of_bytes(bundle(statement.content, signer), _BUNDLE)


def bundle(payload: bytes, signer: Signer, hint: str = "") -> bytes:
    """Return a statement's text in a signed Sigstore bundle.

    The key's hint is, by default, what cosign writes; nothing there is checked against it.
    """
    hint = hint or base64.b64encode(hashlib.sha256(_der(signer.public)).digest()).decode()
    made = _signature(payload, signer)
    del made["keyid"]  # sigstore-go skips signatures whose id is not one of its own kind
    return canonical(
        {
            "mediaType": _BUNDLE,
            # The list may be left out, but the models of Sigstore in Python require it.
            "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
            "dsseEnvelope": _envelope(payload, made),
        }
    )


def claim(image: Digest) -> Statement:
    """Return what cosign 3 signs of an image: its digest, and nothing else."""
    subject = [{"name": "", "digest": {"sha256": image.hex}}]
    return Statement(
        {"_type": STATEMENT, "subject": subject, "predicateType": SIGN_PREDICATE, "predicate": {}}
    )


def bundle_manifest(part: AttachmentPart, subject: Blob, predicate_type: str) -> Attachment:
    """Return a manifest with a bundle where cosign 3 looks for it: among the image's referrers.

    https://github.com/sigstore/cosign/blob/main/specs/BUNDLE_SPEC.md
    """
    notes = {
        "dev.sigstore.bundle.content": "dsse-envelope",
        "dev.sigstore.bundle.predicateType": predicate_type,
    }
    return Attachment(
        artifact_type=part.blob.media_type, subject=subject, parts=(part,), annotations=notes
    )


def countersign(envelope: bytes, signer: Signer) -> bytes:
    """Return an envelope with our signature added; unchanged if this key has signed it already.

    Raises InputRefused if it is not an envelope with a statement.
    """
    if open_envelope(envelope, check_by(signer.public)).signed:
        return envelope
    payload = base64.b64decode(parse(envelope, largest=PART)["payload"])
    return join([envelope, canonical({"signatures": [_signature(payload, signer)]})])


def join(envelopes: Sequence[bytes]) -> bytes:
    """Return one envelope with the signatures of all, each once: their content is the same."""
    read = [parse(envelope, largest=PART) for envelope in envelopes]
    document = max(read, key=lambda one: len(one["signatures"]))
    rows = [row for one in (document, *read) for row in one["signatures"]]
    unique = {row["sig"]: row for row in rows}
    if len(unique) == len(document["signatures"]):
        return envelopes[read.index(document)]
    return canonical({**document, "signatures": list(unique.values())})


def envelope_part(envelope: bytes, predicate_type: str) -> AttachmentPart:
    """Return a signed statement in cosign's format."""
    notes = {_SIGNATURE: "", "predicateType": predicate_type}
    return AttachmentPart.of_bytes(envelope, ENVELOPE_TYPE, **notes)


def statement_part(statement: Statement) -> AttachmentPart:
    """Return an unsigned statement."""
    notes = {"predicateType": statement.predicate_type}
    return AttachmentPart.of_bytes(statement.content, STATEMENT_TYPE, **notes)


def cosign_manifest(
    parts: tuple[AttachmentPart, ...], subject: Blob, artifact_type: str, tag: str
) -> Attachment:
    """Return a manifest where cosign looks for it: under a tag, with an image's configuration."""
    ids = [part.blob.digest for part in parts]
    config = {
        "architecture": "",
        "config": {},
        "created": "0001-01-01T00:00:00Z",
        "history": [{"created": "0001-01-01T00:00:00Z"} for _ in ids],
        "os": "",
        "rootfs": {"type": "layers", "diff_ids": ids},
    }
    return Attachment(
        artifact_type=artifact_type,
        subject=subject,
        parts=parts,
        config=canonical(config),
        config_type=_CONFIG_TYPE,
        tag=tag,
    )


def signed_digest(part: AttachmentPart, check: Check | None) -> str:
    """Return the image digest of a signature, or empty if the key did not make it."""
    payload = part.read()
    try:
        signature = base64.b64decode(part.annotations.get(_SIGNATURE, ""), validate=True)
        claim = parse(payload)["critical"]["image"]["docker-manifest-digest"]
    except (ValueError, KeyError, TypeError):
        return ""
    return str(claim) if signature and check and check(payload, signature) else ""


def open_envelope(data: bytes, check: Check | None) -> Statement:
    """Return an envelope's statement, with whether the key signed it.

    Raises InputRefused if it is not an envelope with a statement.
    """
    try:
        envelope = parse(data, largest=PART, unique=True)
        payload = base64.b64decode(envelope["payload"], validate=True)
        signatures = [base64.b64decode(s["sig"], validate=True) for s in envelope["signatures"]]
        statement = parse(payload, largest=PART, unique=True)
        kind = envelope["payloadType"]
    except (ValueError, KeyError, TypeError):
        raise InputRefused("a signed statement is malformed", hint=_FOREIGN) from None
    if kind != _PAYLOAD or not isinstance(statement, dict):
        raise InputRefused("a signed statement is not an in-toto statement", hint=_FOREIGN)
    signed = check is not None and any(
        check(_pre_authentication(payload), signature) for signature in signatures
    )
    return Statement(statement, signed)


def open_bundle(data: bytes, check: Check | None) -> Statement:
    """Return a Sigstore bundle's statement, with whether it is signed, and else why not.

    Raises InputRefused if there is none in it.
    """
    envelope = unbundled(data)
    read = open_envelope(envelope, check)
    if not isinstance(check, IdentityCheck):
        return read
    payload, fault = check.read(data)
    # The library reads the bundle a second time, and must find there what we found.
    if not fault and payload != base64.b64decode(parse(envelope, largest=PART)["payload"]):
        fault = "it can be read in two ways"
    return Statement(read.document, not fault, fault)


def logged_at(data: bytes) -> str:
    """Return when a transparency log got a bundle that was checked; empty if that is not said."""
    try:
        entry = parse(data, largest=PART)["verificationMaterial"]["tlogEntries"][0]
        when = datetime.fromtimestamp(int(entry["integratedTime"]), UTC)
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, OSError):
        return ""
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def unbundled(data: bytes) -> bytes:
    """Return the envelope in a Sigstore bundle; raises InputRefused if there is none."""
    try:
        return canonical(dict(parse(data, largest=PART)["dsseEnvelope"]))
    except (ValueError, KeyError, TypeError):
        raise InputRefused("a Sigstore bundle holds no signed statement", hint=_FOREIGN) from None


def check_of_signer(signer: AnySigner) -> Check:
    """Return what recognizes a signer's own signatures."""
    return signer.check if isinstance(signer, IdentitySigner) else check_by(signer.public)


def whom(check: Check) -> str:
    """Return who must have signed, for people."""
    return check.who if isinstance(check, IdentityCheck) else "this key"


def read_public_key(path: Path) -> Check:
    """Return a verifier for a PEM file's public key; raises UsageError if it is none."""
    try:
        return check_by(given_content(path))
    except OSError as error:
        why = f"the public key {path} cannot be read: {error.strerror}"
        raise UsageError(why, hint="give the PEM file of a public key") from None
    except ValueError as error:
        raise UsageError(f"{path} is not a public key in PEM form: {error}", hint=_PUBLIC) from None


_PUBLIC = "`cosign generate-key-pair` writes one as cosign.pub, `openssl pkey -pubout` a key's own"


def check_of(key: str) -> Check:
    """Return a verifier for a public key in PEM form, or in a file of that name.

    Raises UsageError if it is neither.
    """
    if not key.startswith("-----BEGIN"):
        return read_public_key(Path(key))
    try:
        return check_by(key.encode())
    except ValueError as error:
        raise UsageError(f"no public key in PEM form: {error}", hint="correct it") from None


def key_id(public: bytes) -> str:
    """Return the id of a public key in PEM form, as TUF and in-toto's library compute it.

    It is a hint only, which anyone can write: DSSE's readers choose the key to check with by it.
    """
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        PublicFormat,
        load_pem_public_key,
    )

    key = load_pem_public_key(public)
    value = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    kind, scheme = "rsa", "rsa-pkcs1v15-sha256"
    if isinstance(key, ed25519.Ed25519PublicKey):
        kind, scheme, value = "ed25519", "ed25519", key.public_bytes_raw().hex()
    elif isinstance(key, ec.EllipticCurvePublicKey):
        kind, scheme = "ecdsa", f"ecdsa-sha2-nistp{key.curve.key_size}"
    # Their canonical JSON keeps line ends in texts as they are.
    text = f'{{"keytype":"{kind}","keyval":{{"public":"{value}"}},"scheme":"{scheme}"}}'
    return hashlib.sha256(text.encode()).hexdigest()


def check_by(public: bytes) -> Check:
    """Return a verifier for a public key in PEM form: ECDSA, RSA (PKCS #1) or Ed25519.

    Raises ValueError if it is not such a public key.
    """
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(public)
    except UnsupportedAlgorithm:
        raise ValueError("its kind or its curve is not supported") from None
    except ValueError:
        raise ValueError(_not_public(public)) from None
    kinds = (ec.EllipticCurvePublicKey, rsa.RSAPublicKey, ed25519.Ed25519PublicKey)
    if not isinstance(key, kinds):
        raise ValueError("it is neither ECDSA, RSA nor Ed25519")  # noqa: TRY004 - as the library

    def check(data: bytes, signature: bytes) -> bool:
        try:
            match key:
                case ec.EllipticCurvePublicKey():
                    key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
                case rsa.RSAPublicKey():
                    key.verify(signature, data, padding.PKCS1v15(), hashes.SHA256())
                case ed25519.Ed25519PublicKey():
                    key.verify(signature, data)
        except InvalidSignature:
            return False
        return True

    return check


def _not_public(data: bytes) -> str:
    """Return why a file is no public key: the library's own words name its parser."""
    others = {b"PRIVATE KEY-----": "a private key", b"BEGIN CERTIFICATE-----": "a certificate"}
    if other := next((what for mark, what in others.items() if mark in data), ""):
        return f"it is {other}"
    begins = b"PUBLIC KEY-----" in data
    return "it is damaged" if begins else "it has no line -----BEGIN PUBLIC KEY-----"


def _envelope(payload: bytes, signature: Mapping[str, str]) -> Mapping[str, JsonValue]:
    text = base64.b64encode(payload).decode()
    return {"payloadType": _PAYLOAD, "payload": text, "signatures": [dict(signature)]}


def _der(public: bytes) -> bytes:
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        PublicFormat,
        load_pem_public_key,
    )

    key = load_pem_public_key(public)
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _signature(payload: bytes, signer: Signer) -> dict[str, str]:
    made = signer.sign(_pre_authentication(payload))
    return {"keyid": key_id(signer.public), "sig": base64.b64encode(made).decode()}


def _pre_authentication(payload: bytes) -> bytes:
    kind = _PAYLOAD.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
