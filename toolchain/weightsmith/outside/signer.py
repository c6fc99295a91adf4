"""Signs with a private key: with a PEM file directly, with other keys through cosign."""

from __future__ import annotations

import base64
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from weightsmith.core.errors import EnvironmentFailure, UsageError
from weightsmith.core.ports import Signer
from weightsmith.core.safe_parse import given_content
from weightsmith.outside import process

_CLOUDS = ("COSIGN_", "AWS_", "GOOGLE_", "AZURE_", "VAULT_", "TRANSIT_", "SIGSTORE_", "TUF_")
"""Variables that cosign reads for encrypted keys and key management services."""
_COSIGNS_OWN = (b"BEGIN ENCRYPTED COSIGN PRIVATE KEY", b"BEGIN ENCRYPTED SIGSTORE PRIVATE KEY")
"""Of key files that only cosign decrypts."""


def open_signer(key: str) -> Signer:
    """Return the signer of a key: a PEM file, cosign's own key file, or a reference.

    References are cosign's: `awskms://…`, `gcpkms://…`, `azurekms://…`, `hashivault://…`.

    Raises UsageError for an invalid key, EnvironmentFailure if cosign is needed and missing or
    cannot use the key.
    """
    if "://" in key:
        return _by_cosign(key)
    path = Path(key).expanduser()
    try:
        data = given_content(path)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the signing key {path} cannot be read: {getattr(error, 'strerror', error)}",
            hint="give a key file or a reference to a key management service",
        ) from None
    if any(kind in data for kind in _COSIGNS_OWN):
        return _by_cosign(str(path))
    return _by_library(path, data)


def _by_library(path: Path, data: bytes) -> Signer:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

    encrypted = b"ENCRYPTED" in data
    password = os.environ.get("COSIGN_PASSWORD", "").encode() if encrypted else b""
    try:
        key = serialization.load_pem_private_key(data, password=password or None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        if encrypted:
            raise UsageError(
                f"the signing key {path} is encrypted, and "
                + ("COSIGN_PASSWORD is not its password" if password else "no password is given"),
                hint="set COSIGN_PASSWORD to the password of the key",
            ) from None
        key = None
    sign: Callable[[bytes], bytes]
    match key:
        case ec.EllipticCurvePrivateKey():
            # Deterministic (RFC 6979): a second push of the same image adds no second signature.
            how = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
            sign = partial(key.sign, signature_algorithm=how)
        case rsa.RSAPrivateKey():
            sign = partial(key.sign, padding=padding.PKCS1v15(), algorithm=hashes.SHA256())
        case ed25519.Ed25519PrivateKey():
            sign = key.sign
        case _:
            raise UsageError(
                f"{path} is not a private key of a supported kind",
                hint="create one: `cosign generate-key-pair`, or "
                "`openssl ecparam -name prime256v1 -genkey -noout -out key.pem`",
            )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return Signer(sign=sign, public=public)


def _by_cosign(key: str) -> Signer:
    if shutil.which("cosign") is None:
        raise EnvironmentFailure(
            f"signing with {key} needs the program cosign, which was not found",
            hint="install it (https://docs.sigstore.dev), or give an unencrypted PEM key",
        )
    settings = {
        # Without it cosign prompts on a terminal, which a build does not have.
        "COSIGN_PASSWORD": os.environ.get("COSIGN_PASSWORD", ""),
        # Keeps cosign 3 from writing a bundle for Sigstore's services. Variables instead of flags,
        # because older versions refuse unknown flags.
        "COSIGN_NEW_BUNDLE_FORMAT": "false",
        "COSIGN_USE_SIGNING_CONFIG": "false",
    }

    def cosign(command: str, *words: str | Path) -> None:
        process.run(
            ["cosign", command, "--key", key, *words],
            env=process.scrubbed(settings, network=True, prefixes=_CLOUDS),
            timeout=120,
        ).require(
            f"signing with {key}",
            hint="set COSIGN_PASSWORD for an encrypted key file, or a key management service's "
            "variables, such as AWS_REGION or VAULT_ADDR",
        )

    def sign(text: bytes) -> bytes:
        with tempfile.TemporaryDirectory(prefix="weightsmith-sign-") as folder:
            given, made = Path(folder, "text"), Path(folder, "signature")
            given.write_bytes(text)
            words = ("--yes", "--tlog-upload=false", "--output-signature", made, given)
            cosign("sign-blob", *words)
            return base64.b64decode(made.read_bytes())

    with tempfile.TemporaryDirectory(prefix="weightsmith-sign-") as folder:
        public = Path(folder, "public")
        cosign("public-key", "--outfile", public)
        return Signer(sign=sign, public=public.read_bytes())
