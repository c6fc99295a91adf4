"""`verify`: check an image's digests, signature and statements.

Everything is read: every layer is hashed, and the files in the weight layers are compared with the
statement, so the chain goes from the sources to the bytes.
"""

from __future__ import annotations

import hashlib
import posixpath
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, cast

from weightsmith.api.results import Verification
from weightsmith.core.errors import Altered, CheckFailed, InputRefused, UsageError, WeightsmithError
from weightsmith.core.escape import joined
from weightsmith.core.ports import Progress
from weightsmith.core.values import Digest, Writable
from weightsmith.oci import manifests
from weightsmith.oci.attachments import Attachment, AttachmentPart
from weightsmith.oci.image import Image, blob_of
from weightsmith.oci.layers import LAYER_TAR, Layer, verified
from weightsmith.oci.layout import LayoutLocation
from weightsmith.oci.registry import (
    ImageLocation,
    Registry,
    RegistryLocation,
    open_location,
)
from weightsmith.oci.streams import ChunkFile, TarEntry
from weightsmith.provenance import evidence, signing
from weightsmith.provenance.chain import Check, check_chain, trace
from weightsmith.provenance.labels import weights_of
from weightsmith.provenance.proofs import check_proven, check_wanted
from weightsmith.provenance.statements import Statement
from weightsmith.provenance.withdrawal import withdrawn_in
from weightsmith.recipe.user_config import refuse_key_text

_BUFFER = 1 << 20
_TARS = (LAYER_TAR, *(name for name in manifests.MODEL_LAYERS if name.endswith(".tar")))
_READERS = 3
_NONE = (
    "none; programs that copy a layout, such as `oras copy -r`, leave them behind: `push` does not"
)
_CHANGED = ", or changed after signing"
_WRONG = (InputRefused, Altered)
"""Errors reported as failed checks, whether the content or the download is at fault."""


@dataclass(slots=True)
class _Proofs:
    """The devices on which an image must be proven, and what was found of each."""

    wanted: tuple[str, ...]
    check: signing.Check
    best: dict[str, Check] = field(default_factory=dict)

    def look(self, image: Digest, attachments: Sequence[Attachment], platform: str) -> None:
        """Look among an image's attachments; one platform's proof is enough for a device."""
        parts = [*evidence.statement_parts(attachments), *evidence.bundles_in(attachments)]
        for wanted in self.wanted:
            found = check_proven(wanted, image, parts, self.check, datetime.now(UTC))
            if wanted not in self.best or found.ok:
                # Of an index, who reads it must know which image was proven.
                said = f"{platform}: {found.found}" if platform and found.ok else found.found
                self.best[wanted] = replace(found, found=said)


@dataclass(slots=True)
class _Checked:
    """The content that was read, and the results of its checks."""

    checks: list[Check] = field(default_factory=list)
    attachments: list[Attachment] = field(default_factory=list)
    stated: list[Statement] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    platform: str = ""
    """Prefix of every check's name, if the reference is an index of several platforms."""
    proofs: _Proofs | None = None
    """Of what must be proven; None if nothing is asked for."""
    known: dict[tuple[Digest, bool], tuple[str, dict[str, str]]] = field(default_factory=dict)
    """Fault and files of layers that were already read; platforms share the weight layers."""

    def say(self, name: str, ok: bool | None, found: str) -> None:
        shown = f"{self.platform} {name}".strip()
        self.checks.append(Check(name=shown, ok=ok, found=found))


def verify_image(
    source: str,
    key: Path | None,
    registry: Registry,
    progress: Progress,
    *,
    signed_by: signing.Check | None = None,
    proven_on: Sequence[str] = (),
    proof_key: Path | None = None,
) -> Verification:
    """Return the result of every check; raise CheckFailed with all results if one failed.

    The image must be signed with the key, or by the identity, if one is given. For an index, the
    image for every platform is checked, and each must be proven on the devices that are asked for,
    or one of them, as a device is of one platform.
    """
    if key and signed_by:
        raise UsageError(
            "--key and --certificate-identity exclude each other",
            hint="verify once for each",
        )
    check = signing.read_public_key(key) if key else signed_by
    check_wanted(proven_on, has_key=bool(check or proof_key))
    place, found = open_location(source, registry), _Checked()
    if proven_on and (prover := signing.read_public_key(proof_key) if proof_key else check):
        found.proofs = _Proofs(wanted=tuple(proven_on), check=prover)
    digest = ""
    try:
        index = place.index()
    except _WRONG as error:
        _require_there(place, error)
        found.say("manifest or configuration (labels)", False, error.message)
        index = None
    if index is not None:
        digest = whole = Digest.of(index)
        twice = manifests.twice_in(index, source)
        several = f"several images for {', '.join(twice)[:200]}: engines differ in which they take"
        found.say("index", not twice, several if twice else digest)
        _attachments(place, whole, found)
        _signature(whole, check, found)
        _statements(whole, check, found)
        for platform in manifests.platforms_in(index, source):
            one = _Checked(platform=platform, known=found.known, proofs=found.proofs)
            _one_image(place, source, check, one, progress)
            found.checks += one.checks
    elif not found.checks:
        digest = _one_image(place, source, check, found, progress)
    if found.proofs:
        found.checks += found.proofs.best.values()
    bad = dict.fromkeys(one.name for one in found.checks if one.ok is False)
    if bad:
        raise CheckFailed(
            f"{source} failed verification: {', '.join(bad)}\n{table(found.checks)}",
            hint="do not use it; if you copied or rebuilt it, verify the image that you pushed",
            details=facts_of(source, digest, found.checks),
        )
    return Verification(image=source, digest=Digest(digest), checks=tuple(found.checks))


def facts_of(source: str, digest: str, checks: Sequence[Check]) -> Mapping[str, Writable]:
    """Return what `verify --json` prints."""
    return {
        "reference": source,
        "digest": digest,
        "ok": all(one.ok is not False for one in checks),
        "checks": [{"check": one.name, "ok": one.ok, "found": one.found} for one in checks],
    }


def _one_image(
    place: ImageLocation,
    source: str,
    check: signing.Check | None,
    found: _Checked,
    progress: Progress,
) -> str:
    """Check one platform's image; return its digest, or "" if it cannot be read."""
    try:
        image = place.image(found.platform or None)
    except _WRONG as error:
        _require_there(place, error)
        found.say("manifest or configuration (labels)", False, error.message)
        return ""
    if found.platform and image.platform != found.platform:
        found.say("manifest", False, f"the index says {found.platform}, the image {image.platform}")
    else:
        config = image.config_blob.digest.short
        found.say("manifest", True, f"{image.digest}, configuration {config}")
    if not _attachments(place, image.digest, found):
        found.say("attachments", None, _NONE)
    _signature(image.digest, check, found)
    _statements(image.digest, check, found)
    _layers(image, source, found, progress)
    if found.proofs:
        found.proofs.look(image.digest, found.attachments, found.platform)
    documents = []
    for document in evidence.documents_in(found.attachments):
        try:
            for part in document.parts:
                for _ in part.open():
                    pass
        except _WRONG as error:
            found.say(f"document {evidence.document_name(document)}", False, error.message)
        else:
            documents.append(document)
    for one in check_chain(image, found.stated, documents, found.files):
        found.say(one.name, one.ok, one.found)
    return image.digest


def table(checks: Sequence[Check]) -> str:
    """Return the checks as a text table."""
    width = max((len(one.name) for one in checks), default=0)
    words = {True: "ok", False: "NO", None: "-"}
    return joined(f"  {words[one.ok]:<3} {one.name:<{width}}  {one.found}" for one in checks)


def _require_there(place: ImageLocation, error: WeightsmithError) -> None:
    if isinstance(place, LayoutLocation) and not place.folder.is_dir():
        raise error
    if isinstance(place, RegistryLocation) and place.registry.digest_of(place.reference) is None:
        raise error


def _attachments(place: ImageLocation, subject: Digest, found: _Checked) -> bool:
    """Read the image's attachments, and say whether there are any.

    One that does not match its digest is a failed check.
    """
    try:
        rows = evidence.limited(place.attached(subject))
    except _WRONG as error:
        found.say("attachments", False, error.message)
        return True
    for blob, tag in rows:
        try:
            found.attachments.append(place.read(blob, tag))
        except _WRONG as error:
            found.say("attachments", False, error.message)
    return bool(rows)


def _signature(digest: Digest, check: signing.Check | None, found: _Checked) -> None:
    try:
        claims = evidence.claims_in(found.attachments, check)
    except _WRONG as error:
        found.say("signature", False, error.message)
        return
    who = signing.whom(check) if check else ""
    if check is None:
        give = "give --key or --certificate-identity to check"
        said = f"{len(claims)} found, {give}" if claims else "not signed"
        found.say("signature", None, said)
    elif digest in claims:
        found.say("signature", True, f"of {digest.short} by {who}")
    elif not claims:
        found.say("signature", False, "not signed")
    elif not any(claims):
        found.say("signature", False, f"{len(claims)} found, none by {who}{_faults(found, check)}")
    else:
        found.say("signature", False, f"by {who}, but for another image")


def _faults(found: _Checked, check: signing.Check) -> str:
    """Return why bundles do not count as an identity's signatures of the image."""
    reasons = dict[str, None]()
    for part in evidence.bundles_in(found.attachments):
        with suppress(*_WRONG):
            read = evidence.read_statement(part, check)
            if evidence.is_claim(read) and read.fault:
                reasons[read.fault] = None
    return f": {'; '.join([*reasons][:3])}" if reasons else ""


def _statements(image: Digest, check: signing.Check | None, found: _Checked) -> None:
    # Each counts once; the copy that this key signed is preferred.
    unique: dict[bytes, tuple[AttachmentPart, Statement]] = {}
    bundles = evidence.bundles_in(found.attachments)
    for part in (*evidence.statement_parts(found.attachments), *bundles):
        try:
            read = evidence.read_statement(part, check)
        except _WRONG as error:
            # A third party's bundle may be of an unknown kind.
            ok = None if evidence.is_bundle(part) else False
            found.say(f"statement {_short_type(part)}", ok, error.message)
            continue
        known = unique.get(read.content)
        if not evidence.is_claim(read) and (known is None or not known[1].signed):
            unique[read.content] = part, read
    rows, who = list(unique.values()), signing.whom(check) if check else "a key"
    found.stated += [read for _, read in rows if check is None or read.signed]
    lineage = trace(image, found.stated)
    for part, read in rows:
        name = f"statement {_short_type(part, read.predicate_type)}"
        # Third parties sign their own statements; ours must be signed by this key.
        ours, counts = read.is_ours, read.signed or check is None
        if why := withdrawn_in([read], image):
            by = "" if counts else f"somebody says so, not signed by {who}: "
            found.say("withdrawn", False if counts else None, f"{by}{why}")
            continue
        if counts and not lineage.holds(read):
            ok = False if ours or read.signed else None
            found.say(name, ok, f"{lineage.describe_unrelated(read)}, no evidence of this one")
        elif check is not None:
            ok = True if read.signed else (False if ours else None)
            said = f"signed by {who}" if read.signed else "not signed"
            envelope = evidence.is_bundle(part) or part.blob.media_type == signing.ENVELOPE_TYPE
            if envelope and not read.signed:
                said += f" by {who}: {read.fault}" if read.fault else f" by {who}{_CHANGED}"
            found.say(name, ok, said)


def _short_type(part: AttachmentPart, kind: str = "") -> str:
    words = (kind or part.annotations.get("predicateType", "")).rstrip("/").split("/")
    return "/".join(words[-2:]) or part.blob.digest.short


def _layers(image: Image, source: str, found: _Checked, progress: Progress) -> None:
    """Check the digest of every layer, and read the files of weight layers; a few at once."""
    try:
        weights = {layer.digest for layer in weights_of(image, source)}
    except _WRONG as error:
        found.say("roles", False, error.message)
        weights = set()
    total, done = sum(layer.size for layer in image.layers), 0

    def read(layer: Layer) -> tuple[str, dict[str, str]]:
        key = (layer.digest, layer.digest in weights)
        if key not in found.known:
            found.known[key] = _read_layer(layer, source, look_inside=key[1])
        fault, files = found.known[key]
        if not fault and layer.media_type in _TARS and layer.diff_id != layer.digest:
            fault = f"{source}: the configuration has a different digest for {layer.file}"
        return fault, files

    with ThreadPoolExecutor(_READERS) as pool:
        results = pool.map(read, image.layers)
        for number, (layer, (fault, files)) in enumerate(zip(image.layers, results, strict=True)):
            name = f"layer {number}"
            found.say(name, not fault, fault or f"{layer.digest.short} {layer.file}".rstrip())
            found.files.update(files)
            done += layer.size
            progress.advance(done, total, "bytes")


def _read_layer(layer: Layer, source: str, *, look_inside: bool) -> tuple[str, dict[str, str]]:
    """Return a layer's fault, or "", and if requested the digests of its files."""
    chunks = verified(layer.open(), blob_of(layer), source)
    try:
        if look_inside and layer.media_type in _TARS:
            files = _files(chunks)
            return "", {path.removeprefix("models/"): digest for path, digest in files}
        for _ in chunks:
            pass
    except (*_WRONG, tarfile.TarError, ValueError, EOFError) as error:
        return f"{layer.file or layer.digest.short}: {error}", {}
    is_model = layer.media_type.endswith((".raw", manifests.OLLAMA_MODEL))
    return "", {layer.file: layer.digest} if look_inside and is_model else {}


def _files(chunks: Iterator[bytes]) -> Iterator[tuple[str, str]]:
    stream, seen = ChunkFile(chunks), set[str]()
    with tarfile.open(
        fileobj=cast("IO[bytes]", stream), mode="r|", bufsize=_BUFFER, tarinfo=TarEntry
    ) as archive:
        while (entry := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # keep memory bounded
            content = archive.extractfile(entry) if entry.isreg() else None
            if content is None:
                continue
            # Normalized, because an engine would read a "./a" that follows "a".
            name = posixpath.normpath("/" + entry.name).lstrip("/")
            if name in seen:
                raise InputRefused(f"duplicate file {name[:200]!r}", hint="do not use the image")
            seen.add(name)
            state = hashlib.sha256()
            while piece := content.read(_BUFFER):
                state.update(piece)
            yield name, f"sha256:{state.hexdigest()}"
    stream.drain()


def key_path(text: str, flag: str = "--key") -> Path | None:
    """Return the path of a public key; raise UsageError if there is no such file."""
    if not text:
        return None
    refuse_key_text(text, flag)
    path, hint = Path(text).expanduser(), "give the PEM file of the public key"
    if "://" in text:
        hint = f"give a file: `cosign public-key --key {text[:200]} --outfile key.pub` writes it"
        raise UsageError(f"{flag} {text[:200]}: signatures are checked with a file", hint=hint)
    if not path.exists() or path.is_dir():
        why = "it is a folder" if path.is_dir() else "no such file"
        raise UsageError(f"{flag} {text}: {why}", hint=hint)
    return path
