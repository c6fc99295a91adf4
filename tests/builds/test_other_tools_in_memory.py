"""Builds of the folders that other tools leave, as docs/how-to/from-*.md lists their files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from weightsmith.core.errors import InputRefused

from tests.fakes.memory import Memory
from tests.paths import ROOT

PAGES = ROOT / "docs" / "how-to"
TRAINED = "from-trl-axolotl-unsloth.md"
"""axolotl writes its configuration beforehand, so an interrupted run has it without weights."""


TRAP = b"cbuiltins\nexit\n(tR."
"""A pickle that ends the process that opens it."""


def listed(page: str, which: int = 0) -> list[str]:
    """Return the files of a page's tree of files, by their paths."""
    text = (PAGES / page).read_text("utf-8")
    trees = re.findall(r"^```text\n([\w./-]+/\n(?:  .*\n)+)```$", text, re.MULTILINE)
    folders: list[str] = []
    found = []
    for line in trees[which].splitlines():
        name = line.strip().partition("  ")[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name] if name.endswith("/") else []
        if not name.endswith("/"):
            found.append("".join([*folders[:depth], name]))
    return found


def recipe(page: str, which: int = 0) -> dict[str, Any]:
    """Return a page's recipe."""
    text = (PAGES / page).read_text("utf-8")
    found = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return dict(yaml.safe_load(found[which]))


def write(memory: Memory, names: list[str]) -> None:
    """Write files of these names, with what the tools write into those that are read."""
    trained = json.loads((memory.home / "a" / "adapter_config.json").read_text())
    trained |= {"base_model_name_or_path": "acme/base", "revision": "0" * 40}
    for name in names:
        path = memory.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name == "adapter_config.json":
            path.write_text(json.dumps(trained))
        elif path.name == "adapter_model.safetensors":
            shutil.copy(memory.home / "a" / path.name, path)
        elif (whole := memory.home / "base" / path.name).is_file():
            shutil.copy(whole, path)
        elif path.suffix in {".bin", ".pt", ".pth"}:
            path.write_bytes(TRAP)
        else:
            path.write_text("{}" if path.suffix == ".json" else "")


def use(memory: Memory, page: str, which: int = 0, **changes: Any) -> None:
    """Write a page's recipe, with a base, questions and a repository that are here."""
    told = recipe(page, which)
    if told["base"]["source"].startswith("hf://"):
        told["base"] = {"source": "./base"}
    told["evaluate"]["data"] = "a.jsonl"
    memory.write_recipe(**{"adapters": None, **told, "targets": ["llamacpp-q4_k_m"], **changes})


def adapter_of(page: str) -> str:
    return str(recipe(page)["adapters"][0]["source"]).removeprefix("./")


def built_from(memory: Memory, folder: str) -> list[str]:
    """Build, and return the adapter's files that came along; the fake answers know it as "a"."""
    memory.facts = {q: (Path(folder).name, told) for q, (_, told) in memory.facts.items()}
    memory.minds.facts = memory.facts
    memory.adapters = (Path(folder).name,)
    memory.build(push=True)
    record = json.loads(next(memory.dist.rglob("build.json")).read_text())
    assert record["merge"]["tensors"]["merged"] == 1
    assert record["scores"]["image"]["score"] == 1
    return [file["path"] for file in record["adapters"][0]["files"]]


@pytest.mark.parametrize(
    "page", [TRAINED, "from-llama-factory.md", "from-ollama.md", "from-aikit.md"]
)
def test_the_folder_is_taken_as_it_comes_out_of_the_tool(memory: Memory, page: str) -> None:
    names, folder = listed(page), adapter_of(page)
    write(memory, names)
    use(memory, page, image={"repository": memory.repository})

    files = built_from(memory, folder)

    here = {name.removeprefix(f"{folder}/") for name in names if name.startswith(folder)}
    assert set(files) < here or page in {"from-ollama.md", "from-aikit.md"}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files) <= here
    assert not any(re.search(r"\.(bin|pt|pth|log|png|jsonl)$|checkpoint-|_state", f) for f in files)


def test_a_checkpoint_of_a_run_is_an_adapter(memory: Memory) -> None:
    folder = f"{adapter_of(TRAINED)}/checkpoint-40"
    write(memory, listed(TRAINED))
    use(memory, TRAINED, adapters=[{"source": folder}])

    assert built_from(memory, folder) == ["adapter_config.json", "adapter_model.safetensors"]


def test_of_an_interrupted_run_the_last_checkpoint_is_named(memory: Memory) -> None:
    folder = adapter_of(TRAINED)
    write(memory, [*listed(TRAINED), f"{folder}/checkpoint-8/adapter_model.safetensors"])
    (memory.home / folder / "adapter_model.safetensors").unlink()
    use(memory, TRAINED)

    with pytest.raises(InputRefused, match=r"adapter_model\.safetensors is missing") as refused:
        memory.forecast()
    assert refused.value.hint.endswith("support/checkpoint-40")


def test_a_run_is_no_base(memory: Memory) -> None:
    write(memory, listed(TRAINED))
    use(memory, TRAINED, base={"source": adapter_of(TRAINED)}, adapters=None)

    with pytest.raises(InputRefused, match="is an adapter, not a whole model") as refused:
        memory.forecast()
    assert "as the base what it was trained on: acme/base" in refused.value.hint


EXPORT = ("from-llama-factory.md", 1)


def test_an_export_is_a_base(memory: Memory) -> None:
    write(memory, listed(*EXPORT))
    use(memory, *EXPORT, image={"repository": memory.repository})
    memory.minds.facts = {q: ("", told) for q, (_, told) in memory.facts.items()}

    memory.build(push=True)

    record = json.loads(next(memory.dist.rglob("build.json")).read_text())
    assert record["scores"]["image"]["score"] == 1


def test_an_export_is_no_adapter(memory: Memory) -> None:
    write(memory, listed(*EXPORT))
    use(memory, *EXPORT, base={"source": "./base"}, adapters=[{"source": "saves/qwen3_sft_merged"}])

    with pytest.raises(InputRefused, match=r"has no adapter_config\.json") as refused:
        memory.forecast()
    assert "name it as the base, without adapters" in refused.value.hint


@pytest.mark.parametrize("as_base", [False, True], ids=["as an adapter", "as a base"])
def test_a_folder_of_gguf_alone_is_refused(memory: Memory, as_base: bool) -> None:
    """An adapter for Ollama, or AIKit's own output."""
    write(memory, ["_output/aikit-model-q4_k_m.gguf"])
    role: dict[str, Any] = {"adapters": [{"source": "_output"}]}
    if as_base:
        role = {"base": {"source": "_output"}, "adapters": None}
    use(memory, "from-aikit.md", **role)

    with pytest.raises(InputRefused, match=r"has no (adapter_)?config\.json") as refused:
        memory.forecast()
    assert "what 'aikit-model-q4_k_m.gguf' was made from" in refused.value.hint


def test_ollamas_form_comes_with_the_image(memory: Memory) -> None:
    page = "from-ollama.md"
    write(memory, listed(page))
    use(memory, page, image={"repository": memory.repository}, serve={"extra": {"temp": 0}})

    built_from(memory, adapter_of(page))

    assert any(tag.endswith("-llamacpp-q4_k_m-ollama") for _, tag in memory.registry.manifests)
