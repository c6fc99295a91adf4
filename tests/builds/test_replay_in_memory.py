"""Replay sets of images that are built in memory, and what `prove` and `verify` say of them."""

from __future__ import annotations

import json
import re
import tarfile
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from weightsmith.api.commands import prove as proving
from weightsmith.api.commands.images import inspect_image
from weightsmith.api.commands.prove import prove_image
from weightsmith.api.commands.requests import ProveCommand
from weightsmith.api.commands.verify import verify_image
from weightsmith.api.results import Verification
from weightsmith.core.devices import Devices
from weightsmith.core.errors import CheckFailed, EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.ports import StartSpec
from weightsmith.core.values import Blob, Digest
from weightsmith.evaluating.replay import LARGEST, ReplaySet
from weightsmith.evaluating.replaying import Replayed, Verdict
from weightsmith.oci.image import Image
from weightsmith.oci.layout import read_layout
from weightsmith.oci.manifests import OCI_MANIFEST
from weightsmith.oci.registry import open_location
from weightsmith.outside.signer import open_signer
from weightsmith.provenance.proofs import ProofDevice, proof_of
from weightsmith.provenance.sealing import attach_signed
from weightsmith.provenance.statements import Statement
from weightsmith.serving.plan import ServingPlan

from tests.fakes.memory import Memory, write_rows
from tests.fakes.openai_server import answer, servers
from tests.fakes.replays import a_set

FILE = "etc/weightsmith/replay.json"


@pytest.fixture
def built(memory: Memory) -> Memory:
    build(memory)
    return memory


def build(memory: Memory, **asked: Any) -> None:
    memory.build(layout=memory.folder / "image", **asked)


def layout(memory: Memory) -> str:
    return f"oci:{memory.folder / 'image'}"


def replay_file(memory: Memory) -> dict[str, Any]:
    """The set as another program reads it out of the layout."""
    image = read_layout(memory.folder / "image")
    data = b"".join(image.layers[-1].open())
    with tarfile.open(fileobj=BytesIO(data)) as archive:
        assert archive.getnames()[-1] == FILE
        content = archive.extractfile(FILE)
        assert content
        return dict(json.loads(content.read()))


def prove(memory: Memory, **asked: Any) -> dict[str, Any]:
    asked = {"image": layout(memory), "retries": 0, **asked}
    found, _ = prove_image(ProveCommand(**asked), memory.tools)
    return dict(found)


def keys(folder: Path, name: str) -> tuple[Path, Path]:
    """A new private key and its public one."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


def test_an_image_carries_what_it_answered_in_a_layer_of_its_own(built: Memory) -> None:
    image = read_layout(built.folder / "image")
    found, record = replay_file(built), built.record()
    first = found["questions"][0]

    assert found["reference"] == "image"
    assert len(found["questions"]) == 8
    assert first["path"] == "/v1/completions"  # it has no chat template
    assert first["request"]["prompt"].startswith("What does a say to")
    assert first["request"] | {"temperature": 0.0, "logprobs": 2} == first["request"]
    assert "".join(token["text"] for token in first["tokens"]) == first["answer"]
    assert image.labels["dev.weightsmith.replay.digest"] == record["replay"]["digest"]
    assert image.labels["dev.weightsmith.replay.questions"] == "8"
    assert record["replay"]["questions"] == 8
    assert image.layers[-1].file == FILE
    assert image.labels["dev.weightsmith.layers"].endswith("settings:3")  # settings, program, set
    shown = inspect_image(layout(built), built.client, built.engine)
    assert shown["replay"]["questions"] == "8"


def test_the_same_build_has_the_same_set(built: Memory) -> None:
    first = built.record()["image"]["digest"]
    asked = len(built.launcher.replayed)
    build(built)

    assert built.record()["image"]["digest"] == first
    assert len(built.launcher.replayed) == asked


def test_a_set_beside_the_recipe_is_kept_where_it_holds(memory: Memory) -> None:
    """So an image has one digest on machines whose log-probabilities differ a little."""
    build(memory)
    first, found = memory.record()["image"]["digest"], replay_file(memory)
    build(memory, keep_replay=True)
    kept = memory.home / "recipe.replay.json"
    assert json.loads(kept.read_text()) == found
    memory.launcher.moved = 0.04
    build(memory)
    assert memory.record()["image"]["digest"] == first

    memory.launcher.moved = 1.0
    memory.store.entries.clear()
    build(memory)
    assert memory.record()["image"]["digest"] != first
    kept.write_text("[]")
    with pytest.raises(InputRefused, match="is no replay set"):
        build(memory)


def test_of_several_targets_each_has_its_own_file(memory: Memory) -> None:
    names = ["llamacpp-q4_k_m", "llamacpp-q8_0"]
    memory.write_recipe(targets=names)
    build(memory, keep_replay=True)

    assert [one.name for one in sorted(memory.home.glob("*.replay.json"))] == [
        f"recipe.{name}.replay.json" for name in names
    ]
    first = memory.record()["image"]["digest"]
    memory.launcher.moved = 0.04
    build(memory)
    assert memory.record()["image"]["digest"] == first


def test_an_image_without_a_set_leaves_none_beside_the_recipe(memory: Memory) -> None:
    memory.write_recipe(replay="none")
    build(memory, keep_replay=True)

    assert "the image has no replay set to keep" in memory.progress.warnings[-1]
    assert list(memory.home.glob("*.replay.json")) == []


def test_secret_questions_are_beside_the_record_alone(memory: Memory) -> None:
    write_rows(memory.home / "secret.jsonl", [{"prompt": "What is the secret?"}])
    memory.write_recipe(replay={"keep": "digests", "data": "secret.jsonl"})
    build(memory)
    found, file = replay_file(memory), memory.results() / "replay.json"

    assert "questions" not in found
    assert len(found["digests"]) == 1
    assert (
        json.loads(file.read_text())["questions"][0]["request"]["prompt"] == "What is the secret?"
    )
    with pytest.raises(InputRefused, match="digests of questions"):
        prove(memory)
    assert prove(memory, replay=file)["verdict"] == "proven"


def test_none_asks_nothing_and_adds_nothing(memory: Memory) -> None:
    memory.write_recipe(replay="none")
    build(memory)

    assert memory.launcher.replayed == []
    assert "replay" not in memory.record()
    with pytest.raises(InputRefused, match="has no replay set") as caught:
        prove(memory)
    assert caught.value.details["verdict"] == "not shown"


def test_a_server_that_lists_no_tokens_makes_no_set(memory: Memory) -> None:
    memory.launcher.lists_tokens = False
    build(memory)

    assert "replay" not in memory.record()


def test_an_image_that_only_the_engine_has_is_asked(memory: Memory) -> None:
    """Its set is read out of the engine; a statement is about a digest, which no engine says."""
    memory.build(load=True)
    name = memory.record()["image"]["reference"]

    assert prove(memory, image=name)["verdict"] == "proven"
    with pytest.raises(UsageError, match="the container engine does not say it"):
        prove(memory, image=name, key="node.key")


def test_a_limit_keeps_the_same_questions(memory: Memory) -> None:
    build(memory)
    every = [one["request"]["prompt"] for one in replay_file(memory)["questions"]]
    memory.write_recipe(replay={"limit": 3})
    build(memory)
    some = [one["request"]["prompt"] for one in replay_file(memory)["questions"]]

    assert len(some) == 3
    assert [one for one in every if one in some] == some


def test_an_image_that_answers_alike_is_proven(built: Memory) -> None:
    found = prove(built)

    assert found["verdict"] == "proven"
    assert found["questions"] == found["by_tokens"] == 8
    assert found["differences"] == []
    assert found["device"] == "Memory CPU 7"
    assert found["engine"].startswith("llamacpp")


def test_another_answer_is_different_and_says_where(built: Memory) -> None:
    built.launcher.answer = lambda question, adapter: "something else entirely"
    with pytest.raises(CheckFailed, match="usually another chat template") as caught:
        prove(built)
    told = caught.value.details

    assert told["verdict"] == "different"
    assert len(told["differences"]) == 8
    first = told["differences"][0]
    assert first["token"] == 0
    assert first["excess"] == pytest.approx(first["margin"] - 1.0)


def test_a_probability_that_moved_too_far_is_different(built: Memory) -> None:
    built.launcher.moved = 0.05
    assert prove(built)["verdict"] == "proven"
    built.launcher.moved = 0.5
    with pytest.raises(CheckFailed, match="log-probability moved"):
        prove(built)


def test_texts_are_compared_where_the_server_lists_no_tokens(built: Memory) -> None:
    built.launcher.lists_tokens = False
    found = prove(built)
    assert (found["verdict"], found["by_tokens"]) == ("proven", 0)

    said = built.launcher.answer
    built.launcher.answer = lambda question, adapter: said(question, adapter) + " And more"
    with pytest.raises(CheckFailed) as caught:
        prove(built)
    assert {one["given"] for one in caught.value.details["differences"]} == {" And more"}


def test_of_another_quantization_the_size_is_said(memory: Memory, tmp_path: Path) -> None:
    (tmp_path / "set.json").write_bytes(replace(a_set(), weight_bytes=4096).data)
    with servers() as starting:
        server = starting(lambda handler, _: handler.send(200, answer("I'm Lantern.")))
        server.models = {"data": [{"id": "bot", "meta": {"size": 2048}}]}
        with pytest.raises(CheckFailed) as caught:
            prove(memory, image="", url=server.endpoint.url, replay=tmp_path / "set.json")
    said = "the server has 2048 bytes of weights and the tested image had 4096"
    assert re.search(rf"^different on [^;]*: {said}", caught.value.message)
    told = caught.value.details
    assert (told["verdict"], told["differences"]) == ("different", [])
    assert str(told["why"]).startswith(said)


def test_a_set_that_was_altered_or_is_another_images_is_refused(
    built: Memory, tmp_path: Path
) -> None:
    found = replay_file(built)
    found["tolerance"] = 3.0
    other, asked = tmp_path / "other.json", [*built.launcher.asked]
    other.write_text(json.dumps(found))
    with pytest.raises(InputRefused, match="is not the image's replay set"):
        prove(built, replay=other)
    other.write_bytes(a_set().data)
    with pytest.raises(InputRefused, match="is not the image's replay set"):
        prove(built, replay=other)
    other.write_bytes(b" " * (LARGEST + 1))
    with pytest.raises(InputRefused, match=str(other)):
        prove(built, replay=other)
    assert built.launcher.asked == asked


def test_a_proof_is_signed_attached_and_asked_for(built: Memory, tmp_path: Path) -> None:
    private, public = keys(tmp_path, "node")
    _, stranger = keys(tmp_path, "stranger")
    built.signer = open_signer(str(private))
    out = tmp_path / "proof.jsonl"
    told = prove(built, key=str(private), statement=out, node_type="g6.xlarge")
    rows = [json.loads(line) for line in out.read_text().splitlines()]

    def verify(*devices: str, key: Path = public) -> dict[str, Any]:
        found = verify_image(
            layout(built), None, built.client, built.progress, proven_on=devices, proof_key=key
        )
        return {one.name: one.ok for one in found.checks}

    assert told["attached"]
    assert [sorted(row) for row in rows] == [["payload", "payloadType", "signatures"]] * 2
    assert verify("Memory CPU 7", "cpu", "g6.xlarge")["proven on g6.xlarge"] is True
    with pytest.raises(CheckFailed, match="another device"):
        verify("nvidia-l4")
    with pytest.raises(CheckFailed, match="not signed by this key"):
        verify("cpu", key=stranger)
    with pytest.raises(UsageError, match="--proven-on needs a key"):
        verify_image(layout(built), None, built.client, built.progress, proven_on=("cpu",))


def test_a_proofs_key_says_nothing_of_how_the_image_was_made(built: Memory, tmp_path: Path) -> None:
    """Its statements are about this image, so it is not said that they are about another."""
    private, public = keys(tmp_path, "node")
    built.signer = open_signer(str(private))
    prove(built, key=str(private))
    with pytest.raises(CheckFailed) as caught:
        verify_image(layout(built), public, built.client, built.progress)
    found = {row["check"]: row["found"] for row in caught.value.details["checks"]}
    assert found["statement"] == "no statement says how this image was made"


def test_without_a_proof_nothing_is_proven(built: Memory, tmp_path: Path) -> None:
    _, public = keys(tmp_path, "node")
    with pytest.raises(CheckFailed, match="no proof is attached"):
        verify_image(layout(built), public, built.client, built.progress, proven_on=("cpu",))


def proof(image: Blob, verdict: Verdict, when: datetime, device: str = "cpu") -> Statement:
    """The summary of what a node would have shown."""
    found = Replayed(verdict=verdict, questions=1, equal=1)
    on = ProofDevice(name=device, model=f"{device} of a test")
    return proof_of(image, "app", a_set(), on, found, {}, when)[1]


@pytest.mark.parametrize("form", ["cosign", "bundle"])
@pytest.mark.parametrize("later", ["proven", "different"])
def test_of_two_proofs_that_disagree_the_newest_counts(
    built: Memory, tmp_path: Path, later: Verdict, form: Any
) -> None:
    """In whichever order they are listed; one of another device says nothing."""
    private, public = keys(tmp_path, "node")
    place = open_location(layout(built), built.client)
    image, now = place.image().manifest_blob, datetime.now(UTC)
    sooner: Verdict = "different" if later == "proven" else "proven"
    told = [
        proof(image, later, now - timedelta(days=1)),
        proof(image, sooner, now - timedelta(days=2)),
        proof(image, "different", now, "nvidia-l4"),
    ]
    attach_signed(told, image, place, replace(open_signer(str(private)), format=form))

    def verify() -> Verification:
        return verify_image(
            layout(built), None, built.client, built.progress, proven_on=("cpu",), proof_key=public
        )

    if later == "proven":
        assert verify().checks[-1].ok
        return
    with pytest.raises(CheckFailed, match="cpu of a test: its answers were different"):
        verify()


def test_a_proof_of_another_image_or_of_both_shows_nothing_of_this_one(
    built: Memory, tmp_path: Path
) -> None:
    """The device is the one that stands beside the image, whatever else the key has proven."""
    private, public = keys(tmp_path, "node")
    place = open_location(layout(built), built.client)
    image, now = place.image().manifest_blob, datetime.now(UTC)
    other = replace(image, digest=Digest.of(b"another image"))
    gpu, cpu = proof(other, "proven", now, "nvidia-l4"), proof(image, "proven", now)
    rows = [*gpu.document["subject"], *cpu.document["subject"]]
    both = Statement({**gpu.document, "subject": rows})
    attach_signed((gpu, both), image, place, open_signer(str(private)))

    with pytest.raises(CheckFailed, match=r"nvidia-l4 +cpu of a test: another device$"):
        verify_image(layout(built), public, built.client, built.progress, proven_on=("nvidia-l4",))


def test_a_device_that_is_not_here_is_not_claimed(built: Memory) -> None:
    with pytest.raises(UsageError, match="the image is started here, on Memory CPU 7"):
        prove(built, device="nvidia-l4")
    assert prove(built, device="cpu")["on"]["model"] == "Memory CPU 7"
    cpu = Devices(cpu="Memory CPU 7", cpus=2, gpus=("NVIDIA L4",))
    built.launcher.runs_on = cpu
    on = prove(built)["on"]
    assert (on["name"], on["model"]) == ("cpu", "Memory CPU 7"), "llama.cpp's image uses no GPU"


def test_a_port_of_this_machine_may_lead_elsewhere(built: Memory, tmp_path: Path) -> None:
    """As `kubectl port-forward` does: then this machine's names say nothing."""
    out = tmp_path / "proof.jsonl"
    with built.launcher.serve(layout(built), StartSpec(port=8080, env={})) as server:
        prove(built, url=server.url, device="nvidia-l4", statement=out)
    shown = json.loads(out.read_text().splitlines()[0])["predicate"]
    assert (shown["device"]["name"], shown["device"]["model"]) == ("nvidia-l4", "")


def test_an_image_for_a_gpu_does_not_answer_on_a_machine_without_one(
    built: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proving, "plan_of", lambda _: ServingPlan(device="nvidia-l4", gpus=1))
    with pytest.raises(UsageError, match="the server may be on another machine"):
        prove(built, url="http://127.0.0.1:1", key="node.key")


class Clock(datetime):
    """A clock that is a day ahead."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime.now(tz) + timedelta(days=1)


def test_a_proof_from_a_clock_that_is_ahead_does_not_count(
    built: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = keys(tmp_path, "node")
    built.signer = open_signer(str(private))
    monkeypatch.setattr(proving, "datetime", Clock)
    prove(built, key=str(private))
    with pytest.raises(CheckFailed, match="its time is ahead of this clock"):
        verify_image(layout(built), public, built.client, built.progress, proven_on=("cpu",))


def test_a_statement_without_key_is_a_vsa_that_is_not_believed(
    built: Memory, tmp_path: Path
) -> None:
    out = tmp_path / "proof.jsonl"
    told = prove(built, statement=out)
    shown, summary = (json.loads(line) for line in out.read_text().splitlines())
    digest = built.record()["image"]["digest"]
    said = summary["predicate"]

    assert not told["attached"]
    assert {row["digest"]["sha256"] for row in (*shown["subject"], *summary["subject"])} == {
        digest.removeprefix("sha256:")
    }
    # Fields of https://slsa.dev/spec/v1.1/verification_summary
    assert summary["predicateType"] == "https://slsa.dev/verification_summary/v1"
    assert said["verificationResult"] == "PASSED"
    assert "WEIGHTSMITH_PROVEN_ON_cpu" in said["verifiedLevels"]
    assert datetime.fromisoformat(said["timeVerified"]) <= datetime.now(UTC)
    assert {"verifier", "resourceUri", "policy", "inputAttestations"} <= set(said)


def test_a_different_image_is_stated_and_never_attached(built: Memory, tmp_path: Path) -> None:
    private, public = keys(tmp_path, "node")
    built.signer = open_signer(str(private))
    built.launcher.answer = lambda question, adapter: "something else"
    out = tmp_path / "proof.jsonl"
    with pytest.raises(CheckFailed) as caught:
        prove(built, key=str(private), statement=out)

    assert not caught.value.details["attached"]
    assert len(out.read_text().splitlines()) == 2
    with pytest.raises(CheckFailed, match="no proof is attached"):
        verify_image(layout(built), public, built.client, built.progress, proven_on=("cpu",))


def test_a_tag_that_moves_meanwhile_does_not_change_what_is_started(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the answers of one image would prove another."""
    memory.build(push=True)
    built, manifests = "1.0.0-llamacpp-q4_k_m", memory.registry.manifests
    known = proving.replay_in

    def and_then_it_moves(image: Image, where: str) -> ReplaySet:
        found = known(image, where)
        manifests["team/tiny", built] = (OCI_MANIFEST, b'{"schemaVersion": 2}')
        return found

    monkeypatch.setattr(proving, "replay_in", and_then_it_moves)
    memory.engine.names.clear()
    out, name = tmp_path / "proof.jsonl", f"{memory.repository}:{built}"
    assert prove(memory, image=name, statement=out)["verdict"] == "proven"
    shown = json.loads(out.read_text().splitlines()[0])
    digest = memory.record()["image"]["digest"]
    assert shown["subject"][0]["digest"]["sha256"] == digest.removeprefix("sha256:")


def test_what_cannot_be_asked_is_said_before_anything_starts(built: Memory) -> None:
    built.journal.events.clear()
    with pytest.raises(UsageError, match="give --image or --url"):
        prove(built, image="")
    with pytest.raises(UsageError, match="--url needs --image or --replay"):
        prove(built, image="", url="http://127.0.0.1:1")
    with pytest.raises(UsageError, match="the server may be on another machine"):
        prove(built, url="http://192.0.2.1:1", key="node.key")
    assert "start" not in built.journal.events


def test_a_server_that_is_not_there_shows_nothing(built: Memory) -> None:
    with pytest.raises(EnvironmentFailure, match="not shown: question 1 got no answer") as caught:
        prove(built, url="http://127.0.0.1:1")
    assert caught.value.details["verdict"] == "not shown"


@pytest.mark.parametrize(
    ("status", "hint"),
    [
        (401, "set WEIGHTSMITH_API_KEY"),
        (403, "set WEIGHTSMITH_API_KEY"),
        (404, "check that it serves this model"),
        (503, "wait until"),
    ],
)
def test_of_a_server_that_refuses_it_is_said_what_to_do(
    built: Memory, status: int, hint: str
) -> None:
    with servers() as start:
        server = start(lambda handler, body: handler.send(status, {}))
        with pytest.raises(EnvironmentFailure, match="not shown: question 1 got no") as caught:
            prove(built, url=server.endpoint.url)
    assert hint in str(caught.value.hint)


def test_a_thin_image_and_other_forms(memory: Memory) -> None:
    """A thin image starts the same weights, so it has the set; a volume starts nothing."""
    memory.use_vllm(outputs=["image", "volume"])
    build(memory)
    volume = read_layout(memory.folder / "image-volume")

    assert FILE in {layer.file for layer in read_layout(memory.folder / "image").layers}
    assert FILE not in {layer.file for layer in volume.layers}
    assert "dev.weightsmith.replay.digest" not in volume.labels


def test_every_platform_has_the_same_set(memory: Memory) -> None:
    memory.write_recipe(
        image={"repository": memory.repository, "platforms": ["linux/amd64", "linux/arm64"]}
    )
    build(memory)
    folder = memory.folder / "image"
    both = [read_layout(folder, platform=f"linux/{one}") for one in ("amd64", "arm64")]

    assert len({image.layers[-1].digest for image in both}) == 1
    assert both[0].layers[-1].file == FILE


def test_of_an_index_it_is_said_which_platform_was_proven(memory: Memory, tmp_path: Path) -> None:
    memory.write_recipe(
        image={"repository": memory.repository, "platforms": ["linux/amd64", "linux/arm64"]}
    )
    build(memory)
    private, public = keys(tmp_path, "node")
    memory.signer = open_signer(str(private))
    assert prove(memory, key=str(private))["attached"]

    found = verify_image(
        layout(memory), None, memory.client, memory.progress, proven_on=("cpu",), proof_key=public
    )
    assert re.match("linux/a[mr][md]64: Memory CPU 7 at ", found.checks[-1].found)
