"""A key service as AWS's, of one key for signatures: enough for cosign's `awskms://`.

https://docs.aws.amazon.com/kms/latest/APIReference/API_Operations.html
"""

from __future__ import annotations

import base64
import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.fakes.auth_server import make_certificate
from tests.fakes.serving import Replying, Serving, serving

KEY_ID = "1234abcd-12ab-34cd-56ef-1234567890ab"


@dataclass
class KeyService:
    """What was asked of it, and where it answers."""

    certificate: Path
    reference: str = ""
    """As cosign takes it."""
    asked: list[str] = field(default_factory=list)
    key: ec.EllipticCurvePrivateKey = field(
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
        facts = {"KeyId": KEY_ID, "KeyUsage": "SIGN_VERIFY", "KeySpec": "ECC_NIST_P256",
                 "SigningAlgorithms": ["ECDSA_SHA_256"]}  # fmt: skip
        if target == "DescribeKey":
            return {"KeyMetadata": facts}
        if target == "GetPublicKey":
            public = self.key.public_key()
            data = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            return {**facts, "PublicKey": base64.b64encode(data).decode()}
        how = ec.ECDSA(utils.Prehashed(hashes.SHA256()))
        made = self.key.sign(base64.b64decode(body["Message"]), how)
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
