"""What an image states: the recipe for `build --from`; signatures, statements and labels."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from weightsmith.api.commands.recipes import _with_questions
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.ports import Silent
from weightsmith.core.trees import below, discard
from weightsmith.core.values import Digest
from weightsmith.models.folder import ignored_files
from weightsmith.oci.attachments import Attachment, AttachmentPart
from weightsmith.oci.image import ROLES
from weightsmith.oci.layers import TITLE
from weightsmith.oci.registry import Registry
from weightsmith.provenance import evidence, signing
from weightsmith.provenance.evidence import EVALUATION_TYPE
from weightsmith.provenance.labels import ADDED, plan_in, roles_of

from tests.fakes.drawn import png
from tests.fakes.images import entry, foreign_image, tar_of
from tests.fakes.journal import RecordingProgress
from tests.fakes.rebuilding import COMMIT, Scene
from tests.fakes.registry import FakeRegistry
from tests.fakes.users import nested

HUB = f"hf://a/b@{COMMIT}"


@pytest.fixture
def scene(fake: FakeRegistry, client: Registry, tmp_path: Path) -> Scene:
    return Scene(fake, client, tmp_path)


def test_a_stated_recipe_names_no_push_target_program_or_file(scene):
    """A statement sets what is run, read or pushed here: none of it is taken, all is told."""

    def twist(recipe: dict[str, Any]) -> None:
        recipe["image"] = {"repository": "evil.example/x", "base": "evil.example/engine:1"}
        recipe["evaluate"] |= {
            "metric": "command",
            "command": ["sh", "-c", "curl evil.example"],
            "data": "/etc/passwd",
            "training": "/etc/shadow",
        }
        recipe["adapters"][0] |= {
            "evaluate": {"data": "x", "metric": "command", "command": ["sh"]},
            "source": "/root/.ssh",
            "revision": "main",
        }
        recipe["base"] |= {"source": "hf://evil/base", "revision": "main"}
        recipe["calibration"] = {"data": "/etc/passwd"}
        recipe["validate"] = {"enabled": False, "probes": "/etc/passwd"}
        recipe["quantize"] = {"imatrix": "/etc/passwd"}
        recipe["from_the_future"] = 1

    scene.publish(HUB, "hf://a/b", twist)
    told = RecordingProgress()
    file = scene.again(progress=told)
    recipe = file.recipe
    assert recipe.image.repository == recipe.image.base == ""
    assert not recipe.evaluate
    assert [(a.source, a.evaluate) for a in recipe.adapters] == [
        ("./adapters/0", ()),
        ("./adapters/1", ()),
    ]
    assert (recipe.base.source, recipe.base.revision) == ("hf://a/b", COMMIT)
    assert recipe.calibration is None
    assert recipe.validation.enabled
    assert recipe.quantize.imatrix == ""
    text = (file.folder / "recipe.yaml").read_text()
    assert not any(word in text for word in ("evil", "/etc", "/root", "future"))
    said = "\n".join(told.said)
    for key in ("image", "calibration", "validate", "from_the_future", "adapters[].evaluate"):
        assert key in said


def test_gates_that_a_stated_recipe_opens_are_told(scene):
    """A statement turns gates off: its makers may, for the same image, and nobody overlooks it."""

    def twist(recipe: dict[str, Any]) -> None:
        recipe["quality"] = {"gate": False, "limits": {"awq": {"kl_mean": 99}}}

    scene.publish(HUB, "hf://a/b", twist)
    told = RecordingProgress()
    scene.again(progress=told)
    said = "\n".join(told.said)
    assert "quality.gate: false, quality.limits, evaluate.max_drop: 0.2" in said


def test_a_stated_score_that_replaces_the_drop_is_told(scene):
    """With `min_score` alone no drop is too large."""

    def twist(recipe: dict[str, Any]) -> None:
        del recipe["evaluate"]["max_drop"]
        recipe["evaluate"]["min_score"] = 0.01

    scene.publish(HUB, "hf://a/b", twist)
    told = RecordingProgress()
    scene.again(progress=told)
    assert "weakens checks: evaluate.min_score: 0.01, without max_drop" in "\n".join(told.said)


@pytest.mark.parametrize("expected", ["{", "[[]]", '[{"name": "other"}]', ""])
def test_stated_calls_that_are_none_are_refused(scene, expected):
    """An image's questions expect what is no call of the tools: nothing of it is asked."""
    tools = [{"type": "function", "function": {"name": "send"}}]
    metric = {"metric": "tool-call"}
    asked = {"expected": [expected], "tools": tools}
    scene.publish(HUB, "hf://a/b", lambda recipe: recipe["evaluate"].update(metric), asked)
    with pytest.raises(InputRefused, match="invalid questions"):
        scene.again()


def test_options_of_the_server_that_reach_out_are_refused_by_name(scene):
    """A statement gives the server a path, a module or another model: each is named, exit 3."""
    reaching = {
        "media-path": "/",
        "middleware": ["evil.Middleware"],
        "load-format": "pt",
        "speculative-config": {"model": "evil/x", "trust_remote_code": True},
    }

    def twist(recipe: dict[str, Any]) -> None:
        recipe["serve"] = {"extra": {**reaching, "seed": 7}}

    scene.publish(HUB, "hf://a/b", twist)
    with pytest.raises(InputRefused) as caught:
        scene.again()
    for place in ("media-path", "middleware", "load-format", "speculative-config.model"):
        assert place in caught.value.message
    assert "seed" not in caught.value.message
    assert not (scene.folder / "dist").exists()

    mine = [f"serve.extra.{key}={json.dumps(value)}" for key, value in reaching.items()]
    with pytest.raises(InputRefused, match="middleware"):
        scene.again(settings=[*mine[:1], *mine[2:]])
    assert scene.again(settings=mine).recipe.serve.extra == {**reaching, "seed": 7}
    assert scene.again(settings=["serve.extra={}"]).recipe.serve.extra == {}
    with pytest.raises(InputRefused, match="speculative-config"):
        scene.again(settings=["serve.extra.speculative-config.model=mine", *mine[:3]])


SMALL = f"hf://a/small@{COMMIT}"


def drafting(source: Any, method: str = "draft") -> Any:
    said = {"method": method, "draft": source}
    return lambda recipe: recipe.update(serve={"speculative": said})


@pytest.mark.parametrize("named", ["hf://evil/draft", "/etc", {"source": "s3://mine/private"}])
def test_what_drafts_is_what_was_stated_to_be_built(scene, named):
    """A stated recipe names another draft, or a place that only the user may read."""
    scene.publish(HUB, "hf://a/b", drafting(named), drafted=SMALL)
    file = scene.again()
    assert (file.recipe.draft.source, file.recipe.draft.revision) == ("hf://a/small", COMMIT)
    locked = json.loads((file.folder / "recipe.lock").read_text())["sources"]
    assert locked["hf://a/small"]["pin"] == SMALL
    assert locked["hf://a/small"]["digest"].startswith("sha256:")
    text = (file.folder / "recipe.yaml").read_text()
    assert not any(word in text for word in ("evil", "etc", "private"))


def test_a_stated_draft_that_nothing_proves(scene):
    """A recipe that says that something drafts, of an image that was built without it."""
    scene.publish(HUB, "hf://a/b", drafting("hf://evil/draft"))
    with pytest.raises(InputRefused, match="no statement about what drafts"):
        scene.again()
    for ngram in (["serve.speculative=null"], ["serve.speculative.method=ngram"]):
        assert scene.again(settings=ngram).recipe.draft is None


@pytest.mark.parametrize("pin", ["", "s3://bucket/small@sha256:" + "a" * 64])
def test_a_draft_that_only_the_user_may_name(scene, pin):
    """A folder, or a place that is read with the user's credentials."""
    scene.publish(HUB, "hf://a/b", drafting("small"), drafted=pin)
    with pytest.raises(UsageError, match="the image's draft") as caught:
        scene.again()
    assert "--set serve.speculative.draft=" in caught.value.hint

    name = pin.partition("@")[0] or str(scene.folder / "draft")
    for key in ("serve.speculative.draft", "serve.speculative.draft.source"):
        file = scene.again(settings=[f"{key}={name}"])
        assert file.recipe.draft.source == name
        row = json.loads((file.folder / "recipe.lock").read_text())["sources"][name]
        assert row["pin"] == pin or row["pin"] == row["digest"]


@pytest.mark.parametrize(
    "twist",
    [
        lambda recipe: recipe.update(adapters="x"),
        lambda recipe: recipe.update(adapters=[1, 2]),
        lambda recipe: recipe.update(name="../../../root"),
        lambda recipe: recipe.update(version="1/../2"),
        lambda recipe: recipe.update(serve=["x"]),
        lambda recipe: recipe.update(serve={"gpu": {"a": 1}}),
        lambda recipe: recipe.update(quantize=7),
        lambda recipe: recipe.update(targets={"vllm": 1}),
        lambda recipe: recipe.update(merge={"method": "system"}),
        lambda recipe: recipe["adapters"][0].update(weight="much"),
        lambda recipe: recipe["evaluate"].update(max_drop="all"),
        lambda recipe: recipe.update(quantize={"tensor_types": {"(" * 3000 + ")" * 3000: "q8_0"}}),
        lambda recipe: recipe.update(quantize={"tensor_types": {"a{99999999999999999999}": "f16"}}),
    ],
)
def test_a_stated_recipe_of_other_types(scene, twist):
    """Values of other types, and names that leave their folder: the image is refused, exit 3."""
    scene.publish(HUB, "hf://a/b", twist)
    with pytest.raises(InputRefused, match="recipe"):
        scene.again()


@pytest.mark.parametrize(
    ("metric", "asked"),
    [
        ("regex", {"expected": ["(" * 3000 + ")" * 3000]}),
        ("regex", {"expected": ["a{99999999999999999999}"]}),
        ("choice", {"choices": ["A", "A"]}),
        ("contains", {"prompt": 5}),
        ("contains", {"messages": [{"role": "root", "content": "x"}]}),
        ("contains", {"expected": [5]}),
    ],
)
def test_questions_that_nobody_can_ask(scene, metric, asked):
    """The attached questions do not fit the metric, or Python cannot read a pattern: exit 3."""
    scene.publish(HUB, "hf://a/b", lambda recipe: recipe["evaluate"].update(metric=metric), asked)
    with pytest.raises(InputRefused, match="invalid questions"):
        scene.again()


@pytest.mark.parametrize("pin", ["hf://a/b@main", f"hf://a/b@{'g' * 40}", "pypi://a==1", "/etc"])
def test_a_stated_pin_that_is_none(scene, pin):
    """A base whose pin is no commit and no SHA-256 is asked for, and not fetched."""
    scene.publish(pin, "hf://a/b")
    with pytest.raises(UsageError, match="base") as caught:
        scene.again()
    assert "--base" in caught.value.hint


DEEP = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
WRAPPED = base64.b64encode(DEEP)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (signing.STATEMENT_TYPE, DEEP),
        (signing.ENVELOPE_TYPE, DEEP),
        (signing.ENVELOPE_TYPE, b'{"payload": "%s", "signatures": []}' % WRAPPED),
        (signing.BUNDLE_TYPE, DEEP),
        (signing.BUNDLE_TYPE, b'{"dsseEnvelope": %s}' % DEEP),
        (signing.BUNDLE_TYPE, b'{"dsseEnvelope": {"payload": "%s"}}' % WRAPPED),
    ],
)
def test_deep_statements_are_refused(kind, data):
    with pytest.raises(InputRefused):
        evidence.read_statement(AttachmentPart.of_bytes(data, kind), lambda *_: True)


def test_a_deep_signature_is_nobodys():
    notes = {"dev.cosignproject.cosign/signature": "AAAA"}
    part = AttachmentPart.of_bytes(DEEP, signing.SIMPLE_SIGNING, **notes)
    assert signing.signed_digest(part, lambda *_: True) == ""


def test_deep_labels_say_nothing():
    labels = {ROLES: "base:1", ADDED: DEEP.decode(), "dev.weightsmith.plan": DEEP.decode()}
    image = foreign_image(tar_of((entry("a"), b"")), config={"Labels": labels})
    assert plan_in(image.labels) == {}
    with pytest.raises(InputRefused, match=ADDED):
        roles_of(image, "x")


def test_an_attached_evaluation_of_another_shape_is_left_out(tmp_path):
    """The questions that an image brings are numbers: the recipe gets none."""
    part = AttachmentPart.of_bytes(b'{"items": [1, {"prompt": 2}]}', "")
    recipe = {"evaluate": {"data": "x"}}
    _with_questions(
        recipe, [Attachment(artifact_type=EVALUATION_TYPE, parts=(part,))], tmp_path, Silent()
    )
    assert recipe == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("title", "url", "says"),
    [
        ("pictures/../../x.png", "x", "another name than its digest"),
        ("/etc/DIGEST.png", "x", "another name than its digest"),
        ("pictures/DIGEST.png/x", "x", "another name than its digest"),
        ("pictures/DIGEST.svg", "x", "another name than its digest"),
        ("pictures/DIGEST.png", "../../etc/passwd", "outside of"),
        ("pictures/DIGEST.png", "http://evil.example/x.png", "nothing from the network"),
    ],
)
def test_attached_pictures_stay_in_their_folder(tmp_path, title, url, says):
    data = png(3, 3, b"")
    part = [{"type": "image_url", "image_url": {"url": url}}]
    row = {"messages": [{"role": "user", "content": part}], "expected": ["x"]}
    questions = json.dumps({"items": [{"prompt": "", **row}]}).encode()
    title = title.replace("DIGEST", Digest.of(data).hex)
    parts = (
        AttachmentPart.of_bytes(questions, EVALUATION_TYPE),
        AttachmentPart.of_bytes(data, "image/png", **{TITLE: title}),
    )
    document = Attachment(artifact_type=EVALUATION_TYPE, parts=parts)
    home = tmp_path / "a" / "home"
    home.mkdir(parents=True)
    with pytest.raises(InputRefused, match=says):
        _with_questions({"evaluate": {"data": "x"}}, [document], home, Silent())
    assert [path for path in below(tmp_path) if path.suffix == ".png"] in (
        [], [home / "pictures" / f"{Digest.of(data).hex}.png"],
    )  # fmt: skip


def test_a_deep_folder_beside_a_model_is_passed_over(tmp_path):
    """A downloaded model has a hidden folder as deep as its author likes: it is not read."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / ".git").mkdir()
    nested(tmp_path / ".git", 1500)
    try:
        assert ignored_files(tmp_path) == ""
        assert tmp_path / ".git" / "deep" in below(tmp_path)
    finally:
        discard(tmp_path / ".git")
