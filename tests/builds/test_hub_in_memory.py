"""A build in memory whose weights are published on a hub, and what else can be pushed there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml
from huggingface_hub import parse_eval_result_entries
from weightsmith.api.commands.upload import push_to_hub
from weightsmith.api.commands.verify import verify_image
from weightsmith.core import platforms
from weightsmith.core.errors import EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.ports import Silent
from weightsmith.stages.upload import HubDestination

from tests.fakes.hub import Repository, WritableHub, writable_hub
from tests.fakes.memory import Memory
from tests.paths import ROOT

SCHEMA = ROOT / "docs" / "reference" / "build.schema.json"
TARGET = "llamacpp-q4_k_m"
HUB = "outputs.hub=hf://team/bot"
DESTINATION = HubDestination(repository="team/bot")
AGAIN = HubDestination(repository="team/again")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    with writable_hub(monkeypatch) as state:
        yield state


def card(hub: WritableHub, name: str = "team/bot") -> str:
    return hub.repositories[name].files["README.md"].decode()


def weights(hub: WritableHub, name: str = "team/bot") -> dict[str, bytes]:
    files = hub.repositories[name].files
    return {
        path: data
        for path, data in files.items()
        if path not in (".gitattributes", "README.md", "build.json")
    }


def test_a_build_publishes_its_weights_with_a_card(warm: Memory, hub: WritableHub) -> None:
    assert warm.build(HUB)[TARGET].forms == {}  # only a build that pushes publishes
    assert hub.requests == []
    built = warm.build(HUB, "card.license=MIT", push=True)[TARGET]

    form = built.forms["hub"]
    assert form.reference == "hf://team/bot"
    assert form.digest == hub.repositories["team/bot"].commits[-1]
    record = warm.record()
    assert record["forms"]["hub"]["digest"] == form.digest
    (file,) = record["artifact"]["files"]
    assert list(weights(hub)) == [file["path"]]
    text = card(hub)
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "mit"
    assert "| image | 8 of 8 | 1.000 | 0.68 to 1.00 |" in text
    assert record["base"]["pin"] in text
    assert record["adapters"][0]["pin"] in text
    assert built.published.digest in text
    assert f"Verdict: **{built.verdict}**" in text
    assert str(warm.home) not in text
    assert form.digest in (warm.results() / "report.html").read_text()

    told = hub.repositories["team/bot"].files["build.json"].decode()
    for secret in (str(warm.home), warm.registry.host, *record["items"][0].values()):
        if isinstance(secret, str):
            assert secret not in told
    public = json.loads(told)
    jsonschema.validate(public, json.loads(SCHEMA.read_text()))
    assert public["adapters"][0]["digest"] == record["adapters"][0]["digest"]
    assert public["artifact"]["files"] == record["artifact"]["files"]
    assert public["image"]["digest"] == built.published.digest
    assert public["verdict"] == built.verdict
    assert public["inputs"]["quantize"]["builder"] == record["inputs"]["quantize"]["builder"]

    again = warm.build(HUB, "card.license=MIT", push=True)[TARGET].forms["hub"]
    assert again.digest == form.digest
    assert again.uploaded_bytes == 0 < form.uploaded_bytes


def test_a_score_on_a_benchmark_is_said_as_the_hub_reads_it(warm: Memory, hub: WritableHub) -> None:
    commit = "5503434ddd753f426f4b38109466949a1217c2bb"
    warm.build(HUB, f"evaluate.benchmark=cais/hle@{commit}:default", push=True)
    files = hub.repositories["team/bot"].files
    said = yaml.safe_load(files[".eval_results/hle_default.yaml"])

    (entry,) = parse_eval_result_entries(said)
    assert (entry.dataset_id, entry.task_id) == ("cais/hle", "default")
    assert (entry.dataset_revision, entry.value) == (commit, 1.0)
    assert entry.notes == "8 questions, contains, asked by weightsmith"

    theirs = ".eval_results/gpqa.yaml"
    files[theirs] = b"[]"
    warm.build(HUB, f"evaluate.benchmark=cais/hle@{commit}:default", push=True)
    assert theirs in hub.repositories["team/bot"].files  # the same model: what others found stays


def test_what_the_hub_refuses_is_known_before_any_work(memory: Memory, hub: WritableHub) -> None:
    hub.fail["GET /api/models"] = 401
    with pytest.raises(EnvironmentFailure, match="token"):
        memory.build(HUB, push=True)
    assert memory.jobs() == []


def test_another_model_on_the_hub_is_refused_before_anything_is_published(
    warm: Memory, hub: WritableHub
) -> None:
    hub.repositories["team/bot"] = Repository(commits=["1" * 40])
    hub.repositories["team/bot"].files["other.gguf"] = b"GGUF"
    warm.store.forget("trial", "smoke")
    before = warm.seen()

    with pytest.raises(UsageError, match="already holds other files, such as other"):
        warm.build(HUB, push=True)
    assert any("already holds a model" in str(line) for line in warm.progress.lines)
    assert warm.seen() == before
    assert warm.registry.manifests == {}
    assert warm.left() == []

    warm.build(HUB, push=True, force=True)
    assert "other.gguf" not in hub.repositories["team/bot"].files


def test_what_was_published_is_recorded_though_the_hub_fails(
    warm: Memory, hub: WritableHub
) -> None:
    warm.write_recipe(outputs=["image", "volume"])
    hub.fail["/commit/main"] = 500
    with pytest.raises(EnvironmentFailure):
        warm.build(HUB, push=True)
    assert sorted(warm.record()["forms"]) == ["volume"]

    hub.fail.clear()
    assert sorted(warm.build(HUB, push=True)[TARGET].forms) == ["hub", "volume"]


@pytest.mark.slow
def test_the_card_of_an_image_that_was_not_started_claims_no_test(
    warm: Memory, hub: WritableHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platforms.platform, "machine", lambda: "x86_64")
    other, kinds = "image.platforms=[linux/arm64]", "outputs.kinds=[image, modelpack]"
    built = warm.build(HUB, other, kinds, push=True)[TARGET]
    push(warm, built.forms["modelpack"].reference, AGAIN)

    for name in ("team/bot", "team/again"):
        text = card(hub, name)
        assert "Verdict: **not proven**" in text
        assert "No server was started with the weights" in text
        assert "tested image" not in text
    checks = verify_image(built.forms["modelpack"].reference, None, warm.client, Silent())
    (gate,) = (one for one in checks.checks if one.name == "gate")
    assert gate.found == "not proven: no image with these weights was started"


@pytest.mark.parametrize(
    ("setting", "targets", "message"),
    [
        (HUB, (TARGET, "llamacpp-q8_0"), "share"),
        (HUB, ("llamacpp-lora",), "merged"),
        ("outputs.hub=hf://bot", (TARGET,), "repository"),
    ],
)
def test_a_place_that_cannot_be_used(
    memory: Memory, hub: WritableHub, setting: str, targets: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        memory.build(setting, targets=targets, push=True)
    assert memory.jobs() == []


@pytest.mark.slow
def test_each_target_has_its_own_repository(memory: Memory, hub: WritableHub) -> None:
    targets = (TARGET, "llamacpp-q8_0")
    memory.build("outputs.hub=hf://team/bot-{target}", targets=targets, push=True)

    assert sorted(hub.repositories) == [f"team/bot-{target}" for target in targets]


def test_a_refused_build_publishes_nothing_and_cannot_be_pushed(
    warm: Memory, hub: WritableHub
) -> None:
    warm.store.forget("trial", "smoke")
    warm.minds.forgot["image"] = set(warm.facts)
    with pytest.raises(Exception, match="drop"):
        warm.build(HUB, push=True)
    with pytest.raises(InputRefused, match="refused"):
        push(warm, str(warm.results() / "refused"))
    assert hub.repositories == {}


def push(memory: Memory, source: str, destination: HubDestination = DESTINATION) -> Any:
    return push_to_hub(source, destination, memory.tools)


@pytest.mark.slow
def test_each_form_of_a_build_can_be_pushed(warm: Memory, hub: WritableHub) -> None:
    warm.build(
        "outputs=[image, volume, modelpack, modelpack-tar, ollama]", layout=warm.folder / "o"
    )
    (file,) = warm.record()["artifact"]["files"]
    for kind in ("", "-volume", "-modelpack", "-modelpack-tar", "-ollama"):
        name = f"team/bot{kind}"
        push(warm, f"oci:{warm.folder / 'o'}{kind}", HubDestination(repository=name))

        assert list(weights(hub, name)) == [file["path"]], kind
        text = card(hub, name)
        assert "| image | 8 of 8 | 1.000 | 0.68 to 1.00 |" in text
        assert warm.record()["adapters"][0]["pin"] in text
        assert warm.record()["image"]["digest"] in text


def test_an_image_in_a_registry_can_be_pushed(warm: Memory, hub: WritableHub) -> None:
    built = warm.build(push=True)[TARGET]
    push(warm, built.published.reference)

    assert built.published.digest in card(hub)
    assert warm.registry.host not in card(hub)  # a registry's name may be nobody else's business


def test_a_builds_folder_is_pushed_from_the_store_or_the_layout_that_it_wrote(
    warm: Memory, hub: WritableHub
) -> None:
    warm.build(layout=warm.folder / "own")
    (file,) = warm.record()["artifact"]["files"]
    push(warm, str(warm.results()))
    assert list(weights(hub)) == [file["path"]]
    assert "started and passed" in card(hub)

    warm.store.forget("quantize")
    push(warm, str(warm.results()), AGAIN)
    assert list(weights(hub, "team/again")) == [file["path"]]

    shutil.rmtree(warm.folder / "own")
    with pytest.raises(InputRefused, match="neither in the store") as caught:
        push(warm, str(warm.results()), HubDestination(repository="team/third"))
    assert "build again" in caught.value.hint
    assert "team/third" not in hub.repositories


@pytest.mark.slow
def test_a_builds_folder_can_be_pushed_from_its_image(warm: Memory, hub: WritableHub) -> None:
    warm.build(push=True)
    push(warm, str(warm.results()))
    warm.store.forget("quantize")
    push(warm, str(warm.results()), AGAIN)

    assert weights(hub) == weights(hub, "team/again")
    assert card(hub).replace("team/bot", "team/again") == card(hub, "team/again")


def test_a_model_of_adapters_beside_their_base_is_refused(memory: Memory, hub: WritableHub) -> None:
    memory.build(targets=("llamacpp-lora",), layout=memory.folder / "own")
    with pytest.raises(InputRefused, match="no merged model"):
        push(memory, f"oci:{memory.folder / 'own'}")
    assert hub.repositories == {}
