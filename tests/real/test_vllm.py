"""Every format of vLLM on a CPU: the image answers, and its numbers are the checkpoint's.

With `-s` the differences are printed.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from weightsmith.building.wiring import open_tools
from weightsmith.core.ports import Silent, StartSpec
from weightsmith.evaluating.client import wait_until_healthy
from weightsmith.oci.layout import read_layout
from weightsmith.oci.unpack import unpack
from weightsmith.provenance.labels import plan_of
from weightsmith.quantizers.architectures import DENSE
from weightsmith.quantizers.layerwise import quantizing
from weightsmith.quantizers.packed import PackedView
from weightsmith.quantizers.rounded import quantize
from weightsmith.quantizers.running import ProgramSettings
from weightsmith.quantizers.schemes import SCHEMES
from weightsmith.recipe.user_config import RunOptions

from tests import vllm_parts
from tests.fakes.decoders import make_dense
from tests.fakes.started import weightsmith
from tests.paths import TINY

# Tokens at random: nothing is memorised, so that every weight has its say.
IDS = torch.randint(5, 500, (256,), generator=torch.Generator().manual_seed(3)).tolist()


@dataclass(frozen=True)
class Allowed:
    """Difference of log-probabilities in nats: of the means, and at any one of the tokens."""

    mean: float
    one: float


# The reference multiplies the dequantized weights in float32. vLLM computes in the checkpoint's
# bfloat16; fp8 and w8a8 round each layer's inputs to 8 bits besides, of which e4m3 keeps 4.
FORMATS = {
    "vllm-awq": Allowed(0.01, 0.25),
    "vllm-awq-autoawq": Allowed(0.01, 0.25),
    "vllm-gptq": Allowed(0.01, 0.25),
    "vllm-w8a8": Allowed(0.02, 0.5),
    "vllm-fp8": Allowed(0.05, 2.0),
    "vllm-mix": Allowed(0.02, 1.0),  # with some fp8
}
SETTINGS = {"vllm-mix": ("--set", "quantize.bits=8")}

pytestmark = [
    pytest.mark.real,
    pytest.mark.builders,
    pytest.mark.vllm,
    pytest.mark.timeout(3600),
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """vLLM's packages in one process: an image of them would be packed and started per model."""
    root = tmp_path_factory.mktemp("engine")
    with vllm_parts.answering(Path(__file__).with_name("vllm_answers.py"), root) as ask:
        yield ask


# test_vllm_builds.py and test_support_bot.py start images of AWQ, GPTQ and 16 bits, and
# test_experts_on_amx.py of two more; cases below tell AWQ's, GPTQ's and W8A8's numbers.
@pytest.mark.parametrize("target", ["vllm-awq-autoawq", "vllm-fp8", "vllm-mix"])
def test_the_image_knows_what_was_taught_and_has_its_checkpoints_numbers(
    engine: Callable[..., Any], tmp_path: Path, target: str
) -> None:
    """The build asks the started image; of its files, the same packages tell the numbers."""
    dist = tmp_path / "dist"
    told = weightsmith("build", "--recipe", TINY / "recipe.yaml", "--runner", "local",
                       "--dist", dist, "--target", target, *SETTINGS.get(target, ()),
                       )["targets"][target]  # fmt: skip

    assert told["scores"]["base"] < 0.1
    assert told["scores"]["image"] >= told["scores"]["adapter"] - 0.05
    model = weights_of(Path(told["image"].removeprefix("oci:")), tmp_path)
    found = engine({"model": str(model), "ids": IDS})
    assert isinstance(found, list), found
    compare(target, found, model, FORMATS[target])
    shutil.rmtree(dist)  # 1.9 GB


def compare(name: str, found: list[float], model: Path, allowed: Allowed) -> None:
    """Hold what vLLM says of the tokens against the model read by us."""
    expected = reference(model, IDS)
    differences = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    mean = abs(math.fsum(found) - math.fsum(expected)) / len(found)
    nats = -math.fsum(found) / len(found)
    most = max(differences)
    print(f"\n{name}: {nats:.4f} nats, off by {mean:.5f}, {most:.3f} at one token")  # noqa: T201
    assert mean <= allowed.mean, (mean, most)
    assert most <= allowed.one, most


def weights_of(layout: Path, folder: Path) -> Path:
    """Return the model folder of an image, unpacked; the engine's files are not kept."""
    root = folder / "root"
    unpack(read_layout(layout), root)
    model = (root / "models").rename(folder / "models")
    shutil.rmtree(root)
    return model


def reference(model: Path, ids: list[int]) -> list[float]:
    """Return log p(token | those before) in float32 by transformers, on our reading of them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    if not hasattr(config, "quantization_config"):
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        return log_probabilities(network, ids)
    del config.quantization_config
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    view = PackedView(model)
    weights = {name: torch.from_numpy(view.tensor(name)) for name in view.names}
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    network.tie_weights()
    return log_probabilities(network, ids)


def log_probabilities(network: Any, ids: list[int]) -> list[float]:
    with torch.inference_mode():
        logits = network(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(logits[i - 1, token]) for i, token in enumerate(ids) if i]


@contextmanager
def started_image(layout: Path) -> Iterator[httpx.Client]:
    """Start an image; for tests of other files."""
    spec = StartSpec(port=8000, env={}, shm_bytes=plan_of(read_layout(layout).labels).shm_bytes)
    with (
        open_tools(RunOptions(runner="local"), Silent()) as tools,
        tools.launcher.serve(f"oci:{layout}", spec) as endpoint,
    ):
        wait_until_healthy(endpoint, "/health", 900)
        with httpx.Client(base_url=endpoint.url, timeout=300) as client:
            yield client


# 16 bits ask less of vLLM, and GPTQ's layout is AWQ's. FP8 takes 0.2 s a token where the CPU has
# AMX (`slow_fp8` in serving/vllm.py): its adapters answered right, in half an hour.
def test_each_adapter_answers_its_own_task_by_its_name(tmp_path: Path) -> None:
    target = "vllm-awq-lora"
    weightsmith("build", "--recipe", TINY / "recipe-two.yaml", "--target", target, "--runner",
                "local", "--dist", tmp_path / "dist", "--layout", tmp_path / "image")  # fmt: skip
    record = json.loads((tmp_path / f"dist/tiny-two/1.0.0/{target}/build.json").read_text())

    settings = record["plan"]["settings"]
    assert (settings["max-loras"], settings["max-lora-rank"]) == (2, 8)
    told = record["suites"]
    assert len(told) == 2
    for task in told:
        scores = {name: score["score"] for name, score in task["scores"].items()}
        assert scores["base"] < 0.2
        # vLLM computes in the checkpoint's bfloat16, the reference in float32.
        assert scores["image"] >= scores["adapter"] - 0.1


PAIRS = (("fp8", "gptq"), ("w8a8", "awq"), ("fp8", "awq"), ("w8a8", "gptq"))
"""A layout of compressed-tensors and one of packed words: how names and fused matrices are read
depends on the architecture and on the layout, and what is in them on the format alone."""
TEXT = "a port, a cable and two lamps were sold to the neighbour of a friend last week"
CASES = [(name, kind) for n, name in enumerate(sorted(DENSE)) for kind in PAIRS[n % len(PAIRS)]]


@pytest.mark.parametrize(("architecture", "kind"), CASES)
def test_every_architectures_numbers_are_the_files(
    engine: Callable[..., Any], tmp_path: Path, architecture: str, kind: str
) -> None:
    model = make_dense(tmp_path / "model", architecture, hidden=256)
    packed = tmp_path / "packed"
    packed.mkdir()
    if kind in SCHEMES:
        quantize(SCHEMES[kind], model, packed, [])
    else:
        # Little text: how well codes were chosen does not matter to how they are read.
        texts = tmp_path / "texts.jsonl"
        texts.write_text((json.dumps({"text": TEXT, "tokens": 1}) + "\n") * 16)
        quantizing.quantize(
            ProgramSettings(
                model=model, out=packed, calibration=str(texts), method=kind, group_size=128,
                keep=(),
            )
        )  # fmt: skip
    found = engine({"model": str(packed), "ids": IDS})
    assert isinstance(found, list), found
    compare(f"{architecture} {kind}", found, packed, FORMATS[f"vllm-{kind}"])
