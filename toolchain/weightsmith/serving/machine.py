"""The machine that a plan is for: one kind of GPU, how many, and how a model is split on them."""

from __future__ import annotations

from dataclasses import dataclass

from weightsmith.core.errors import UsageError
from weightsmith.models.shape import ModelShape
from weightsmith.serving.devices import CPU, Gpu, named_gpu
from weightsmith.serving.engine import ServeOptions
from weightsmith.serving.memory import host_memory

_LOW_PRECISION = ("Gemma2For", "Gemma3For", "Glm4For")
"""Beginnings of models whose activations overflow float16, which vLLM refuses for them (0.33,
config/model.py)."""

_DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Memory of one device and how many there are; `gpus` is 0 for a CPU."""

    device: str
    gpu: Gpu | None
    gpus: int
    bytes_each: int
    """What a process sees as the total of one device."""
    tensor_parallel: int = 1
    pipeline_parallel: int = 1


def machine_for(options: ServeOptions, shape: ModelShape) -> Machine:
    """Return the machine to plan for; UsageError for a split that the model does not allow."""
    named = named_gpu(options.gpu)
    if not named and not options.gpu_memory_bytes:
        if options.tensor_parallel_size > 1 or options.pipeline_parallel_size > 1:
            raise UsageError(
                "tensor_parallel_size and pipeline_parallel_size split a model over GPUs, and none"
                " is named",
                hint="set serve.gpu, or serve.gpu_memory",
            )
        total = options.host_memory_bytes or host_memory()
        return Machine(device=options.gpu or CPU, gpu=None, gpus=0, bytes_each=total)
    tensor, pipeline = _split(options, shape)
    return Machine(
        device=named.name if named else "gpu",
        gpu=named,
        gpus=tensor * pipeline,
        bytes_each=options.gpu_memory_bytes or (named.usable_bytes if named else 0),
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
    )


def _split(options: ServeOptions, shape: ModelShape) -> tuple[int, int]:
    """Return (tensor, pipeline) parallel sizes: the user's, else as many shards as heads allow."""
    tensor, pipeline = options.tensor_parallel_size, options.pipeline_parallel_size
    count = options.gpu_count
    if tensor or pipeline:
        if not tensor:
            tensor = count // pipeline if count % pipeline == 0 else 1
        elif not pipeline:
            pipeline = max(1, count // tensor)
        if count not in {1, tensor * pipeline}:
            raise UsageError(
                f"tensor_parallel_size {tensor} x pipeline_parallel_size {pipeline} is"
                f" {tensor * pipeline} GPUs, gpu_count is {count}",
                hint=f"set serve.gpu_count={tensor * pipeline}, or leave the sizes out",
            )
    else:
        tensor = max(n for n in range(1, count + 1) if count % n == 0 and can_split(shape, n))
        pipeline = count // tensor
    if not can_split(shape, tensor):
        possible = [n for n in range(1, 65) if can_split(shape, n)]
        raise UsageError(
            f"tensor_parallel_size {tensor} does not divide the model's {shape.heads} attention"
            f" heads ({shape.kv_heads} key-value heads)",
            hint=f"possible: {', '.join(map(str, possible))}; or split by layers with"
            " serve.pipeline_parallel_size",
        )
    if pipeline > shape.layers:
        raise UsageError(
            f"pipeline_parallel_size {pipeline} is more than the model's {shape.layers} layers",
            hint=f"nearest: {shape.layers}",
        )
    return tensor, pipeline


def can_split(shape: ModelShape, shards: int) -> bool:
    """Say whether a model's heads can be divided among so many GPUs.

    Key-value heads are divided, or each is held by several GPUs (vLLM 0.33, config/model.py).
    """
    even = shape.kv_heads % shards == 0 or shards % shape.kv_heads == 0
    return shape.heads % shards == 0 and (even or shape.latent_cache)


def choose_dtype(shape: ModelShape, machine: Machine, wanted: str) -> tuple[str, str]:
    """Return (dtype, note): the type that activations are computed in, and why where it changed.

    float32 checkpoints are served in bfloat16, as vLLM does. GPUs before compute capability 8.0
    lack bfloat16. Raises UsageError for a type that the GPU or the model does not allow.
    """
    bf16 = machine.gpu is None or machine.gpu.bf16
    own = shape.dtype if shape.dtype in {"bfloat16", "float16"} else "bfloat16"
    chosen = wanted or own
    note = ""
    if chosen == "bfloat16" and not bf16:
        if wanted == "bfloat16":
            raise UsageError(
                f"{machine.device} has no bfloat16 (it came with compute capability 8.0)",
                hint="set serve.dtype=float16, or choose an L4 or later",
            )
        chosen, note = "float16", f"{machine.device} has no bfloat16: float16 is used"
    if chosen == "float16" and shape.architecture.startswith(_LOW_PRECISION):
        raise UsageError(
            f"{shape.architecture} overflows in float16"
            + ("" if bf16 else f", and {machine.device} has no bfloat16"),
            hint="set serve.dtype=bfloat16" if bf16 else "choose an L4, an A10G or later",
        )
    return chosen, note


def dtype_bytes(dtype: str) -> int:
    """Return the bytes of a number of that type."""
    return _DTYPES[dtype]
