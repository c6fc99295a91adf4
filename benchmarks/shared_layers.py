"""Many fine-tunes of one base in a registry and on a node: bytes, and seconds to assemble.

Run from a checkout, with docker-registry and a container engine:
`python benchmarks/shared_layers.py [--adapters 20] [--targets q_proj,v_proj] [--layers 32]`.
The base has the shapes of Llama 3.1 8B with every width a quarter (0.5 billion weights, 1 GB), so
its kinds of matrices have the same shares. Every adapter changes other numbers of the same
matrices. Sent is what the registry wrote while a new image was pulled.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from bake_acts import WORK
from bake_servers import registry
from pull_update import quiet, sent

HIDDEN, INNER, KEYS, VOCABULARY = 1024, 3584, 256, 32064
RANK = 16
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
    "intermediate_size": INNER, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": VOCABULARY, "torch_dtype": "bfloat16",
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip


def main() -> None:
    """Measure, print a Markdown table, clean up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=20)
    parser.add_argument("--targets", default="q_proj,v_proj")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--max-layer-size", default="auto")
    options = parser.parse_args()
    targets = tuple(options.targets.split(","))
    CONFIG["num_hidden_layers"] = options.layers
    changed = options.layers * sum(np.prod(s) for n, s in SHAPES.items() if n.endswith(targets))
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    pulled: list[str] = []
    try:
        whole = make_base(WORK / "base")
        print(f"{', '.join(targets)}: {2 * changed / whole:.4f} of {whole / 1e6:.0f} MB change")
        with registry() as (host, pids):
            stored, seconds = [], []
            for number in range(options.adapters):
                tag = f"{host}/bench/many:{number}"
                seconds.append(publish(number, targets, tag, options.max_layer_size))
                stored.append(size_of(WORK / "registry"))
            each = (stored[-1] - stored[0]) / (options.adapters - 1)
            print("| | MB | of the weights |\n|---|---|---|")
            print(f"| registry, first image | {stored[0] / 1e6:.1f} | {stored[0] / whole:.4f} |")
            print(f"| registry, each further one | {each / 1e6:.1f} | {each / whole:.4f} |")
            print(f"| registry, all | {stored[-1] / 1e6:.1f} | {stored[-1] / whole:.4f} |")
            for number in range(min(3, options.adapters)):
                before, began = sent(pids), time.perf_counter()
                quiet(["docker", "pull", f"{host}/bench/many:{number}"])
                pulled.append(f"{host}/bench/many:{number}")
                wall, moved = time.perf_counter() - began, sent(pids) - before
                said = f"| node, image {number + 1}, {wall:.1f} s |"
                print(f"{said} {moved / 1e6:.1f} | {moved / whole:.4f} |", flush=True)
            later = statistics.median(seconds[1:])
            print(f"bake and push: {seconds[0]:.1f} s for the first, {later:.1f} for others")
    finally:
        for image in pulled:
            quiet(["docker", "rmi", image])
        shutil.rmtree(WORK)


def make_base(folder: Path) -> int:
    """Write the base; return the bytes of its weights."""
    from weightsmith.models.safetensors import build_header

    tables = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (VOCABULARY, HIDDEN))
    shapes: dict[str, tuple[int, ...]] = {**tables, "model.norm.weight": (HIDDEN,)}
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{name}.weight": shape for name, shape in SHAPES.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{norm}.weight"] = (HIDDEN,)
    names, draw = sorted(shapes), np.random.default_rng(0)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(build_header([(n, "BF16", shapes[n]) for n in names], {"format": "pt"}))
        for name in names:  # exponents around a fiftieth, any sign and mantissa
            bits = draw.integers(0, 1 << 16, int(np.prod(shapes[name])), np.uint16)
            file.write((bits & 0x81FF | 0x3C00).tobytes())
        return file.tell()


def make_adapter(folder: Path, seed: int, targets: tuple[str, ...]) -> None:
    """Write an adapter of rank 16 that changes some kinds of matrices."""
    from safetensors.numpy import save_file

    draw, found = np.random.default_rng(seed + 1), {}
    for layer in range(CONFIG["num_hidden_layers"]):
        for name, (rows, columns) in SHAPES.items():
            if name.endswith(targets):
                stem = f"base_model.model.model.layers.{layer}.{name}.lora_"
                found[f"{stem}A.weight"] = draw.normal(0, 0.1, (RANK, columns)).astype(np.float32)
                found[f"{stem}B.weight"] = draw.normal(0, 0.1, (rows, RANK)).astype(np.float32)
    folder.mkdir()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK,
        "target_modules": list(targets), "bias": "none",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(found, folder / "adapter_model.safetensors")


def publish(number: int, targets: tuple[str, ...], tag: str, largest: str) -> float:
    """Merge an adapter, bake and push the image; return the seconds of the latter two."""
    from weightsmith.merging.engine import MergeRequest, merge

    adapter, out = WORK / f"adapter-{number}", WORK / f"merged-{number}"
    make_adapter(adapter, number, targets)
    merge(MergeRequest(base=WORK / "base", adapters=((adapter, 1.0),), out=out))
    words = [
        *(sys.executable, "-m", "weightsmith", "bake", "--model", str(out), "--target", "vllm"),
        *("--kind", "volume", "--max-layer-size", largest, "--push", tag),
    ]
    began = time.perf_counter()
    quiet(words)
    shutil.rmtree(out)
    return time.perf_counter() - began


def size_of(folder: Path) -> int:
    """Return the bytes of a registry's blobs."""
    return sum(path.stat().st_size for path in folder.rglob("data") if path.is_file())


if __name__ == "__main__":
    main()
