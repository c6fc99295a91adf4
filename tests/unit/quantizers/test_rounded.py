"""The writer of formats without calibration: what it reads and refuses, and interrupts.

The check has a rule of its own: a wrong one of the writer's does not pass.
"""

import json
import re
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save_file
from weightsmith.core.errors import CheckFailed, EnvironmentFailure, InputRefused
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.quantizers import matrices, rounded, writing
from weightsmith.quantizers.packed import PackedLayout
from weightsmith.quantizers.packed_check import check_checkpoint
from weightsmith.quantizers.rounded import quantize as write
from weightsmith.quantizers.rounding import round_rows
from weightsmith.quantizers.schemes import SCHEMES

from tests.fakes.awkward import SIZES, make
from tests.fakes.decoders import make_sparse


@pytest.fixture
def model(tmp_path):
    return make(tmp_path / "model")


@pytest.fixture
def whole(model, tmp_path):
    """The model in nvfp4a16, written in one go."""
    (tmp_path / "whole").mkdir()
    write(SCHEMES["nvfp4a16"], model, tmp_path / "whole", [])
    return (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("room", "times"), [(1 << 20, 1), (100_000, 2), (0, 2)])
def test_rows_are_read_once_where_they_fit_into_memory(model, out, whole, monkeypatch, room, times):
    """A scale that matrices share needs all of their rows before the first one is rounded."""
    monkeypatch.setattr(rounded, "_KEPT", room)
    monkeypatch.setattr(rounded, "_BLOCK", 1 << 12)
    read = counting(monkeypatch)
    write(SCHEMES["nvfp4a16"], model, out, [])

    assert max(read[name] / size for name, size in SIZES.items()) <= times
    assert (sum(read[name] for name in SIZES) > sum(SIZES.values())) == (times == 2)
    assert (out / "model.safetensors").read_bytes() == whole


def counting(monkeypatch):
    """Count the bytes of each tensor that are read from now on."""
    read: Counter[str] = Counter()
    raw = CheckpointTensors.raw

    def counted(self, name, *where):
        found = raw(self, name, *where)
        read[name] += found.size
        return found

    monkeypatch.setattr(CheckpointTensors, "raw", counted)
    return read


@pytest.mark.parametrize("missing", ["none", "k_proj"])
def test_rows_are_read_once_where_the_largest_weights_are_recorded(
    model, out, whole, monkeypatch, missing
):
    known = {name: most for name, most in recorded(model).items() if missing not in name}
    monkeypatch.setattr(rounded, "_KEPT", 0)
    monkeypatch.setattr(rounded, "_BLOCK", 1 << 12)
    read = counting(monkeypatch)
    write(SCHEMES["nvfp4a16"], model, out, [], recorded=known)

    for name, size in SIZES.items():
        assert read[name] == (1 if name in known else 2) * size, name
    assert (out / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_a_weight_that_was_recorded_wrongly_is_an_error(model, out, factor):
    """Too small a scale would cut weights off, too large a one would waste codes."""
    known = recorded(model)
    known["model.layers.0.self_attn.v_proj.weight"] *= factor

    with pytest.raises(EnvironmentFailure, match=r"largest weight of .*v_proj"):
        write(SCHEMES["nvfp4a16"], model, out, [], recorded=known)
    assert not list(out.glob("*.safetensors"))


def recorded(model):
    """Return the largest magnitude of each matrix, as a merge records it."""
    tensors = load_file(model / "model.safetensors")
    return {name: float(tensors[name].abs().max()) for name in SIZES}


@pytest.mark.slow
def test_a_large_embedding_is_compared_in_little_memory(model, out):
    """The job's limit does not grow with the model."""
    name, size = "model.embed_tokens.weight", 1 << 26
    tensors = load_file(model / "model.safetensors")
    width = tensors[name].shape[1]
    tensors[name] = torch.ones((size // 2 // width, width), dtype=torch.bfloat16)
    save_file(tensors, model / "model.safetensors")
    scheme = SCHEMES["fp8"]
    write(scheme, model, out, [])

    tracemalloc.start()
    try:
        check_checkpoint(out, model, PackedLayout.of_scheme(scheme), ())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < size // 2
    tensors = load_file(out / "model.safetensors")
    tensors[name][-1, -1] = 2
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(CheckFailed, match="unexpectedly changed"):
        check_checkpoint(out, model, PackedLayout.of_scheme(scheme), ())


@pytest.mark.parametrize("shard_bytes", [1 << 14, 1 << 16])
def test_shards_hold_the_same_tensors_and_a_killed_run_goes_on(
    model, out, whole, monkeypatch, shard_bytes
):
    scheme = SCHEMES["nvfp4a16"]
    monkeypatch.setattr(writing, "SHARD_BYTES", shard_bytes)
    calls = []

    def failing(*given):
        calls.append(given)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return round_rows(*given)

    monkeypatch.setattr(rounded, "round_rows", failing)
    with pytest.raises(KeyboardInterrupt):
        write(scheme, model, out, [])
    finished = {path: path.stat().st_mtime_ns for path in out.glob("model-*")}
    assert finished
    assert not (out / "model.safetensors.index.json").exists()

    write(scheme, model, out, [])

    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
    assert sorted(path.name for path in out.iterdir() if path.name.startswith(".")) == []
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = load(whole)
    assert index.keys() == tensors.keys()
    for shard in set(index.values()):
        for name, value in load_file(out / shard).items():
            assert index[name] == shard
            assert torch.equal(value.view(torch.uint8), tensors[name].view(torch.uint8))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", SCHEMES)
def test_weights_that_are_not_finite_are_refused(model, out, name, value):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][3, 3] = value
    save_file(tensors, model / "model.safetensors")

    with pytest.raises(InputRefused, match=r"down_proj.* has NaN or infinite weights"):
        write(SCHEMES[name], model, out, [])


def test_a_name_in_keep_that_matches_nothing_is_refused(model, tmp_path):
    with pytest.raises(InputRefused, match=r"no matrix has a name that ends in 'layers\.7\.mlp"):
        write(SCHEMES["fp8"], model, tmp_path, ["layers.7.mlp.down_proj"])


FP8 = SCHEMES["fp8"]


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return make_sparse(tmp_path_factory.mktemp("models"), "Qwen2MoeForCausalLM")


@pytest.mark.parametrize(
    ("names", "odd"),
    [
        (r"[qkv]_proj|\w+_proj(?<!o_proj)", r"0\.self_attn\.o_proj\.weight stays in 16 bits"),
        (r"\w+_proj|gate", r"1\.mlp\.gate\.weight is quantized"),
        (r"\w+_proj|shared_expert_gate", r"1\.mlp\.shared_expert_gate\.weight is quantized"),
    ],
)
def test_a_wrong_rule_of_the_writer_is_found(experts, tmp_path, monkeypatch, names, odd):
    write(FP8, experts, tmp_path, [])
    check_checkpoint(tmp_path, experts, PackedLayout.of_scheme(FP8))

    rule = re.compile(rf"(?P<parent>.+)\.(?P<name>{names})\.weight")
    monkeypatch.setattr(matrices, "_PLAIN", rule)
    write(FP8, experts, tmp_path, [])

    with pytest.raises(CheckFailed, match=rf"model\.layers\.{odd}, against what is known"):
        check_checkpoint(tmp_path, experts, PackedLayout.of_scheme(FP8))


def test_a_wrong_rule_for_stacks_is_found(tmp_path, out, monkeypatch):
    experts = make_sparse(tmp_path / "experts", "GraniteMoeForCausalLM")
    rule = matrices._STACKED.pattern.replace(r"|output_linear\.weight", "")
    assert rule != matrices._STACKED.pattern
    monkeypatch.setattr(matrices, "_STACKED", re.compile(rule))
    write(FP8, experts, out, [])

    with pytest.raises(CheckFailed, match=r"output_linear\.weight stays in 16 bits"):
        check_checkpoint(out, experts, PackedLayout.of_scheme(FP8))
