"""`affected` on a model hub: by the cards and records that `push --to hf://` writes, if signed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from weightsmith.api.commands.affected import affected_text, error_of, find_affected, withdraw_all
from weightsmith.api.results import Affected
from weightsmith.core.errors import EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.ports import HubCommit, Silent
from weightsmith.core.values import Digest, FileEntry
from weightsmith.evaluating.card import ModelCard, Parent
from weightsmith.evaluating.pages import model_card
from weightsmith.oci.registry import Registry
from weightsmith.outside.hub import HubFinder
from weightsmith.outside.signer import open_signer
from weightsmith.provenance.model_signing import sign_model
from weightsmith.provenance.origins import wanted
from weightsmith.provenance.signing import bundle, read_public_key
from weightsmith.provenance.statements import STATEMENT, Statement

from tests.fakes.baking import make_key
from tests.fakes.hub import COMMIT, FakeHub, fake_hub
from tests.fakes.journal import RecordingProgress

BASE, ADAPTER = f"hf://acme/base@{'b' * 40}", f"hf://acme/support-lora@{'a' * 40}"
CARD = ModelCard(
    name="support",
    license="apache-2.0",
    base=Parent(name="acme/base", pin=BASE),
    adapters=(Parent(name="acme/support-lora", pin=ADAPTER, version="v3", run_id="wandb/abc"),),
    method="linear",
    verdict="passed",
)


def text_of(card: ModelCard) -> bytes:
    return model_card(card, "team/model", ["model.safetensors"]).encode()


def signature(card: bytes, key: Path) -> bytes:
    files = [FileEntry(path="README.md", size=len(card), digest=Digest.of(card))]
    return sign_model("model", files, open_signer(str(key)))


def statement_that_lists(card: bytes, key: Path) -> bytes:
    """Return what the key said of something else, with the card among its parts."""
    predicate = {"resources": [{"name": "README.md", "digest": Digest.of(card).hex}]}
    made = Statement({"_type": STATEMENT, "predicateType": "https://x/y", "predicate": predicate})
    signer = open_signer(str(key))
    return bundle(made.content, signer, hint="")


@dataclass
class MemoryHub:
    commits_of: dict[str, list[HubCommit]] = field(default_factory=dict)
    fails: bool = False

    def put(self, repository: str, **files: bytes) -> None:
        rows = self.commits_of.setdefault(repository, [])
        named = {name.replace("_", "."): data for name, data in files.items()}
        commit = f"{len(rows):040x}"
        made = HubCommit(repository=repository, commit=commit, created="", files=named)
        rows.insert(0, made)

    def repositories(self, owner: str) -> Sequence[str]:
        if self.fails:
            raise EnvironmentFailure("the hub could not be reached", hint="")
        return [name for name in self.commits_of if name.startswith(f"{owner}/")]

    def commits(
        self, repository: str, names: Sequence[str], commit: str = ""
    ) -> Iterator[HubCommit]:
        if repository not in self.commits_of:
            raise InputRefused("no such repository", hint="")
        rows = self.commits_of[repository]
        rows = [one for one in rows if one.commit.startswith(commit)]
        if not rows:
            raise InputRefused(f"no commit {commit}", hint="")
        for one in rows:
            kept = {name: data for name, data in one.files.items() if name in names}
            yield replace(one, files=kept)


def exit_code(found: Affected) -> int | None:
    return (error := error_of(found)) and error.exit_code


def ask(hub: MemoryHub | HubFinder, place: str, *keys: Path, **asked: str) -> Affected:
    ((kind, text),) = asked.items()
    checks = {key.stem: read_public_key(key) for key in keys}
    with Registry() as client:
        return find_affected(wanted(kind, text), [place], checks, client, Silent(), hub)


@pytest.mark.parametrize(
    ("kind", "text", "found"),
    [
        ("adapter", "hf://acme/support-lora", True),
        ("adapter", ADAPTER, True),
        ("adapter", "a" * 12, True),
        ("adapter", "acme/base", False),
        ("base", "acme/base", True),
        ("base", "hf://acme/other", False),
        ("license", "Apache-2.0", True),
        ("dataset_run", "wandb/abc", True),
    ],
)
def test_what_a_card_names(tmp_path: Path, kind: str, text: str, found: bool) -> None:
    key, public = make_key(tmp_path)
    hub, card = MemoryHub(), text_of(CARD)
    hub.put("team/model", README_md=card, model_sig=signature(card, key))
    got = ask(hub, "hf://team", public, **{kind: text})
    assert [row.reference for row in got.images] == ([f"hf://team/model@{0:040x}"] * found)
    for row in got.images:
        assert (row.form, row.verdict, row.signed_by) == ("hub", "passed", ("key",))
    assert (got.unsigned, got.problems) == ((), ())


def test_nothing_is_believed_unsigned(tmp_path: Path) -> None:
    """Without a signature, by another key, of another card or kind, or of one changed later."""
    (key, public), (theirs, _) = make_key(tmp_path), make_key(tmp_path, "other")
    hub, card = MemoryHub(), text_of(CARD)
    hub.put("team/plain", README_md=card)
    hub.put("team/theirs", README_md=card, model_sig=signature(card, theirs))
    hub.put("team/moved", README_md=card, model_sig=signature(card + b"\n", key))
    hub.put("team/broken", README_md=card, model_sig=b'{"dsseEnvelope": []}')
    hub.put("team/listed", README_md=card, model_sig=statement_that_lists(card, key))
    hub.put("else/model", README_md=b"---\nbase_model: acme/support-lora\n---\n")
    hub.put("else/other", README_md=b"\xff---\nbase_model: [\n---")
    hub.put("else/empty")
    got = ask(hub, "hf://team", public, adapter="acme/support-lora")
    assert got.images == ()
    assert {row.reference.split("/")[-1][:5]: row.chain for row in got.unsigned} == {
        "plain": "unsigned", "their": "not signed by a key that was given",
        "moved": "unsigned", "broke": "unsigned", "liste": "unsigned",
    }  # fmt: skip
    # Another's fine-tune says in the hub's own words what it was made from, and has no verdict.
    (row,) = ask(hub, "hf://else", public, adapter="acme/support-lora").unsigned
    assert (row.reference[:15], row.verdict) == ("hf://else/model", "")
    assert "hf://else/model" in affected_text(ask(hub, "hf://else", adapter="acme/support-lora"))


def test_every_commit_is_looked_at(tmp_path: Path) -> None:
    key, public = make_key(tmp_path)
    hub, card = MemoryHub(), text_of(CARD)
    hub.put("team/model", README_md=card, model_sig=signature(card, key))
    hub.put("team/model", README_md=b"# another model")
    got = ask(hub, "hf://team/model", public, base="acme/base")
    assert [row.digest for row in got.images] == [f"{0:040x}"]
    assert (got.looked_at, len(got.others)) == (2, 1)


def test_one_commit_may_be_named(tmp_path: Path) -> None:
    key, public = make_key(tmp_path)
    hub, card = MemoryHub(), text_of(CARD)
    hub.put("team/model", README_md=card, model_sig=signature(card, key))
    hub.put("team/model", README_md=b"# another model")
    for name in (f"{1:040x}", "0" * 40, "0" * 12):
        got = ask(hub, f"hf://team/model@{name.upper()}", public, base="acme/base")
        whole = len(name) == 40
        assert got.looked_at == (1 if whole else 2)
        assert [row.digest for row in got.images] == ["0" * 40] * (name != f"{1:040x}")
    gone = ask(hub, f"hf://team/model@{'f' * 40}", base="acme/base")
    assert (exit_code(gone), gone.problems[0].reference[-8:]) == (5, "f" * 8)
    for place in ("hf://team/model@main", "hf://team@0000000", "hf://team/model@"):
        with pytest.raises(UsageError, match="what follows @"):
            ask(hub, place, base="acme/base")
    for place in ("hf://", "hf://a/b/c", "hf://a//b", "hf://team/model/tree/main@0000000"):
        with pytest.raises(UsageError, match="no such place"):
            ask(hub, place, base="acme/base")


def test_what_a_card_cannot_say(tmp_path: Path) -> None:
    hub = MemoryHub()
    hub.put("team/model", README_md=text_of(CARD))
    (problem,) = ask(hub, "hf://team", builder="gguf").problems
    assert problem.why == "it has no build.json, and a card does not say what made it"
    assert not problem.unreachable


@pytest.mark.parametrize("asked", [{"engine": "vllm"}, {"cve_package": "openssl"}])
def test_a_commit_has_weights_alone(asked: dict[str, str]) -> None:
    hub = MemoryHub()
    hub.put("team/model", README_md=text_of(CARD), build_json=record_of())
    got = ask(hub, "hf://team", **asked)
    assert (got.images, got.unsigned, got.problems) == ((), (), ())


def record_of(**changes: Any) -> bytes:
    """Return what a hub has of a build, written by hand."""
    source = {"source": "hf://acme/support-lora", "pin": ADAPTER, "digest": "sha256:" + "1" * 64}
    base = {"source": "hf://acme/base", "pin": BASE, "digest": "sha256:" + "2" * 64}
    files = [{"path": "model.safetensors", "size": 1, "digest": "sha256:" + "3" * 64}]
    weights = {"format": "q4_k_m", "size": 1, "bits_per_weight": 4.5, "file": "", "files": files}
    rows = {
        "name": "support",
        "version": "1",
        "target": "llamacpp-q4_k_m",
        "created": "",
        "made_by": "0.1.0",
        "base": base | {"license": "apache-2.0"},
        "adapters": [source | {"version": "v3", "run_id": "wandb/abc"}],
        "artifact": weights | {"digest": "sha256:" + "4" * 64},
        "inputs": {
            "quantize": {"quantizer": "gguf", "builder": "sha256:" + "5" * 64},
            "reference": {"questions": "sha256:" + "6" * 64, "builder": "sha256:" + "7" * 64},
        },
        "verdict": "not proven",
    }
    return json.dumps(rows | changes).encode()


def sealed(key: Path, **files: bytes) -> dict[str, bytes]:
    """Return files of a commit with their signature."""
    named = {name.replace("_", "."): data for name, data in files.items()}
    rows = [
        FileEntry(path=name, size=len(data), digest=Digest.of(data)) for name, data in named.items()
    ]
    weights = FileEntry(path="model.safetensors", size=1, digest=Digest("sha256:" + "3" * 64))
    return files | {"model_sig": sign_model("model", [*rows, weights], open_signer(str(key)))}


@pytest.mark.parametrize(
    ("kind", "text", "found"),
    [
        ("adapter", "hf://acme/support-lora", True),
        ("adapter", "1" * 12, True),
        ("adapter", "support-lora@v3", True),
        ("adapter", "acme/base", False),
        ("base", "2" * 64, True),
        ("builder", "gguf", True),
        ("builder", "sha256:" + "5" * 64, True),
        ("builder", "weightsmith<0.2", True),
        ("builder", "weightsmith<0.1", False),
        ("builder", "autoawq", False),
        ("dataset_run", "6" * 64, True),
        ("dataset_run", "wandb/abc", True),
        ("license", "Apache-2.0", True),
    ],
)
def test_what_a_record_names(tmp_path: Path, kind: str, text: str, found: bool) -> None:
    """The card says nothing here, so it is the record that answers."""
    key, public = make_key(tmp_path)
    hub = MemoryHub()
    hub.put("team/model", **sealed(key, README_md=b"# a model", build_json=record_of()))
    got = ask(hub, "hf://team", public, **{kind: text})
    assert len(got.images) == found
    for row in got.images:
        assert (row.verdict, row.signed_by) == ("not proven", ("key",))
        assert row.chain == "the record is signed with the files"
    assert (got.unsigned, got.problems, got.others) == ((), (), ())


def test_a_record_is_believed_only_if_it_is_signed_itself(tmp_path: Path) -> None:
    (key, public), (theirs, _) = make_key(tmp_path), make_key(tmp_path, "other")
    hub, card = MemoryHub(), text_of(CARD)
    hub.put("team/added", **sealed(key, README_md=b"#"), build_json=record_of())
    hub.put("team/theirs", **sealed(theirs, README_md=card, build_json=record_of()))
    hub.put("team/plain", build_json=record_of())
    hub.put("team/mixed", **sealed(key, README_md=card), build_json=record_of(verdict="passed"))
    got = ask(hub, "hf://team", public, adapter="acme/support-lora")
    # The card of the last is signed: it is in the answer, by what the card says.
    assert [row.chain for row in got.images] == ["the card is signed with the files"]
    assert {row.reference.split("/")[-1][:5]: row.chain for row in got.unsigned} == {
        "added": "unsigned",
        "their": "not signed by a key that was given",
        "plain": "unsigned",
    }


def test_a_record_of_other_weights_breaks_the_chain(tmp_path: Path) -> None:
    key, public = make_key(tmp_path)
    hub = MemoryHub()
    other = json.loads(record_of())["artifact"]
    other["files"][0]["digest"] = "sha256:" + "9" * 64
    hub.put("team/model", **sealed(key, README_md=b"#", build_json=record_of(artifact=other)))
    (row,) = ask(hub, "hf://team", public, base="acme/base").images
    assert row.chain.startswith("broken at model.safetensors")


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"base": 1}', b"\xff", b"null"])
def test_a_damaged_record_is_named(tmp_path: Path, data: bytes) -> None:
    """What the card says is answered all the same."""
    key, public = make_key(tmp_path)
    hub = MemoryHub()
    hub.put("team/model", **sealed(key, README_md=text_of(CARD), build_json=data))
    got = ask(hub, "hf://team", public, base="acme/base")
    assert len(got.images) == 1
    (problem,) = got.problems
    assert "build.json cannot be read" in problem.why


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    found = ask(MemoryHub(fails=True), "hf://team", base="acme/base")
    assert isinstance(error_of(found), EnvironmentFailure)
    absent = ask(MemoryHub(), "hf://team/absent", base="acme/base")
    assert (exit_code(absent), absent.problems[0].why) == (5, "no such repository")


def test_nothing_is_withdrawn_on_a_hub(tmp_path: Path) -> None:
    key, public = make_key(tmp_path)
    hub, card, told = MemoryHub(), text_of(CARD), RecordingProgress()
    hub.put("team/model", README_md=card, model_sig=signature(card, key))
    found = ask(hub, "hf://team", public, base="acme/base")
    with Registry() as client:
        after = withdraw_all(found, "leaks", open_signer(str(key)), client, told)
    assert after.images == found.images
    assert "on the hub" in told.warnings[0]


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(tmp_path / "hub", monkeypatch) as made:
        yield made


def test_by_the_hubs_own_client(served: FakeHub, tmp_path: Path) -> None:
    key, public = make_key(tmp_path)
    card = text_of(CARD)
    files = sealed(key, README_md=card, build_json=record_of())
    served.files |= {name.replace("_", "."): data for name, data in files.items()}
    for place in ("hf://team", "hf://team/model"):
        (row,) = ask(HubFinder(), place, public, adapter="acme/support-lora").images
        assert (row.digest, row.built, row.dated) == (COMMIT, "2026-03-01T00:00:00Z", "hub")
    assert {*served.fetched} == {"README.md", "model.sig", "build.json"}
    for name in (COMMIT, COMMIT[:7]):
        got = ask(HubFinder(), f"hf://team/model@{name}", public, base="acme/base")
        assert [row.digest for row in got.images] == [COMMIT]
    for name in ("f" * 40, "f" * 7):
        (problem,) = ask(HubFinder(), f"hf://team/model@{name}", base="acme/base").problems
        assert "commit" in problem.why
    assert ask(HubFinder(), "hf://nobody", public, base="acme/base").looked_at == 0


def test_a_card_that_is_too_large(served: FakeHub) -> None:
    """It is not fetched."""
    served.sizes["README.md"] = 1 << 40
    (problem,) = ask(HubFinder(), "hf://team/model", base="acme/base").problems
    assert "bytes" in problem.why
    assert served.fetched == []
