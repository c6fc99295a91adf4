"""Packed checkpoints of every architecture that is made here: vLLM's numbers are the file's.

Forty of them at half a minute each, on two cores. With `-s` the differences are printed.
"""

from pathlib import Path

import pytest
import torch
from weightsmith.quantizers.architectures import DENSE

from tests.fakes.decoders import make_dense
from tests.fakes.started import weightsmith
from tests.real.test_vllm import FORMATS, compare

pytestmark = [
    pytest.mark.real,
    pytest.mark.builders,
    pytest.mark.vllm,
    pytest.mark.timeout(3600),
]
CASES = [(name, kind) for name in sorted(DENSE) for kind in ("fp8", "w8a8", "gptq", "awq")]


@pytest.mark.parametrize(("architecture", "kind"), CASES)
def test_log_probabilities_are_those_of_the_dequantized_checkpoint(
    tmp_path: Path, architecture: str, kind: str
) -> None:
    model = make_dense(tmp_path / "model", architecture, hidden=256)
    packed, layout = tmp_path / "packed", tmp_path / "layout"
    weightsmith("quantize", "--model", model, "--format", kind, "--no-gate", "--out", packed,
                "--runner", "local")  # fmt: skip
    weightsmith("bake", "--model", packed, "--target", f"vllm-{kind}", "--layout", layout)
    ids = torch.randint(5, 500, (256,), generator=torch.Generator().manual_seed(3)).tolist()
    compare(f"{architecture} {kind}", layout, packed, ids, FORMATS[f"vllm-{kind}"])
