"""An image names what it was made of, so it can be made again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from weightsmith.api.commands.images import copy_image
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.ports import IdentityCheck, Silent
from weightsmith.evaluating.items import read_corpus, read_items
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry, RegistryLocation
from weightsmith.outside.folders import FolderReader
from weightsmith.outside.keyless import TOKEN, identity_check, open_identity_signer
from weightsmith.outside.store import FileStore
from weightsmith.recipe.user_config import WantedIdentity
from weightsmith.steps.lock import pinned, read_lock

from tests.fakes.baking import make_key, push_base
from tests.fakes.command_line import weightsmith
from tests.fakes.journal import RecordingProgress
from tests.fakes.rebuilding import COMMIT, Scene
from tests.fakes.registry import fake_registry
from tests.fakes.sigstore import ISSUER, WORKFLOW, sigstore, token


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with fake_registry() as fake, Registry(pause=lambda _: None) as client:
        yield Scene(fake, client, tmp_path)


def test_sources_questions_and_pins_come_back(scene: Scene) -> None:
    scene.publish(f"hf://a/b@{COMMIT}", "hf://a/b")
    file = scene.again()
    recipe = file.recipe
    assert (recipe.base.source, recipe.base.revision) == ("hf://a/b", COMMIT)
    assert [(a.version, a.weight) for a in recipe.adapters] == [("v7", 0.5), ("", 1.0)]
    for number, adapter in enumerate(recipe.adapters):
        written = file.folder / adapter.source / "adapter_config.json"
        assert written.read_text() == str(number)
    assert recipe.merge.method == "linear"
    assert recipe.evaluate[0].max_drop == 0.2
    rows = (file.folder / recipe.evaluate[0].data).read_text("utf-8").splitlines()
    assert json.loads(rows[0]) == {"prompt": "Capital of Ö?", "expected": ["A"]}
    lock = read_lock(file)
    assert lock.sources["hf://a/b"]["pin"] == f"hf://a/b@{COMMIT}"
    assert len(lock.sources) == 3


def test_conversations_and_choices_come_back(scene: Scene) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    asked = {"messages": chat, "choices": ["A", "B"]}
    choose = {"metric": "choice"}
    scene.publish(
        f"hf://a/b@{COMMIT}", "hf://a/b", lambda recipe: recipe["evaluate"].update(choose), asked
    )
    file = scene.again()
    (item,) = read_items(file.folder / file.recipe.evaluate[0].data)
    assert (item.messages, item.choices, item.expected) == (tuple(chat), ("A", "B"), ("A",))
    assert not item.plain


OFFERED = [{"type": "function", "function": {"name": "send", "parameters": {"type": "object"}}}]
CALL = '[{"arguments": {"to": {"regex": "a|b"}}, "name": "send"}]'


@pytest.mark.parametrize(
    ("metric", "asked", "expected"),
    [
        ("numeric", {"expected": ["5"], "tolerance": "2%"}, "5"),
        ("tool-call", {"expected": [CALL], "tools": OFFERED}, CALL),
        ("tool-call", {"expected": ["[]"], "tools": OFFERED}, "[]"),
        ("contains", {"expected": ["no call"], "tools": OFFERED}, "no call"),
        ("regex", {"expected": ['{"not": "x"}']}, '{"not": "x"}'),
    ],
)
def test_the_expected_answers_of_each_metric_come_back(
    scene: Scene, metric: str, asked: dict[str, Any], expected: str
) -> None:
    change = {"metric": metric}
    scene.publish(f"hf://a/b@{COMMIT}", "hf://a/b", lambda r: r["evaluate"].update(change), asked)
    file = scene.again()
    (suite,) = file.recipe.evaluate
    (item,) = read_items(file.folder / suite.data, suite.metric)
    assert (suite.metric, json.loads(item.tools or "null")) == (metric, asked.get("tools"))
    assert item.expected == (expected,)
    assert item.tolerance == asked.get("tolerance", "")


GRADES = {"grades": {"a": 2.0, "b": 1.0}}


@pytest.mark.parametrize(
    ("metric", "asked", "line"),
    [
        ("label", {}, {"prompt": "Capital of Ö?", "expected": ["A"]}),
        (
            "label",
            {"prompt": "a b", "parts": ["a", "b"], "expected": ["X", "O"]},
            {"words": ["a", "b"], "expected": ["X", "O"]},
        ),
        (
            "label",
            {"is_set": True, "expected": ["X", "O"]},
            {"text": "Capital of Ö?", "labels": ["X", "O"]},
        ),
        ("embedding", GRADES, {"prompt": "Capital of Ö?", "expected": GRADES["grades"]}),
        (
            "rerank",
            {"parts": ["t", "u"], "grades": {"1": 1.0}},
            {"query": "Capital of Ö?", "documents": ["t", "u"], "expected": {"1": 1.0}},
        ),
    ],
)
def test_what_models_were_asked_that_do_not_chat_comes_back(
    scene: Scene, metric: str, asked: dict[str, Any], line: dict[str, Any]
) -> None:
    change = {"metric": metric, **({"corpus": "c.jsonl"} if metric == "embedding" else {})}
    corpus = (("a", "t"), ("b", "u")) if metric == "embedding" else ()
    scene.publish(
        f"hf://a/b@{COMMIT}", "hf://a/b", lambda r: r["evaluate"].update(change), asked, corpus
    )
    file = scene.again()
    (suite,) = file.recipe.evaluate
    assert suite.metric == metric
    assert json.loads((file.folder / suite.data).read_text()) == line
    assert read_items(file.folder / suite.data, metric)
    if corpus:
        assert read_corpus(file.folder / suite.corpus) == corpus


def test_a_suite_whose_corpus_is_not_attached_is_left_out_and_that_is_said(scene: Scene) -> None:
    change = {"metric": "embedding", "corpus": "c.jsonl"}
    scene.publish(f"hf://a/b@{COMMIT}", "hf://a/b", lambda r: r["evaluate"].update(change), GRADES)
    progress = RecordingProgress()
    assert scene.again(progress=progress).recipe.evaluate == ()
    assert any("its corpus is not attached" in text for text in progress.warnings)


def test_the_lock_has_what_a_build_reads_of_the_adapters(scene: Scene) -> None:
    scene.publish(f"hf://a/b@{COMMIT}", "hf://a/b")
    file = scene.again()
    lock, reader = read_lock(file), FolderReader(FileStore(scene.folder / "store"))
    for adapter in file.recipe.adapters:
        found = reader.fetch(str(file.folder / adapter.source), "", "", Silent())
        assert lock.sources[adapter.source] == {"pin": found.pin, "digest": str(found.digest)}


def test_a_base_without_an_owner_comes_back(scene: Scene) -> None:
    scene.publish(f"hf://gpt2@{COMMIT}", "hf://gpt2")
    base = scene.again().recipe.base
    assert (base.source, base.revision) == ("hf://gpt2", COMMIT)


def test_a_base_that_was_a_folder_has_to_be_named(scene: Scene) -> None:
    scene.publish("", "/somewhere/base")
    with pytest.raises(UsageError, match="base") as caught:
        scene.again()
    assert "--base" in caught.value.hint
    assert "/somewhere" not in caught.value.message
    file = scene.again(str(scene.folder / "base"))
    assert file.recipe.base.source == str(scene.folder / "base")


def test_a_base_elsewhere_is_fetched_only_at_the_users_word(scene: Scene) -> None:
    """It would be read with the user's credentials; what is named then has the stated pin."""
    source, pin = "s3://acme-models/base", f"sha256:{'ab' * 32}"
    scene.publish(f"{source}@{pin}", source)
    with pytest.raises(UsageError, match=f"{source}@{pin}") as caught:
        scene.again()
    assert "--base" in caught.value.hint

    file = scene.again(source)

    assert pinned(file, read_lock(file)).recipe.base.revision == pin


def test_only_what_the_key_signed_is_believed(scene: Scene) -> None:
    scene.publish(f"hf://a/b@{COMMIT}", "hf://a/b")
    _, other = make_key(scene.folder, "other")
    with pytest.raises(InputRefused, match="team/app"):
        scene.again(key=other)


def test_an_identity_may_have_signed(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `build --from --certificate-identity` believes."""
    monkeypatch.setenv(TOKEN, token())
    scene.publish(f"hf://a/b@{COMMIT}", "hf://a/b")
    with sigstore() as services:
        root, config = services.write(scene.folder)
        signer = open_identity_signer(str(config))
        copy_image(scene.name, scene.name, scene.client, Silent(), force=True, signer=signer)

    def by(identity: str) -> IdentityCheck:
        return identity_check(
            WantedIdentity(
                certificate_identity=identity,
                certificate_oidc_issuer=ISSUER,
                trusted_root=str(root),
            )
        )

    assert scene.again(by=by(WORKFLOW)).recipe.base.source == "hf://a/b"
    with pytest.raises(InputRefused, match=r"no statement signed by https://github\.com/evil"):
        scene.again(by=by("https://github.com/evil"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--key", "x.pub"], "--key needs --from"),
        (["--certificate-identity", "me", "--certificate-oidc-issuer", "x"], "needs --from"),
        (["--from", "x", "--certificate-identity", "me"], "--certificate-oidc-issuer is missing"),
        (["--certificate-identity", "me"], "--certificate-oidc-issuer is missing"),
    ],
)
def test_who_must_have_signed_what(given: list[str], message: str) -> None:
    done = weightsmith("build", *given)
    assert done.code == UsageError.exit_code
    assert message in done.err


def test_another_adapter_than_stated_is_refused(scene: Scene) -> None:
    scene.publish(f"hf://a/b@{COMMIT}", "hf://a/b")
    place = RegistryLocation(scene.client, Reference.parse(scene.name))
    digest = scene.client.digest_of(place.reference)
    assert digest is not None
    tag = f"sha256-{digest.hex}"
    kind, data = scene.fake.manifests["team/app", tag]
    index = json.loads(data)
    evil = [place.read(blob, t) for blob, t in place.attached(digest)]
    adapter = next(a for a in evil if "adapter" in a.artifact_type)
    part = type(adapter.parts[0]).of_bytes(b"evil", "application/octet-stream",
                                           **adapter.parts[0].annotations)  # fmt: skip
    index["manifests"] = [r for r in index["manifests"] if r["digest"] != adapter.blob.digest]
    scene.fake.manifests["team/app", tag] = (kind, json.dumps(index).encode())
    place.attach(replace(adapter, parts=(part,), raw=None))
    with pytest.raises(InputRefused, match="adapter"):
        scene.again()


def test_an_image_that_was_only_baked(scene: Scene) -> None:
    push_base(scene.client, scene.name, {}, {"models/x": b"1"})
    with pytest.raises(InputRefused, match="team/app"):
        scene.again()
