"""OpenSSF Model Signing: one signature over the digests of all files of a model.

https://github.com/ossf/model-signing-spec/blob/main/spec/v1.0.md

`model_signing verify key` reads it from a file beside the weights, and so do programs that use the
library before they load a model. The library itself is not used to sign: it would hash each file
again, and pull in Sigstore's services for a text of a few lines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from weightsmith.core.errors import UsageError
from weightsmith.core.ports import AnySigner, IdentitySigner
from weightsmith.core.values import FileEntry
from weightsmith.provenance import signing
from weightsmith.provenance.statements import STATEMENT, Statement

SIGNATURE = "model.sig"
"""The file's name in a model's folder; beside a single file, that file's name with `.sig`."""
PREDICATE = "https://model_signing/signature/v1.0"
_IGNORED = (".git", ".gitattributes", ".github", ".gitignore", SIGNATURE)
"""Files that need not be signed: the library's own list, and the signature itself."""


def signs_models(signer: AnySigner) -> bool:
    """Say whether readers of model signatures take it: an identity, or a key of ECDSA on P-256.

    They take other curves too, but choose the hash by the curve, and ours is always SHA-256.
    """
    if isinstance(signer, IdentitySigner):
        return True
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    key = load_pem_public_key(signer.public)
    return isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == "secp256r1"


def model_signer(signer: AnySigner | None) -> AnySigner | None:
    """Return what signs a model's files; UsageError for a key that their readers do not take."""
    if signer and not signs_models(signer):
        raise UsageError(
            "model signatures need an ECDSA key on the curve P-256",
            hint="create one: `openssl ecparam -name prime256v1 -genkey -noout -out key.pem`",
        )
    return signer


def sign_model(name: str, files: Sequence[FileEntry], signer: AnySigner) -> bytes:
    """Return the signature of a model's folder; of a single file, the only path is `.`."""
    rows = sorted(files, key=lambda file: file.path.split("/"))
    whole = hashlib.sha256(b"".join(bytes.fromhex(file.digest.hex) for file in rows))
    made = Statement(
        {
            "_type": STATEMENT,
            "subject": [{"name": name, "digest": {"sha256": whole.hexdigest()}}],
            "predicateType": PREDICATE,
            "predicate": {
                "serialization": {
                    "method": "files",
                    "hash_type": "sha256",
                    "allow_symlinks": False,
                    "ignore_paths": list(_IGNORED),
                },
                "resources": [
                    {"name": file.path, "algorithm": "sha256", "digest": file.digest.hex}
                    for file in rows
                ],
            },
        }
    )
    if isinstance(signer, IdentitySigner):
        return signer.bundle(made.content)
    return signing.bundle(made.content, signer, hint=hashlib.sha256(signer.public).hexdigest())
