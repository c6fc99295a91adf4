"""Attachments of the images in an OCI layout.

Ours are listed in `referrers.json`, an index beside `index.json`. So a layout of one image has one
row in its index, and skopeo, podman and umoci accept it without a name. Rows of `index.json` with
a subject, as oras writes them, are read as well, and so are those of `cosign save`.

Rows of `index.json` for them would survive `umoci gc` and `oras copy -r`, but then skopeo and
podman require an image name.
"""

from __future__ import annotations

from pathlib import Path

from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.core.files import replace_file
from weightsmith.core.values import Blob, Digest, JsonValue
from weightsmith.oci import layout, manifests
from weightsmith.oci.attachments import Attachment, load_attachment, with_rows
from weightsmith.oci.progress import Meter

LIST = "referrers.json"
PARTS = frozenset({"blobs", "index.json", "oci-layout", LIST})
"""All top-level names in a layout of ours."""


def attach(folder: Path, attachment: Attachment) -> None:
    """Write an attachment into a layout folder; its row is written last."""
    store = folder / "blobs" / "sha256"
    try:
        for blob, opener in attachment.blobs():
            layout.put_blob(store, blob, opener, Meter(blob.size))
        data = attachment.manifest_bytes
        layout.put_blob(store, attachment.blob, lambda: iter((data,)), Meter(0))
        replace_file(folder / LIST, [with_rows(_listed(folder), [attachment])], layout.MODE)
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot write the image layout {folder}: {error.strerror or error}",
            hint="check free space and permissions, then run it again",
        ) from None


def forget(folder: Path) -> None:
    """Remove our list of attachments from a layout."""
    (folder / LIST).unlink(missing_ok=True)


def attached(folder: Path, subject: Digest) -> list[tuple[Blob, str]]:
    """Return the manifests attached to an image; InputRefused if one that is listed is gone."""
    kinds = (manifests.OCI_MANIFEST,)
    index = manifests.listed(layout.index_document(folder), "manifests", f"{folder}/index.json")
    own = _listed(folder)
    rows = [*own, *filter(layout.is_attachment, index)]
    blobs = [manifests.descriptor(x, str(folder), kinds, manifests.LARGEST_MANIFEST) for x in rows]
    if lost := sum(not layout.has_blob(folder, blob) for blob in blobs[: len(own)]):
        raise InputRefused(
            f"{lost} of {len(own)} attachments in {folder / LIST} are gone; programs that know"
            " only index.json delete them, as `umoci gc` does",
            hint=f"write the layout again, or delete {LIST} to go on without what it lists",
        )
    found: dict[Digest, Blob] = {}
    for row, blob in zip(rows, blobs, strict=True):
        named = read_attachment(folder, blob).subject
        if named.digest == subject or (layout.is_saved_by_cosign(row) and not named.size):
            found[blob.digest] = blob
    return [(blob, "") for blob in found.values()]


def read_attachment(folder: Path, blob: Blob) -> Attachment:
    """Return an attachment; raises InputRefused if it does not match its digest."""
    return load_attachment(
        layout.read_blob(folder, blob),
        lambda part: lambda: layout.open_blob(folder, part),
        str(folder),
    )


def _listed(folder: Path) -> list[JsonValue]:
    if not (folder / LIST).exists():
        return []
    document = manifests.read_json(layout.read_small_file(folder / LIST), f"{folder}/{LIST}")
    return manifests.listed(document, "manifests", f"{folder}/{LIST}")
