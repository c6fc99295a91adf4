"""What hangs on the images of an OCI layout: rows of its index that have a subject."""

from __future__ import annotations

from pathlib import Path

from toolchain.errors import EnvironmentFailure
from toolchain.oci import layout, manifests
from toolchain.oci.attachments import Attachment, load_attachment
from toolchain.oci.progress import Meter
from toolchain.values import Blob, Digest, Json, canonical


def attach(folder: Path, attachment: Attachment) -> None:
    """Put an attachment into a layout folder; `index.json` comes last."""
    store = folder / "blobs" / "sha256"
    try:
        for blob, opener in attachment.blobs():
            layout.put_blob(store, blob, opener, Meter(blob.size))
        data = attachment.manifest_bytes
        layout.put_blob(store, attachment.blob, lambda: iter((data,)), Meter(0))
        document = dict(layout.index_document(folder))
        row = dict(attachment.row)
        rows = [kept for kept in _rows(folder) if kept["digest"] != row["digest"]]
        document["manifests"] = [*rows, row]
        layout.replace_file(folder / "index.json", [canonical(document)])
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot write the image layout {folder}: {error.strerror or error}",
            hint="check free space and permissions, then run it again",
        ) from None


def attached(folder: Path, subject: Digest) -> list[tuple[Blob, str]]:
    """Return the manifests attached to an image."""
    kinds = (manifests.OCI_MANIFEST,)
    blobs = [
        manifests.descriptor(row, str(folder), kinds, manifests.LARGEST_MANIFEST)
        for row in _rows(folder)
        if layout.is_attachment(row)
    ]
    return [(b, "") for b in blobs if read_attachment(folder, b).subject.digest == subject]


def read_attachment(folder: Path, blob: Blob) -> Attachment:
    """Return an attachment; InputRefused where it is not what its digest says."""
    return load_attachment(
        layout.read_blob(folder, blob),
        lambda part: lambda: layout.open_blob(folder, part),
        str(folder),
    )


def _rows(folder: Path) -> list[Json]:
    rows = manifests.listed(layout.index_document(folder), "manifests", f"{folder}/index.json")
    return [row for row in rows if isinstance(row, dict)]
