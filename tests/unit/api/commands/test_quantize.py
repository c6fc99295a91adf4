"""`quantize`, `plan` and `build` refuse what cannot be quantized before any work starts."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path

import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.merging.plan import make_plan
from weightsmith.models.safetensors import build_header, read_header

from tests.fakes.command_line import weightsmith
from tests.paths import ROOT

TINY = ROOT / "examples" / "tiny"
TEXTS = TINY / "calibration.jsonl"
WORK = ("quantize: ", "  quantizing to", "  converting to", "  rounding to", "making the builder")
"""What the first long steps say."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return shutil.copytree(TINY / "base", tmp_path / "model")


def refused(
    model: Path, tmp_path: Path, *words: object, expect: int = 3, calibration: Path = TEXTS
) -> str:
    out = tmp_path / "out"
    asked = ("--model", model, "--out", out, "--runner", "local", "--calibration", calibration)
    done = weightsmith("quantize", *asked, *words)
    assert done.code == expect, done.err
    assert not any(word in done.err for word in WORK), done.err
    assert "hint: " in done.err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".out", "out"))]
    return done.err


ODD = {"architectures": ["PerceiverForCausalLM"]}
PACKED = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
NARROW = {"intermediate_size": 200}


@pytest.mark.parametrize(
    ("changes", "words", "says"),
    [
        *((ODD, (name,), ["PerceiverForCausalLM"])
          for name in ("q4_k_m", "awq", "gptq", "fp8", "awq-compressed")),
        *((PACKED, (name,), ["already quantized (gptq)", "16-bit checkpoint"])
          for name in ("q8_0", "awq", "w8a8")),
        *((NARROW, (name,), ["group size 32 does not divide the 200 inputs of down_proj",
                             "fp8 or w8a8"])
          for name in ("awq", "gptq", "awq-compressed")),
        ({"intermediate_size": 576}, ("gptq", "--group-size", 128),
         ["group size 128 does not divide the 576 inputs of down_proj", "--group-size 64"]),
    ],
)  # fmt: skip
def test_a_model_that_a_format_does_not_take(model, tmp_path, changes, words, says) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    said = refused(model, tmp_path, "--format", *words)
    assert all(text in said for text in says), said


@pytest.mark.parametrize("format_", ["q8_0", "fp8"])
def test_weights_of_64_bits_are_refused_as_by_a_merge(model, tmp_path, format_) -> None:
    path = model / "model.safetensors"
    wide = [(t.name, "F64", t.shape) for t in read_header(path).tensors]
    size = sum(8 * math.prod(shape) for _, _, shape in wide)
    path.write_bytes(build_header(wide, {"format": "pt"}) + bytes(size))

    said = refused(model, tmp_path, "--format", format_)
    with pytest.raises(InputRefused, match="unsupported dtype F64") as merging:
        make_plan(model, [(TINY / "adapters" / "a", 1.0)])
    assert "has the unsupported dtype F64" in said
    assert merging.value.hint in said


@pytest.mark.parametrize("format_", ["q4_k_m", "gptq", "fp8"])
@pytest.mark.parametrize(
    ("raw", "says"), [(b"", "no usable calibration text"), (b'{"text": "\xff"}', "is not UTF-8")]
)
def test_calibration_that_is_empty_or_no_text(model, tmp_path, format_, raw, says) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_bytes(raw)

    assert says in refused(model, tmp_path, "--format", format_, calibration=texts)


def test_the_importance_matrix_of_another_model(model, tmp_path) -> None:
    name = b"blk.0.attn_q.weight"
    matrix = tmp_path / "m.dat"
    head = struct.pack("<ii", 1, len(name)) + name
    matrix.write_bytes(head + struct.pack("<ii", 5, 8) + bytes(32))

    said = refused(model, tmp_path, "--format", "q4_k_m", "--imatrix", matrix)
    assert "does not match the model" in said
    # A format that uses none refuses one that is not there, too.
    said = refused(model, tmp_path, "--format", "q8_0", "--imatrix", tmp_path / "missing.dat")
    assert "missing.dat" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--format", "q4_k_m", "--group-size", 32), "--group-size does not apply to q4_k_m"),
        (("--format", "fp8", "--group-size", 32), "--group-size does not apply to fp8"),
        (("--format", "awq", "--no-zero-point"), "zero_point: false is not supported by awq"),
        (("--format", "gptq", "--no-zero-point"), "--no-zero-point does not apply to gptq"),
        (
            ("--format", "q4_0", "--keep-module", "down_proj"),
            "--keep-module does not apply to q4_0",
        ),
        (("--format", "awq", "--group-size", 48), "32, 64 or 128"),
        (("--format", "gptq", "--keep-module", "q_proj"), "without k_proj, v_proj"),
        (
            ("--format", "awq-autoawq", "--keep-module", "down_proj"),
            "awq or awq-compressed",
        ),
        (("--format", "fp8", "--keep-module", "proj"), "is not the suffix of a matrix name"),
    ],
)
def test_a_wish_that_a_format_cannot_have(model, tmp_path, words, says) -> None:
    assert says in refused(model, tmp_path, *words, expect=2)


@pytest.mark.parametrize("name", ["plan", "build"])
@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--target", "sglang-fp8", "--gpu", "nvidia-t4"), 3, "needs compute capability 8.0"),
        (
            ("--target", "vllm-awq", "--set", "quantize.zero_point=false"),
            2,
            "zero_point: false is not supported",
        ),
        (("--target", "vllm-gptq", "--set", "quantize.keep=[up_proj]"), 2, "without gate_proj"),
    ],
)
def test_a_build_s_targets_are_refused_by_its_plan_too(name, words, code, says, tmp_path) -> None:
    done = weightsmith(name, "--recipe", TINY, "--runner", "local", "--dist", tmp_path, *words)

    assert (done.code, says in done.err) == (code, True), done.err
    assert not any(word in done.err for word in WORK), done.err
