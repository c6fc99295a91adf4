"""The recipe's sections as the options of stages, and its base as a checkpoint."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.values import Digest, FileEntry, Snapshot, Tree
from weightsmith.quantizers import formats, gguf_importance
from weightsmith.recipe.schema import Base, Serve
from weightsmith.serving.engine import ServeOptions
from weightsmith.stages.quantize import format_options
from weightsmith.stages.render import serve_options
from weightsmith.stages.resolve import resolve_base

from tests.fakes.memory import memory_tools
from tests.paths import TINY


def test_what_a_recipe_leaves_out_is_the_planners_default() -> None:
    assert serve_options(Serve()) == ServeOptions()
    assert serve_options(Serve(max_model_len="auto", dtype="auto", gpu_count=1)) == ServeOptions()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"gpu_memory": "24GiB", "memory": "1GB"},
         {"gpu_memory_bytes": 24 << 30, "host_memory_bytes": 10**9}),
        ({"max_model_len": 4096, "tensor_parallel_size": 2, "gpu_memory_utilization": 0.5},
         {"max_model_len": 4096, "tensor_parallel_size": 2, "gpu_memory_utilization": 0.5}),
        ({"served_model_name": "auto", "kv_cache_dtype": "fp8", "dtype": "float16"},
         {"served_model_name": "auto", "kv_cache_dtype": "fp8", "dtype": "float16"}),
    ],
)  # fmt: skip
def test_what_a_recipe_gives_is_in_the_planners_units(given, wanted) -> None:
    assert serve_options(Serve(**given)) == ServeOptions(**wanted)


@pytest.mark.parametrize("key", ["gpu_memory", "memory"])
def test_a_memory_without_its_unit_is_refused(key: str) -> None:
    with pytest.raises(UsageError, match=f"serve.{key} 24 is 24 bytes") as caught:
        serve_options(Serve(**{key: "24"}))
    assert "24GiB" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("q4_k_m", "", "walk"),
        ("q4_k_m", "auto", "auto"),
        ("q4_k_m", "off", "off"),
        ("q5_k_m", "", "off"),
        ("q5_k_m", "walk", "walk"),
        ("f16", "", "off"),
    ],
)
def test_our_own_walk_measures_where_nobody_is_named(
    tmp_path, monkeypatch, name, given, expected
) -> None:
    monkeypatch.setattr(gguf_importance, "has_avx2", lambda: True)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    model = Tree(
        root=tmp_path, files=(FileEntry(path="model.safetensors", size=1 << 30, digest="0" * 64),)
    )
    made = format_options(
        "m", formats()[name], {"imatrix": given}, {}, model, memory_tools(tmp_path)
    )
    assert made.options["imatrix"] == expected


def test_a_source_in_one_gguf_file_is_converted_once(tmp_path) -> None:
    entries = [FileEntry(path=f"{n}.gguf", size=4, digest=Digest.of(b"GGUF")) for n in range(2)]
    came = Snapshot(
        tree=Tree(root=tmp_path, files=entries[:1]), source="hf://a/b", pin="p", pinned=True
    )

    def convert(job: Any, _report: object) -> dict[str, Any]:
        shutil.copytree(TINY / "base", job.output, dirs_exist_ok=True)
        return {}

    def resolved(snapshot: Snapshot) -> Snapshot:
        reader = SimpleNamespace(fetch=lambda *_: snapshot)
        return resolve_base(
            Base(source="hf://a/b"), tmp_path, replace(tools, readers={"hf": reader})
        )

    tools = memory_tools(tmp_path / "store", {"import-gguf": convert})
    found = [resolved(came) for _ in range(2)]

    assert len(tools.runner.jobs) == 1
    assert [one.made_from for one in found] == [(came.digest,)] * 2
    assert (found[0].pin, found[0].tree.has("config.json")) == ("p", True)
    with pytest.raises(InputRefused, match="has 2 GGUF files, expected one"):
        resolved(replace(came, tree=replace(came.tree, files=tuple(entries))))


def test_a_local_gguf_file_is_a_base_and_its_folder_is_none(tmp_path) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "one.gguf").write_bytes(b"GGUF")
    (tmp_path / "given" / "other.gguf").write_bytes(b"GGUF, of another model")
    converted = []

    def convert(job: Any, _report: object) -> dict[str, Any]:
        converted.append(job.gguf.path)
        shutil.copytree(TINY / "base", job.output, dirs_exist_ok=True)
        return {}

    tools = memory_tools(tmp_path / "store", {"import-gguf": convert})
    found = resolve_base(Base(source="given/one.gguf"), tmp_path, tools)

    assert converted == [tmp_path / "given" / "one.gguf"]
    assert found.tree.has("config.json")
    with pytest.raises(InputRefused, match="has no config") as refused:
        resolve_base(Base(source="given"), tmp_path, tools)
    assert refused.value.hint.endswith("a GGUF base is given as its file")
    with pytest.raises(InputRefused, match="no revision or sha256 to pin"):
        resolve_base(Base(source="given/one.gguf", sha256="0" * 64), tmp_path, tools)
