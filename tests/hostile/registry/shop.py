"""Two images of one key, and what anybody may hang on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from weightsmith.api.commands.rebase import rebase_image
from weightsmith.api.commands.requests import RebaseCommand
from weightsmith.api.commands.verify import verify_image
from weightsmith.core.errors import CheckFailed
from weightsmith.core.ports import Silent
from weightsmith.core.values import Blob, Score
from weightsmith.oci.attachments import Attachment, AttachmentPart
from weightsmith.oci.locations import RegistryLocation
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.outside.signer import open_signer
from weightsmith.provenance import signing, statements
from weightsmith.provenance.attest import test_result as result_of
from weightsmith.provenance.evidence import (
    Evidence,
    read_attached,
    read_statement,
    statement_parts,
)
from weightsmith.provenance.sealing import attach
from weightsmith.provenance.statements import Statement

from tests.fakes.baking import bake, make_model
from tests.fakes.memory import memory_tools
from tests.fakes.registry import FakeRegistry


@dataclass
class Shop:
    """Two images that one key made; each differs from the other in its weights."""

    fake: FakeRegistry
    client: Registry
    key: Path
    public: Path
    base: str
    folder: Path

    def bake(self, name: str, key: Path | None = None, weights: bytes = b"") -> str:
        model = make_model(self.folder / name)
        (model / "tiny.gguf").write_bytes(b"GGUF" + (weights or name.encode()) * 1000)
        reference = f"{self.fake.host}/team/{name}:1"
        bake(self.client, model, self.base, key or self.key, push=reference)
        return reference

    def place(self, name: str) -> RegistryLocation:
        return RegistryLocation(self.client, Reference.parse(name))

    def blob(self, name: str) -> Blob:
        return self.place(name).image("linux/amd64").manifest_blob

    def state(self, name: str, *told: Statement, key: Path | None = None) -> None:
        """Hang statements on an image, signed."""
        signer = open_signer(str(key or self.key))
        attach(Evidence(statements=told), self.blob(name), "team", self.place(name), signer)

    def rebase(self, name: str, key: Path | None = None) -> str:
        """Move an image to the other base; return its new name."""
        onto, to = self.base[:-1] + "2", f"{self.fake.host}/team/app:2"
        request = RebaseCommand(source=name, onto=onto, to=to, smoke=False)
        tools = memory_tools(self.folder, registry=self.client, key=key or self.key)
        rebase_image(request, tools)
        return to

    def hang(self, name: str, kind: str, *parts: AttachmentPart, **notes: str) -> None:
        """Hang something on an image that nobody signed."""
        made = Attachment(
            artifact_type=kind, subject=self.blob(name), parts=parts, annotations=notes
        )
        self.place(name).attach(made)

    def plant(self, name: str, *told: Statement, key: Path | None = None) -> None:
        """Hang statements on an image as somebody may who has no key but found them signed."""
        signer = open_signer(str(key or self.key))
        for one in told:
            envelope = signing.sign_statement(one, signer)
            part = signing.envelope_part(envelope, one.predicate_type)
            self.hang(name, part.blob.media_type, part)

    def stated(self, name: str, public: Path | None = None) -> list[Statement]:
        """Return what hangs on an image as statements, each with whether the key signed it."""
        parts = statement_parts(read_attached(self.place(name), self.blob(name).digest))
        check = signing.read_public_key(public or self.public)
        return [read_statement(part, check) for part in parts]

    def rows(self, name: str, *, key: bool = True) -> dict[str, tuple[bool | None, str]]:
        """Return each check of `verify`; of several with one name, the worst."""
        try:
            found = verify_image(name, self.public if key else None, self.client, Silent())
        except CheckFailed as error:
            found = error.details
        order = sorted(found["checks"], key=lambda row: row["ok"] is False)
        return {row["check"]: (row["ok"], row["found"]) for row in order}


def passed(image: Blob, *more: statements.Resource, result: str = "PASSED") -> Statement:
    told = result_of({"image": Score(score=1.0, n=9, metric="exact")}, 0.0, 0.0, ())
    about = [statements.image_resource(image), *more]
    return statements.statement(about, statements.TEST_RESULT, {**told, "result": result})
