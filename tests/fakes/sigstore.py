"""A Sigstore of the tests' own: CA, certificate log and transparency log, over HTTP.

Certificates, their timestamps, log entries and proofs are made here of the standards, and never by
the library that reads them: RFC 5280, 6962, https://github.com/sigstore/fulcio/tree/main/docs and
https://github.com/sigstore/rekor/blob/main/openapi.yaml.
"""

import base64
import hashlib
import json
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.fakes.serving import Replying, Serving, serving

WORKFLOW = "https://github.com/acme/models/.github/workflows/build.yml@refs/heads/main"
ISSUER = "https://token.actions.githubusercontent.com"
_SCTS = "1.3.6.1.4.1.11129.2.4.2"
ISSUER_OID = "1.3.6.1.4.1.57264.1.8"
OLD_ISSUER_OID = "1.3.6.1.4.1.57264.1.1"
SIGNS_CODE = x509.oid.ExtendedKeyUsageOID.CODE_SIGNING
P256 = "PKIX_ECDSA_P256_SHA_256"


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def token(identity: str = WORKFLOW, issuer: str = ISSUER, seconds: float = 600) -> str:
    """Return an identity token; neither Sigstore's library nor this CA checks its signature."""
    now = int(time.time())
    body = {
        "iss": issuer,
        "sub": identity,
        "aud": "sigstore",
        "iat": now,
        "exp": now + int(seconds),
    }
    parts = ({"alg": "RS256", "typ": "JWT"}, body)
    texts = [
        base64.urlsafe_b64encode(json.dumps(one).encode()).decode().strip("=") for one in parts
    ]
    return ".".join([*texts, "c2lnbmF0dXJl"])


@dataclass
class Key:
    private: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )

    @cached_property
    def der(self) -> bytes:
        public = self.private.public_key()
        return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    @property
    def id(self) -> bytes:
        return hashlib.sha256(self.der).digest()

    def sign(self, data: bytes) -> bytes:
        return self.private.sign(data, ec.ECDSA(hashes.SHA256()))

    def log(self, url: str) -> dict[str, Any]:
        """Return it as a log of a trusted root."""
        return {
            "baseUrl": url,
            "hashAlgorithm": "SHA2_256",
            "publicKey": {
                "rawBytes": b64(self.der),
                "keyDetails": P256,
                "validFor": {"start": "2020-01-01T00:00:00Z"},
            },
            "logId": {"keyId": b64(self.id)},
        }


@dataclass
class Sigstore:
    """What it answers; tests change its fields to make it lie or fail."""

    ca: Key = field(default_factory=Key)
    certificates: Key = field(default_factory=Key)
    log: Key = field(default_factory=Key)
    bodies: list[bytes] = field(default_factory=lambda: [b"{}"])
    """The entries of the transparency log; cosign takes the number 0 for none."""
    url: str = ""
    asked: list[str] = field(default_factory=list)
    """Methods and paths of requests."""
    tokens: list[str] = field(default_factory=list)
    status: int = 201
    hangs: float = 0.0
    late: int = 0
    """Seconds by which the transparency log's clock is ahead."""
    keeps: bool = True
    """Whether entries get into the log: if not, it only says so."""
    by_extension: str = ISSUER_OID

    @cached_property
    def root(self) -> x509.Certificate:
        name = x509.Name.from_rfc4514_string("CN=tests' CA")
        public = self.ca.private.public_key()
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(public)
            .serial_number(1)
            .not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
            .not_valid_after(datetime(2120, 1, 1, tzinfo=UTC))
            .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(self.ca.private, hashes.SHA256())
        )

    def trusted_root(self) -> dict[str, Any]:
        der = self.root.public_bytes(Encoding.DER)
        authority = {
            "subject": {"organization": "tests", "commonName": "tests' CA"},
            "uri": self.url,
            "certChain": {"certificates": [{"rawBytes": b64(der)}]},
            "validFor": {"start": "2020-01-01T00:00:00Z"},
        }
        return {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [self.log.log(self.url)],
            "certificateAuthorities": [authority],
            "ctlogs": [self.certificates.log(f"{self.url}/ct")],
        }

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write a trusted root and a client's trust configuration; return their files."""
        row = {
            "url": self.url,
            "majorApiVersion": 1,
            "validFor": {"start": "2020-01-01T00:00:00Z"},
            "operator": "tests",
        }
        config = {
            "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
            "trustedRoot": self.trusted_root(),
            "signingConfig": {
                "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
                "caUrls": [row],
                "rekorTlogUrls": [row],
                "rekorTlogConfig": {"selector": "ANY"},
            },
        }
        files = folder / "root.json", folder / "trust.json"
        for path, made in zip(files, (self.trusted_root(), config), strict=True):
            path.write_text(json.dumps(made))
        return files

    def certificate(self, public: Any, identity: str, issuer: str) -> x509.Certificate:
        """Return a certificate of ten minutes, with the certificate log's timestamp in it."""
        begins = datetime.now(UTC).replace(microsecond=0)
        name = (
            x509.RFC822Name(identity)
            if "@" in identity and "://" not in identity
            else x509.UniformResourceIdentifier(identity)
        )
        text = issuer.encode()
        der = bytes([0x0C, len(text)]) + text if self.by_extension == ISSUER_OID else text
        plain = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self.root.subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begins)
            .not_valid_after(begins + timedelta(minutes=10))
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([SIGNS_CODE]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.ca.private.public_key()),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName([name]), critical=True)
            .add_extension(
                x509.UnrecognizedExtension(x509.ObjectIdentifier(self.by_extension), der),
                critical=False,
            )
        )
        before = plain.sign(self.ca.private, hashes.SHA256())
        scts = x509.UnrecognizedExtension(
            x509.ObjectIdentifier(_SCTS), self._timestamp(before.tbs_certificate_bytes)
        )
        return plain.add_extension(scts, critical=False).sign(self.ca.private, hashes.SHA256())

    def _timestamp(self, certificate: bytes) -> bytes:
        """Return a list with one timestamp of a certificate without it (RFC 6962, 3.2 and 3.3)."""
        when = struct.pack("!Q", int(time.time() * 1000))
        entry = self.ca.id + len(certificate).to_bytes(3, "big") + certificate
        signature = self.certificates.sign(b"\0\0" + when + struct.pack("!H", 1) + entry + b"\0\0")
        made = b"\0" + self.certificates.id + when + b"\0\0"
        made += b"\4\3" + struct.pack("!H", len(signature)) + signature
        inner = struct.pack("!H", len(made)) + made
        whole = struct.pack("!H", len(inner)) + inner
        return bytes([0x04, len(whole)]) + whole

    def entry(self, proposed: dict[str, Any]) -> dict[str, Any]:
        """Put an envelope into the log; return its entry, with the proofs that it is there."""
        content = proposed["spec"]["proposedContent"]
        envelope = json.loads(content["envelope"])
        payload = base64.b64decode(envelope["payload"])
        body = _canonical(
            {
                "apiVersion": "0.0.1",
                "kind": "dsse",
                "spec": {
                    "envelopeHash": _sha256(content["envelope"].encode()),
                    "payloadHash": _sha256(payload),
                    "signatures": [
                        {"signature": row["sig"], "verifier": content["verifiers"][0]}
                        for row in envelope["signatures"]
                    ],
                },
            }
        )
        self.bodies.append(body if self.keeps else b"another")
        index, size = len(self.bodies) - 1, len(self.bodies)
        leaves = [hashlib.sha256(b"\0" + one).digest() for one in self.bodies]
        root, now = _tree(leaves), int(time.time()) + self.late
        note = f"tests - 1\n{size}\n{b64(root)}\n"
        signed = b64(self.log.id[:4] + self.log.sign(note.encode()))
        promised = {
            "body": b64(body),
            "integratedTime": now,
            "logID": self.log.id.hex(),
            "logIndex": index,
        }
        return {
            "24296fb24b8ad77a": {
                **promised,
                "verification": {
                    "signedEntryTimestamp": b64(self.log.sign(_canonical(promised))),
                    "inclusionProof": {
                        "checkpoint": f"{note}\n\u2014 tests {signed}\n",
                        "hashes": [one.hex() for one in _path(index, leaves)],
                        "logIndex": index,
                        "rootHash": root.hex(),
                        "treeSize": size,
                    },
                },
            }
        }


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False,
        key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _sha256(data: bytes) -> dict[str, str]:
    return {"algorithm": "sha256", "value": hashlib.sha256(data).hexdigest()}


def _half(leaves: list[bytes]) -> int:
    return 1 << (len(leaves) - 1).bit_length() - 1


def _tree(leaves: list[bytes]) -> bytes:
    """Return a Merkle tree's root (RFC 6962, 2.1)."""
    if len(leaves) == 1:
        return leaves[0]
    half = _half(leaves)
    return hashlib.sha256(b"\1" + _tree(leaves[:half]) + _tree(leaves[half:])).digest()


def _path(index: int, leaves: list[bytes]) -> list[bytes]:
    """Return the audit path of a leaf (RFC 6962, 2.1.1)."""
    if len(leaves) == 1:
        return []
    half = _half(leaves)
    if index < half:
        return [*_path(index, leaves[:half]), _tree(leaves[half:])]
    return [*_path(index - half, leaves[half:]), _tree(leaves[:half])]


class _Service(Replying):
    sigstore: Sigstore

    def do_POST(self) -> None:
        told, sent = self.sigstore, json.loads(self.body())
        told.asked.append(self.path)
        time.sleep(told.hangs)
        if told.status != 201:
            self.reply(told.status, b'{"code": 3, "message": "no"}')
            return
        answer = told.entry(sent) if self.path == "/api/v1/log/entries" else self._certificate(sent)
        self.reply(201, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _certificate(self, sent: dict[str, Any]) -> dict[str, Any]:
        raw = self.headers["Authorization"].removeprefix("Bearer ")
        self.sigstore.tokens.append(raw)
        claims = json.loads(base64.urlsafe_b64decode(raw.split(".")[1] + "=="))
        request = x509.load_pem_x509_csr(base64.b64decode(sent["certificateSigningRequest"]))
        assert request.is_signature_valid
        made = self.sigstore.certificate(request.public_key(), claims["sub"], claims["iss"])
        chain = [one.public_bytes(Encoding.PEM).decode() for one in (made, self.sigstore.root)]
        return {"signedCertificateEmbeddedSct": {"chain": {"certificates": chain}}}


@contextmanager
def sigstore(make: Callable[[], Sigstore] = Sigstore) -> Iterator[Sigstore]:
    """Serve one; its CA and its log have one address."""
    made = make()
    with serving(Serving(_Service, sigstore=made)) as made.url:
        yield made
