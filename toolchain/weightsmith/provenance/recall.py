"""Judges whether an image was made from something, and who says so.

What the keys signed about the image is believed, and labels that such a signature covers. All else
is only reported: anyone who can write to a repository can attach a statement or push a label. Of
the image, only manifest, configuration and small attachments are read, never weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from weightsmith.core.errors import Altered, InputRefused
from weightsmith.core.json_objects import JsonObject
from weightsmith.core.ports import IdentityCheck
from weightsmith.core.safe_parse import PART, SMALL, parse
from weightsmith.core.values import Digest, Json
from weightsmith.oci.attachments import Attachment, AttachmentPart
from weightsmith.oci.image import Image
from weightsmith.provenance import evidence, signing
from weightsmith.provenance.bills import MEDIA_TYPE
from weightsmith.provenance.chain import broken_at, trace
from weightsmith.provenance.labels import PREFIX, VERDICT
from weightsmith.provenance.origins import IN_BILLS, Named, Wanted, origins
from weightsmith.provenance.statements import TEST_RESULT, Statement, utc_time
from weightsmith.provenance.withdrawal import withdrawn_in

BILLS = (MEDIA_TYPE, evidence.SPDX_TYPE)
STATED = (*evidence.STATEMENTS, signing.BUNDLE_TYPE)
"""Artifact types, or their beginnings, that are always read."""
_CACHED_PART, _CACHED_PARTS = 256 << 10, 20_000
"""Bytes of a part that is kept in case another image has it too, and how many are kept."""
_SHOWN = 5
_EPOCH = "1970-01-01T00:00:00"
_CREATED = "org.opencontainers.image.created"
UNCHECKED = "signature not checked: give --key"


@dataclass(frozen=True, slots=True, kw_only=True)
class AffectedImage(JsonObject):
    """An image, index, volume, artifact or hub commit that was made from what was asked for."""

    reference: str
    digest: str
    form: str
    """`image`, another kind as `build --kind` names it, `index`, or `hub` for a commit."""
    verdict: str
    platforms: tuple[str, ...]
    built: str | None
    """When it was made, or as `dated` says the earliest time by which it was; null if unknown."""
    signed_by: tuple[str, ...]
    """The keys, as they were given."""
    chain: str
    """`whole`, or where the chain from the image back to its sources breaks."""
    because: tuple[str, ...]
    """What of it is the value."""
    tags: tuple[str, ...] = ()
    dated: str = ""
    """Where `built` is from: `configuration`; `statement`, of its build or of a test, or
    `transparency log`, both signed; or `annotation` of what is attached, or `hub`, which nobody
    signed."""
    withdrawn: str | None = None
    """Why it was withdrawn; null if it was not."""
    members: tuple[str, ...] = ()
    """Digests of an index's images that are in the answer."""
    withdrawn_members: tuple[str, ...] = ()
    """Those of them that were withdrawn, or list one that was; `verify` refuses the index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What was found of one image."""

    ours: bool
    """Whether it says that weightsmith made it."""
    row: AffectedImage | None = None
    trusted: bool = False
    faults: tuple[str, ...] = ()
    """What of it is damaged, false, or missing, so that the answer may be wrong."""


@dataclass(frozen=True, slots=True)
class _Read:
    """One statement, and the keys that signed it."""

    statement: Statement
    keys: frozenset[str]
    sealed: bool
    """Whether it is in an envelope, signed by whomever."""
    logged: str = ""
    """When a transparency log got it, if an identity that is believed signed it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """A question about many images; it may be asked from several threads."""

    wanted: Wanted
    keys: Mapping[str, signing.Check]
    """Name -> verifier; without any, signatures are not checked."""
    _known: dict[tuple[Digest, str], _Read] = field(default_factory=dict)
    """By digest and media type: who attaches the same bytes as another kind changes no answer."""
    _bills: dict[Digest, tuple[Named, ...]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The artifact types, or their beginnings, that an answer needs."""
        return (*STATED, *(BILLS if self.wanted.kind in IN_BILLS else ()))

    def judge(
        self,
        image: Image,
        attached: Sequence[Attachment],
        signatures: Callable[[], Sequence[Attachment]],
        reference: str,
        tags: Sequence[str],
    ) -> Judgement:
        """Return whether an image was made from it, by what is attached to the image.

        `signatures` reads further attachments. They are needed if no statement about the image
        itself is signed, which covers its labels as a signature does.
        """
        faults = list[str]()
        mine = [one for one in attached if not _is_foreign(one, image.digest, faults)]
        read = [*self._statements(mine, faults)]
        believed = [one.statement for one in read if (one.keys if self.keys else one.sealed)]
        every = [one.statement for one in read]
        own = trace(image.digest, believed).own
        if own is None:
            mine += [one for one in signatures() if not _is_foreign(one, image.digest, faults)]
        claimed = self._claims(image.digest, mine, faults)
        covered = bool(claimed) or own is not None
        signers = claimed | {
            key
            for one in read
            if own is not None and one.statement.document == own.document
            for key in one.keys
        }
        found = self._found(image, believed, mine, labels=covered, bills=False)
        trusted = bool(found)
        found = found or self._found(image, every, mine, labels=True, bills=True)
        stated = trace(image.digest, every).own is not None
        ours = stated or any(key.startswith(PREFIX) for key in image.labels)
        if ours and not found and (why := self._cannot_say(mine, stated=stated)):
            faults.append(why)
        if not found:
            return Judgement(ours=ours, faults=tuple(faults))
        sealed = any(one.sealed for one in read) or bool(evidence.signatures_in(mine))
        chain = self._chain(image, believed if trusted else every, trusted=trusted, sealed=sealed)
        told = [one for one in read if (one.keys if self.keys else one.sealed)]
        built, dated = _dated(image, told, mine)
        row = AffectedImage(
            reference=reference,
            digest=image.digest,
            form=image.labels.get(f"{PREFIX}kind", "image"),
            verdict=image.labels.get(VERDICT, ""),
            platforms=(image.platform,) if image.platform else (),
            built=built,
            dated=dated,
            signed_by=tuple(sorted(signers - {""})),
            chain=chain,
            because=found,
            tags=tuple(tags),
            withdrawn=withdrawn_in(believed, image.digest),
        )
        return Judgement(ours=True, row=row, trusted=trusted, faults=tuple(faults))

    def signers_of(self, digest: Digest, attached: Sequence[Attachment]) -> tuple[set[str], str]:
        """Return the keys that signed an index (`""` is whoever, without keys), and why not."""
        faults = list[str]()
        mine = [one for one in attached if not _is_foreign(one, digest, faults)]
        return self._claims(digest, mine, faults), "; ".join(faults)

    def withdrawn(self, digest: Digest, attached: Sequence[Attachment]) -> str | None:
        """Return why an index was withdrawn, or None."""
        read = self._statements(attached, [])
        told = [one.statement for one in read if (one.keys if self.keys else one.sealed)]
        return withdrawn_in(told, digest)

    def _found(
        self,
        image: Image,
        stated: Sequence[Statement],
        attached: Sequence[Attachment],
        *,
        labels: bool,
        bills: bool,
    ) -> tuple[str, ...]:
        """Return what of an image is the value; `labels` and `bills` that no signature covers."""
        lineage = trace(image.digest, stated)
        about = [one for one in stated if lineage.holds(one)]
        rows: Iterator[Named]
        if self.wanted.kind in IN_BILLS:
            documents = [
                one
                for one in evidence.documents_in(attached)
                if one.artifact_type in BILLS and (bills or lineage.names(one))
            ]
            rows = (named for one in documents for named in self._billed(one))
        else:
            said = image.labels if labels else {}
            rows = origins(self.wanted.kind, said, about, own=lineage.own)
        return because(rows, self.wanted)

    def _billed(self, document: Attachment) -> tuple[Named, ...]:
        """Return what a bill of materials lists of the kind that is asked for."""
        digest = evidence.document_digest(document)
        if digest not in self._bills:
            bills = list[Json]()
            for part in document.parts[:1]:
                try:
                    bills.append(parse(part.read(), largest=PART))
                except ValueError:
                    continue
            self._bills[digest] = tuple(origins(self.wanted.kind, {}, (), bills))
        return self._bills[digest]

    def _cannot_say(self, attached: Sequence[Attachment], *, stated: bool) -> str:
        """Return why an image that does not match may be affected all the same; or empty."""
        if self.wanted.kind in IN_BILLS:
            has = any(one.artifact_type in BILLS for one in attached)
            return "" if has else "it has no bill of materials, so what is in it is not known"
        if self.wanted.kind == "builder" and not stated:
            return "it has no statement, so what made it is not known"
        return ""

    def _statements(self, attached: Sequence[Attachment], faults: list[str]) -> Iterator[_Read]:
        parts = (*evidence.statement_parts(attached), *evidence.bundles_in(attached))
        telling = [one for one in parts if one.annotations.get("predicateType") != TEST_RESULT]
        for part in telling or parts:  # a test result says nothing that is asked
            try:
                yield self._statement(part)
            except (InputRefused, Altered) as error:
                if not evidence.is_bundle(part):  # a third party's may be of an unknown kind
                    faults.append(error.message)

    def _statement(self, part: AttachmentPart) -> _Read:
        where = part.blob.digest, part.blob.media_type
        if known := self._known.get(where):
            return known
        if part.blob.size > SMALL:
            raise InputRefused(f"a statement has {part.blob.size} bytes", hint="do not trust it")
        data = part.read()
        again = AttachmentPart.of_bytes(data, part.blob.media_type)
        plain = evidence.read_statement(again, None)
        keys = {k for k, check in self.keys.items() if evidence.read_statement(again, check).signed}
        sealed = evidence.is_bundle(part) or part.blob.media_type == signing.ENVELOPE_TYPE
        named = any(isinstance(self.keys[key], IdentityCheck) for key in keys)
        read = _Read(plain, frozenset(keys), sealed, signing.logged_at(data) if named else "")
        if len(data) <= _CACHED_PART:
            with self._lock:
                if len(self._known) >= _CACHED_PARTS:
                    self._known.clear()
                self._known[where] = read
        return read

    def _claims(
        self, digest: Digest, attached: Sequence[Attachment], faults: list[str]
    ) -> set[str]:
        """Return the keys whose signature of the image is there; without keys, `""` for any."""
        try:
            if not self.keys:
                return {""} if evidence.claims_in(attached, None) else set()
            return {
                key
                for key, check in self.keys.items()
                if digest in evidence.claims_in(attached, check)
            }
        except (InputRefused, Altered) as error:
            faults.append(error.message)
            return set()

    def _chain(
        self, image: Image, stated: Sequence[Statement], *, trusted: bool, sealed: bool
    ) -> str:
        broken = broken_at(image, stated)
        end = f"broken at {broken}" if broken else "whole"
        if trusted:
            return end if self.keys else f"{end}, {UNCHECKED}"
        why = "not signed by a key that was given" if sealed and self.keys else "unsigned"
        return f"{why}, {end}" if broken else why


def _is_foreign(one: Attachment, image: Digest, faults: list[str]) -> bool:
    """Return whether what was listed for an image names another as its subject."""
    if not one.subject.size or one.subject.digest == image:
        return False
    faults.append(
        f"what is attached to it ({one.blob.digest[7:19]}) is about another image"
        f" ({one.subject.digest[7:19]}) and was left out"
    )
    return True


def because(rows: Iterable[Named], wanted: Wanted) -> tuple[str, ...]:
    """Return what of the rows is the value, for people."""
    return tuple(dict.fromkeys(_said(row) for row in rows if wanted.matches(row)))[:_SHOWN]


def _said(row: Named) -> str:
    names = sorted(row.names, key=lambda name: (name.startswith("sha256:"), -len(name), name))
    version = f" {row.version}" if row.version else ""
    return f"{row.role}: {names[0] if names else ''}{version}"


def _dated(
    image: Image, told: Sequence[_Read], attached: Sequence[Attachment]
) -> tuple[str | None, str]:
    """Return when an image was made, and who says so; the best source that there is.

    Builds that can be repeated have no time in their configuration. Whatever was said of an image
    was said after it was made, so the earliest time is the nearest.
    """
    created = image.settings.get("created")
    if isinstance(created, str) and not created.startswith(_EPOCH):
        return created, "configuration"
    about = [one for one in told if image.digest in one.statement.subjects.values()]
    if times := [time for one in about if (time := one.statement.time)]:
        return min(times), "statement"
    if times := [one.logged for one in about if one.logged]:
        return min(times), "transparency log"
    noted = (one.annotations.get(_CREATED, "") for one in attached)
    times = [time for one in noted if (time := utc_time(one))]
    return (min(times), "annotation") if times else (None, "")
