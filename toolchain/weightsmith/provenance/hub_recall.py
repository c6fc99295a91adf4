"""Judges whether a commit on a model hub was made from something, by its record and its card.

Both are anyone's word. Each is believed if a key signed it with the model's files, as `push
--sign-key` does (OpenSSF Model Signing). A commit has weights alone: no engine, and no packages.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain

from weightsmith.core.errors import InputRefused
from weightsmith.core.ports import HubCommit
from weightsmith.core.safe_parse import parse, parse_yaml
from weightsmith.core.values import Digest, JsonValue
from weightsmith.evaluating.build_record import FILE as RECORD
from weightsmith.evaluating.build_record import BuildRecord
from weightsmith.provenance import signing
from weightsmith.provenance.model_signing import PREDICATE, SIGNATURE
from weightsmith.provenance.origins import Named, Wanted, known_as
from weightsmith.provenance.recall import UNCHECKED, AffectedImage, Judgement, because
from weightsmith.provenance.statements import Statement

CARD = "README.md"
READ = (CARD, RECORD, SIGNATURE)
"""The files that an answer needs."""
_FRONT = re.compile(r"---\r?\n(.*?)\r?\n---", re.DOTALL)
_VERDICT = re.compile(r"^Verdict: \*\*(passed|not proven)\*\*", re.MULTILINE)
_ROW = re.compile(
    r"^\| (base|adapter)[^|\n]* \| (?:\[([\w.-]+/[\w.-]+)\]\([^)\n]*\)|([^|\n]*)) "
    r"\| ([\w:.-]+)(?:, run ([^|\n]+))? \|$",
    re.MULTILINE,
)
"""Of a card's table: role, source on the hub or elsewhere, revision, training run."""
_NOT_THERE = ("engine", "cve_package")
"""Kinds that no commit is made from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Signed:
    """What a model's signature covers."""

    by: Mapping[str, set[str]] = field(default_factory=dict)
    """Card and record -> the keys that signed them; `""` for any, if none was given."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Every file that it names, by whomever -> SHA-256."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubRecall:
    """A question about commits on a hub."""

    wanted: Wanted
    keys: Mapping[str, signing.Check]
    """Name -> verifier; without any, signatures are not checked."""

    def judge(self, one: HubCommit) -> Judgement:
        """Return whether a commit was made from it."""
        text = one.files.get(CARD, b"").decode("utf-8", "replace")
        front, faults = _front(text), list[str]()
        tags, record = front.get("tags"), _record(one, faults)
        ours = record is not None or (isinstance(tags, list) and "weightsmith" in tags)
        if self.wanted.kind in _NOT_THERE:
            return Judgement(ours=ours, faults=tuple(faults))
        if self.wanted.kind == "builder" and ours and not record:
            faults.append(f"it has no {RECORD}, and a card does not say what made it")
        named = {CARD: [*_named(self.wanted.kind, front, text)]}
        named[RECORD] = [*_recorded(self.wanted.kind, record)] if record else []
        signed = self._signed(one)
        answers = {name: said for name in named if (said := because(named[name], self.wanted))}
        if not answers:
            return Judgement(ours=ours, faults=tuple(faults))
        believed = {name: said for name, said in answers.items() if signed.by.get(name)}
        trusted, told = bool(believed), believed or answers
        shown = _VERDICT.search(text) if ours and CARD in told else None
        verdict = record.verdict if record and RECORD in told else ""
        signers = {key for name in believed for key in signed.by.get(name, ())}
        row = AffectedImage(
            reference=f"hf://{one.repository}@{one.commit}",
            digest=one.commit,
            form="hub",
            verdict=verdict or (shown[1] if shown else ""),
            platforms=(),
            built=one.created or None,
            dated="hub" if one.created else "",
            signed_by=tuple(sorted(signers - {""})),
            chain=self._chain(signed, told, record),
            because=tuple(dict.fromkeys(chain(*told.values()))),
        )
        return Judgement(ours=True, row=row, trusted=trusted, faults=tuple(faults))

    def _signed(self, one: HubCommit) -> _Signed:
        """Return which keys signed card and record, `""` without keys; and what anyone signed."""
        data, by = one.files.get(SIGNATURE), dict[str, set[str]]()
        if data is None:
            return _Signed()
        try:
            whoever = _covered(signing.open_bundle(data, None))
            checks = self.keys.items()
            reads = {key: signing.open_bundle(data, check) for key, check in checks}
        except InputRefused:
            return _Signed()
        for name in (CARD, RECORD):
            if name not in one.files or whoever.get(name) != Digest.of(one.files[name]).hex:
                continue
            by[name] = {key for key, read in reads.items() if read.signed} if self.keys else {""}
        return _Signed(by=by, files=whoever)

    def _chain(self, signed: _Signed, told: Collection[str], record: BuildRecord | None) -> str:
        """Return what is known of where it comes from: it has no statements of the steps."""
        if not any(signed.by.get(name) for name in told):
            sealed = any(name in signed.by for name in told)
            return "not signed by a key that was given" if sealed and self.keys else "unsigned"
        if RECORD in told and record and record.artifact:
            files = {file.path: file.digest.hex for file in record.artifact.files}
            if other := sorted(
                path for path, hex_ in files.items() if signed.files.get(path) != hex_
            ):
                return f"broken at {other[0]}, which is not the file that {RECORD} names"
        end = f"the {'record' if RECORD in told else 'card'} is signed with the files"
        return end if self.keys else f"{end}, {UNCHECKED}"


def _covered(read: Statement) -> dict[str, str]:
    """Return the files that a model's signature covers, with their SHA-256.

    None of a statement of another kind: it may list files that its signer never held for a model's.
    """
    rows = read.predicate.get("resources") if read.predicate_type == PREDICATE else None
    return {
        str(row.get("name")): str(row.get("digest"))
        for row in (rows if isinstance(rows, list) else ())
        if isinstance(row, dict)
    }


def _record(one: HubCommit, faults: list[str]) -> BuildRecord | None:
    """Return a commit's record, if it has one that can be read."""
    if (data := one.files.get(RECORD)) is None:
        return None
    try:
        return BuildRecord.from_json(parse(data))
    except ValueError as error:
        faults.append(f"its {RECORD} cannot be read: {error}")
        return None


def _recorded(kind: str, record: BuildRecord) -> Iterator[Named]:
    """Yield what a record names of one kind."""
    if kind == "base":
        base = record.base
        yield known_as("base", "", base.source, base.pin, base.digest)
    elif kind == "license":
        said = record.base.license
        yield Named(role="license", names=frozenset({said, said.upper()} - {""}))
    elif kind == "builder":
        yield Named(role="weightsmith", names=frozenset({"weightsmith"}), version=record.made_by)
        for stage, given in record.inputs.items():
            if isinstance(given, dict) and "builder" in given:
                names = (str(given.get("quantizer", stage)), str(given["builder"]))
                yield known_as(f"builder of {stage}", "", *names)
    for place, one in enumerate(record.adapters):
        if kind == "adapter":
            texts = (one.source, one.pin, one.digest)
            yield known_as(f"adapter:{place}", one.version, *texts)
        elif kind == "dataset_run":
            yield known_as(f"adapter:{place}", "", one.run_id)
    if kind == "dataset_run":
        yield from _datasets(record)


def _datasets(record: BuildRecord) -> Iterator[Named]:
    """Yield the texts and questions that made or judged a model."""
    texts = record.quality.calibration if record.quality else None
    if texts:
        yield known_as("calibration", "", texts.source, texts.digest)
    for stage, given in record.inputs.items():
        for key in ("calibration", "questions"):
            if isinstance(given, dict) and isinstance(given.get(key), str):
                yield known_as(f"{key} of {stage}", "", given[key])


def _front(text: str) -> Mapping[str, JsonValue]:
    """Return a card's metadata; nothing of one that has none."""
    found = _FRONT.match(text)
    try:
        front = parse_yaml(found[1]) if found else None
    except ValueError:
        front = None
    return front if isinstance(front, dict) else {}


def _named(kind: str, front: Mapping[str, JsonValue], text: str) -> Iterator[Named]:
    """Yield what a card names of one kind.

    The hub's `base_model` does not tell bases from adapters, so each may be either.
    """
    if kind == "license":
        names = [front.get("license"), front.get("license_name")]
        said = {one for one in names if isinstance(one, str)}
        yield Named(role="license", names=frozenset(said | {one.upper() for one in said}))
        return
    rows = [row.groups(default="") for row in _ROW.finditer(text)]
    for role, hub, other, revision, run in rows:
        source = f"hf://{hub}" if hub else other.strip()
        if kind == "dataset_run":
            yield known_as(role, "", run.strip())
        elif role == kind:
            yield known_as(role, "", source, f"{source}@{revision}", revision)
    told = front.get("base_model")
    listed = told if isinstance(told, list) else [told]
    if kind != "dataset_run" and not rows:
        yield from (known_as("base_model", "", f"hf://{one}") for one in listed if one)
