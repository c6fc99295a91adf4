"""Signs with a private key: a PEM file here, every other kind of key by the cosign program."""

from __future__ import annotations

import base64
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from toolchain.drivers import process
from toolchain.errors import EnvironmentFailure, UsageError

Sign = Callable[[bytes], bytes]

_CLOUDS = ("COSIGN_", "AWS_", "GOOGLE_", "AZURE_", "VAULT_", "SIGSTORE_", "TUF_")
"""What cosign reads to open an encrypted key or to reach a key management service."""


def open_signer(key: str) -> Sign:
    """Return what signs with a key: a PEM file, cosign's own key file, or a reference.

    References are cosign's: `awskms://…`, `gcpkms://…`, `azurekms://…`, `hashivault://…`.

    Raises UsageError for a key that is none, EnvironmentFailure where cosign is needed and absent
    or cannot use it: found out now, not after the build.
    """
    sign = _by_cosign(key) if "://" in key else _by_file(Path(key).expanduser())
    sign(b"weightsmith: can this key sign?")
    return sign


def _by_file(path: Path) -> Sign:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"the signing key {path} cannot be read: {error.strerror}",
            hint="give a key file or a reference to a key management service",
        ) from None
    if b"ENCRYPTED" in data.partition(b"\n")[0]:
        return _by_cosign(str(path))
    return _by_library(path, data)


def _by_library(path: Path, data: bytes) -> Sign:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError):
        key = None
    match key:
        case ec.EllipticCurvePrivateKey():
            # Deterministic (RFC 6979): a second push of the same image adds no second signature.
            how = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
            return lambda text: key.sign(text, how)
        case rsa.RSAPrivateKey():
            return lambda text: key.sign(text, padding.PKCS1v15(), hashes.SHA256())
        case ed25519.Ed25519PrivateKey():
            return key.sign
        case _:
            raise UsageError(
                f"{path} is not a private key of a known kind",
                hint="make one: `cosign generate-key-pair`, or "
                "`openssl ecparam -name prime256v1 -genkey -noout -out key.pem`",
            )


def _by_cosign(key: str) -> Sign:
    if shutil.which("cosign") is None:
        raise EnvironmentFailure(
            f"signing with {key} needs the cosign program, which is not here",
            hint="install it (https://docs.sigstore.dev), or give an unencrypted PEM key",
        )

    def sign(text: bytes) -> bytes:
        with tempfile.TemporaryDirectory(prefix="weightsmith-sign-") as folder:
            given, made = Path(folder, "text"), Path(folder, "signature")
            given.write_bytes(text)
            process.run(
                ["cosign", "sign-blob", "--yes", "--tlog-upload=false", "--key", key,
                 "--output-signature", made, given],
                env=process.scrubbed(_password(), network=True, prefixes=_CLOUDS),
                timeout=120,
            ).require(
                f"signing with {key}", hint="COSIGN_PASSWORD holds the password of a key file"
            )  # fmt: skip
            return base64.b64decode(made.read_bytes())

    return sign


def _password() -> dict[str, str]:
    # Without it cosign asks on a terminal, and a build has none.
    return {"COSIGN_PASSWORD": os.environ.get("COSIGN_PASSWORD", "")}
