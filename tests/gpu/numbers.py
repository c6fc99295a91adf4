"""What needs torch, as a program for a builder's Python: it prints one JSON value.

python -m tests.gpu.numbers forward             answers by the GPU beside the CPU's
python -m tests.gpu.numbers machine             torch's version and GPU
python -m tests.gpu.numbers reference MODEL [ADAPTER]   log-probabilities of IDS
python -m tests.gpu.numbers model FOLDER TOKENIZER      a model of 1.17 billion weights
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from weightsmith.forward.greedy import Answers, Questions, greedy
from weightsmith.forward.lockstep import Lockstep
from weightsmith.forward.products import DeviceCopier, on_gpu
from weightsmith.forward.views import view
from weightsmith.quantizers.packed import PackedView

IDS = random.Random(3).choices(range(5, 500), k=256)
"""Tokens at random: nothing is memorised, so that every weight has its say."""
PROMPTS = [[1, *range(40, 99), extra] for extra in range(100, 133)]


def make_models(folder: Path) -> tuple[Path, Path]:
    """Write a small Llama with random weights, and an adapter for all of its linear layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=2048, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = LlamaForCausalLM(config)
        for parameter in network.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.1)
        network.bfloat16().save_pretrained(folder / "base")
        tuned = get_peft_model(network.float(), LoraConfig(r=4, target_modules="all-linear"))
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.04)
        tuned.save_pretrained(folder / "lora")
    return folder / "base", folder / "lora"


def answers(
    root: Path, lora: Path, products: DeviceCopier | None
) -> tuple[dict[str, Answers], float]:
    """Return the answers of base and adapter, and the seconds that they took."""
    lockstep = Lockstep(products=products)
    given = (("base", []), ("adapter", [(lora, 1.0)]))
    views = {name: view(root, adapters, lockstep, 0) for name, adapters in given}
    asked = Questions(prompts=PROMPTS, ends=[2], most=32)
    started = time.perf_counter()
    found = lockstep.run(
        {n: lambda m=m: greedy(m, asked, lambda _: None) for n, m in views.items()}
    )
    return found, time.perf_counter() - started


def tie(mine: list[int], other: list[int], margins: list[float]) -> float:
    """Return by how much the CPU preferred its token where the answers part; 0 if they do not."""
    return next((m for a, b, m in zip(mine, other, margins, strict=False) if a != b), 0.0)


def forward() -> dict[str, Any]:
    """Return how many answers are the CPU's, and the largest margin at which another was chosen."""
    with tempfile.TemporaryDirectory() as folder:
        base, lora = make_models(Path(folder))
        cpu, cpu_seconds = answers(base, lora, None)
        answers(base, lora, on_gpu())  # the first call loads CUDA's kernels
        gpu, gpu_seconds = answers(base, lora, on_gpu())
    ties = [
        tie(mine, other, margins)
        for name in cpu
        for mine, other, margins in zip(
            cpu[name].tokens, gpu[name].tokens, cpu[name].margins, strict=True
        )
    ]
    return {
        "answers": len(ties), "equal": ties.count(0.0), "largest_margin": max(ties),
        "cpu_seconds": round(cpu_seconds, 2), "gpu_seconds": round(gpu_seconds, 2),
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """Return torch's version and its GPU."""
    there = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "gpu": torch.cuda.get_device_name() if there else "",
        "gpu_bytes": torch.cuda.get_device_properties(0).total_memory if there else 0,
    }


def reference(model: Path, adapter: Path | None = None) -> dict[str, Any]:
    """Return IDS and log p(token | those before) in float32 by transformers.

    Packed weights are read by us.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        packed = PackedView(model)
        weights = {name: torch.from_numpy(packed.tensor(name)) for name in packed.names}
        missing, unexpected = network.load_state_dict(weights, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise SystemExit(f"{model}: not the model's tensors: {unexpected}, {missing}")
        network.tie_weights()
    else:
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        network = PeftModel.from_pretrained(network, adapter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.inference_mode():
        logits = network.eval().to(device)(torch.tensor([IDS], device=device)).logits[0]
    found = logits.float().log_softmax(-1).cpu()
    return {"ids": IDS, "said": [float(found[i - 1, token]) for i, token in enumerate(IDS) if i]}


def model(folder: Path, tokenizer: Path) -> str:
    """Write base, adapter and questions of the benchmarks' model of 1.17 billion weights."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from large_build import CASES, make_inputs

    make_inputs(folder, CASES["1b"], 16, tokenizer)
    return str(folder)


COMMANDS = {"forward": forward, "machine": machine, "reference": reference, "model": model}

if __name__ == "__main__":
    print(json.dumps(COMMANDS[sys.argv[1]](*map(Path, sys.argv[2:]))))  # type: ignore[operator] # noqa: T201
