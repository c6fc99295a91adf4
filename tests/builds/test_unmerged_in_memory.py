"""A build in memory of adapters that are served beside their base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from weightsmith.building.explain import forecast
from weightsmith.core.errors import InputRefused
from weightsmith.models.safetensors import read_header
from weightsmith.oci.registry import Registry

from tests.fakes.memory import Memory, in_memory

TARGETS = ("vllm-lora", "llamacpp-lora")


@pytest.fixture
def two(tmp_path: Path, client: Registry, quick: None) -> Iterator[Memory]:
    """Two adapters without questions."""
    with in_memory(tmp_path, client, adapters=("a", "b")) as made:
        made.write_recipe(evaluate=None)
        yield made


@pytest.mark.parametrize("target", TARGETS)
def test_the_memory_for_adapters_is_planned_before_the_build_as_in_it(
    two: Memory, target: str
) -> None:
    asked = two.request(targets=[target])
    base = (two.home / "base" / "model.safetensors").stat().st_size
    tensors = [read_header(two.home / name / "adapter_model.safetensors").tensors for name in "ab"]
    size = sum(tensor.size for one in tensors for tensor in one)

    (before,) = forecast(asked.file, asked.targets, two.dist, two.tools)["serving"].values()
    two.build(targets=[target])

    assert before["weight_bytes"] - base == size
    told = two.record(target)
    files = {file["path"]: file["size"] for file in told["artifact"]["files"]}
    (served,) = (files[name] for name in files if Path(name).suffix in {".gguf", ".safetensors"}
               and not name.startswith("adapters/"))  # fmt: skip
    assert told["plan"]["weight_bytes"] - served == size


@pytest.mark.parametrize("target", TARGETS)
def test_adapters_with_weights_that_peft_leaves_out_are_refused_before_any_work(
    two: Memory, target: str
) -> None:
    path = two.home / "b" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "layers_to_transform": [1]}))

    with pytest.raises(InputRefused, match=r"layers_to_transform \[1\].*PEFT leaves them out"):
        two.build(targets=[target])

    assert two.jobs() == []
