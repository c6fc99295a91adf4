"""Judges whether a commit on a model hub was made from something, by its card and its signature.

A card is anyone's word. It is believed if a key signed the model's files, and the card with them,
as `push --sign-key` does (OpenSSF Model Signing).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from weightsmith.core.errors import InputRefused
from weightsmith.core.ports import HubCommit
from weightsmith.core.safe_parse import parse_yaml
from weightsmith.core.values import Digest, Json
from weightsmith.provenance import signing
from weightsmith.provenance.model_signing import SIGNATURE
from weightsmith.provenance.origins import Named, Wanted, known_as
from weightsmith.provenance.recall import UNCHECKED, AffectedImage, Judgement, because
from weightsmith.provenance.statements import Statement

CARD = "README.md"
READ = (CARD, SIGNATURE)
"""The files that an answer needs."""
_FRONT = re.compile(r"---\r?\n(.*?)\r?\n---", re.DOTALL)
_VERDICT = re.compile(r"^Verdict: \*\*(passed|not proven)\*\*", re.MULTILINE)
_ROW = re.compile(
    r"^\| (base|adapter)[^|\n]* \| (?:\[([\w.-]+/[\w.-]+)\]\([^)\n]*\)|([^|\n]*)) "
    r"\| ([\w:.-]+)(?:, run ([^|\n]+))? \|$",
    re.MULTILINE,
)
"""Of a card's table: role, source on the hub or elsewhere, revision, training run."""
_OF_A_CARD = ("adapter", "base", "license", "dataset_run")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubRecall:
    """A question about commits on a hub."""

    wanted: Wanted
    keys: Mapping[str, signing.Check]
    """Name -> verifier; without any, signatures are not checked."""

    def judge(self, one: HubCommit) -> Judgement:
        """Return whether a commit was made from it."""
        text = one.files.get(CARD, b"").decode("utf-8", "replace")
        front = _front(text)
        tags = front.get("tags")
        ours = isinstance(tags, list) and "weightsmith" in tags
        if self.wanted.kind not in _OF_A_CARD:
            why = f"a card does not say its {self.wanted.kind.replace('_', ' ')}"
            return Judgement(ours=ours, faults=(why,) if ours else ())
        found = because(_named(self.wanted.kind, front, text), self.wanted)
        if not found:
            return Judgement(ours=ours)
        signers, sealed = self._signers(one)
        verdict = _VERDICT.search(text)
        row = AffectedImage(
            reference=f"hf://{one.repository}@{one.commit}",
            digest=one.commit,
            form="hub",
            verdict=verdict[1] if verdict and ours else "",
            platforms=(),
            built=one.created or None,
            dated="hub" if one.created else "",
            signed_by=tuple(sorted(signers - {""})),
            chain=self._chain(signed=bool(signers), sealed=sealed),
            because=found,
        )
        return Judgement(ours=True, row=row, trusted=bool(signers))

    def _signers(self, one: HubCommit) -> tuple[set[str], bool]:
        """Return the keys that signed the card, `""` without keys; and whether anyone signed."""
        data, card = one.files.get(SIGNATURE), one.files.get(CARD)
        if data is None or card is None:
            return set(), False
        found = set[str]()
        try:
            for key, check in self.keys.items():
                read = signing.open_bundle(data, check)
                if read.signed and Digest.of(card).hex in _covered(read):
                    found.add(key)
            whoever = Digest.of(card).hex in _covered(signing.open_bundle(data, None))
        except InputRefused:
            return set(), False
        return found if self.keys else ({""} if whoever else set()), whoever

    def _chain(self, *, signed: bool, sealed: bool) -> str:
        """Return what is known of where it comes from: a card has no statements of the steps."""
        if signed:
            end = "the card is signed with the files"
            return end if self.keys else f"{end}, {UNCHECKED}"
        return "not signed by a key that was given" if sealed and self.keys else "unsigned"


def _covered(read: Statement) -> set[str]:
    """Return the digest of the card that a model's signature covers."""
    rows = read.predicate.get("resources")
    return {
        str(row.get("digest"))
        for row in (rows if isinstance(rows, list) else ())
        if isinstance(row, dict) and row.get("name") == CARD
    }


def _front(text: str) -> Mapping[str, Json]:
    """Return a card's metadata; nothing of one that has none."""
    found = _FRONT.match(text)
    try:
        front = parse_yaml(found[1]) if found else None
    except ValueError:
        front = None
    return front if isinstance(front, dict) else {}


def _named(kind: str, front: Mapping[str, Json], text: str) -> Iterator[Named]:
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
