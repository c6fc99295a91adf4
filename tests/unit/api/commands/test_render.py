"""`render` and `plan` as others call them: figures of the engines' own rules, on the command line.

The expected values are vLLM's, computed from its block rules by hand: blocks of 16 tokens, groups
of equal size, windows with what is under way, one row for latent attention.
"""

import json
import struct

import pytest
from weightsmith import render
from weightsmith.quantizers.checkpoints import integers_config

from tests.fakes.command_line import weightsmith
from tests.paths import ROOT

MODELS = ROOT / "tests" / "golden" / "models"


def invoke(*words):
    """(exit code, what --json printed, standard error)."""
    done = weightsmith(*words, "--json")
    return done.code, json.loads(done.out), done.err


def folder(tmp_path, name, *, weights=True):
    """A checkpoint of holes: its config.json, and one file of the right size."""
    told = json.loads((MODELS / f"{name}.json").read_text("utf-8"))
    path = tmp_path / name
    path.mkdir()
    (path / "config.json").write_text(json.dumps(told["config"]))
    if weights:
        size = told["weight_bytes"]
        entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
        header = json.dumps({"w": entry}).encode()
        with (path / "model.safetensors").open("wb") as stream:
            stream.write(struct.pack("<Q", len(header)) + header)
            stream.truncate(size)
    return path, told["weight_bytes"]


CASES = [
    # model, flags, bytes per token, bytes per request of that length
    ("llama-3.1-70b", ["--gpu-count", 4, "--max-model-len", 131072], 80 * 4096, 80 * 4096 * 131072),
    ("llama-3-8b", ["--max-model-len", 8192], 131072, 1 << 30),
    (
        "qwen3-8b",
        ["--max-model-len", 32768, "--set", "serve.kv_cache_dtype=fp8"],
        73728,
        2048 * 16 * 73728,
    ),
    (
        "gemma-3-27b",
        ["--max-model-len", 32768, "--set", "serve.max_num_batched_tokens=8192"],
        10 * 8192,
        8582 * 16 * 10 * 8192,
    ),
    (
        "gpt-oss-20b",
        ["--max-model-len", 131072, "--set", "serve.max_num_batched_tokens=8192"],
        12 * 2048,
        9225 * 16 * 12 * 2048,
    ),
    ("deepseek-v3", ["--gpu-memory", "900GiB", "--max-model-len", 4096], 70272, 4096 * 70272),
]
KEYS = {
    "weights_bytes_per_gpu", "kv_bytes_per_token", "kv_bytes_per_request", "kv_cache_bytes",
    "max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_concurrency",
    "gpu_memory_utilization", "margin_bytes", "fits", "nearest",
}  # fmt: skip


@pytest.mark.parametrize(("name", "flags", "token", "request_"), CASES, ids=[c[0] for c in CASES])
def test_vllms_figures(tmp_path, name, flags, token, request_):
    path, size = folder(tmp_path, name)
    machine = [] if "--gpu-memory" in flags else ["--gpu", "nvidia-h100-80gb"]
    code, told, error = invoke(
        "render", "--model", path, "--target", "vllm", *machine, *flags, "--out", tmp_path / "out"
    )

    assert code == 0, error
    plan = told["plan"]
    assert set(plan) >= KEYS
    assert plan["weights_bytes_per_gpu"] == -(-size // plan["gpus"])
    assert (plan["kv_bytes_per_token"], plan["kv_bytes_per_request"]) == (token, request_)
    assert plan["max_num_seqs"] * request_ <= plan["kv_cache_bytes"] * plan["gpus"]
    assert (plan["fits"], plan["nearest"]) == (True, None)


def test_an_engine_alone_is_its_usual_target(tmp_path):
    """As in `build` and `plan`."""
    path, _ = folder(tmp_path, "qwen3-8b", weights=False)
    out = tmp_path / "out"
    code, _, error = invoke("render", "--model", path, "--target", "llamacpp", "--out", out)
    assert code == 0, error
    assert json.loads((out / "serving.json").read_text())["target"] == "llamacpp-q4_k_m"


def test_a_config_alone_is_enough_to_plan(tmp_path):
    path, size = folder(tmp_path, "qwen3-8b", weights=False)
    flags = ["--target", "vllm", "--set", "serve.gpu=nvidia-l40s"]
    code, told, _ = invoke("render", "--model", path, *flags, "--out", tmp_path / "out")
    assert code == 0
    assert told["plan"]["weights_bytes_per_gpu"] == pytest.approx(size, rel=0.002)
    assert any("an estimate" in note for note in told["plan"]["notes"])

    code, planned, _ = invoke("plan", "--base", path, *flags, "--gpu-count", 0)
    assert (code, "--gpu-count 0" in planned["error"]["message"]) == (2, True)
    code, planned, _ = invoke("plan", "--base", path, *flags, "--gpu-count", 1)
    assert code == 0
    for key in KEYS:
        assert planned["plan"]["vllm"][key] == told["plan"][key]

    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": {}})
    )
    code, told, _ = invoke("render", "--model", path, *flags, "--out", tmp_path / "out2")
    assert told["plan"]["weights_bytes_per_gpu"] == size


def test_what_is_not_weights_is_not_planned_as_such(tmp_path):
    path, size = folder(tmp_path, "smollm2-135m")
    (path / "tokenizer.json").write_text(" " * 1_000_000)
    flags = ["--target", "vllm", "--set", "serve.gpu=nvidia-l4"]

    _, planned, _ = invoke("plan", "--base", path, *flags)

    assert planned["plan"]["vllm"]["weights_bytes_per_gpu"] == size


def test_weights_of_32_bits_are_halved_before_they_are_packed(tmp_path):
    """As q8_0 a checkpoint's 8.5 of 16 or of 32 bits are left."""
    path, size = folder(tmp_path, "smollm2-135m")
    flags = ["--target", "llamacpp-q8_0", "--gpu", "nvidia-l4", "--out"]
    _, half, _ = invoke("render", "--model", path, *flags, tmp_path / "16")
    config = json.loads((path / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    (path / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    _, full, _ = invoke("render", "--model", path, *flags, tmp_path / "32")

    found = [told["plan"]["weights_bytes_per_gpu"] for told in (half, full)]
    assert found == pytest.approx([size * 8.5 / 16, size * 8.5 / 32], rel=0.001)


@pytest.mark.parametrize("weights", [True, False])
def test_packed_weights_are_refused_where_they_would_be_quantized(tmp_path, weights):
    path, _ = folder(tmp_path, "deepseek-v3", weights=weights)
    flags = ["--target", "llamacpp-q4_k_m", "--gpu", "nvidia-h200-141gb", "--gpu-count", 8]
    code, told, _ = invoke("render", "--model", path, *flags, "--out", tmp_path / "out")
    _, planned, _ = invoke("plan", "--base", path, *flags)

    assert (code, planned["error"]) == (3, told["error"])
    assert "already quantized (fp8)" in told["error"]["message"]


OWN = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}


@pytest.mark.parametrize(
    ("told", "target", "served"),
    [
        (integers_config(4, 128, [], symmetric=False), "vllm-awq", True),
        (integers_config(4, 128, [], symmetric=False), "vllm-awq-compressed", True),
        (integers_config(4, 128, []), "vllm-gptq", True),
        (OWN, "vllm-awq", True),
        (OWN, "vllm-awq-gemm", True),
        (OWN, "tgi-awq", True),
        (integers_config(4, 128, [], symmetric=False), "tgi-awq", False),
        (integers_config(4, 128, []), "sglang-gptq", False),
    ],
)
def test_a_target_serves_its_own_weights(tmp_path, told, target, served):
    """As they are; of both layouts of AWQ and GPTQ, vLLM reads each, TGI and SGLang only one."""
    path, size = folder(tmp_path, "llama-3-8b")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": told}))

    flags = ["--target", target, "--gpu", "nvidia-h100-80gb", "--out", tmp_path / "out"]
    code, said, _ = invoke("render", "--model", path, *flags)

    if served:
        assert said["plan"]["weights_bytes_per_gpu"] == size
    else:
        assert (code, said["error"]["hint"]) == (3, "start from the 16-bit checkpoint")


@pytest.mark.parametrize("target", ["vllm-lora", "vllm-awq-lora", "llamacpp-q4_k_m-lora"])
def test_a_model_without_adapters_has_no_plan_for_them(tmp_path, target):
    path, _ = folder(tmp_path, "llama-3-8b")
    flags = ["--target", target, "--gpu", "nvidia-l40s", "--out", tmp_path / "out"]
    code, told, _ = invoke("render", "--model", path, *flags)

    assert (code, told["error"]["message"]) == (
        2,
        f"{target} serves adapters beside a base, and this is a model without any",
    )
    assert f"invoke plan --target {target}" in told["error"]["hint"]


def test_what_does_not_fit_is_exit_2_with_what_does(tmp_path):
    path, _ = folder(tmp_path, "llama-3-8b")
    flags = ["--target", "sglang", "--gpu", "nvidia-l4"]
    wish = ["--max-model-len", 8192, "--max-num-seqs", 64]
    code, told, error = invoke("render", "--model", path, *flags, *wish, "--out", tmp_path / "out")

    assert code == 2
    assert "nearest that fits" in error
    assert told["plan"]["fits"] is False
    assert {"text", "max_model_len", "max_num_seqs"} <= set(told["plan"]["nearest"][0])
    assert not (tmp_path / "out").exists()


def test_a_named_flag_counts_before_set_and_set_before_the_recipe(tmp_path):
    path, _ = folder(tmp_path, "qwen3-8b", weights=False)
    recipe = tmp_path / "recipe.yaml"
    serve = {"gpu": "nvidia-l40s", "max_model_len": 1024}
    quantize = {"allow_low_bits": False}
    told = {"name": "x", "base": {"source": str(path)}, "serve": serve, "quantize": quantize}
    recipe.write_text(json.dumps(told))
    fields = ("--set", "serve.max_model_len=2048")

    def length(*flags):
        words = ("plan", "--recipe", recipe, "--target", "vllm", *flags)
        return invoke(*words)[1]["plan"]["vllm"]["max_model_len"]

    assert [length(), length(*fields)] == [1024, 2048]
    assert length("--max-model-len", 4096) == length("--max-model-len", 4096, *fields) == 4096
    assert length("--max-model-len", "auto", *fields) == length("--set", "serve.max_model_len=auto")
    low = ("plan", "--recipe", recipe, "--target", "llamacpp-q2_k")
    assert invoke(*low, "--allow-low-bits", "--set", "quantize.allow_low_bits=false")[0] == 0

    one = ("render", "--model", path, "--target", "vllm", "--gpu", "nvidia-l40s")
    for more, wanted in (((), 2048), (("--max-model-len", 4096), 4096)):
        code, rendered, _ = invoke(*one, *fields, *more, "--out", tmp_path / "out")
        assert (code, rendered["plan"]["max_model_len"]) == (0, wanted)
        keywords = {"max_model_len": more[1]} if more else {}
        keywords |= {"gpu": "nvidia-l40s", "set": fields[1]}
        rendered = render(path, "vllm", tmp_path / "out", **keywords)
        assert rendered.plan["max_model_len"] == wanted
