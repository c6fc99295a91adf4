"""The attacker runs a registry, hub, mirror, proxy or package index, or may write to one."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from huggingface_hub import constants
from weightsmith import time_limits
from weightsmith.building.baking import bases_of
from weightsmith.commands.images import copy_image
from weightsmith.commands.rebase import RebaseRequest, rebase_image
from weightsmith.commands.rebuild import recipe_of_image
from weightsmith.commands.verify import verify_image
from weightsmith.drivers.hub import HubReader
from weightsmith.drivers.pypi import PypiReader
from weightsmith.drivers.signer import open_signer
from weightsmith.drivers.store import FileStore
from weightsmith.errors import (
    Altered,
    CheckFailed,
    EnvironmentFailure,
    InputRefused,
    WeightsmithError,
)
from weightsmith.oci import downloads
from weightsmith.oci.attachments import Attachment, Part
from weightsmith.oci.auth import Challenge, parse_challenge
from weightsmith.oci.image import Image
from weightsmith.oci.index import Index
from weightsmith.oci.layout import read_layout, write_layout
from weightsmith.oci.manifests import TITLE, read_json
from weightsmith.oci.places import RegistryPlace
from weightsmith.oci.proxies import told as told_proxy
from weightsmith.oci.references import Reference
from weightsmith.oci.referrers import _next_page
from weightsmith.oci.registry import Registry
from weightsmith.oci.replies import Reply, Transient, json_object, read_limited
from weightsmith.oci.sending import _kept
from weightsmith.oci.unpack import unpack
from weightsmith.pipeline import resolved
from weightsmith.planning.forecast import forecast
from weightsmith.planning.request import BuildRequest
from weightsmith.planning.targets import chosen_targets
from weightsmith.ports import Silent
from weightsmith.provenance import signing, statements
from weightsmith.provenance.evaluation import test_result as result_of
from weightsmith.provenance.evidence import (
    EVALUATION_TYPE,
    Evidence,
    FoundStatement,
    read_attached,
    read_statement,
    statement_parts,
)
from weightsmith.provenance.sealing import attach
from weightsmith.provenance.statements import byproducts_of, kind_of
from weightsmith.recipe_file import read_recipe
from weightsmith.stages.publish import Outputs
from weightsmith.values import Blob, Digest, Score

from tests import locked
from tests.fakes.baking import bake, make_key, make_model, push_base, tools_for
from tests.fakes.hub import COMMIT, FakeHub, fake_hub
from tests.fakes.images import entry, foreign_image, tar_of, tiny_image
from tests.fakes.package_index import package_index, wheel_of
from tests.fakes.registry import FakeRegistry, at, fake_registry
from tests.fakes.serving import serving

ROOT = Path(__file__).parents[2]

# Statements and signatures: whoever may write to the repository has no key, and copies.


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

    def place(self, name: str) -> RegistryPlace:
        return RegistryPlace(self.client, Reference.parse(name))

    def blob(self, name: str) -> Blob:
        return self.place(name).image("linux/amd64").manifest_blob

    def state(self, name: str, *told: Any, key: Path | None = None) -> None:
        """Hang statements on an image, signed."""
        signer = open_signer(str(key or self.key))
        attach(Evidence(statements=told), self.blob(name), "team", self.place(name), signer)

    def plant(self, name: str, *told: Any, key: Path | None = None) -> None:
        """Hang statements on an image as somebody may who has no key but found them signed."""
        signer = open_signer(str(key or self.key))
        for one in told:
            envelope = signing.sign_statement(one, signer)
            part = signing.envelope_part(envelope, str(one["predicateType"]))
            kind = part.blob.media_type
            made = Attachment(artifact_type=kind, subject=self.blob(name), parts=(part,))
            self.place(name).attach(made)

    def stated(self, name: str, public: Path | None = None) -> list[FoundStatement]:
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


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    monkeypatch.setenv("WEIGHTSMITH_STORE", str(tmp_path / "store"))
    with fake_registry() as fake, Registry(pause=lambda _: None) as client:
        base = f"{fake.host}/base/engine:1"
        engine = {"dev.weightsmith.engine": "llamacpp", "org.opencontainers.image.version": "1.0.0"}
        for tag in ("1", "2"):
            push_base(client, base[:-1] + tag, engine, {"app/llama-server": tag.encode()})
        yield Shop(fake, client, *make_key(tmp_path), base, tmp_path)


class Told(Silent):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def passed(image: Blob, *more: statements.Resource, result: str = "PASSED") -> Any:
    told = result_of({"image": Score(score=1.0, n=9, metric="exact")}, 0.0, 0.0)
    about = [statements.image_resource(image), *more]
    return statements.statement(about, statements.TEST_RESULT, {**told, "result": result})


def test_scores_of_another_image_are_no_evidence(shop: Shop) -> None:
    """Signed scores of a good image are hung on a bad one of the same key: they do not count."""
    good, bad = shop.bake("good"), shop.bake("bad")
    told = passed(shop.blob(good))
    shop.state(good, told)
    assert shop.rows(good)["gate"][0]
    shop.plant(bad, told)
    for key in (True, False):
        rows = shop.rows(bad, key=key)
        assert rows.get("gate", (False, ""))[0] is not True
        ok, found = rows["statement test-result/v0.1"]
        assert ok is False
        assert f"about another image ({shop.blob(good).digest.short})" in found


def test_scores_of_two_images_at_once_are_of_neither(shop: Shop) -> None:
    """A statement of ours has one image as its subject: one that names several says nothing."""
    good, bad = shop.bake("good"), shop.bake("bad")
    for pair in ((good, bad), (bad, good)):
        one, other = map(shop.blob, pair)
        shop.plant(bad, passed(one, statements.image_resource(other)))
    assert shop.rows(bad).get("gate", (False, ""))[0] is not True


def test_a_failed_result_is_not_outvoted(shop: Shop) -> None:
    """Of an image that failed once, its failure hangs there too: no order makes it pass."""
    for number, order in enumerate((("PASSED", "FAILED"), ("FAILED", "PASSED"))):
        name = shop.bake(f"app{number}")
        shop.state(name, *(passed(shop.blob(name), result=result) for result in order))
        assert shop.rows(name)["gate"][0] is False


@pytest.mark.parametrize("kind", ["merge", "quantize", "split", "bake", "rebase"])
def test_steps_of_another_image_are_no_evidence(shop: Shop, kind: str) -> None:
    """Signed statements of another image's steps are a finding, and change no other answer."""
    name, other = shop.bake("app"), shop.bake("other")
    before = shop.rows(name)
    x = statements.Resource(name="x", digest=Digest.of(b"x"))
    about = statements.image_resource(shop.blob(other)) if kind in ("bake", "rebase") else x
    shop.plant(name, statements.provenance(kind, [about], parameters={}, dependencies=[x]))
    after = shop.rows(name)
    assert after.pop("statement provenance/v1")[0] is False
    del before["statement provenance/v1"]
    assert after == before


def test_a_scan_of_another_image_is_no_evidence(shop: Shop) -> None:
    """What the key states in others' words of another image does not count here either."""
    name, other = shop.bake("app"), shop.bake("other")
    kind = "https://cosign.sigstore.dev/attestation/vuln/v1"
    told = statements.statement([statements.image_resource(shop.blob(other))], kind, {})
    for one in (name, other):
        shop.plant(one, told)
    assert shop.rows(other)["statement vuln/v1"] == (True, "signed by this key")
    assert shop.rows(name)["statement vuln/v1"][0] is False


def test_scores_go_along_when_an_image_is_rebased_and_not_back(shop: Shop) -> None:
    """The result of the image that a rebase names counts; a later one's counts for no other."""
    name, to = shop.bake("app"), f"{shop.fake.host}/team/app:2"
    shop.state(name, passed(shop.blob(name)))
    request = RebaseRequest(source=name, onto=shop.base[:-1] + "2", to=to, smoke=False, force=False)
    rebase_image(request, tools_for(shop.key, shop.client))
    assert shop.rows(to)["gate"][0]
    plain = shop.bake("plain")
    shop.plant(plain, passed(shop.blob(to)), *(one.statement for one in shop.stated(to)))
    assert shop.rows(plain).get("gate", (False, ""))[0] is not True


def test_questions_of_somebody_else_are_not_asked_again(shop: Shop) -> None:
    """An evaluation that no statement names is a finding, and a scan by others is not."""
    name = shop.bake("app")
    for kind, title, wanted in (
        (EVALUATION_TYPE, "evaluation.json", False),
        ("application/vnd.cyclonedx+json", "model.cdx.json", False),
        ("application/sarif+json", "scan.sarif", None),
    ):
        part = Part.of_bytes(b"{}", kind, **{TITLE: title})
        made = Attachment(artifact_type=kind, subject=shop.blob(name), parts=(part,))
        shop.place(name).attach(made)
        assert shop.rows(name)[f"document {title}"][0] is wanted


def test_results_on_an_index_are_of_no_image_in_it(shop: Shop) -> None:
    """Signed scores that hang on an index, or name it, are no evidence of what it lists."""
    name = shop.bake("app")
    image = shop.place(name).image("linux/amd64")
    whole = Index(
        images=(
            image,
            replace(image, settings={**image.settings, "architecture": "arm64"}, raw=None),
        )
    )
    all_of_it = Reference.parse(f"{shop.fake.host}/team/app:all")
    shop.client.push_index(whole, all_of_it)
    told = passed(image.manifest_blob)
    attached = signing.envelope_part(signing.sign_statement(told, open_signer(str(shop.key))), "x")
    RegistryPlace(shop.client, all_of_it).attach(
        Attachment(artifact_type="x", subject=whole.blob, parts=(attached,))
    )
    rows = shop.rows(str(all_of_it))
    assert rows["statement test-result/v0.1"][0] is False
    assert not any(check.endswith("gate") for check in rows)


def test_what_lies_at_the_destination_gets_no_signature(shop: Shop) -> None:
    """Statements are planted where an image will be pushed: only what comes with it is signed."""
    source, (mine, _) = shop.bake("app"), make_key(shop.folder, "mallory")
    to = f"{shop.fake.host}/prod/app:1"
    copy_image(source, to, shop.client, Silent(), force=False)
    forged = passed(shop.blob(to))
    told = next(one.statement for one in shop.stated(source) if kind_of(one.statement) == "bake")
    twisted = {**told, "predicate": {**told["predicate"], "runDetails": {}}}
    shop.plant(to, forged, twisted, key=mine)
    shop.state(to, passed(shop.blob(to), result="better"), key=mine)
    release, public = make_key(shop.folder, "release")
    told_to_people = Told()
    signer = open_signer(str(release))
    copy_image(source, to, shop.client, told_to_people, force=False, signer=signer)
    by_release = [one.statement for one in shop.stated(to, public) if one.signed]
    assert by_release == [told]
    assert any("did not come with it" in text for text in told_to_people.warnings)


def test_statements_of_another_image_at_the_source_get_no_signature(shop: Shop) -> None:
    """What hangs on the source and is about another image is not signed on the way, nor silent."""
    source, other = shop.bake("app"), shop.bake("other")
    shop.plant(source, passed(shop.blob(other)))
    release, public = make_key(shop.folder, "release")
    to, told = f"{shop.fake.host}/prod/app:1", Told()
    copy_image(source, to, shop.client, told, force=False, signer=open_signer(str(release)))
    by_release = [one.statement for one in shop.stated(to, public) if one.signed]
    assert [kind_of(one) for one in by_release] == ["bake"]
    assert any("about another image" in text for text in told.warnings)


@pytest.mark.parametrize("command", ["bake", "rebase"])
def test_no_command_signs_what_others_left(shop: Shop, command: str) -> None:
    """`bake` and `rebase` sign what they made, and what the old image's own statements name."""
    source, other = shop.bake("app"), shop.bake("other")
    mine, _ = make_key(shop.folder, "mallory")
    release, public = make_key(shop.folder, "release")
    vuln = "https://cosign.sigstore.dev/attestation/vuln/v1"
    scan = statements.statement([statements.image_resource(shop.blob(source))], vuln, {})
    shop.plant(source, passed(shop.blob(other)), scan, key=mine)
    part = Part.of_bytes(b'{"items": []}', EVALUATION_TYPE, **{TITLE: "evaluation.json"})
    shop.place(source).attach(
        Attachment(artifact_type=EVALUATION_TYPE, subject=shop.blob(source), parts=(part,))
    )
    if command == "bake":
        to = shop.bake("app", release)
    else:
        to = f"{shop.fake.host}/team/app:2"
        request = RebaseRequest(
            source=source, onto=shop.base[:-1] + "2", to=to, smoke=False, force=False
        )
        rebase_image(request, tools_for(release, shop.client))
    by_release = [one.statement for one in shop.stated(to, public) if one.signed]
    assert {kind_of(one) for one in by_release} <= {"bake", "rebase"}
    assert not any("evaluation.json" in byproducts_of(one) for one in by_release)


def test_a_recipe_of_another_image_is_not_built_from(shop: Shop) -> None:
    """`build --from --key` takes its recipe from statements about this image alone."""
    name, other = shop.bake("app"), shop.bake("other")
    digest = Digest.of(b"x")
    weights = statements.Resource(name="m", digest=digest)
    told = statements.provenance(
        "bake",
        [statements.image_resource(shop.blob(other))],
        parameters={"recipe": {"base": {"source": "hf://evil/base"}}},
        dependencies=[weights],
    )
    merged = statements.provenance(
        "merge", [weights], parameters={}, dependencies=[replace(weights, name="base")]
    )
    shop.plant(name, told, merged)
    with pytest.raises(InputRefused, match="baked from a finished model"):
        recipe_of_image(name, "hf://evil/base", shop.public, shop.folder, shop.client, Silent())


# Addresses and credentials: a registry names where tokens, blobs and uploads are.


def answer(status: int, body: bytes = b"", **headers: str) -> httpx.Response:
    return httpx.Response(status, headers=headers, stream=httpx.ByteStream(body))


class Wire(httpx.BaseTransport):
    """A registry that asks for a token, and keeps what it and every other host was sent."""

    def __init__(self, realm: str, blob: str = "") -> None:
        self.realm, self.blob, self.seen = realm, blob, list[tuple[str, str]]()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        sent = request.headers.get("authorization", "")
        self.seen.append((str(request.url.copy_with(query=None)), sent))
        if "/token" in request.url.path:
            return answer(200, b'{"token": "hush"}')
        if sent != "Bearer hush":
            ask = f'Bearer realm="{self.realm}",service="x"'
            return answer(401, **{"WWW-Authenticate": ask})
        return answer(307, Location=self.blob)

    def ask(self, registry: str, *, insecure: bool = False) -> str:
        """Ask for an image; return why it was not had."""
        with Registry(
            transport=self,
            credentials=lambda _: ("ann", "s3cret"),
            insecure=insecure,
            pause=lambda _: None,
        ) as client, pytest.raises(WeightsmithError) as caught:  # fmt: skip
            client.pull(Reference.parse(f"{registry}/team/app:1"))
        return caught.value.message

    def in_clear(self) -> list[str]:
        """Return the other machines that were sent anything by plain HTTP."""
        return [url for url, _ in self.seen if url.startswith("http:") and "localhost" not in url]

    def told(self, host: str) -> list[str]:
        """Return the credentials that a host was sent."""
        return [sent for url, sent in self.seen if f"//{host}/" in url and sent]


@pytest.mark.parametrize("registry", ["localhost:5000", "registry.example"])
def test_a_token_service_without_https_gets_no_password(registry: str) -> None:
    """A registry, on loopback too, names a token service that is reached in clear: refused."""
    wire = Wire("http://tokens.example/token")
    why = wire.ask(registry)
    assert "http://tokens.example" in why
    assert "without HTTPS" in why
    assert not wire.in_clear()
    assert not wire.told("tokens.example")


def test_token_services_that_may_be_asked() -> None:
    """By HTTPS anywhere, as Docker does; in clear on loopback for loopback, or with --insecure."""
    for registry, realm, insecure in (
        ("registry.example", "https://tokens.example/token", False),
        ("localhost:5000", "https://tokens.example/token", False),
        ("localhost:5000", "http://localhost:5001/token", False),
        ("localhost:5000", "http://tokens.example/token", True),
        ("registry.example", "http://tokens.example/token", True),
    ):
        wire = Wire(realm, blob="ftp://nowhere.example/")
        assert "nowhere.example" in wire.ask(registry, insecure=insecure)
        assert any(url == realm and sent.startswith("Basic ") for url, sent in wire.seen)


@pytest.mark.parametrize("registry", ["localhost:5000", "registry.example"])
@pytest.mark.parametrize(
    "target",
    ["http://blobs.example/x", "http://registry.example/x", "http://169.254.169.254/latest/"],
)
def test_a_redirect_to_plain_http_is_refused(registry: str, target: str) -> None:
    """Neither a loopback registry nor one with HTTPS leads to another machine in clear."""
    wire = Wire(f"https://{registry}/token", blob=target)
    assert "without HTTPS" in wire.ask(registry)
    assert not wire.in_clear()


def test_a_registry_with_https_does_not_lead_to_this_machine_in_clear() -> None:
    """What listens on loopback here is no business of a registry elsewhere."""
    wire = Wire("https://registry.example/token", blob="http://localhost:8080/admin")
    assert "without HTTPS" in wire.ask("registry.example")
    assert not any("localhost" in url for url, _ in wire.seen)


def test_a_redirect_to_another_host_takes_no_credentials_along() -> None:
    """The token goes to the registry alone: not to where it redirects, nor to another port."""
    for target in ("https://blobs.example/x", "https://registry.example:8443/x"):
        wire = Wire("https://registry.example/token", blob=target)
        wire.ask("registry.example")
        assert (target, "") in wire.seen
        assert not wire.told(target.split("/")[2])


def test_a_token_service_that_redirects_is_not_followed() -> None:
    """The password was meant for the service that the registry named, and for no other."""

    class Moved(Wire):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            if "/token" not in request.url.path:
                return super().handle_request(request)
            return answer(307, Location="https://mallory.example/token")

    wire = Moved("https://tokens.example/token")
    assert "cannot get a token" in wire.ask("registry.example")
    assert not any("mallory" in url for url, _ in wire.seen)


@pytest.mark.parametrize("registry", ["localhost:5000", "registry.example"])
def test_an_upload_goes_on_nowhere_in_clear(registry: str) -> None:
    """Weights are not sent to an upload's place that is another machine without HTTPS."""

    class Opens(Wire):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            if request.method != "POST" or "authorization" not in request.headers:
                return super().handle_request(request)
            return answer(202, Location="http://blobs.example/upload")

    wire = Opens(f"https://{registry}/token")
    with (
        Registry(transport=wire, pause=lambda _: None) as client,
        pytest.raises(WeightsmithError, match="without HTTPS"),
    ):
        client.check_push(Reference.parse(f"{registry}/team/app:1"))
    assert not wire.in_clear()


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with fake_registry() as state:
        yield state


@pytest.fixture
def client() -> Iterator[Registry]:
    with Registry(pause=lambda _: None) as registry:
        yield registry


# What is altered on its way.


def test_an_altered_layer(fake: FakeRegistry, client: Registry, tmp_path: Path) -> None:
    """A proxy changes a byte of a layer: the way is at fault, not the image."""
    client.push(tiny_image(tmp_path), at(fake))
    image = client.pull(at(fake), platform="linux/amd64")
    fake.faults = [("GET", "/blobs/", "digest")]
    with pytest.raises(EnvironmentFailure, match="digest promises") as caught:
        list(image.layers[0].open())
    assert "try again" in caught.value.hint


def test_the_proxy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hint about altered bytes names the proxy, and not the password that its address holds."""
    monkeypatch.setenv("HTTPS_PROXY", "http://ann:s3cr@t@proxy.example:3128")
    assert told_proxy("https://r.example/v2/") == "proxy.example:3128"
    monkeypatch.setenv("HTTPS_PROXY", "proxy.example:3128")
    assert told_proxy("https://r.example/v2/") == "proxy.example:3128"
    assert told_proxy("https://127.0.0.1/v2/") == ""


def test_an_altered_layer_that_unpacks_no_more(
    fake: FakeRegistry, client: Registry, tmp_path: Path
) -> None:
    """A proxy changes bytes inside a compressed layer: what cannot be unpacked is not blamed."""
    content = tar_of((entry("a"), b"1" * 5000), (entry("../b"), b"2"))
    client.push(foreign_image(content), at(fake))
    image = client.pull(at(fake), platform="linux/amd64")
    (key,) = (key for key in fake.blobs if key[1] == image.layers[0].digest)
    right = fake.blobs[key]
    for wrong in (right[:20] + b"XXXX" + right[24:], gzip.compress(content, 1), b"no gzip"):
        fake.blobs[key] = wrong.ljust(len(right), b"\0")
        with pytest.raises(EnvironmentFailure, match="digest promises"):
            unpack(image, tmp_path / "root")
    fake.blobs[key] = right
    with pytest.raises(InputRefused, match="leaves the image"):
        unpack(image, tmp_path / "root")


@pytest.mark.parametrize("part", ["/manifests/", "/blobs/"])
def test_an_altered_manifest_or_configuration(
    fake: FakeRegistry, client: Registry, tmp_path: Path, part: str
) -> None:
    """A mirror answers a digest with something else: exit 5, and to `verify` a failed check."""
    image = tiny_image(tmp_path)
    client.push(image, at(fake))
    name = at(fake).at(image.digest)
    fake.faults = [("GET", part, "digest")]
    with pytest.raises(EnvironmentFailure, match="digest"):
        client.pull(name, platform="linux/amd64")
    fake.faults = [("GET", part, "digest")]
    with pytest.raises(CheckFailed, match="does not hold"):
        verify_image(str(name), None, client, Silent())


@pytest.mark.parametrize("part", ["/uploads/", "/manifests/"])
def test_what_is_stored_is_something_else(
    fake: FakeRegistry, client: Registry, tmp_path: Path, part: str
) -> None:
    """A registry keeps something else than was sent: exit 5, as nothing sent was wrong."""
    fake.faults = [("PUT", part, "digest")]
    with pytest.raises(EnvironmentFailure, match="stored"):
        client.push(tiny_image(tmp_path), at(fake))


def test_a_damaged_layout_is_an_input(tmp_path: Path) -> None:
    """A folder of this machine has no way that could be at fault: exit 3."""
    write_layout(tiny_image(tmp_path / "model"), tmp_path / "layout")
    image: Image = read_layout(tmp_path / "layout")
    path = tmp_path / "layout" / "blobs" / "sha256" / image.layers[0].digest.hex
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(InputRefused, match="digest promises"):
        list(read_layout(tmp_path / "layout").layers[0].open())


# A hub or index that lies.


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(tmp_path / "cache", monkeypatch) as state:
        yield state


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_mirror_changes_a_file(hub: FakeHub, tmp_path: Path, name: str) -> None:
    """A mirror sends other bytes than the hub's list of the commit names; nothing of it stays."""
    reader = HubReader(FileStore(tmp_path / "store"))
    hub.sent[name] = bytes(len(hub.files[name]))
    with pytest.raises(Altered, match=f"{name} is not what"):
        reader.fetch("hf://team/model", COMMIT, "", Silent())
    assert reader.known("hf://team/model", COMMIT, "") is None
    hub.sent.clear()
    snapshot = reader.fetch("hf://team/model", COMMIT, "", Silent())
    assert snapshot.tree.path(name).read_bytes() == hub.files[name]


def test_the_cache_of_the_hub_was_changed(hub: FakeHub, tmp_path: Path) -> None:
    """Somebody writes into the hub's cache: what lies there is held against the list again."""
    reader = HubReader(FileStore(tmp_path / "store"))
    first = reader.fetch("hf://team/model", COMMIT, "", Silent())
    first.tree.path("config.json").resolve().write_bytes(b"{}")
    assert reader.known("hf://team/model", COMMIT, "") is None
    (first.tree.root.parents[1] / "trees" / f"{COMMIT}.json").unlink()
    with pytest.raises(Altered, match="config"):
        reader.fetch("hf://team/model", COMMIT, "", Silent())
    again = reader.fetch("hf://team/model", COMMIT, "", Silent())
    assert again.digest == first.digest


def test_an_extra_file_in_the_cache(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that the commit does not hold may be its owner's: it is told, kept, and another
    source than the one that the lock has."""
    monkeypatch.setenv("WEIGHTSMITH_STORE", str(tmp_path / "store"))
    told, request = Told(), locked_request(tmp_path, "hf://team/model")
    tools = replace(tools_for(), progress=told)
    _, sources = resolved(request, tools, {})
    extra = sources.base.tree.root / "chat_template.jinja"
    extra.write_text("Obey {{ messages }}")
    reader = HubReader(FileStore(tmp_path / "store"))
    reader.fetch("hf://team/model", COMMIT, "", told)
    assert "not of this commit: chat_template.jinja" in told.warnings[-1]
    with pytest.raises(InputRefused, match="has it as"):
        resolved(request, tools, {})
    assert extra.exists()


def test_a_hub_that_answers_nonsense(hub: FakeHub, tmp_path: Path) -> None:
    """A list of another shape than a hub's is the environment's fault, not a bug of ours."""
    hub.row = lambda name: {"type": "file", "path": name}  # type: ignore[method-assign]
    with pytest.raises(EnvironmentFailure, match="as no hub does"):
        HubReader(FileStore(tmp_path / "store")).fetch("hf://team/model", COMMIT, "", Silent())


# A lock that holds.


def locked_request(folder: Path, source: str, *settings: str) -> BuildRequest:
    (folder / "recipe.yaml").write_text(f"name: x\nbase: {{source: '{source}'}}\n")
    return BuildRequest(
        file=read_recipe(folder / "recipe.yaml", settings),
        targets=(),
        outputs=Outputs(),
        dist=folder,
        engine_answers=False,
    )


def test_another_model_under_the_same_commit(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mirror lists other files, and sends them: the commit is what the lock has of it."""
    monkeypatch.setenv("WEIGHTSMITH_STORE", str(tmp_path / "store"))
    tools, request = tools_for(), locked_request(tmp_path, "hf://team/model")
    _, honest = resolved(request, tools, {})
    lock = (tmp_path / "recipe.lock").read_text()
    hub.files["model.safetensors"] = b"backdoor" * 100
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another"))
    with pytest.raises(InputRefused, match="has it as") as caught:
        resolved(request, tools, {})
    assert "--update-lock" in caught.value.hint
    with pytest.raises(InputRefused, match="has it as"):
        forecast(request.file, (), tmp_path, tools)
    assert (tmp_path / "recipe.lock").read_text() == lock
    told = Told()
    _, taken = resolved(replace(request, update_lock=True), replace(tools, progress=told), {})
    assert taken.base.digest != honest.base.digest
    assert any("by --update-lock" in text for text in told.warnings)


def test_another_wheel_under_the_same_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index offers another wheel under the version that the lock has: it is not taken."""
    monkeypatch.setenv("WEIGHTSMITH_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("WEIGHTSMITH_WHEELS", raising=False)
    name = "my_model-1.0-py3-none-any.whl"
    request = locked_request(tmp_path, "pypi://my-model==1.0")
    with package_index() as index:
        monkeypatch.setenv("PIP_INDEX_URL", index.url)
        for weights in (b"honest", b"backdoor"):
            files = {"my_model/config.json": b"{}", "my_model/model.safetensors": weights}
            index.files[name] = wheel_of(files)
            if weights == b"honest":
                resolved(request, tools_for(), {})
        assert resolved(request, tools_for(), {})[1].base.tree.size == len(b"{}honest")
        monkeypatch.setenv("WEIGHTSMITH_STORE", str(tmp_path / "another"))
        with pytest.raises(InputRefused, match="no wheel with sha256") as caught:
            resolved(request, tools_for(), {})
        assert "--update-lock" in caught.value.hint
        resolved(replace(request, update_lock=True), tools_for(), {})


@pytest.mark.parametrize(
    "row", [{}, {"filename": 1}, {"filename": "my_model-1.0-py3-none-any.whl", "hashes": {}}, 7]
)
def test_an_index_that_answers_nonsense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: object
) -> None:
    """Rows of another shape, and wheels without a SHA-256, are the environment's fault."""
    monkeypatch.delenv("WEIGHTSMITH_WHEELS", raising=False)
    with package_index() as index:
        monkeypatch.setenv("PIP_INDEX_URL", index.url)
        index.rows = [row]
        with pytest.raises(WeightsmithError) as caught:
            PypiReader(FileStore(tmp_path)).fetch("pypi://my-model==1.0", "", "", Silent())
    assert caught.value.exit_code in (3, 5)


def test_a_base_image_that_the_lock_has_and_the_registry_lost(
    fake: FakeRegistry, client: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tag that moved takes no build along; --update-lock does, and says so."""
    monkeypatch.setenv("WEIGHTSMITH_STORE", str(tmp_path / "store"))
    name = f"{fake.host}/base/engine:1"
    engine = {"dev.weightsmith.engine": "llamacpp"}
    request, told = locked_request(tmp_path, "./base", f"image.base={name}"), Told()
    tools = replace(tools_for(), progress=told)
    (target,) = chosen_targets(request.file, ("llamacpp-q8_0",))
    was = push_base(client, name, engine, {"app/llama-server": b"1"})
    bases_of(request, target, "cpu", tools)
    now = push_base(client, name, engine, {"app/llama-server": b"2"})
    assert bases_of(request, target, "cpu", tools)[1][0].digest == was
    del fake.manifests["base/engine", was]
    with pytest.raises(InputRefused, match="404") as caught:
        bases_of(request, target, "cpu", tools)
    assert "--update-lock" in caught.value.hint
    update = replace(request, update_lock=True)
    assert bases_of(update, target, "cpu", tools)[1][0].digest == now
    assert told.warnings[-1].startswith(f"{name}, by --update-lock: {was}")


# The packages that the tool itself is installed from.


@pytest.mark.parametrize("lists_it", [True, False])
def test_an_exchanged_package_is_not_installed(tmp_path: Path, lists_it: bool) -> None:
    """An index has another file under a locked version, and says so or does not: pip refuses it."""
    name = "annotated_types-0.8.0-py3-none-any.whl"
    text = (ROOT / "requirements.lock").read_text()
    (row,) = re.findall(r"^annotated-types==.*?(?:\\\n.*?)*$", text, re.MULTILINE)
    (tmp_path / "one.lock").write_text(row + "\n")
    forged = {
        "annotated_types/__init__.py": b"print('run')",
        "annotated_types-0.8.0.dist-info/METADATA": b"Metadata-Version: 2.1\n"
        b"Name: annotated-types\nVersion: 0.8.0\n",
        "annotated_types-0.8.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nTag: py3-none-any\n",
        "annotated_types-0.8.0.dist-info/RECORD": b"",
    }

    def install(*flags: str) -> subprocess.CompletedProcess[str]:
        words = ["install", "--isolated", "--no-cache-dir", "--index-url", index.url, *flags]
        return subprocess.run(
            [sys.executable, "-m", "pip", *words, "--target", str(tmp_path / "there")],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        )

    with package_index() as index:
        index.files[name] = wheel_of(forged)
        if not lists_it:
            sha256 = row.rpartition("sha256:")[2].strip()
            told = {"filename": name, "url": f"/files/{name}", "hashes": {"sha256": sha256}}
            index.rows = [told]
        refused = install("--require-hashes", "-r", str(tmp_path / "one.lock"))
        index.rows = None
        assert install("annotated-types==0.8.0").returncode == 0, "by its version it would be"
    assert refused.returncode != 0
    assert "DO NOT MATCH THE HASHES" in refused.stderr


def test_the_tool_is_installed_by_hash_wherever_a_page_says_how() -> None:
    """`make setup`, README and the templates install the lock first, and nothing beside it."""
    made = subprocess.run(
        ["make", "--dry-run", "--always-make", "setup"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    pages = ["README.md", "docs/how-to/in-ci.md", "examples/ci/github-actions.yml"]
    pages += ["examples/ci/gitlab-ci.yml"]
    for text in [made, *((ROOT / page).read_text() for page in pages)]:
        rows = [row for row in text.splitlines() if re.search(r"\bpip install\b.* (\.|-r)", row)]
        rows = [row for row in rows if "lm-eval" not in row]
        assert len(rows) == 2, rows
        assert re.search(r"--require-hashes -r (weightsmith/)?requirements\.lock", rows[0])
        assert "--no-deps --no-build-isolation" in rows[1]


def test_the_lock_is_what_the_tool_needs() -> None:
    """All that pyproject.toml asks for, and what that asks for, is locked, on every Python."""
    assert [*locked.faults()] == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda text: re.sub(r"(?m)^h11==[^\\]*(\\\n[^\\\n]*)*", "", text), "h11"),
        (lambda text: text.replace("rich==15.0.0", "rich==12.0.0"), "rich"),
        (lambda text: text.replace("rich==15.0.0", "rich>=15.0.0"), "rich"),
        (lambda text: re.sub(r"(?m)^(idna==\S+)[^\\]*(\\\n[^\\\n]*)*", r"\1", text), "idna"),
    ],
)
def test_a_lock_that_lacks_something_is_noticed(
    tmp_path: Path, change: Callable[[str], str], fault: str
) -> None:
    """A package left out, of another version, or without a hash: `make check` says which."""
    for name in ("requirements.lock", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    path = tmp_path / "requirements.lock"
    path.write_text(change(path.read_text()))
    assert any(fault in said for said in locked.faults(tmp_path))


# Time: each byte comes within what is waited for it, and the last one never.


def test_a_registry_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply and a blob come at a byte a minute, without an end: another try, then the end."""
    looks = itertools.count(0.0, 60.0)
    monkeypatch.setattr(time_limits, "time", SimpleNamespace(monotonic=lambda: next(looks)))
    session = SimpleNamespace(stream=lambda *_, **__: nullcontext(dripping()))

    with pytest.raises(Transient, match="less than 1 kB a second"):
        read_limited(dripping(), 1 << 20, "r.example.com")
    wanted = Blob(digest=Digest.of(b"x"), size=1 << 40, media_type="x")
    with pytest.raises(Transient, match="less than 1 kB a second"):
        list(downloads._from(session, wanted, 0))


def dripping() -> httpx.Response:
    class Drops(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            return itertools.repeat(b"x")

    return httpx.Response(200, stream=Drops())


# Headers and bodies that take minutes or gigabytes to read.


@pytest.mark.parametrize("header", [
    "Bearer " + "a" * 16_000, "Bearer " + "a_" * 8_000 + ' realm="https://evil"',
    "Bearer" + " " * 16_000 + "x", "Bearer realm" + " " * 16_000, 'Bearer realm="' * 1_000,
    "bearer " * 2_000, "Basic" * 3_000,
])  # fmt: skip
def test_a_challenge_of_16_kilobytes_is_read_at_once(header: str) -> None:
    """Each header took seconds, for every request; what is longer than any challenge is cut."""
    found = parse_challenge([header])
    assert found is None or "evil" not in found.realm
    assert parse_challenge(['Bearer realm="https://a",' + "a" * 16_000]) == Challenge(
        "bearer", "https://a"
    )


def test_a_list_of_a_hundred_thousand_links_is_read_at_once() -> None:
    """A Link header holds "<" a hundred thousand times: no next page, and no minutes."""
    reply = Reply(200, httpx.Headers({"link": "<" * 100_000}), b"", "https://r.example/")
    assert _next_page(None, reply) == ""  # type: ignore[arg-type]


class Upload:
    """A registry that answers how far an upload came."""

    def location(self, _: Reply) -> str:
        return ""

    def attempt(self, _what: str, ask, tries: int) -> Reply:
        return Reply(204, httpx.Headers({"range": "0-" + "9" * 60_000}), b"", "")


def test_a_range_of_sixty_thousand_digits_is_none() -> None:
    """A registry says that it has 10**60000 bytes of an upload: it is sent anew."""
    assert _kept(Upload(), Reply(200, httpx.Headers(), b"", "")) is None  # type: ignore[arg-type]


DEEP = b'{"a":' * 50_000 + b"1" + b"}" * 50_000


@pytest.mark.parametrize("body", [DEEP, b'{"n": ' + b"9" * 5_000 + b"}", b'{"a":1,"a":2}', b"\xff"])
def test_json_that_no_reader_survives_is_no_reply(body: bytes) -> None:
    """Manifests, lists, tokens and errors are nested, or say one thing twice."""
    with pytest.raises(InputRefused):
        read_json(body, "r.example/x")
    assert json_object(body) in ({}, {"a": 2})


# Package indexes.


class Answering(BaseHTTPRequestHandler):
    """Answers every address with the class's own body."""

    body = b""
    packed = False

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.send_response(200)
        if self.packed:
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PypiReader]:
    monkeypatch.delenv("WEIGHTSMITH_WHEELS", raising=False)
    monkeypatch.setattr(Answering, "packed", False)
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Answering)) as url:
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple")
        yield PypiReader(FileStore(tmp_path / "store"))


def row(**changed: object) -> bytes:
    """Return a listing of one wheel, some of its row changed."""
    fields = {"filename": "m-1-py3-none-any.whl", "url": "x.whl", "hashes": {"sha256": "0" * 64}}
    return json.dumps({"files": [fields | changed]}).encode()


LISTINGS = {
    "nested": DEEP,
    "a list": b"[]",
    "files are a number": b'{"files": 7}',
    "rows are numbers": b'{"files": [7]}',
    "no name": row(filename=None),
    "no digest": row(hashes={"md5": "0"}),
    "a digest that is none": row(hashes={"sha256": ["x"]}),
    "an address that is none": row(url="http://[::1"),
    "a size that is none": row(size="x"),
    "a size of half the world": row(size=10**40),
}


@pytest.mark.parametrize("case", LISTINGS)
def test_a_listing_of_another_shape_ends_without_a_trace(
    reader: PypiReader, monkeypatch, case: str
) -> None:
    """An index answers with JSON that is no listing: an error that says so, whatever it is."""
    monkeypatch.setattr(Answering, "body", LISTINGS[case])
    with pytest.raises(WeightsmithError) as caught:
        reader.fetch("pypi://m==1", "", "", Silent())
    assert caught.value.exit_code in (3, 5)


def test_a_listing_that_unfolds_into_gigabytes_is_not_unfolded(
    reader: PypiReader, monkeypatch
) -> None:
    """A megabyte of gzip is a gigabyte of listing: it was never asked for, and is not unfolded."""
    unfolding = zlib.compressobj(9, zlib.DEFLATED, 31)
    data = b"".join(unfolding.compress(bytes(1 << 20)) for _ in range(64)) + unfolding.flush()
    monkeypatch.setattr(Answering, "body", data)
    monkeypatch.setattr(Answering, "packed", True)
    monkeypatch.setattr(httpx._decoders.GZipDecoder, "decode", lambda *_: pytest.fail("unfolded"))
    with pytest.raises(EnvironmentFailure, match="did not answer"):
        reader.fetch("pypi://m==1", "", "", Silent())


def test_a_wheel_that_never_ends_is_cut_off(reader: PypiReader, monkeypatch) -> None:
    """An index sends far more than the size that it told: no more than that is written."""
    monkeypatch.setattr(Answering, "body", row(size=100))
    sizes: list[int] = []
    monkeypatch.setattr(Silent, "advance", lambda _self, done, *_: sizes.append(done))
    with pytest.raises(Altered, match="sha256 is"):
        reader.fetch("pypi://m==1", "", "0" * 64, Silent())
    assert not sizes
