"""Signatures of models, as OpenSSF's own program reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from weightsmith.api.commands.merge import merge_folders
from weightsmith.api.commands.quantize import _signatures, _written
from weightsmith.api.commands.requests import MergeCommand
from weightsmith.api.commands.upload import push_to_hub
from weightsmith.core.errors import EnvironmentFailure, UsageError
from weightsmith.core.ports import AnySigner, IdentitySigner
from weightsmith.core.values import Artifact, Digest, FileEntry, Format, Tree
from weightsmith.outside.keyless import TOKEN, identity_check, open_identity_signer
from weightsmith.outside.signer import open_signer
from weightsmith.provenance.model_signing import SIGNATURE, model_signer, sign_model
from weightsmith.provenance.signing import check_by, open_bundle
from weightsmith.recipe.user_config import WantedIdentity
from weightsmith.stages.upload import HubDestination
from weightsmith.steps.destinations import in_folder

from tests.fakes.baking import make_key
from tests.fakes.hub import writable_hub
from tests.fakes.memory import memory_tools
from tests.fakes.sigstore import ISSUER, OLD_ISSUER_OID, WORKFLOW, Sigstore, sigstore, token
from tests.fakes.tiny import write_model
from tests.paths import ROOT

TINY = ROOT / "examples" / "tiny"
NAMES = ("model.safetensors", "config.json", "a/b.json", "a.json", "a-b/c.json", "é.json")


@dataclass
class Readers:
    """The key with which all is signed here, and the program that reads."""

    key: Path
    public: Path

    def believe(self, model: Path, signature: Path, *words: str, public: Path | None = None) -> str:
        """Return what it says against a model, or nothing."""
        from click.testing import CliRunner
        from model_signing._cli import main  # the program; a process of its own takes a second

        key = str(public or self.public)
        asked = ["verify", "key", str(model), "--signature", str(signature), "--public_key", key]
        done = CliRunner().invoke(main, [*asked, *words])
        return "" if done.exit_code == 0 else done.output or str(done.exception)


@pytest.fixture
def readers(tmp_path: Path) -> Readers:
    pytest.importorskip("model_signing", reason="model-signing is not installed")
    return Readers(*make_key(tmp_path))


def tree_of(root: Path, names: Sequence[str]) -> Tree:
    entries = []
    for name in names:
        data = (root / name).read_bytes()
        entries.append(FileEntry(path=name, size=len(data), digest=Digest.of(data)))
    return Tree(root=root, files=tuple(entries))


def test_a_folder(readers: Readers, tmp_path: Path) -> None:
    """Whatever its files' names, and wherever the signature lies."""
    model = tmp_path / "model"
    for name in NAMES:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(name)
    signer = open_signer(str(readers.key))
    signature = sign_model("model", tree_of(model, NAMES).files, signer)
    for place in (model / SIGNATURE, tmp_path / "elsewhere.sig"):
        place.write_bytes(signature)
        assert readers.believe(model, place) == ""
    _, other = make_key(tmp_path, "other")
    assert "Key mismatch" in readers.believe(model, place, public=other)

    (model / "config.json").write_text("{}")
    assert "Hash mismatch for 'config.json'" in readers.believe(model, place)
    (model / "config.json").unlink()
    assert "Missing files" in readers.believe(model, place)
    (model / "config.json").write_text("config.json")
    (model / "more.py").write_text("")
    assert "Extra files" in readers.believe(model, place)


def test_a_merged_checkpoint(readers: Readers, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    request = MergeCommand(
        base=str(TINY / "base"), adapters=(str(TINY / "adapters" / "a"),), out=out
    )
    tools = memory_tools(tmp_path / "work", key=readers.key)
    merge_folders(request, tools)
    assert readers.believe(out, out / SIGNATURE) == ""

    # What is made of it is signed anew, or not at all.
    again = tmp_path / "again"
    merge_folders(replace(request, base=str(out), out=again), memory_tools(tmp_path / "work2"))
    assert not (again / SIGNATURE).exists()


@pytest.mark.parametrize("names", [["x.gguf"], ["mmproj-x.gguf", "x.gguf"]])
def test_a_file_and_its_projector(readers: Readers, tmp_path: Path, names: list[str]) -> None:
    """Each is signed alone."""
    out = tmp_path / "x.gguf"
    written = quantized(out, names, open_signer(str(readers.key)))
    models = [path for path in written if path.suffix != ".sig"]
    assert {*models} == {tmp_path / name for name in names}
    assert quantized(tmp_path / "y.gguf", ["z.gguf"], None) == [tmp_path / "y.gguf"]
    for path in models:
        signature = path.with_name(f"{path.name}.sig")
        assert signature in written
        assert readers.believe(path, signature) == ""
        path.write_text("changed")
        assert "mismatch" in readers.believe(path, signature)


def test_a_quantized_folder(readers: Readers, tmp_path: Path) -> None:
    out, names = tmp_path / "out", ["x-00001-of-00002.gguf", "x-00002-of-00002.gguf"]
    written = quantized(out, names, open_signer(str(readers.key)))
    assert sorted(path.name for path in written) == sorted([*names, SIGNATURE])
    assert readers.believe(out, out / SIGNATURE) == ""


def quantized(out: Path, names: Sequence[str], signer: AnySigner | None) -> list[Path]:
    """Write files as `quantize` does, and return what it says that it wrote."""
    kind = Format(name="x", kind="gguf", bits_per_weight=4)
    with in_folder(out, "the model", memory_tools(out.parent / "work")) as to:
        for name in names:
            (to.folder / name).write_text(name)
        artifact = Artifact(format=kind, tree=tree_of(to.folder, names))
        signatures = _signatures(out, artifact, signer)
    return _written(out, artifact, signatures)


@pytest.mark.parametrize("names", [["x.gguf"], ["x.safetensors", "config.json"]])
def test_a_service_that_refuses_leaves_nothing(tmp_path: Path, names: list[str]) -> None:
    def refuse(_: bytes) -> bytes:
        raise EnvironmentFailure("the log is down", hint="wait")

    key = check_by(open_signer(str(make_key(tmp_path)[0])).public)
    signer = IdentitySigner(identity=WORKFLOW, issuer=ISSUER, bundle=refuse, check=key)
    out = tmp_path / "dist" / "x.gguf"
    with pytest.raises(EnvironmentFailure, match="the log is down"):
        quantized(out, names, signer)
    assert not [*out.parent.iterdir()]


def test_a_hub_s_repository(
    readers: Readers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that `push` sends is signed, the card too; without a key, no old signature stays."""
    model, tools = write_model(tmp_path / "model"), memory_tools(tmp_path, key=readers.key)
    place = HubDestination(repository="team/bot", force=True)
    with writable_hub(monkeypatch) as hub:
        first = push_to_hub(str(model), place, tools)
        assert push_to_hub(str(model), place, tools).uploaded_bytes == 0
        there = tmp_path / "there"
        for name, data in hub.repositories["team/bot"].files.items():
            (there / name).parent.mkdir(parents=True, exist_ok=True)
            (there / name).write_bytes(data)
        assert readers.believe(there, there / SIGNATURE) == ""

        unsigned = replace(tools, signer=None)
        assert push_to_hub(str(model), place, unsigned).digest == first.digest
        (model / "NOTICE").write_text("changed")
        push_to_hub(str(model), place, unsigned)
        assert SIGNATURE not in hub.repositories["team/bot"].files


@contextmanager
def an_identity(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AnySigner]:
    """Yield a signer with a service of the tests' own."""
    monkeypatch.setenv(TOKEN, token())
    made = lambda: Sigstore(by_extension=OLD_ISSUER_OID)  # noqa: E731 - all that this reader reads
    with sigstore(made) as services:
        _, config = services.write(folder)
        yield open_identity_signer(str(config))


def test_what_merge_and_quantize_write_by_an_identity(
    readers: Readers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from model_signing.verifying import Config
    from sigstore.errors import VerificationError

    merged, file = tmp_path / "merged", tmp_path / "x.gguf"
    request = MergeCommand(base=str(TINY / "base"), adapters=(), out=merged)
    with an_identity(tmp_path, monkeypatch) as signer:
        merge_folders(request, replace(memory_tools(tmp_path / "work"), signer=signer))
        quantized(file, [file.name], signer)

    for model, signature in ((merged, merged / SIGNATURE), (file, tmp_path / "x.gguf.sig")):
        for who, message in ((WORKFLOW, ""), ("https://github.com/evil/models", "SAN")):
            reader = Config().use_sigstore_verifier(
                identity=who, oidc_issuer=ISSUER, trust_config=tmp_path / "trust.json"
            )
            with pytest.raises(VerificationError, match=message) if message else nullcontext():
                reader.verify(model, signature)


def test_a_hub_s_repository_by_an_identity(
    readers: Readers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSSF's library checks who signed; and so does `affected`."""
    from model_signing.verifying import Config
    from sigstore.errors import VerificationError

    monkeypatch.setenv(TOKEN, token())
    model, there = write_model(tmp_path / "model"), tmp_path / "there"
    made = lambda: Sigstore(by_extension=OLD_ISSUER_OID)  # noqa: E731 - all that this reader reads
    with sigstore(made) as services, writable_hub(monkeypatch) as hub:
        root, config = services.write(tmp_path)
        signer = open_identity_signer(str(config))
        tools = replace(memory_tools(tmp_path), signer=signer)
        push_to_hub(str(model), HubDestination(repository="team/bot"), tools)
        files = hub.repositories["team/bot"].files
    for name, data in files.items():
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes(data)

    def believe(identity: str) -> None:
        reader = Config().use_sigstore_verifier(
            identity=identity, oidc_issuer=ISSUER, trust_config=config
        )
        reader.verify(there, there / SIGNATURE)

    believe(WORKFLOW)
    with pytest.raises(VerificationError, match="SAN"):
        believe("https://github.com/evil/models")

    wanted = WantedIdentity(
        certificate_identity=WORKFLOW, certificate_oidc_issuer=ISSUER, trusted_root=str(root)
    )
    check = identity_check(wanted)
    assert open_bundle(files[SIGNATURE], check).signed
    (there / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json"):
        believe(WORKFLOW)


@pytest.mark.parametrize("kind", ["rsa:2048", "ed25519", "ec:secp384r1"])
def test_a_key_that_its_readers_do_not_take(tmp_path: Path, kind: str) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    made = {
        "rsa:2048": lambda: rsa.generate_private_key(65537, 2048),
        "ed25519": ed25519.Ed25519PrivateKey.generate,
        "ec:secp384r1": lambda: ec.generate_private_key(ec.SECP384R1()),
    }[kind]()
    path = tmp_path / "key.pem"
    path.write_bytes(
        made.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    with pytest.raises(UsageError, match="P-256"):
        model_signer(open_signer(str(path)))
    tools = memory_tools(tmp_path / "work", key=path)
    request = MergeCommand(base=str(TINY / "base"), adapters=(), out=tmp_path / "out")
    with pytest.raises(UsageError, match="P-256"):
        merge_folders(request, tools)
