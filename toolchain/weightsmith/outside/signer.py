"""Signs with a private key: a PEM file, a key of a cloud's service, or any other through cosign.

securesystemslib speaks with the services of three clouds. What it lacks, such as Vault's keys other
than Ed25519 or an endpoint of one's own, and every service where it is not installed, is cosign's.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from weightsmith.core.errors import EnvironmentFailure, UsageError
from weightsmith.core.ports import Signer
from weightsmith.core.safe_parse import given_content
from weightsmith.outside import process
from weightsmith.recipe.user_config import refuse_key_text

_CLOUDS = ("COSIGN_", "AWS_", "GOOGLE_", "AZURE_", "VAULT_", "TRANSIT_", "SIGSTORE_", "TUF_")
"""Variables that cosign reads for encrypted keys and key management services."""
_COSIGNS_OWN = (b"BEGIN ENCRYPTED COSIGN PRIVATE KEY", b"BEGIN ENCRYPTED SIGSTORE PRIVATE KEY")
"""Of key files that only cosign decrypts."""
_SERVICES = ("awskms", "gcpkms", "azurekms", "hashivault", "openbao", "k8s", "gitlab", "env")
"""Schemes that cosign knows (its pkg/signature/keys.go and pkg/blob, sigstore's key services); for
others it looks for a plugin."""
_PLUGIN = "sigstore-kms-"
_FILE_OR_SERVICE = f"give a key file, or a key service's key: {'://…, '.join(_SERVICES)}://…"


def open_signer(key: str) -> Signer:
    """Return the signer of a key: a PEM file, cosign's own key file, or a reference.

    References are cosign's: `awskms://…`, `gcpkms://…`, `azurekms://…`, `hashivault://…`.

    Raises UsageError for an invalid key, EnvironmentFailure if the service cannot use the key, or
    cosign is needed and missing.
    """
    refuse_key_text(key, "the signing key")
    if "://" in key:
        scheme = key.partition("://")[0]
        if scheme not in _SERVICES and not shutil.which(f"{_PLUGIN}{scheme}"):
            raise UsageError(
                f"the signing key {key[:200]}: {scheme}:// is no key service that is known",
                hint=_FILE_OR_SERVICE,
            )
        return _by_service(key) or _by_cosign(key)
    path = Path(key).expanduser()
    try:
        data = given_content(path)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the signing key {path} cannot be read: {getattr(error, 'strerror', error)}",
            hint=_FILE_OR_SERVICE,
        ) from None
    if any(kind in data for kind in _COSIGNS_OWN):
        return _by_cosign(str(path))
    return _by_library(path, data)


def is_open_to_all(key: str) -> bool:
    """Return whether every user of this machine can read a private key's file without a password.

    A file that cannot be looked at is not open.
    """
    path = Path(key).expanduser()
    try:
        folders = path.resolve().parents
        if not (path.is_file() and path.stat().st_mode & stat.S_IROTH):
            return False
        reached = all(folder.stat().st_mode & stat.S_IXOTH for folder in folders)
        return reached and b"ENCRYPTED" not in given_content(path)
    except (OSError, ValueError):
        return False


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
            other = ", but a public key" if b"PUBLIC KEY-----" in data else ""
            raise UsageError(
                f"{path} is not a private key of a supported kind{other}",
                hint="create one: `cosign generate-key-pair`, or "
                "`openssl ecparam -name prime256v1 -genkey -noout -out key.pem`",
            )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return Signer(sign=sign, public=public)


_AWS, _GOOGLE, _AZURE = (
    re.compile(r"awskms:///(?P<id>.+)"),
    re.compile(r"gcpkms://(?P<id>projects/.+)/(crypto[kK]ey)?[vV]ersions/(?P<version>\d+)"),
    re.compile(r"azurekms://(?P<vault>[\w-]+)\.vault\.azure\.net/(?P<id>[\w-]+)"),
)
"""References as cosign takes them, of keys that securesystemslib uses."""
_RSA = "rsa-pkcs1v15-sha256"
"""The scheme of RSA signatures that cosign checks."""


def _by_service(key: str) -> Signer | None:
    """Return the signer of a cloud's key; None if it is of another kind, or the extra is missing.

    Raises EnvironmentFailure if the service cannot be reached, or refuses.
    """
    packages = {_AWS: "boto3", _GOOGLE: "google.cloud.kms", _AZURE: "azure.keyvault.keys"}
    found = next(((one, m) for one in packages if (m := one.fullmatch(key))), None)
    if found is None or not all(map(_installed, ("securesystemslib", packages[found[0]]))):
        return None
    from securesystemslib.signer import AWSSigner, AzureSigner, GCPSigner
    from securesystemslib.signer import Signer as ServiceSigner

    form, parts = found
    try:
        if form is _AWS:
            import boto3

            # The variable that cosign and AWS's other programs read; boto3 has another.
            boto3.setup_default_session(region_name=os.environ.get("AWS_REGION") or None)
            uri, public = AWSSigner.import_(parts["id"])
            if public.keytype == "rsa":
                uri, public = AWSSigner.import_(parts["id"], _RSA)
        elif form is _GOOGLE:
            uri, public = GCPSigner.import_(f"{parts['id']}/cryptoKeyVersions/{parts['version']}")
        else:
            uri, public = AzureSigner.import_(parts["vault"], parts["id"])
        signer = ServiceSigner.from_priv_key_uri(uri, public)
    except Exception as error:  # noqa: BLE001 - each cloud has errors of its own
        raise _unusable(key, error) from None

    def sign(text: bytes) -> bytes:
        try:
            return bytes.fromhex(signer.sign(text).signature)
        except Exception as error:  # noqa: BLE001 - as above
            raise _unusable(key, error) from None

    return Signer(sign=sign, public=public.keyval["public"].encode())


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False


def _unusable(key: str, error: Exception) -> EnvironmentFailure:
    return EnvironmentFailure(
        f"signing with {key}: {type(error).__name__}: {str(error)[:300]}",
        hint="check the key's name, its kind, and the service's variables, such as AWS_REGION",
    )


def _by_cosign(key: str) -> Signer:
    if shutil.which("cosign") is None:
        raise EnvironmentFailure(
            f"signing with {key} needs the program cosign, which was not found",
            hint="install it (https://docs.sigstore.dev), or for a key of AWS, Google Cloud or "
            "Azure `pip install 'weightsmith[kms]'`, or give an unencrypted PEM key",
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
