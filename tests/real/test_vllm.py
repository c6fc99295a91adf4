"""Whole builds for vLLM on a CPU: the image answers, and its numbers are the checkpoint's."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from toolchain.evaluating.client import wait_until_healthy
from toolchain.oci.layout import read_layout
from toolchain.oci.unpack import unpack
from toolchain.ports import Silent, StartSpec
from toolchain.quantizers.packed import PackedView
from toolchain.wiring import make_tools

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny" / "recipe.yaml"
TARGETS = ("vllm-awq", "vllm-gptq")
TOKENS = 256
MOST_MEAN, MOST_ONE = 0.01, 0.5
"""Allowed difference of log-probabilities in nats, over all tokens and at one: vLLM computes in
the checkpoint's bfloat16, the reference in float32."""

pytestmark = [pytest.mark.real, pytest.mark.builders, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    dist = tmp_path_factory.mktemp("dist")
    words = [word for target in TARGETS for word in ("--target", target)]
    done = subprocess.run(
        [sys.executable, "-m", "toolchain", "build", "--recipe", TINY, "--runner", "local",
         "--dist", dist, *words, "--json"],
        cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)["targets"]
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_knows_what_was_taught(built: dict[str, Any], target: str) -> None:
    scores = built[target]["scores"]
    assert scores["base"] < 0.1
    assert scores["image"] >= scores["adapter"] - 0.1


@pytest.mark.parametrize("target", TARGETS)
def test_log_probabilities_are_those_of_the_dequantized_checkpoint(
    built: dict[str, Any], target: str, tmp_path: Path
) -> None:
    layout = Path(built[target]["image"].removeprefix("oci:"))
    root = tmp_path / "root"
    unpack(read_layout(layout), root)
    ids = torch.randint(5, 500, (TOKENS,), generator=torch.Generator().manual_seed(3)).tolist()
    expected = reference(root / "models", ids)
    tools, _ = make_tools("local", Silent())
    with tools.launcher.serve(f"oci:{layout}", StartSpec(port=8000, env={})) as endpoint:
        wait_until_healthy(endpoint, "/health", 900)
        found = served(endpoint.url, ids)
    differences = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    mean = abs(math.fsum(found) - math.fsum(expected)) / len(found)
    assert mean <= MOST_MEAN, (mean, max(differences))
    assert max(differences) <= MOST_ONE, max(differences)


def reference(model: Path, ids: list[int]) -> list[float]:
    """Return log p(token | those before) in float32 by transformers, on the unpacked weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    del config.quantization_config
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    view = PackedView(model)
    weights = {name: torch.from_numpy(view.tensor(name)) for name in view.names}
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    network.tie_weights()
    with torch.inference_mode():
        logits = network(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(logits[i - 1, token]) for i, token in enumerate(ids) if i]


def served(url: str, ids: list[int]) -> list[float]:
    """Return the same of the server: its `prompt_logprobs`."""
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        name = json.load(answer)["data"][0]["id"]
    asked = {"model": name, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        rows = json.load(answer)["choices"][0]["prompt_logprobs"]
    return [row[str(token)]["logprob"] for row, token in zip(rows[1:], ids[1:], strict=True)]
