"""What the lock has is what a build takes, whatever a hub, an index or a registry offers now."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants
from weightsmith.building.explain import forecast
from weightsmith.building.pipeline import steps_of
from weightsmith.building.request import BuildRequest
from weightsmith.building.targets import chosen_targets
from weightsmith.core.errors import InputRefused
from weightsmith.core.values import Sources
from weightsmith.outside.hub import HubReader
from weightsmith.outside.pypi import PypiReader
from weightsmith.recipe.file import read_recipe
from weightsmith.steps.bases import bases_of
from weightsmith.steps.outputs import ImageOutputs
from weightsmith.steps.step import Results
from weightsmith.steps.tools import Tools

from tests.fakes.baking import push_base
from tests.fakes.hub import COMMIT
from tests.fakes.journal import RecordingProgress
from tests.fakes.memory import memory_tools
from tests.fakes.package_index import package_index, wheel_of


def machine(folder: Path) -> Tools:
    """Return the ports of a machine that reads from hubs and package indexes as any other does."""
    tools = memory_tools(folder)
    readers = (HubReader(tools.store), PypiReader(tools.store))
    return replace(tools, readers={reader.scheme: reader for reader in readers})


def locked_request(folder: Path, source: str, *settings: str) -> BuildRequest:
    (folder / "recipe.yaml").write_text(f"name: x\nbase: {{source: '{source}'}}\n")
    return BuildRequest(
        file=read_recipe(folder / "recipe.yaml", settings),
        targets=(),
        outputs=ImageOutputs(),
        dist=folder,
        engine_answers=False,
    )


def resolved(request: BuildRequest, tools: Tools) -> Sources:
    """Fetch a build's sources, as its first step does."""
    return steps_of(request.pinned()).sources.run(Results(), tools).value


def test_another_model_under_the_same_commit(hub, tmp_path, monkeypatch):
    """A mirror lists other files, and sends them: the commit is what the lock has of it."""
    tools, request = machine(tmp_path), locked_request(tmp_path, "hf://team/model")
    honest = resolved(request, tools)
    lock = (tmp_path / "recipe.lock").read_text()
    hub.files["model.safetensors"] = b"backdoor" * 100
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another"))
    with pytest.raises(InputRefused, match=r"recipe\.lock") as caught:
        resolved(request, tools)
    assert "--update-lock" in caught.value.hint
    with pytest.raises(InputRefused, match=r"recipe\.lock"):
        forecast(request.file, (), tmp_path, tools)
    assert (tmp_path / "recipe.lock").read_text() == lock
    told = RecordingProgress()
    taken = resolved(replace(request, update_lock=True), replace(tools, progress=told))
    assert taken.base.digest != honest.base.digest
    assert any("by --update-lock" in text for text in told.warnings)


@pytest.mark.slow
def test_another_wheel_under_the_same_version(tmp_path, monkeypatch):
    """An index offers another wheel under the version that the lock has: it is not taken."""
    here, another = machine(tmp_path / "here"), machine(tmp_path / "another")
    monkeypatch.delenv("WEIGHTSMITH_WHEELS", raising=False)
    name = "my_model-1.0-py3-none-any.whl"
    request = locked_request(tmp_path, "pypi://my-model==1.0")
    with package_index() as index:
        monkeypatch.setenv("PIP_INDEX_URL", index.url)
        for weights in (b"honest", b"backdoor"):
            files = {"my_model/config.json": b"{}", "my_model/model.safetensors": weights}
            index.files[name] = wheel_of(files)
            if weights == b"honest":
                resolved(request, here)
        assert resolved(request, here).base.tree.size == len(b"{}honest")
        with pytest.raises(InputRefused, match=r"pypi://my-model==1\.0") as caught:
            resolved(request, another)
        assert "--update-lock" in caught.value.hint
        resolved(replace(request, update_lock=True), another)


def test_a_base_image_that_the_lock_has_and_the_registry_lost(fake, client, tmp_path):
    """A tag that moved takes no build along; --update-lock does, and says so."""
    name = f"{fake.host}/base/engine:1"
    engine = {"dev.weightsmith.engine": "llamacpp"}
    request, told = locked_request(tmp_path, "./base", f"image.base={name}"), RecordingProgress()
    tools = replace(memory_tools(tmp_path, registry=client), progress=told)
    (target,) = chosen_targets(request.file, ("llamacpp-q8_0",))
    was = push_base(client, name, engine, {"app/llama-server": b"1"})
    bases_of(request.file, target, "cpu", tools)
    now = push_base(client, name, engine, {"app/llama-server": b"2"})
    assert bases_of(request.file, target, "cpu", tools)[1][0].digest == was
    del fake.manifests["base/engine", was]
    with pytest.raises(InputRefused, match="404") as caught:
        bases_of(request.file, target, "cpu", tools)
    assert "--update-lock" in caught.value.hint
    assert bases_of(request.file, target, "cpu", tools, update_lock=True)[1][0].digest == now
    assert name in told.warnings[-1]
    assert was in told.warnings[-1]


def test_an_extra_file_in_the_cache(hub, tmp_path):
    """A file that the commit does not hold may be its owner's: it is told, kept, and another
    source than the one that the lock has."""
    told, request = RecordingProgress(), locked_request(tmp_path, "hf://team/model")
    tools = replace(machine(tmp_path), progress=told)
    sources = resolved(request, tools)
    extra = sources.base.tree.root / "chat_template.jinja"
    extra.write_text("Obey {{ messages }}")
    tools.readers["hf"].fetch("hf://team/model", COMMIT, "", told)
    assert "not in this commit: chat_template.jinja" in told.warnings[-1]
    with pytest.raises(InputRefused, match=r"recipe\.lock"):
        resolved(request, tools)
    assert extra.exists()
