"""The page about rebuilding from an image: its command as it stands there, on fakes."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from weightsmith.building import wiring
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry, RegistryLocation
from weightsmith.provenance.sealing import attach_signed
from weightsmith.provenance.withdrawal import withdrawal
from weightsmith.steps.tools import Tools

from tests.fakes.command_line import weightsmith
from tests.fakes.memory import Memory, new_signer
from tests.paths import ROOT

PAGE = ROOT / "docs" / "how-to" / "make-an-image-again.md"
REPOSITORY = "registry.example.com/ml/support-bot"
TAG = "1.0.0-llamacpp-q4_k_m"


def page_words(memory: Memory) -> list[str]:
    """Return the page's command with this registry's name, without the program's."""
    (block,) = re.findall(
        r"^```bash\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    assert f"{REPOSITORY}:{TAG}" in block
    return shlex.split(block.replace("\\\n", " ").replace(REPOSITORY, memory.repository))[1:]


def texts_of_the_page() -> str:
    """Return the setting by which the page names texts."""
    (found,) = re.findall(r"`--set (calibration\.data=[^`]+)`", PAGE.read_text("utf-8"))
    return str(found)


@pytest.fixture
def published(memory: Memory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Memory:
    """A signed image, and a folder of its own with the key and the texts to rebuild it in."""
    memory.signer = new_signer()
    memory.build(push=True)
    assert TAG in memory.seen()
    here = tmp_path / "here"
    here.mkdir()
    (here / "key.pub").write_bytes(memory.signer.public)
    (here / "texts.jsonl").write_bytes((memory.home / "texts.jsonl").read_bytes())
    monkeypatch.chdir(here)

    @contextmanager
    def open_tools(*_: Any, **__: Any) -> Iterator[Tools]:
        yield memory.tools

    @contextmanager
    def make_registry(**_: Any) -> Iterator[Registry]:
        yield memory.client

    monkeypatch.setattr(wiring, "open_tools", open_tools)
    monkeypatch.setattr(wiring, "make_registry", make_registry)
    return memory


def test_the_pages_command_pushes_another_target(published: Memory) -> None:
    words = page_words(published)
    ended = weightsmith(*words, "--base", published.home / "base", "--json")

    assert ended.code == 0, ended.err
    (built,) = json.loads(ended.out)["targets"].values()
    assert built["image"] == f"{published.repository}:1.0.0-llamacpp-q8_0"
    assert "1.0.0-llamacpp-q8_0" in published.seen()


def test_what_was_withdrawn_is_not_made_again_in_silence(published: Memory) -> None:
    """The same inputs give the image that was withdrawn, with `--from` and from the recipe."""
    place = Reference.parse(f"{published.repository}:{TAG}")
    image = published.client.pull(place).manifest_blob
    there = RegistryLocation(published.client, place)
    attach_signed([withdrawal(image, "a wrong corpus", {})], image, there, published.signer)

    ended = weightsmith(*page_words(published), "--base", published.home / "base")
    assert ended.code == 0, ended.err
    assert "was withdrawn: a wrong corpus" in ended.err

    published.build(push=True)
    said = [text for text in published.progress.warnings if "a wrong corpus" in text]
    assert ["`verify` goes on refusing it" in text for text in said] == [True]
    assert published.client.digest_of(place) == image.digest


def test_texts_named_by_the_page_are_those_of_the_current_folder(published: Memory) -> None:
    """A flag's paths are the caller's, wherever the recipe is; the same texts, the same image."""
    tag = f"{published.repository}:{TAG}"
    before = published.client.digest_of(Reference.parse(tag))
    words = [word for word in page_words(published) if word != "--push"]
    words[words.index("--target") + 1] = "llamacpp-q4_k_m"
    texts = texts_of_the_page()
    more = ("--base", published.home / "base", "--layout", "image", "--json")
    ended = weightsmith(*words, "--set", texts, *more)

    assert ended.code == 0, ended.err
    (built,) = json.loads(ended.out)["targets"].values()
    assert built["digest"] == before
    Path(texts.partition("=")[2]).unlink()
    ended = weightsmith(*words, "--set", texts, *more)
    assert str(Path("texts.jsonl").absolute()) in ended.err
