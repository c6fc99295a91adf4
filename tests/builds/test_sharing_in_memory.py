"""Images of one base share the layers of what their adapters leave unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from weightsmith.core.jobs import QuantizeJob
from weightsmith.oci.image import Image
from weightsmith.oci.references import Reference

from tests.fakes.memory import Memory, in_memory

ORDER = [
    f"model-{name}-001.safetensors"
    for name in (
        *("embed_tokens", "lm_head"),
        *(f"layers.mlp.{one}_proj" for one in ("down", "gate", "up")),
        "rest",
        *(f"layers.self_attn.{one}_proj" for one in "kovq"),
    )
]
KINDS = ("modelpack", "modelpack-tar", "volume")
TARGET = "llamacpp-q4_k_m"
OWN = "model-layers.self_attn.q_proj-001.safetensors"
"""The adapters of these builds change one matrix."""


@pytest.fixture
def two(tmp_path: Path, quick: None) -> Iterator[Memory]:
    """One base with two adapters; each version of the recipe has one of them, or none."""
    with in_memory(tmp_path, adapters=("a", "b")) as made:
        yield made


def record_of(memory: Memory, name: str, target: str, **changes: Any) -> dict[str, Any]:
    """The record of a build with one of the adapters."""
    adapters = [{"source": f"./{name}", "version": "v1"}] if name else []
    memory.use_vllm(target, adapters=adapters, version=name or "base", **changes)
    memory.build(push=True)
    folder = memory.dist / "tiny" / (name or "base") / target
    return dict(json.loads((folder / "build.json").read_text()))


def weights(image: Image) -> dict[str, str]:
    """The digests of an image's layers of weights, by file."""
    layers = image.layers
    return {one.file.removeprefix("models/"): one.digest for one in layers if "model-" in one.file}


def pulled(memory: Memory, tag: str) -> Image:
    found = memory.client.pull(Reference.parse(f"{memory.repository}:{tag}"))
    assert isinstance(found, Image)
    return found


def test_layers_of_unchanged_matrices_are_equal_in_all_forms(two: Memory) -> None:
    records = {
        name: record_of(two, name, "vllm", outputs=["image", *KINDS]) for name in ("a", "b", "")
    }
    for kind in ("", *(f"-{one}" for one in KINDS)):
        a, b, base = (weights(pulled(two, f"{n}-vllm{kind}")) for n in ("a", "b", "base"))
        assert a.keys() == b.keys() == base.keys()
        assert len(a) == 10
        if "pack" not in kind or "tar" in kind:
            assert [*a] == ORDER, "what differs is on top of what a node has"
        assert {file for file in a if a[file] != b[file]} == {OWN}
        assert {file for file in a if a[file] != base[file]} == {OWN}
    image, volume = (set(weights(pulled(two, f"a-vllm{one}")).values()) for one in ("", "-volume"))
    assert image == volume
    tars = weights(pulled(two, "a-vllm-modelpack-tar"))
    assert image == set(tars.values())

    matrix = 256 * 256 * 4
    for name in ("a", "b"):
        own, shared = (records[name]["sharing"][f"{what}_bytes"] for what in ("own", "shared"))
        assert matrix < own < matrix + 1000
        whole = sum(
            one["size"] for one in records[name]["image"]["layers"] if "/model-" in one["file"]
        )
        assert own + shared == pytest.approx(whole, rel=0.05)  # with headers of tar
    assert records[""]["sharing"]["own_bytes"] == 0


@pytest.mark.parametrize(
    ("target", "own"), [("vllm", 0.16), ("vllm-awq", 1), ("llamacpp-q8_0", 1), ("vllm-lora", 0)]
)
def test_the_plan_says_what_the_record_says(memory: Memory, target: str, own: float) -> None:
    """Calibration reads all weights, and a GGUF file is one layer."""
    (planned,) = memory.forecast(targets=[target])["sharing"].values()
    memory.build(targets=[target])
    for found in (planned, memory.record(target)["sharing"]):
        share = found["own_bytes"] / (found["own_bytes"] + found["shared_bytes"])
        assert share == pytest.approx(own, abs=0.02)


def test_parts_of_gguf_files_are_shared_where_importance_is_the_bases(two: Memory) -> None:
    quantize = {"shared_layers": True}
    planned, records, layers = {}, {}, {}
    for name in "ab":
        adapters = [{"source": f"./{name}", "version": "v1"}]
        two.write_recipe(targets=[TARGET], version=name, quantize=quantize, adapters=adapters)
        (planned[name],) = two.forecast(targets=[TARGET])["sharing"].values()
        two.build(targets=[TARGET], push=True)
        records[name] = json.loads((two.dist / "tiny" / name / TARGET / "build.json").read_text())
        layers[name] = weights(pulled(two, f"{name}-{TARGET}"))

    (job,) = (job for job in two.runner.jobs if isinstance(job, QuantizeJob))
    assert job.statistics is not None, "measured by the first build"
    assert len(layers["a"]) == len(layers["b"]) == 13
    assert len(set(layers["a"].items()) - set(layers["b"].items())) == 1
    for name, record in records.items():
        for found in (planned[name], record["sharing"]):
            share = found["own_bytes"] / (found["own_bytes"] + found["shared_bytes"])
            assert share == pytest.approx(0.16, abs=0.02)


def test_a_plan_without_the_bases_weights_reads_the_adapters_keys(memory: Memory) -> None:
    (whole,) = memory.forecast(targets=["vllm"])["sharing"].values()
    (memory.home / "base" / "model.safetensors").unlink()
    (found,) = memory.forecast(targets=["vllm"])["sharing"].values()
    assert found["own_bytes"] == whole["own_bytes"] == 256 * 256 * 4
    assert found["shared_bytes"] == pytest.approx(whole["shared_bytes"], rel=0.05)


def tied(home: Path) -> None:
    """Let the base's head be its embedding; the adapter `a` changes the embedding alone."""
    base = home / "base"
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model = load_file(base / "model.safetensors")
    del model["lm_head.weight"]
    save_file(model, base / "model.safetensors")
    stem = "base_model.model.model.embed_tokens.lora_embedding_"
    ones = {"A": np.ones((2, 32), np.float32), "B": np.ones((256, 2), np.float32)}
    save_file({stem + one: value for one, value in ones.items()}, weights_of(home))
    retarget(home, target_modules=["embed_tokens"])


def replicated(home: Path) -> None:
    """Let the adapter `a` change two replicas of a layer."""
    made = load_file(weights_of(home))
    second = {name.replace("layers.0.", "layers.1."): value for name, value in made.items()}
    save_file(made | second, weights_of(home))
    retarget(home, layer_replication=[[0, 1], [0, 1]])


def weights_of(home: Path) -> Path:
    return home / "a" / "adapter_model.safetensors"


def retarget(home: Path, **settings: Any) -> None:
    file = home / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize(("make", "files"), [(tied, 8), (replicated, 2)])
def test_what_no_other_image_of_the_base_has_is_not_shared(
    two: Memory, make: Callable[[Path], None], files: int
) -> None:
    """A head that is untied is a copy, but under a name that the base does not have."""
    make(two.home)
    two.use_vllm("vllm", adapters=[{"source": "./a", "version": "v1"}])
    (planned,) = two.forecast(targets=["vllm"])["sharing"].values()
    a, base = (record_of(two, name, "vllm") for name in ("a", ""))

    layers = [
        {
            one["digest"]: one["size"]
            for one in record["image"]["layers"]
            if "/model-" in one["file"]
        }
        for record in (a, base)
    ]
    shared = layers[0].keys() & layers[1].keys()
    assert len(shared) == files
    for what, some in (("shared", shared), ("own", layers[0].keys() - shared)):
        size = sum(layers[0][one] for one in some)
        tar = 8_000 * len(some)  # headers and padding
        assert a["sharing"][f"{what}_bytes"] == pytest.approx(size, abs=tar)
    assert planned["shared_bytes"] <= a["sharing"]["shared_bytes"]


def test_a_second_image_sends_what_is_its_own(two: Memory) -> None:
    record_of(two, "a", "vllm")
    record = record_of(two, "b", "vllm")
    own, small = record["sharing"]["own_bytes"], 60_000
    assert own < record["image"]["uploaded_bytes"] < own + small
