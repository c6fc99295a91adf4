"""A token server for Debian's docker-registry, certificates by openssl, and a key service.

https://distribution.github.io/distribution/spec/auth/jwt/
https://docs.aws.amazon.com/kms/latest/APIReference/API_Operations.html
"""

import base64
import json
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.fakes.serving import Replying, Serving, serving

USER, PASSWORD = "ann", "s3cret"


def make_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """Return key and certificate for 127.0.0.1, localhost, registry.test, signed by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    key, certificate = folder / f"{name}.key", folder / f"{name}.crt"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", f"/CN={name}",
         "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost,DNS:registry.test",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    return key, certificate


@dataclass
class Tokens:
    key: Path
    certificate: Path
    url: str = ""
    asked: list[str] = field(default_factory=list)

    def issue(self, scopes: list[str]) -> str:
        der = subprocess.run(
            ["openssl", "x509", "-in", self.certificate, "-outform", "DER"],
            check=True, capture_output=True,
        ).stdout  # fmt: skip
        access = []
        for scope in " ".join(scopes).split():
            kind, name, actions = scope.split(":")
            access.append({"type": kind, "name": name, "actions": actions.split(",")})
        now = int(time.time())
        head = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(der).decode()]}
        body = {"iss": "tests", "sub": USER, "aud": "registry", "exp": now + 300,
                "nbf": now - 1, "iat": now - 1, "jti": str(now), "access": access}  # fmt: skip
        text = ".".join(_packed(json.dumps(part).encode()) for part in (head, body))
        signed = subprocess.run(
            ["openssl", "dgst", "-sha256", "-sign", self.key],
            input=text.encode(), check=True, capture_output=True,
        ).stdout  # fmt: skip
        return f"{text}.{_packed(signed)}"


def _packed(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


@contextmanager
def token_server(folder: Path) -> Iterator[Tokens]:
    key, certificate = make_certificate(folder, "tokens")
    state = Tokens(key, certificate)

    class Handler(Replying):
        def do_GET(self) -> None:
            wanted = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
            query = parse_qs(urlsplit(self.path).query)
            state.asked.append(self.path)
            right = self.headers.get("Authorization") == f"Basic {wanted}"
            body = b"{}"
            if right:
                token = state.issue(query.get("scope", []))
                body = json.dumps({"token": token, "expires_in": 300}).encode()
            self.reply(200 if right else 401, body)

    with serving(Serving(Handler)) as url:
        state.url = f"{url}/token"
        yield state


KEY_ID = "1234abcd-12ab-34cd-56ef-1234567890ab"


@dataclass
class KeyService:
    """A key service as AWS's, of one key for signatures: enough for cosign's `awskms://`."""

    certificate: Path
    reference: str = ""
    """As cosign takes it."""
    asked: list[str] = field(default_factory=list)
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "s3cret",
            "AWS_CA_BUNDLE": str(self.certificate),
        }

    def answer(self, target: str, body: dict[str, str]) -> dict[str, object]:
        self.asked.append(target)
        spec, ways = "ECC_NIST_P256", ["ECDSA_SHA_256"]
        if isinstance(self.key, rsa.RSAPrivateKey):
            spec, ways = "RSA_2048", ["RSASSA_PSS_SHA_256", "RSASSA_PKCS1_V1_5_SHA_256"]
        facts = {"KeyId": KEY_ID, "KeyUsage": "SIGN_VERIFY", "KeySpec": spec,
                 "SigningAlgorithms": ways}  # fmt: skip
        if target == "DescribeKey":
            return {"KeyMetadata": facts}
        if target == "GetPublicKey":
            public = self.key.public_key()
            data = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            return {**facts, "PublicKey": base64.b64encode(data).decode()}
        digest, known = base64.b64decode(body["Message"]), utils.Prehashed(hashes.SHA256())
        if isinstance(self.key, rsa.RSAPrivateKey):
            assert body["SigningAlgorithm"] == ways[1], "cosign checks no other"
            made = self.key.sign(digest, padding.PKCS1v15(), known)
        else:
            made = self.key.sign(digest, ec.ECDSA(known))
        return {"KeyId": KEY_ID, "Signature": base64.b64encode(made).decode()}


@contextmanager
def key_service(folder: Path) -> Iterator[KeyService]:
    pair = make_certificate(folder, "kms")
    service = KeyService(certificate=pair[1])

    class Handler(Replying):
        def do_POST(self) -> None:
            target = self.headers["X-Amz-Target"].rpartition(".")[2]
            data = json.dumps(service.answer(target, json.loads(self.body()))).encode()
            self.reply(200, data, {"Content-Type": "application/x-amz-json-1.1"})

    server = Serving(Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair[1], pair[0])
    server.socket = context.wrap_socket(server.socket, server_side=True)
    service.reference = f"awskms://localhost:{server.server_address[1]}/{KEY_ID}"
    with serving(server):
        yield service
