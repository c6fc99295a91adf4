"""A token server for Debian's docker-registry, and certificates: made by openssl.

https://distribution.github.io/distribution/spec/auth/jwt/
"""

from __future__ import annotations

import base64
import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

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
    """What was asked of the token server."""

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
    """Serve tokens on a free loopback port."""
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
