"""Signs as cosign 3 does: a statement in a Sigstore bundle that hangs on the image.

https://github.com/sigstore/cosign/blob/main/specs/BUNDLE_SPEC.md
"""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

from weightsmith.core.values import Blob, Digest
from weightsmith.oci.attachments import Attachment, AttachmentPart

BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
SIGNED = "https://sigstore.dev/cosign/sign/v1"


def claim(image: Digest) -> dict[str, Any]:
    """Return what `cosign sign` states of an image: its digest, and nothing else."""
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"digest": {"sha256": image.hex}, "annotations": {}}],
        "predicateType": SIGNED,
        "predicate": {},
    }


def bundle(statement: dict[str, Any], private: Path) -> dict[str, Any]:
    """Return a statement signed by a PEM key; openssl makes the signature."""
    payload, kind = json.dumps(statement).encode(), b"application/vnd.in-toto+json"
    text = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    signature = subprocess.run(
        ["openssl", "dgst", "-sha256", "-sign", private],
        input=text, check=True, capture_output=True,
    ).stdout  # fmt: skip
    return {
        "mediaType": BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": "any"}},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": kind.decode(),
            "signatures": [{"sig": base64.b64encode(signature).decode()}],
        },
    }


def attached(made: dict[str, Any], image: Blob, kind: str = SIGNED) -> Attachment:
    """Return a bundle as it hangs on an image."""
    return Attachment(
        artifact_type=BUNDLE,
        subject=image,
        parts=(AttachmentPart.of_bytes(json.dumps(made).encode(), BUNDLE),),
        annotations={
            "dev.sigstore.bundle.content": "dsse-envelope",
            "dev.sigstore.bundle.predicateType": kind,
            "org.opencontainers.image.created": "2026-11-26T00:00:00Z",
        },
    )
