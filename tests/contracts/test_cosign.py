"""cosign and `verify` believe each other's signatures, in the form of either generation.

cosign 2 keeps signatures under a tag; cosign 3 hangs Sigstore bundles on the image, and reads the
tag where none is there.
"""

import base64
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from weightsmith.api.commands.images import copy_image
from weightsmith.api.commands.rebase import rebase_image
from weightsmith.api.commands.requests import RebaseCommand
from weightsmith.api.commands.verify import verify_image
from weightsmith.core.errors import CheckFailed
from weightsmith.core.ports import SignatureFormat, Signer, Silent
from weightsmith.core.values import Blob, Digest
from weightsmith.oci.attachments import Attachment, AttachmentPart, fallback_tag
from weightsmith.oci.manifests import OCI_INDEX
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry, RegistryLocation
from weightsmith.outside.keyless import TOKEN, open_identity_signer
from weightsmith.outside.signer import open_signer
from weightsmith.provenance import evidence

from tests.fakes.baking import bake, make_key, make_model, push_base
from tests.fakes.memory import memory_tools
from tests.fakes.real_registries import real_registry
from tests.fakes.sigstore import ISSUER, WORKFLOW, sigstore, token
from tests.paths import ROOT

pytestmark = pytest.mark.registry
ENGINE = {"dev.weightsmith.engine": "llamacpp", "org.opencontainers.image.version": "1.0.0"}
DOCUMENTED = ("--insecure-ignore-tlog=true", "--new-bundle-format=false")


PEM = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
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


@dataclass
class Scene:
    host: str
    client: Registry
    folder: Path
    model: Path

    def bake(self, name: str, key: Path | None = None, form: SignatureFormat = "cosign") -> str:
        """Push an image; return its reference."""
        made = f"{self.host}/team/{name}:1"
        bake(self.client, self.model, f"{self.host}/base/engine:1", key, form=form, push=made)
        return made

    def tags(self, name: str) -> list[str]:
        """Return the suffixes of cosign's tags for an image."""
        digest, place = self.blob(name).digest, Reference.parse(name)
        tags = [(end, fallback_tag(digest, f".{end}")) for end in ("att", "sig")]
        return [end for end, tag in tags if self.client.digest_of(replace(place, tag=tag))]

    def place(self, name: str) -> RegistryLocation:
        return RegistryLocation(self.client, Reference.parse(name))

    def blob(self, name: str) -> Blob:
        return self.place(name).image("linux/amd64").manifest_blob

    def check(self, name: str, key: Path) -> dict[str, str]:
        """Return what does not hold."""
        try:
            verify_image(name, key, self.client, Silent())
        except CheckFailed as error:
            rows = error.details["checks"]
            return {row["check"]: row["found"] for row in rows if row["ok"] is False}
        return {}

    def sign(self, name: str, key: Path, *, all_of_it: bool = False) -> None:
        """Sign as cosign 3 does: the image, and with `all_of_it` each of its statements."""
        place, image = self.place(name), self.blob(name)
        place.attach(attached(bundle(claim(image.digest), key), image))
        if all_of_it:
            parts = evidence.statement_parts(evidence.read_attached(place, image.digest))
            told = [evidence.read_statement(part, None) for part in parts]
            made = [attached(bundle(t.document, key), image, t.predicate_type) for t in told]
            place.attach(*made)


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setenv("WEIGHTSMITH_STORE", str(tmp_path / "store"))
    with real_registry(tmp_path) as host, Registry() as client:
        for n in (1, 2):
            push_base(client, f"{host}/base/engine:{n}", ENGINE, {"app/x": b"%d" % n})
        yield Scene(host, client, tmp_path, make_model(tmp_path / "model"))


def test_a_signature_in_a_bundle(scene: Scene) -> None:
    """Signatures of images count; those of other images, and of other keys, do not."""
    (_, public), (theirs, other) = make_key(scene.folder), make_key(scene.folder, "other")
    name, wrong = scene.bake("app", scene.folder / "key.pem"), scene.bake("wrong")
    image = scene.blob(name)
    seen = {**claim(image.digest), "predicateType": "https://example.com/seen"}
    scene.place(name).attach(attached(bundle(seen, theirs), image))
    assert scene.check(name, other)["signature"] == "1 found, none by this key"
    moved = attached(bundle(claim(image.digest.of(b"another")), theirs), image)
    scene.place(name).attach(moved)
    assert "another image" in scene.check(name, other)["signature"]
    scene.sign(name, theirs)
    assert "signature" not in scene.check(name, other)
    assert "statement provenance/v1" in scene.check(name, other)
    assert scene.check(name, public) == {}
    scene.sign(wrong, scene.folder / "key.pem")
    assert scene.check(wrong, other)["signature"] == "1 found, none by this key"


def test_statements_in_bundles(scene: Scene) -> None:
    """Everything that an image needs may be signed by cosign 3 alone; it goes along."""
    key, public = make_key(scene.folder)
    release, other = make_key(scene.folder, "release")
    name = scene.bake("app")
    scene.sign(name, key, all_of_it=True)
    assert scene.check(name, public) == {}
    verify_image(name, None, scene.client, Silent())
    to = f"{scene.host}/prod/app:1"
    signer = open_signer(str(release))
    for _ in range(2):
        copy_image(name, to, scene.client, Silent(), force=False, signer=signer)
    assert scene.check(to, public) == {}
    assert scene.check(to, other) == {}


def test_a_bundle_that_was_changed_or_is_no_statement(scene: Scene) -> None:
    (key, public), (theirs, other) = make_key(scene.folder), make_key(scene.folder, "other")
    name = scene.bake("app", key)
    image = scene.blob(name)
    evil = bundle(claim(image.digest.of(b"another")), theirs)
    evil["dsseEnvelope"]["payload"] = bundle(claim(image.digest), key)["dsseEnvelope"]["payload"]
    for made in (evil, {"messageSignature": {}}, {"dsseEnvelope": []}, {"dsseEnvelope": {}}):
        scene.place(name).attach(attached(made, image))
    assert scene.check(name, other)["signature"] == "2 found, none by this key"
    # What others hang there is not ours to be right.
    assert scene.check(name, public) == {}


def test_a_bundle_stays_with_its_image(scene: Scene) -> None:
    key, public = make_key(scene.folder)
    theirs, other = make_key(scene.folder, "other")
    name, to = scene.bake("app", key), f"{scene.host}/team/app:2"
    scene.sign(name, theirs)
    onto = f"{scene.host}/base/engine:2"
    request = RebaseCommand(source=name, onto=onto, to=to, smoke=False, force=False)
    rebase_image(request, memory_tools(scene.folder, registry=scene.client, key=key))
    assert scene.check(to, public) == {}
    assert scene.check(to, other)["signature"] == "1 found, none by this key"


@pytest.fixture
def cosign(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    if not shutil.which("cosign"):
        pytest.skip("cosign is not installed")
    monkeypatch.setenv("COSIGN_PASSWORD", "pa55")
    # As a variable, because cosign 2 refuses the flag; without it, 3 asks Sigstore's services.
    monkeypatch.setenv("COSIGN_USE_SIGNING_CONFIG", "false")

    def run(*words: str | Path) -> bool:
        done = subprocess.run(["cosign", *words], capture_output=True)
        return done.returncode == 0

    return run


def test_what_cosign_signs_is_believed(scene: Scene, cosign: Callable[..., bool]) -> None:
    """In the form that it takes by itself; and cosign goes on to believe what we signed."""
    key, public = make_key(scene.folder)
    name = scene.bake("app", key)
    assert cosign("generate-key-pair", "--output-key-prefix", scene.folder / "their")
    theirs, other = scene.folder / "their.key", scene.folder / "their.pub"
    assert "signature" in scene.check(name, other)
    by_digest = f"{name.rpartition(':')[0]}@{scene.blob(name).digest}"
    words = ("--key", theirs, "--yes", "--tlog-upload=false", by_digest)
    assert cosign("sign", *words)
    assert list(scene.check(name, other)) == ["statement provenance/v1", "statement"]
    assert scene.check(name, public) == {}
    assert cosign("verify", "--key", other, DOCUMENTED[0], name)
    assert cosign("verify", "--key", public, *DOCUMENTED, name)
    # Pushed by us with their key, all of it is theirs too.
    signer = open_signer(str(theirs))
    copy_image(name, name, scene.client, Silent(), force=False, signer=signer)
    for one in (public, other):
        assert scene.check(name, one) == {}
        assert cosign("verify", "--key", one, *DOCUMENTED, name)


@pytest.mark.parametrize("bundled", [False, True])
def test_cosign_believes_us(scene: Scene, cosign: Callable[..., bool], bundled: bool) -> None:
    """By the commands of the how-to, whoever else signed the image and in whichever form."""
    key, public = make_key(scene.folder)
    theirs, other = make_key(scene.folder, "other")
    name = scene.bake("app", key)
    if bundled:
        scene.sign(name, theirs, all_of_it=True)
    attestation = ("verify-attestation", "--type", "slsaprovenance1")
    for words in (("verify",), attestation):
        assert cosign(*words, "--key", public, *DOCUMENTED, name)
        assert not cosign(*words, "--key", other, *DOCUMENTED, name)
        assert bundled or cosign(*words, "--key", public, DOCUMENTED[0], name)


NO_SERVICES = '{"mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1"}'
"""A trust root without authorities and logs, so that cosign 2 does not fetch Sigstore's own."""


@pytest.mark.parametrize("form", ["bundle", "both"])
def test_cosign_believes_our_bundles(
    scene: Scene, cosign: Callable[..., bool], form: SignatureFormat
) -> None:
    """In a bundle each statement has one signature; with both forms, older readers find theirs."""
    (key, public), (_, other) = make_key(scene.folder), make_key(scene.folder, "other")
    name, root = scene.bake("app", key, form), scene.folder / "root.json"
    root.write_text(NO_SERVICES)
    how = (DOCUMENTED[0], "--new-bundle-format=true", "--trusted-root", root)
    for kind in ("slsaprovenance1", SIGNED):
        words = ("verify-attestation", "--type", kind)
        assert cosign(*words, "--key", public, *how, name)
        assert not cosign(*words, "--key", other, *how, name)
    assert cosign("verify", "--key", public, *DOCUMENTED, name) is (form == "both")
    assert scene.check(name, public) == {}
    assert {*scene.check(name, other)} >= {"signature", "statement provenance/v1"}
    assert scene.tags(name) == (["att", "sig"] if form == "both" else [])


def _pem(der: bytes, path: Path) -> str:
    path.write_bytes(serialization.load_der_public_key(der).public_bytes(*PEM))
    return str(path)


def test_cosign_believes_an_identity(
    scene: Scene, cosign: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own programs check certificate, log entry and proofs; pushed again nothing is added."""
    name, to = scene.bake("app"), f"{scene.host}/prod/app:1"
    with sigstore() as services:
        root, trust = services.write(scene.folder)
        monkeypatch.setenv(TOKEN, token())
        signer = open_identity_signer(str(trust))
        for _ in range(2):
            copy_image(name, to, scene.client, Silent(), force=False, signer=signer)
        assert len(services.bodies) == 1 + 2
    # Version 2 asks for these beside the trusted root, or fetches Sigstore's own.
    authority = scene.folder / "ca.pem"
    authority.write_bytes(services.root.public_bytes(PEM[0]))
    monkeypatch.setenv("SIGSTORE_ROOT_FILE", str(authority))
    keys = {"REKOR_PUBLIC_KEY": services.log, "CT_LOG_PUBLIC_KEY_FILE": services.certificates}
    for variable, key in keys.items():
        monkeypatch.setenv(f"SIGSTORE_{variable}", _pem(key.der, scene.folder / variable))
    for kind in ("slsaprovenance1", SIGNED):
        for identity in (WORKFLOW, f"{WORKFLOW}2"):
            words = ("--certificate-identity", identity, "--certificate-oidc-issuer", ISSUER)
            how = ("--trusted-root", root, "--new-bundle-format=true", "--type", kind)
            assert cosign("verify-attestation", *words, *how, to) is (identity == WORKFLOW)
    assert scene.tags(to) == []


def test_a_bundle_once_for_each_key(scene: Scene) -> None:
    """Pushed again nothing is added; by another key each statement has a bundle of that key too."""
    (key, public), (release, other) = make_key(scene.folder), make_key(scene.folder, "release")
    name, to = scene.bake("app", key, "bundle"), f"{scene.host}/prod/app:1"
    image, made = scene.blob(name), []
    random = _random_signer(release)
    for signer in (replace(open_signer(str(key)), format="bundle"), random, random):
        copy_image(name, to, scene.client, Silent(), force=False, signer=signer)
        made.append(len(scene.place(to).attached(image.digest)))
        assert scene.check(to, public) == {}
    assert made[0] == len(scene.place(name).attached(image.digest))
    assert made[1] == made[2] == made[0] + 2
    assert scene.check(to, other) == {}


def _random_signer(key: Path) -> Signer:
    """Return a signer that never makes the same signature twice, as key services do."""
    made = serialization.load_pem_private_key(key.read_bytes(), None)
    assert isinstance(made, ec.EllipticCurvePrivateKey)
    known = open_signer(str(key))
    sign = partial(made.sign, signature_algorithm=ec.ECDSA(hashes.SHA256()))
    return replace(known, sign=sign, format="bundle")


@pytest.mark.parametrize("form", ["cosign", "bundle"])
def test_statements_change_their_form(scene: Scene, form: SignatureFormat) -> None:
    """An image is rebased with its statements, in whichever form they were and will be."""
    (key, public), to = make_key(scene.folder), f"{scene.host}/team/app:2"
    name = scene.bake("app", key, "cosign" if form == "bundle" else "bundle")
    onto = f"{scene.host}/base/engine:2"
    request = RebaseCommand(source=name, onto=onto, to=to, smoke=False, force=False)
    tools = memory_tools(scene.folder, registry=scene.client, key=key)
    assert tools.signer
    rebase_image(request, replace(tools, signer=replace(tools.signer, format=form)))
    assert scene.check(to, public) == {}
    rebase_image(replace(request, to=f"{to}u"), replace(tools, signer=None))
    verify_image(f"{to}u", None, scene.client, Silent())


def test_cosign_3_believes_our_stand_in(scene: Scene, cosign: Callable[..., bool]) -> None:
    """So that what the tests above hang on images is what cosign would."""
    told = subprocess.run(["cosign", "sign", "--help"], capture_output=True, text=True).stdout
    if "--signing-config" not in told or "--new-bundle-format" in told:
        pytest.skip("needs cosign 3; this one reads no bundles by itself")
    key, public = make_key(scene.folder)
    name = scene.bake("app")
    assert not cosign("verify", "--key", public, DOCUMENTED[0], name)
    scene.sign(name, key, all_of_it=True)
    for words in (("verify",), ("verify-attestation", "--type", "slsaprovenance1")):
        assert cosign(*words, "--key", public, DOCUMENTED[0], name)


def test_what_cosign_copied(scene: Scene, cosign: Callable[..., bool]) -> None:
    """It leaves the image where others keep the list of what hangs on it, and no bills."""
    key, public = make_key(scene.folder)
    name, to = scene.bake("app", key), f"{scene.host}/copied/app:1"
    assert cosign("copy", "--force", name, to)
    assert list(scene.check(to, public)) == ["documents"]


def test_an_index_that_cosign_copied(scene: Scene) -> None:
    """What it names are its images, and nothing that hangs on it."""
    image = scene.blob(scene.bake("app"))
    row = {"mediaType": image.media_type, "digest": image.digest, "size": image.size}
    index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [row]}).encode()
    whole = Digest.of(index)
    for tag in ("all", fallback_tag(whole)):
        to = Reference(scene.host, "team/app", tag)
        scene.client.push_manifest(to, index, OCI_INDEX)
    assert scene.place(f"{scene.host}/team/app:all").attached(whole) == []


def test_what_cosign_saved(
    scene: Scene, cosign: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layout with signatures in its index, of ours and of its own; they are pushed with it."""
    monkeypatch.setenv("COSIGN_NEW_BUNDLE_FORMAT", "false")
    key, public = make_key(scene.folder)
    assert cosign("generate-key-pair", "--output-key-prefix", scene.folder / "their")
    theirs, other = scene.folder / "their.key", scene.folder / "their.pub"
    signed, unsigned = scene.bake("signed", key), scene.bake("unsigned")
    by_digest = f"{unsigned.rpartition(':')[0]}@{scene.blob(unsigned).digest}"
    assert cosign("sign", "--key", theirs, "--yes", "--tlog-upload=false", by_digest)
    for n, (name, one, bad) in enumerate(
        ((signed, public, ["documents"]), (unsigned, other, ["statement"]))
    ):
        layout, to = scene.folder / f"saved{n}", f"{scene.host}/pushed{n}/app:1"
        assert cosign("save", "--dir", layout, name)
        assert list(scene.check(f"oci:{layout}", one)) == bad
        copy_image(str(layout), to, scene.client, Silent(), force=False)
        assert list(scene.check(to, one)) == bad
        assert cosign("verify", "--key", one, *DOCUMENTED, to)


@pytest.mark.skipif(not shutil.which("oras"), reason="oras is not installed")
def test_what_oras_copied(scene: Scene, cosign: Callable[..., bool]) -> None:
    """It takes all that hangs on an image and no tags; a push gives it cosign's tags again."""
    key, public = make_key(scene.folder)
    name, layout = scene.bake("app", key), scene.folder / "layout"
    there, back = f"{scene.host}/oras/app:1", f"{scene.host}/back/app:1"
    plain = ("oras", "copy", "-r", "--from-plain-http")
    for words in (("--to-plain-http", name, there), ("--to-oci-layout", name, f"{layout}:1")):
        subprocess.run([*plain, *words], check=True, capture_output=True)
    copy_image(f"oci:{layout}:1", back, scene.client, Silent(), force=False)
    for one in (there, f"oci:{layout}:1", back):
        assert scene.check(one, public) == {}
    assert cosign("verify", "--key", public, DOCUMENTED[0], "--experimental-oci11", there)
    for words in (("verify",), ("verify-attestation", "--type", "slsaprovenance1")):
        assert not cosign(*words, "--key", public, *DOCUMENTED, there)
        assert cosign(*words, "--key", public, *DOCUMENTED, back)


@pytest.mark.skipif(not shutil.which("skopeo"), reason="skopeo is not installed")
def test_policies_of_podman_and_others(scene: Scene) -> None:
    """The how-to's own: what the key signed is let in, and nothing else."""
    key, public = make_key(scene.folder)
    _, other = make_key(scene.folder, "other")
    page = ROOT / "docs" / "how-to" / "sign-and-verify.md"
    blocks = page.read_text().split("```")
    (shown,) = (block for block in blocks if "sigstoreSigned" in block)
    (lookaside,) = (block for block in blocks if "use-sigstore-attachments" in block)
    name, written = scene.bake("app", key), "registry.example.com"
    folder = scene.folder / "registries.d"
    folder.mkdir()
    text = lookaside.partition("\n")[2].replace(written, scene.host)
    (folder / "registry.yaml").write_text(text)

    def let_in(name: str, one: Path) -> bool:
        policy = shown.partition("\n")[2].replace(written, scene.host)
        policy = policy.replace("/etc/containers/key.pub", str(one))
        (scene.folder / "policy.json").write_text(policy)
        words = ["skopeo", "--policy", scene.folder / "policy.json", "--registries.d", folder,
                 "copy", "-q", "--src-tls-verify=false", f"docker://{name}",
                 f"dir:{scene.folder}/{one.stem}"]  # fmt: skip
        return subprocess.run(words, capture_output=True).returncode == 0

    assert let_in(name, public)
    assert not let_in(name, other)
    to = f"{scene.host}/prod/app:1"
    for signer in (None, open_signer(str(key))):
        copy_image(name, to, scene.client, Silent(), force=False, signer=signer)
        assert let_in(to, public) is bool(signer)
