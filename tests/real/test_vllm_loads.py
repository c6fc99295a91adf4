"""vLLM's own models load what is written for experts: every code and scale where its weight was.

vLLM 0.32 for CPUs builds each model with its loaders, without kernels. The 16-bit checkpoint says
which weight is where; packed parameters must be near these, all others the same, and nothing may
stay unloaded. So this needs no GPU, and says nothing about what kernels compute.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.quantizers import formats, modelopt
from weightsmith.quantizers.architectures import (
    FURTHER_EXPERTS,
    LLAMAS,
    SCANNING,
    STACKED_MXFP4,
)
from weightsmith.quantizers.calibration import GENERAL
from weightsmith.quantizers.layerwise.quantizing import quantize as walked
from weightsmith.quantizers.low_bits import BITS
from weightsmith.quantizers.matrices import matrices
from weightsmith.quantizers.rounded import quantize
from weightsmith.quantizers.running import ProgramSettings
from weightsmith.quantizers.schemes import SCHEMES

from tests import vllm_parts
from tests.unit.quantizers.conftest import make_any

pytestmark = [
    pytest.mark.real,
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the engine's packages are for it"),
]
MOST = {
    "w8a8": 0.02, "fp8": 0.04, "fp8-block": 0.04, "mxfp8": 0.04, "nvfp4a16": 0.12, "mxfp4a16": 0.15,
    "mxfp4a8": 0.15, "nvfp4a16-4o6": 0.11,
    "fp8-modelopt": 0.04, "nvfp4-modelopt": 0.12,
    "awq": 0.12, "gptq": 0.15, "w2a16": 0.9, "w3a16": 0.35, "w5a16": 0.08,
}  # fmt: skip
SEEING = "Qwen3VLMoeForConditionalGeneration"
DENSE = (
    "ApertusForCausalLM", "Idefics3ForConditionalGeneration", "Lfm2ForCausalLM",
    "Qwen2VLForConditionalGeneration", "Qwen3_5ForCausalLM", "SmolVLMForConditionalGeneration",
)  # fmt: skip
SPARSE = ("GptOssForCausalLM", "GraniteMoeForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM")
CELLS = [
    (architecture, name)
    for architecture in (*sorted({*SPARSE, SEEING} | FURTHER_EXPERTS), *DENSE)  # experts first
    for name in SCHEMES
    if not (architecture in STACKED_MXFP4 and name != "mxfp4a16")
    and not (architecture in SCANNING and name == "fp8-block")
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def probe(root: Path) -> Iterator[Callable[..., Any]]:
    """vLLM's own code, which answers a line by a line."""
    with vllm_parts.answering(Path(__file__).with_name("vllm_loads.py"), root) as ask:
        yield ask


@pytest.mark.parametrize(("architecture", "name"), CELLS)
def test_every_weight_comes_where_vllm_has_it(
    probe: Callable[..., Any], root: Path, architecture: str, name: str
) -> None:
    plain, made = folders(root, architecture, name)
    quantize(SCHEMES[name], plain, made, [])

    check(probe({"plain": str(plain), "made": str(made)}), name)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        *(("Qwen3MoeForCausalLM", name) for name in BITS),  # experts first
        *(("LlamaForCausalLM", name) for name in ("awq", "gptq", *BITS)),
    ],
)
def test_integers_of_few_bits_come_where_vllm_has_them(
    probe: Callable[..., Any], root: Path, architecture: str, name: str
) -> None:
    """Their kernels, Humming's, exist on GPUs alone; that their layout is vLLM's shows here."""
    plain, made = folders(root, architecture, name)
    texts = root / "texts.jsonl"
    rows = [json.loads(line) for line in GENERAL.read_text("utf-8").splitlines()[:2]]
    texts.write_text("".join(json.dumps({**row, "tokens": 1}) + "\n" for row in rows))
    settings = ProgramSettings(
        model=plain, out=made, calibration=str(texts), method=name,
        bits=BITS.get(name, 4), group_size=32, packed=True, scaled=False,
    )  # fmt: skip
    walked(settings)

    check(probe({"plain": str(plain), "made": str(made)}), name)


@pytest.mark.parametrize("name", ["fp8-modelopt", "nvfp4-modelopt"])
@pytest.mark.parametrize(
    "architecture",
    sorted(modelopt.ARCHITECTURES, key=lambda name: (name in LLAMAS, name)),  # experts first
)
def test_modelopts_layout_is_read_by_vllms_reader_of_it(
    probe: Callable[..., Any], root: Path, architecture: str, name: str
) -> None:
    """Written for TensorRT-LLM, which cannot be had without a GPU."""
    plain, made = folders(root, architecture, name)
    found = matrices(CheckpointTensors(plain), plain)
    inputs = dict.fromkeys((one.module for one in found), 4.0)
    modelopt.quantize(formats()[name], plain, made, [], inputs)

    check(probe({"plain": str(plain), "made": str(made)}), name)


def folders(root: Path, architecture: str, name: str) -> tuple[Path, Path]:
    """Folders of a small model in 16 bits, and of what will be made of it."""
    plain, made = root / architecture, root / f"{architecture}-{name}"
    if not plain.exists():
        make_any(plain, architecture)
    made.mkdir()
    return plain, made


def check(told: dict[str, Any], name: str) -> None:
    assert told.get("left") == [], told
    assert told["moved"] == []
    assert any(part in name for name in told["errors"] for part in ("w13", "gate_up", ".up_proj"))
    assert 0 < max(told["errors"].values()) < MOST[name]
