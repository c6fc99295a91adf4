"""vLLM's own parser, `create_engine_config` and cache rules on every golden config, on a CPU.

Needs a vLLM for CPUs: the program that WEIGHTSMITH_VLLM names, else `vllm` on the PATH. Nothing is
loaded; kernels, and what only a GPU's platform decides, stay untried.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from weightsmith.core.errors import InputRefused, UsageError

from tests.golden.cases import GOLDEN, MACHINES, MODELS, PACKED, RENDERS, TARGETS, model, rendered

PROGRAM = os.environ.get("WEIGHTSMITH_VLLM") or shutil.which("vllm") or ""
PROBE = Path(__file__).with_name("vllm_probe.py")
H200 = "nvidia-h200-141gb"
HYBRIDS = json.loads((GOLDEN / "hybrids.json").read_text("utf-8"))
"""Models with states, by their configuration; shapes as published, weights are made up."""
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not PROGRAM, reason="no vLLM: set WEIGHTSMITH_VLLM to its program"),
]


def cases():
    """(name, model, target, wishes) of every vLLM config that fits."""
    for name, (which, target, wishes) in RENDERS.items():
        if target.startswith("vllm"):
            yield name, which, target, wishes
    small = {"host_memory_bytes": 8 << 30, "max_model_len": 2048, "max_num_seqs": 4}
    off = {"gpu": "nvidia-l4", "extra": {"enable_prefix_caching": False}}
    packed = {"gpu": "nvidia-l4", "kv_cache_dtype": "fp8"}
    for number, wishes in enumerate((off, packed, {**small, "kv_cache_dtype": "auto"})):
        yield f"wish {number}", "llama-3-8b" if "gpu" in wishes else "qwen3-8b", "vllm-awq", wishes
    for which in HYBRIDS:
        for count in (1, 2):
            one = {"gpu": "nvidia-h100-80gb", "gpu_count": count, "max_model_len": 8192}
            yield f"{which} x {count}", which, "vllm", one
            uncached = {**one, "extra": {"enable-prefix-caching": False}}
            yield f"{which} x {count}, nothing cached", which, "vllm", uncached
            wide = {**one, "extra": {"mamba-ssm-cache-dtype": "float32"}}
            yield f"{which} x {count}, in float32", which, "vllm", wide
    for which in MODELS:
        for target in (t for t in PACKED.get(which, TARGETS) if t.startswith("vllm")):
            for machine, (gpu, count) in {**MACHINES, "8 x H200": (H200, 8)}.items():
                yield f"{which} {target} {machine}", which, target, {"gpu": gpu, "gpu_count": count}


def folder(root, which):
    """The model's config.json; of Gemma 3 its text model: the CPU build has no image library."""
    path, config = root / which, HYBRIDS.get(which) or model(which)["config"]
    if "text_config" in config:
        config = {**config["text_config"], "architectures": ["Gemma3ForCausalLM"]}
    # Packed weights are not there, and nothing else of the configuration asks for their kernels.
    config = {k: v for k, v in config.items() if k != "quantization_config"}
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return path


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Per case: (plan, settings of the file, what vLLM says)."""
    root, found, lines = tmp_path_factory.mktemp("vllm"), {}, []
    for name, which, target, wishes in cases():
        try:
            config = rendered(which, target, wishes, config=HYBRIDS.get(which))
        except (UsageError, InputRefused):
            continue
        path = root / f"{len(lines)}.yaml"
        path.write_text(config.files["vllm.yaml"])
        # What is off is said twice, the second time for `vllm serve` alone.
        said = yaml.safe_load(config.files["vllm.yaml"])
        settings = {key: value for key, value in said.items() if not key.startswith("no-")}
        plan = config.plan
        asked = {
            "config": str(path),
            "model": str(folder(root, which)),
            "keys": [key.replace("-", "_") for key in settings],
            "kv_cache_bytes": plan.kv_cache_bytes,
            "batches": plan.pipeline_parallel_size + (1 if plan.gpus else 0),
            "block": settings.get("block-size", 16),
            "state_dtype": settings.get("mamba-ssm-cache-dtype", "auto"),
        }
        lines.append(json.dumps(asked))
        found[name] = (plan, settings)
    done = subprocess.run(
        [Path(PROGRAM).with_name("python"), PROBE],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
    )
    told = [json.loads(row[5:]) for row in done.stdout.splitlines() if row.startswith("TOLD ")]
    assert len(told) == len(lines), done.stderr[-3000:]
    return {name: (*case, said) for (name, case), said in zip(found.items(), told, strict=True)}


def test_every_golden_config_is_among_them(answers):
    stored = {path.parent.name for path in (GOLDEN / "renders").glob("*/vllm.yaml")}

    assert stored <= set(answers)
    assert len(answers) > 90


def test_it_accepts_each_and_reads_every_setting(answers):
    for name, (_, settings, told) in answers.items():
        assert "error" not in told, (name, told["error"])
        said = {key: told["read"][key.replace("-", "_")] for key in settings}
        if modules := said.get("lora-modules"):
            said["lora-modules"] = [f"{module['name']}={module['path']}" for module in modules]
        assert said == {**settings, "served-model-name": [settings["served-model-name"]]}, name


def test_its_engine_config_is_the_plan(answers):
    keys = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size")
    for name, (plan, settings, told) in answers.items():
        for key in (*keys, "pipeline_parallel_size"):
            # A CPU's latent attention takes prompts whole, whatever the file says.
            if key == "max_num_batched_tokens" and name.startswith("deepseek"):
                assert told[key] == max(getattr(plan, key), plan.max_model_len)
            else:
                assert told[key] == getattr(plan, key), (name, key)
        assert told["dtype"] == settings["dtype"], name


def test_its_cache_rules_give_the_planned_bytes_and_concurrency(answers):
    for name, (plan, _, told) in answers.items():
        gpus = max(1, plan.gpus)
        assert told["request"] * gpus == plan.kv_bytes_per_request, name
        assert int(told["concurrency"] * 100) / 100 == plan.max_concurrency, name
