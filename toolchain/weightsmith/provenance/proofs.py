"""Proofs that an image answers on a device as it was tested: statements, and who asks for them.

A proof is two in-toto statements about (digest, device): what the replay set showed, and SLSA's
summary of it, which policies of clusters read.
https://slsa.dev/spec/v1.1/verification_summary
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from weightsmith import __version__
from weightsmith.core.devices import Devices, is_device, telling_words
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.json_objects import JsonObject
from weightsmith.core.values import Blob, Digest, Json, JsonValue, plain
from weightsmith.evaluating.replay import LARGEST, REPLAY, ReplaySet, read_replay
from weightsmith.evaluating.replaying import Replayed
from weightsmith.oci.attachments import AttachmentPart
from weightsmith.oci.image import Image
from weightsmith.provenance import statements
from weightsmith.provenance.chain import Check
from weightsmith.provenance.evidence import read_statement
from weightsmith.provenance.labels import REPLAY_DIGEST
from weightsmith.provenance.signing import Check as KeyCheck
from weightsmith.provenance.statements import LEVEL, VSA, Statement, image_resource, statement
from weightsmith.serving.devices import GPUS

REPLAYED = f"{statements.PROJECT}/replay/v1"
"""Predicate type of what a replay set showed."""
_RULE = f"{statements.PROJECT}/docs/reference/replay.md"
_SKEW = timedelta(minutes=10)
"""By how much the clocks of a node and of who verifies may differ."""
_UNSTATED = ("verdict", "hint")
_TAR = 64 << 10
"""Bytes of a layer's tar beside its file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofDevice(JsonObject):
    """What a server ran on when it was asked."""

    name: str
    """`cpu`, or a GPU as plans name it, such as `nvidia-l4`."""
    model: str = ""
    """The CPU's or GPU's own name."""
    count: int = 1
    """GPUs, or CPUs that could be used."""
    driver: str = ""
    cuda: str = ""
    """The newest version of CUDA that the driver runs."""
    node_type: str = ""
    """The kind of node, as the cluster's labels name it."""

    def fits(self, wanted: str) -> bool:
        """Return whether it is the wanted device, or a node of the wanted type."""
        word = wanted.strip().lower()
        if word in {self.name.lower(), self.node_type.lower()} - {""}:
            return True
        return is_device(wanted, f"{self.name} {self.model}".replace("-", " "))


def device_of(found: Devices | None, name: str = "", node_type: str = "") -> ProofDevice:
    """Return the device by what a machine says, or by the name that the user gives."""
    if found is None:
        return ProofDevice(name=name, node_type=node_type)
    model, count = (found.gpus[0], len(found.gpus)) if found.gpus else (found.cpu, found.cpus)
    known = name or (gpu_name(model) if found.gpus else "cpu")
    return ProofDevice(name=known, model=model, count=count, node_type=node_type)


def gpu_name(model: str) -> str:
    """Return a GPU's name as plans have it; of an unknown one, its own in lower case."""
    fitting = [
        one.name
        for one in GPUS.values()
        if any(is_device(name.replace("-", " "), model) for name in (one.name, *one.aliases))
    ]
    longest = max(fitting, key=lambda name: len(telling_words(name)), default="")
    return longest or re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")


def replay_in(image: Image, where: str) -> ReplaySet:
    """Return an image's replay set, held against the digest in its label.

    Raises InputRefused if it has none, if only its digests are there, or for another set than the
    one that the label names.
    """
    stated = require_stated(image.labels, where)
    name = REPLAY.lstrip("/")
    for layer in reversed(image.layers):
        if layer.file == name and layer.size <= LARGEST + _TAR:
            data = _file(b"".join(layer.open()), name)
            made = read_replay(data, f"{where}:{REPLAY}")
            return held_to(made, stated, f"{where}:{REPLAY}")
    raise InputRefused(f"{where} has no file {REPLAY}, which its label names", hint=_DAMAGED)


def require_stated(labels: Mapping[str, str], where: str) -> str:
    """Return the digest of a replay set in an image's labels; raises InputRefused without one."""
    if stated := labels.get(REPLAY_DIGEST, ""):
        return stated
    raise InputRefused(
        f"{where} has no replay set",
        hint="builds give one to images whose questions are answered in words; build it again"
        " without `replay: none`",
    )


_DAMAGED = "the image is damaged; push or write it again"


def held_to(made: ReplaySet, stated: str, where: str) -> ReplaySet:
    """Return a set; raises InputRefused if it is another than the one of that digest."""
    if made.digest != stated:
        raise InputRefused(
            f"{where} is not the image's replay set: it is {made.digest[7:19]}, and the image's"
            f" label names {stated[7:19]}",
            hint="it was altered, or is another image's",
        )
    return made


def _file(data: bytes, name: str) -> bytes:
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            content = archive.extractfile(name)
            return content.read(LARGEST + 1) if content else b""
    except (tarfile.TarError, KeyError, EOFError, OSError) as error:
        raise InputRefused(f"the layer with {name} is damaged: {error}", hint=_DAMAGED) from None


def proof_of(
    image: Blob,
    name: str,
    wanted: ReplaySet,
    device: ProofDevice,
    replayed: Replayed,
    facts: JsonValue,
    when: datetime,
) -> tuple[Statement, Statement]:
    """Return the statement of what was shown, and SLSA's summary of it.

    `name` is the image's repository, `facts` what else is recorded of the server.
    """
    resource = image_resource(image)
    noted = statements.Resource(
        name=resource.name,
        digest=resource.digest,
        media_type=resource.media_type,
        annotations={"device": device.name, "model": device.model, "node_type": device.node_type},
    )
    stamp = when.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    shown = statement(
        [noted],
        REPLAYED,
        {
            "verdict": replayed.verdict,
            "time": stamp,
            "device": device.to_json(),
            "replay": {"sha256": wanted.digest.hex},
            "server": facts,
            **{key: value for key, value in plain(replayed).items() if key not in _UNSTATED},
        },
    )
    passed = replayed.verdict == "proven"
    levels = [f"{LEVEL}_ON_{one}" for one in (device.name, device.node_type) if one]
    summary = statement(
        [noted],
        VSA,
        {
            "verifier": {
                "id": f"{statements.PROJECT}@{__version__}",
                "version": {"weightsmith": __version__},
            },
            "timeVerified": stamp,
            "resourceUri": f"pkg:oci/{name.rpartition('/')[2]}@{image.digest}",
            "policy": {"uri": _RULE, "digest": {"sha256": wanted.digest.hex}},
            "inputAttestations": [
                {"uri": REPLAYED, "digest": {"sha256": Digest.of(shown.content).hex}}
            ],
            "verificationResult": "PASSED" if passed else "FAILED",
            "verifiedLevels": [LEVEL, *levels] if passed else ["FAILED"],
            "slsaVersion": "1.1",
        },
    )
    return shown, summary


def check_proven(
    wanted: str,
    image: Digest,
    parts: Iterable[AttachmentPart],
    check: KeyCheck,
    now: datetime,
) -> Check:
    """Return whether a key signed that this image is proven on the wanted device.

    Of several summaries the newest counts, since a new driver may answer otherwise than the one
    before. What was found instead is said: nothing, another device, another key, no signature, a
    failed proof, or one from a clock that is ahead.
    """
    reasons, newest = list[str](), list[tuple[datetime, bool, str]]()
    for part in parts:
        try:
            read = read_statement(part, check)
        except InputRefused:
            continue
        if read.predicate_type != VSA or image not in read.digests:
            continue
        device = _device(read, image)
        where, fault = device.model or device.name or "a device without a name", ""
        differs = read.predicate.get("verificationResult") != "PASSED"
        when, unknown = _time(read, now)
        if not device.fits(wanted):
            fault = "another device"
        elif not read.signed:
            fault = "not signed by this key"
        elif differs:
            # One without a time may be the newest.
            newest.append((when or now, True, f"{where}: its answers were different"))
        elif not _is_of_replay(read):
            fault = "a summary of something else"
        elif when is None:
            fault = unknown
        else:
            newest.append((when, False, f"{where} at {read.predicate.get('timeVerified')}"))
        reasons += [f"{where}: {fault}"] if fault else []
    if newest:
        _, differs, found = max(newest)
        return Check(name=f"proven on {wanted}", ok=not differs, found=found)
    found = "; ".join(sorted(set(reasons))[:5]) or "no proof is attached"
    return Check(name=f"proven on {wanted}", ok=False, found=found)


def _device(read: Statement, image: Digest) -> ProofDevice:
    """Return the device that a summary names beside an image."""
    rows = read.document.get("subject")
    named = (
        row.get("annotations")
        for row in (rows if isinstance(rows, list) else ())
        if isinstance(row, dict) and row.get("digest") == {"sha256": image.hex}
    )
    notes: Json = next(named, None)
    texts = {
        key: value[:200]
        for key, value in (notes.items() if isinstance(notes, dict) else ())
        if isinstance(value, str)
    }
    return ProofDevice(
        name=texts.get("device", ""),
        model=texts.get("model", ""),
        node_type=texts.get("node_type", ""),
    )


def _is_of_replay(read: Statement) -> bool:
    levels = read.predicate.get("verifiedLevels")
    return isinstance(levels, list) and LEVEL in levels


def _time(read: Statement, now: datetime) -> tuple[datetime | None, str]:
    """Return when a summary was made; None and why if it does not say it, or cannot be right."""
    try:
        when = datetime.fromisoformat(str(read.predicate.get("timeVerified")))
    except ValueError:
        return None, "it has no time"
    if when.tzinfo is None:
        return None, "its time has no zone"
    if when > now + _SKEW:
        return None, f"its time is ahead of this clock: {when.isoformat()}"
    return when, ""


def check_wanted(wanted: Sequence[str], *, has_key: bool) -> None:
    """Raise UsageError for a device without words, or without a key to check its proof with."""
    for one in wanted:
        if not one.strip():
            raise UsageError("--proven-on is empty", hint="for example --proven-on nvidia-l4")
    if wanted and not has_key:
        raise UsageError(
            "--proven-on needs a key: anyone can attach a proof",
            hint="give --key, or --proof-key for the key that `prove --key` signed with",
        )
