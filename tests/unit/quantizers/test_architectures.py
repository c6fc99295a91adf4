"""Each cell of the table of architectures and formats without calibration is a test here."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from weightsmith.checkpoints.facts import read_facts
from weightsmith.checkpoints.tensors import CheckpointTensors
from weightsmith.errors import InputRefused
from weightsmith.quality.measure import measure
from weightsmith.quantizers import formats, of_format
from weightsmith.quantizers.architectures import EXPERTS, ROUNDED, SEEING
from weightsmith.quantizers.calibration import GENERAL
from weightsmith.quantizers.packed import Layout, view_of
from weightsmith.quantizers.packed_check import check_checkpoint
from weightsmith.quantizers.rounded import quantize
from weightsmith.quantizers.schemes import SCHEMES

from tests.fakes.dense import make_dense
from tests.fakes.seeing import make_seeing
from tests.fakes.sparse import make_sparse

ROWS = [json.loads(line) for line in GENERAL.read_text("utf-8").splitlines()[:1]]
CELLS = [(name, scheme) for name in sorted(ROUNDED) for scheme in SCHEMES]
MOST = {"w8a8": 0.1, "fp8": 0.2, "fp8-block": 0.2, "nvfp4a16": 0.45, "mxfp4a16": 0.6}
"""Errors of layers; the largest are of models with experts, whose routers choose others."""
NOT_QUANTIZED = (
    "embed_tokens", "lm_head", "norm", ".bias", ".gate.", "router", "shared_expert_gate",
    "q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj", "vision", "visual", "multi_modal_projector",
    "e_score_correction_bias",
)  # fmt: skip
"""Parts of the names of tensors that must stay as they are."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("models")

    @cache
    def made(architecture: str) -> Path:
        if architecture in SEEING:
            return make_seeing(root / architecture, architecture)
        if architecture in EXPERTS:
            return make_sparse(root / architecture, architecture)
        return make_dense(root / architecture, architecture, hidden=256)

    return made


@pytest.mark.grid(9)
@pytest.mark.parametrize(("architecture", "name"), CELLS)
def test_a_model_of_this_architecture_becomes_this_format(
    models, tmp_path: Path, architecture: str, name: str
) -> None:
    model, out, scheme = models(architecture), tmp_path / "out", SCHEMES[name]
    out.mkdir()
    of_format(name).check_input(formats()[name], read_facts(model))

    quantize(scheme, model, out, [])

    check_checkpoint(out, model, Layout.of_scheme(scheme))
    view, source = view_of(out, model), CheckpointTensors(model)
    for tensor in source.names:
        stays = any(part in tensor for part in NOT_QUANTIZED)
        assert stays == (tensor in view.tensors.names and _same(view.tensors, source, tensor)), (
            tensor
        )
    ignored = set(json.loads((out / "config.json").read_text())["quantization_config"]["ignore"])
    assert ignored >= _linear_in_16_bits(source, view.modules)
    found = measure(model, view, ROWS, 100, lambda *_: None)
    assert found.kl_mean > 0
    assert 0 < found.layer_error < MOST[name]


def _same(made: CheckpointTensors, source: CheckpointTensors, tensor: str) -> bool:
    return made.info(tensor).dtype == source.info(tensor).dtype and np.array_equal(
        made.raw(tensor), source.raw(tensor)
    )


def _linear_in_16_bits(source: CheckpointTensors, quantized: frozenset[str]) -> set[str]:
    """Return the modules that engines would take for linear layers, by their tensors' shapes."""
    made = {n.removesuffix(".weight") for n in source.names if len(source.info(n).shape) == 2}
    tables = {n for n in made if n.endswith(("embed_tokens", "weight", "vlm", "pos_embed"))}
    return made - quantized - tables - {n for n in made if n.endswith(("lm_head", "_embedding"))}


@pytest.mark.parametrize(
    "architecture", ["GptOssForCausalLM", "Phi4MMForCausalLM", "JambaForCausalLM"]
)
@pytest.mark.parametrize("name", SCHEMES)
def test_another_architecture_is_refused_with_what_works(architecture: str, name: str) -> None:
    from tests.fakes.configs import facts

    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    model = facts({
        **shape, "num_hidden_layers": 2, "vocab_size": 100, "architectures": [architecture],
    })  # fmt: skip
    with pytest.raises(InputRefused, match="unsupported architecture") as refused:
        of_format(name).check_input(formats()[name], model)
    assert "target vllm" in refused.value.hint
