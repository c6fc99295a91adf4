"""Loads checkpoints with vLLM's own models and loaders; run with vLLM's packages, not with ours.

Reads one JSON object per line: `made`, a packed checkpoint's folder, and `plain`, the folder of the
16-bit one. Writes one per line: `errors`, the relative error of each packed parameter; `moved`,
those in 16 bits that differ; `left`, those of which the packed checkpoint leaves some bytes as they
were; or `error`. Nothing is computed: the kernels, which a CPU lacks, are replaced by nothing.
"""

import functools
import importlib
import json
import os
import pkgutil
import sys
import tempfile
from pathlib import Path
from unittest.mock import MagicMock

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")
os.environ.update(VLLM_CPU_KVCACHE_SPACE="1")

import torch
import vllm.model_executor.models.registry as registry
from safetensors.torch import load_file
from vllm.config import set_current_vllm_config
from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
UNSTORED = (
    *(f"attn.{part}_{kind}" for part in "qkv" for kind in ("scale", "zero_point")),
    "attn.prob_scale", "w13_input_global_scale", "w2_input_global_scale",
)  # fmt: skip
"""Parameters with defaults, which no checkpoint here has."""
PLACES = ("layers.quantization.compressed_tensors", "layers.fused_moe.oracle")


def without_kernels():
    """Have vLLM choose no kernels: where tensors are stored does not depend on them."""
    importlib.import_module("vllm.model_executor.layers.quantization.modelopt")
    for place in PLACES:
        package = importlib.import_module(f"vllm.model_executor.{place}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            try:
                importlib.import_module(module.name)
            except ImportError:
                continue  # of another platform
    for module in [one for name, one in sys.modules.items() if name.startswith("vllm.")]:
        for name in dir(module):
            if name.startswith("select_") and name.endswith("_moe_backend"):
                setattr(module, name, chooser(sys.modules[getattr(module, name).__module__]))
            elif name == "mxfp4_round_up_hidden_size_and_intermediate_size":
                setattr(module, name, lambda _, *sizes, **__: sizes)
            elif name.startswith("init_") and name.endswith("_linear_kernel"):
                setattr(module, name, MagicMock())
            elif name == "choose_mp_linear_kernel":
                setattr(module, name, lambda *_, **__: MagicMock(__name__="none"))
    registry._run_in_subprocess = lambda make: make()


def chooser(module):
    """A function that chooses Marlin where there is one: its weights are as in the checkpoint."""
    kinds = [one for name, one in vars(module).items() if name.endswith("Backend")]
    kind = next((one for one in kinds if hasattr(one, "MARLIN")), kinds[0])
    chosen = getattr(kind, "MARLIN", next(iter(kind)))
    return lambda *_, **__: (chosen, MagicMock())


def loaded(folder, fill):
    """The parameters after loading, which had only these bytes before."""
    args = EngineArgs(model=folder, dtype="bfloat16", enforce_eager=True, max_model_len=64)
    config = args.create_engine_config()
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        if not torch.distributed.is_initialized():
            store = f"file://{tempfile.mkdtemp()}/store"
            init_distributed_environment(1, 0, store, 0, "gloo")
            initialize_model_parallel(1, 1, backend="gloo")
        model = initialize_model(vllm_config=config)
        for parameter in model.parameters():
            in_bytes(parameter.data).fill_(fill)
        files = sorted(Path(folder).glob("*.safetensors"))
        model.load_weights((n, t) for file in files for n, t in load_file(file).items())
    return {n: p.data for n, p in model.named_parameters() if not n.endswith(UNSTORED)}


def in_bytes(tensor):
    return tensor.view(-1).view(torch.uint8)


def same(one, other):
    return torch.equal(in_bytes(one), in_bytes(other))


def complete(folder):
    """The parameters, and the names of those that loading leaves in part as they were."""
    first, second = loaded(folder, 0x3C), loaded(folder, 0x3B)
    return first, [name for name in first if not same(first[name], second[name])]


def integers(words, columns):
    """The signed integers of rows of words, whose bits follow each other without gaps."""
    bits = words.shape[-1] * 32 // columns
    each = (words[..., None] >> torch.arange(32, dtype=torch.int32)) & 1
    each = each.flatten(-2)[..., : columns * bits].unflatten(-1, (columns, bits))
    return (each << torch.arange(bits, dtype=torch.int32)).sum(-1).float() - 2 ** (bits - 1)


def dequantized(found, name, right):
    """A parameter's values from its codes and scales; `right` has its shape in 16 bits."""
    codes = found.get(f"{name}_packed", found.get(name))
    scale = found[f"{name}_scale"]
    if codes.dtype == torch.uint8:
        values = torch.stack([VALUES[(codes & 15).long()], VALUES[(codes >> 4).long()]], -1)
        values = values.flatten(-2)
    elif codes.dtype == torch.int32:
        values = integers(codes, right.shape[-1])
        if (zeros := found.get(f"{name}_zero_point")) is not None:
            zeros = integers(zeros.transpose(-1, -2), right.shape[-2]).transpose(-1, -2)
            values -= zeros.repeat_interleave(right.shape[-1] // zeros.shape[-1], -1)
    else:
        values = codes.float()
    scale = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    if (shared := found.get(f"{name}_global_scale")) is not None:
        experts = scale.dim() == 3
        scale = scale / (shared.reshape(len(shared), -1)[:, :1, None] if experts else shared[0])
    if (second := found.get(f"{name}_scale_2")) is not None:
        scale = scale * of_matrices(second, values)
    if scale.dim() < values.dim():
        scale = of_matrices(scale, values)
    for axis in (-1, -2):
        width, groups = values.shape[axis], scale.shape[axis]
        if groups not in (1, width):
            times = width // groups if width % groups == 0 else 128
            scale = scale.repeat_interleave(times, axis).narrow(axis, 0, width)
    return values * scale


def of_matrices(scale, values):
    """The scale of a matrix, or of each expert's; the parts of what is fused have the same."""
    scale = scale.amax() if values.dim() == 2 else scale.reshape(len(scale), -1).amax(-1)
    return scale.reshape(-1, *[1] * (values.dim() - 1))


@functools.lru_cache(maxsize=1)
def unpacked(folder):
    """The same of a 16-bit checkpoint, which one format after another is held against."""
    return complete(folder)


def about(asked):
    plain, left = unpacked(asked["plain"])
    if left:
        return {"error": f"the 16-bit checkpoint leaves {left[:4]}"}
    made, left = complete(asked["made"])
    errors, moved = {}, []
    for name, whole in plain.items():
        kept = made.get(name)
        if kept is not None and (kept.dtype, kept.shape) == (whole.dtype, whole.shape):
            moved += [] if same(kept, whole) else [name]
            continue
        wrong = dequantized(made, name, whole) - whole.float()
        errors[name] = float(wrong.norm() / whole.float().norm())
    return {"errors": errors, "moved": moved, "left": left}


def main():
    without_kernels()
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            told = about(asked)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is the answer
            told = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write("TOLD " + json.dumps(told) + "\n")
        sys.stdout.flush()


main()
