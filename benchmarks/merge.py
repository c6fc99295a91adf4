"""Merging compared with PEFT, mergekit, axolotl and `cp`: CPU and wall seconds, peak memory.

    python benchmarks/merge.py [--case gigabyte|small|deep|wide|large|layer70b|tuner]
        [--rounds 3] [--only NAME,…] [--peers] [--work benchmarks/work]
    python benchmarks/merge.py --case whole70b

Every tool runs in its own process, and all run alternately, so that a change in the machine's load
affects all of them. Checkpoints have Llama's shapes in bfloat16, with an adapter of rank 64 on all
linear layers: `gigabyte` has 0.97 GB, `small` 1.85, `deep` 4.67; `large` has three layers of a 70B
model and 6.2 GB, `wide` two, `layer70b` one; `tuner` is `small` with a LoHa adapter, which PEFT's
own layers merge. `whole70b` plans the merge of all 80 layers on a sparse file and prints the
predicted memory.

With `--peers` mergekit and axolotl's wheel are installed beside the inputs, not into the project's
environment. Of axolotl only the module that merges shard by shard is used, with a standard logger,
since the package itself needs CUDA. Variables for BLAS and OpenMP are removed, so that every tool
runs with its defaults; ours has the one that its jobs get. Our modules are compiled first, as pip
does when it installs a package.

`reading and writing alone` does with each byte what a merge must do that prints digests and
checks what it wrote, and computes nothing. Its system time is also what a virtual machine's host
takes to provide memory for the new files, which varies.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RANK = 64
OURS = """
import os, sys
from pathlib import Path
os.environ["OPENBLAS_NUM_THREADS"] = "1"
from weightsmith.merging.engine import MergeRequest, merge
base, adapter, out = sys.argv[1:4]
merge(MergeRequest(base=Path(base), adapters=((Path(adapter), 1.0),), out=Path(out)))
"""
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:4]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""
MERGEKIT = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
base, adapter, out = sys.argv[1:4]
config = {"models": [{"model": f"{base}+{adapter}"}], "merge_method": "passthrough",
          "dtype": "bfloat16"}
run_merge(MergeConfiguration.model_validate(config), out,
          MergeOptions(lora_merge_cache=out + "-cache"))
"""
AXOLOTL = """
import importlib.util, logging, sys, types
from pathlib import Path
for name in ("axolotl", "axolotl.utils", "axolotl.utils.logging"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["axolotl.utils.logging"].get_logger = logging.getLogger
(path,) = [p for p in (Path(p, "axolotl/cli/utils/lora_merge.py") for p in sys.path) if p.exists()]
spec = importlib.util.spec_from_file_location("lora_merge", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.merge_lora_sharded_efficient(*sys.argv[1:4])
"""
FLOOR = """
import hashlib, os, sys
from pathlib import Path
from weightsmith.merging.libc import reserve
base, _, out = sys.argv[1:4]
os.mkdir(out)
data = memoryview(bytearray(1 << 18))
for source in sorted(Path(base).glob("*.safetensors")):
    digest, written = hashlib.sha256(), Path(out, source.name)
    with source.open("rb", 0) as file, written.open("wb", 0) as made:
        reserve(made.fileno(), source.stat().st_size)
        while count := file.readinto(data):
            digest.update(data[:count])
            made.write(data[:count])
        os.fsync(made.fileno())
    with written.open("rb", 0) as file:
        while file.readinto(data):
            pass
"""
PEERS = {"mergekit": ["mergekit==0.1.5", "immutables"], "axolotl": ["axolotl==0.19.0"]}
TUNED = ("OPENBLAS_", "OMP_", "MKL_", "MALLOC_")
PLAN = """
import json, sys, time
from pathlib import Path
from weightsmith.merging.plan import estimate, make_plan
started = time.monotonic()
plan = make_plan(Path(sys.argv[1]), [(Path(sys.argv[2]), 1.0)])
print(json.dumps(estimate(plan, 2) | {"seconds": time.monotonic() - started,
                                      "tensors": len(plan.outputs)}))
"""


@dataclass(frozen=True)
class Shape:
    """A model with Llama's architecture."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one decoder layer."""
        keys = self.hidden // self.heads * self.key_heads
        return {
            "mlp.down_proj": (self.hidden, self.inner),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
        }

    def tensors(self) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
        """Yield the tensors of each file."""
        yield [("model.embed_tokens.weight", (self.vocabulary, self.hidden))]
        for number in range(self.layers):
            name = f"model.layers.{number}"
            yield [
                (f"{name}.input_layernorm.weight", (self.hidden,)),
                *((f"{name}.{part}.weight", size) for part, size in self.linears.items()),
                (f"{name}.post_attention_layernorm.weight", (self.hidden,)),
            ]
        yield [
            ("lm_head.weight", (self.vocabulary, self.hidden)),
            ("model.norm.weight", (self.hidden,)),
        ]


SMALL = Shape(2048, 5632, 18, 32, 4, 32000)
GIGABYTE = replace(SMALL, layers=8)
DEEP = replace(SMALL, layers=50)
LARGE = Shape(8192, 28672, 3, 64, 8, 32000)
WIDE = Shape(8192, 28672, 2, 64, 8, 32000)
LAYER = Shape(8192, 28672, 1, 64, 8, 1000)
WHOLE = Shape(8192, 28672, 80, 64, 8, 128256)
CASES = {
    "gigabyte": GIGABYTE, "small": SMALL, "deep": DEEP, "tuner": SMALL, "large": LARGE,
    "wide": WIDE, "layer70b": LAYER, "whole70b": WHOLE,
}  # fmt: skip


def make_base(folder: Path, shape: Shape, *, sparse: bool = False) -> None:
    """Write a base: one random block repeated, or only holes."""
    import ml_dtypes
    import numpy as np
    from weightsmith.models.safetensors import build_header

    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    block = (random.standard_normal(1 << 22, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    data = block.tobytes()
    places, total = {}, 0
    parts = list(shape.tensors())
    for number, tensors in enumerate(parts, 1):
        path = folder / f"model-{number:05}-of-{len(parts):05}.safetensors"
        size = sum(2 * int(np.prod(dimensions)) for _, dimensions in tensors)
        with path.open("wb") as file:
            header = build_header([(n, "BF16", s) for n, s in tensors], {"format": "pt"})
            file.write(header)
            if sparse:
                file.truncate(len(header) + size)
            for start in [] if sparse else range(0, size, len(data)):
                file.write(data[: min(len(data), size - start)])
        places |= {name: path.name for name, _ in tensors}
        total += size
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def make_adapter(
    folder: Path, shape: Shape, kind: str, *, sparse: bool = False, seed: int = 1
) -> None:
    """Write an adapter for all linear layers, about one hundredth of the weights in size."""
    import numpy as np
    from weightsmith.models.safetensors import build_header

    folder.mkdir(parents=True)
    tensors = []
    for number in range(shape.layers):
        for part, (rows, columns) in shape.linears.items():
            name = f"base_model.model.model.layers.{number}.{part}"
            sides = {"lora_A.weight": (RANK, columns), "lora_B.weight": (rows, RANK)}
            if kind == "LOHA":
                sides = {f"hada_w{i}_a": (rows, 16) for i in (1, 2)}
                sides |= {f"hada_w{i}_b": (16, columns) for i in (1, 2)}
            tensors += [(f"{name}.{side}", "F32", size) for side, size in sides.items()]
    random = np.random.default_rng(seed)
    with (folder / "adapter_model.safetensors").open("wb") as file:
        header = build_header(tensors, {"format": "pt"})
        file.write(header)
        if sparse:
            file.truncate(len(header) + sum(4 * a * b for _, _, (a, b) in tensors))
        for _, _, size in [] if sparse else tensors:
            file.write((random.standard_normal(size, np.float32) * 0.01).tobytes())
    config: dict[str, Any] = {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "r": RANK if kind == "LORA" else 16,
        "target_modules": sorted({part.rpartition(".")[2] for part in shape.linears}),
    }
    config |= {"lora_alpha": 32} if kind == "LORA" else {"alpha": 16}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def make_inputs(work: Path, case: str) -> tuple[Path, Path]:
    """Make base and adapter of a case once; return their folders."""
    shape = CASES[case]
    kind = "LOHA" if case == "tuner" else "LORA"
    base = work / ("base-small" if case == "tuner" else f"base-{case}")
    adapter = work / f"adapter-{case}"
    if not (base / "config.json").exists():
        make_base(base, shape, sparse=case == "whole70b")
    if not (adapter / "adapter_config.json").exists():
        make_adapter(adapter, shape, kind, sparse=case == "whole70b")
    return base, adapter


@cache
def kernels() -> dict[str, str]:
    """Compile our kernels if needed, and return the variable that a builder's jobs find them by."""
    from weightsmith.building.progress import progress_for
    from weightsmith.building.wiring import cache_folder
    from weightsmith.outside.toolset import make_toolset, tools_variable

    return {tools_variable("kernels"): str(make_toolset(cache_folder(), "kernels", progress_for()))}


def run(argv: list[str], path: Path | None = None) -> dict[str, float]:
    """Run a process; return CPU and wall seconds, peak resident MiB and bytes read from disks."""
    paths = os.pathsep.join(str(p) for p in (path, ROOT) if p)
    told = {name: value for name, value in os.environ.items() if not name.startswith(TUNED)}
    environment = told | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", **kernels()}
    started = time.monotonic()
    quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
    pid = os.posix_spawnp(argv[0], argv, environment, file_actions=quiet)
    _, status, usage = os.wait4(pid, 0)
    if status:
        sys.exit(f"{argv[0]} failed with status {status}; run it by hand to see why: {argv[2:]}")
    return {
        "user": usage.ru_utime,
        "system": usage.ru_stime,
        "cpu": usage.ru_utime + usage.ru_stime,
        "wall": time.monotonic() - started,
        "rss": usage.ru_maxrss / 1024,
        "read": 512 * usage.ru_inblock,
    }


def ways(options: argparse.Namespace, base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    """Return each tool's command and its additional PYTHONPATH."""
    python, folders = [sys.executable, "-W", "ignore", "-c"], [str(base), str(adapter), str(out)]
    found: dict[str, Any] = {
        "weightsmith": ([*python, OURS, *folders], None),
        "PEFT merge_and_unload": ([*python, PEFT, *folders], None),
    }
    if options.case != "tuner" and options.peers:
        found["mergekit"] = ([*python, MERGEKIT, *folders], peer(options.work, "mergekit"))
        path = peer(options.work, "axolotl")
        found["axolotl by shards"] = ([*python, AXOLOTL, *folders], path)
    found["reading and writing alone"] = ([*python, FLOOR, *folders], None)
    found["cp"] = (["cp", "-r", str(base), str(out)], None)
    copied = 'cp -r "$0" "$1" && sync "$1"/*'
    found["cp and fsync"] = (["sh", "-c", copied, str(base), str(out)], None)
    chosen = options.only.split(",") if options.only else list(found)
    return {name: way for name, way in found.items() if name in chosen}


def peer(work: Path, name: str) -> Path:
    """Install a tool's own code into a folder, once; it uses the project's dependencies."""
    folder = work.resolve() / name
    if not folder.exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*install, "--target", str(folder), *PEERS[name]], check=True)
    return folder


def show(options: argparse.Namespace, base: Path, found: dict[str, list[dict[str, float]]]) -> None:
    """Print the table."""
    size = sum(path.stat().st_size for path in base.iterdir())
    loads = " ".join(f"{load:.1f}" for load in os.getloadavg())
    print(f"{options.case}: base {size / 1e9:.2f} GB, {os.cpu_count()} CPUs, load {loads}, ")
    print(f"median of {options.rounds} interleaved rounds.\n")
    print("| way | CPU s | user | system | CPU s per GB | wall s | peak RSS MiB |")
    print("|---|---|---|---|---|---|---|")
    keys = ("cpu", "user", "system", "wall", "rss")
    for name, runs in found.items():
        cpu, user, system, wall, rss = (statistics.median(r[key] for r in runs) for key in keys)
        shown = f"{cpu:.1f} | {user:.1f} | {system:.1f} | {cpu / size * 1e9:.1f} | {wall:.1f}"
        print(f"| {name} | {shown} | {rss:.0f} |")


def main() -> None:
    """Make the inputs, run all tools alternately, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="small", choices=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "work")
    parser.add_argument("--only", default="", help="comma-separated ways to run")
    parser.add_argument("--peers", action="store_true", help="install and run mergekit and axolotl")
    parser.add_argument("--make", action="store_true", help="make the inputs, run nothing")
    options = parser.parse_args()
    # In its own process: a child's peak memory starts at its parent's.
    if not options.make:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        again = [sys.executable, __file__, *sys.argv[1:], "--make"]
        subprocess.run(again, check=True, env=environment)
    base, adapter = (path.resolve() for path in make_inputs(options.work, options.case))
    if options.make:
        return
    if options.case == "whole70b":
        argv = [sys.executable, "-c", PLAN, str(base), str(adapter)]
        subprocess.run(argv, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        return
    compileall.compile_dir(ROOT / "toolchain" / "weightsmith", quiet=1)
    out = options.work / "out"
    chosen = ways(options, base, adapter, out)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    for _ in range(options.rounds):
        for name, (argv, path) in chosen.items():
            for folder in (out, options.work / "out-cache"):
                shutil.rmtree(folder, ignore_errors=True)
            found[name].append(run(argv, path))
            # Saved at once, so that an aborted run keeps its results.
            kept = options.work / f"results-{options.case}.json"
            kept.write_text(json.dumps(found, indent=2))
    for folder in (out, options.work / "out-cache"):
        shutil.rmtree(folder, ignore_errors=True)
    show(options, base, found)


if __name__ == "__main__":
    main()
