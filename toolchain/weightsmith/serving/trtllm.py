"""TensorRT-LLM's own server, with its PyTorch backend: 16 bits, or ModelOpt's 8 or 4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

from weightsmith.core.errors import UsageError
from weightsmith.core.values import JsonValue
from weightsmith.models.facts import ModelFacts
from weightsmith.serving.compatibility import check_blocks
from weightsmith.serving.engine import (
    OFFLINE,
    Engine,
    EngineBase,
    ServedModel,
    ServeOptions,
    Support,
)
from weightsmith.serving.options import OptionList, load_options
from weightsmith.serving.paged_capacity import Rules, Switches
from weightsmith.serving.paged_plan import plan_paged
from weightsmith.serving.plan import ServingPlan

GPU_IMAGE = "nvcr.io/nvidia/tensorrt-llm/release:1.2.1"
"""Upstream's release image; images/bases.lock has its digest."""

CONFIG_FILE = "/etc/weightsmith/trtllm.yaml"

_PORT = 8000
_OPTIONS = Path(__file__).with_name("trtllm_options.json")
_ARGUMENTS: Mapping[str, str] = {
    "max_seq_len": "max_seq_len",
    "max_batch_size": "max_batch_size",
    "max_num_tokens": "max_num_tokens",
    "tensor_parallel_size": "tp_size",
    "pipeline_parallel_size": "pp_size",
}
"""Settings that are arguments -> their names there; everything else is in the file."""

_NOT_HERE: Mapping[str, str] = {
    "model": "the image's own model is served",
    "tokenizer": "the image's own tokenizer is used",
    "max_seq_len": "set serve.max_model_len",
    "max_batch_size": "set serve.max_num_seqs",
    "max_num_tokens": "set serve.max_num_batched_tokens",
    "tensor_parallel_size": "set serve.tensor_parallel_size",
    "pipeline_parallel_size": "set serve.pipeline_parallel_size",
    "dtype": "set serve.dtype",
    "kv_cache_config": "set serve.gpu_memory_utilization and serve.kv_cache_dtype",
    "build_config": "set serve.max_model_len and serve.max_num_seqs: it would hide them",
    "backend": "the plan is for the PyTorch backend",
    "trust_remote_code": "an image runs no code of a checkpoint",
    "quant_config": "TensorRT-LLM reads it from the checkpoint",
}


RULES = Rules(
    name="trtllm",
    block=32,
    cpu_block=32,
    keeps_windows_small=False,
    null_block=False,
    fraction=0.9,
    fraction_of="free",
    capabilities=((8, 0), (99, 0)),
    data_parallel="serve.extra.enable_attention_dp",
    state_dtype="float32",
    batched_tokens=lambda _machine: 8192,
    most_requests=lambda _machine: 256,
    cache_dtypes={"fp8": 1},
)


@cache
def known_options() -> OptionList:
    """Return the keys of the options file, as recorded with the server's source."""
    return load_options(_OPTIONS, _NOT_HERE, underscores=True)


def plan(model: ModelFacts, weight_bytes: int, options: ServeOptions) -> ServingPlan:
    """Return the plan of a checkpoint of `weight_bytes` by the fraction of free memory.

    Raises InputRefused for numbers in config.json that are wrong, and UsageError for a GPU of
    another maker or before compute capability 8.0, a served name, and options that do not fit.
    """
    extra = known_options().checked(options.extra)
    if options.served_model_name not in {"", ENGINE.fixed_name}:
        raise UsageError(
            "trtllm-serve calls a model by its folder, and has no option for another name",
            hint=f"leave serve.served_model_name out: clients ask for `{ENGINE.fixed_name}`",
        )
    planned, capacity = plan_paged(model, weight_bytes, options, RULES, Switches())
    card = capacity.machine.gpu
    if card and not RULES.knows(card):
        raise UsageError(
            f"TensorRT-LLM does not run on {card.name}",
            hint="choose an NVIDIA GPU from the A100, A10G or L4 on, or a vllm target",
        )
    check_blocks(model, options.format, planned.tensor_parallel_size, options.group_size)
    cache: dict[str, JsonValue] = {"free_gpu_memory_fraction": planned.gpu_memory_utilization}
    if options.kv_cache_dtype:
        cache["dtype"] = options.kv_cache_dtype
    settings: dict[str, JsonValue] = {
        "max_seq_len": planned.max_model_len,
        "max_batch_size": planned.max_num_seqs,
        "max_num_tokens": planned.max_num_batched_tokens,
        "tensor_parallel_size": planned.tensor_parallel_size,
        "pipeline_parallel_size": planned.pipeline_parallel_size,
        "dtype": capacity.dtype,
        "kv_cache_config": cache,
        "enable_chunked_prefill": True,
    }
    return replace(planned, settings={**settings, **extra})


def file_settings(plan: ServingPlan, model: ServedModel) -> Mapping[str, JsonValue]:
    """Return what trtllm.yaml says: nothing that an argument says, because the file would win."""
    del model
    return {key: value for key, value in plan.settings.items() if key not in _ARGUMENTS}


def command(plan: ServingPlan, model: ServedModel) -> tuple[str, ...]:
    """Return the arguments; the host is explicit because the default is this container alone."""
    argv = [model.path, "--host", "0.0.0.0", "--port", str(_PORT)]  # noqa: S104
    for key, argument in _ARGUMENTS.items():
        if key in plan.settings:
            argv += [f"--{argument}", str(plan.settings[key])]
    return (*argv, "--extra_llm_api_options", CONFIG_FILE)


def env(plan: ServingPlan, model: ServedModel) -> Mapping[str, str]:
    """Return the environment: offline, silent about usage, writing below /tmp only."""
    del plan, model
    return {
        **OFFLINE,
        "TRTLLM_NO_USAGE_STATS": "1",
        "TRITON_CACHE_DIR": "/tmp/triton",  # noqa: S108
    }


_SUPPORT: Mapping[str, Support] = {
    "modelopt-fp8": Support(
        capability=(8, 9),
        source="_torch/modules/linear.py FP8QDQLinearMethod: cublas_scaled_mm of float8_e4m3fn",
    ),
    "modelopt-awq": Support(
        capability=(8, 0),
        before=(12, 0),
        source="_torch/modules/linear.py W4A16_AWQ_LinearMethod: finegrained_mixed_dtype_gemm, "
        "FinegrainedMixedDtypeGemm.MAX_SUPPORTED_SM_VERSION",
    ),
    "modelopt-nvfp4": Support(
        capability=(10, 0), source="_torch/modules/linear.py NVFP4LinearMethod: nvfp4_gemm"
    ),
}

ENGINE = Engine(
    name="trtllm",
    title="TensorRT-LLM",
    accepts=frozenset({"safetensors", "modelopt-awq", "modelopt-fp8", "modelopt-nvfp4"}),
    base=EngineBase(cpu="", gpu=GPU_IMAGE),
    port=_PORT,
    health_path="/health",
    plan=plan,
    env=env,
    entrypoint=("trtllm-serve",),
    command=command,
    file_settings=file_settings,
    neutral_settings=frozenset({"max_batch_size", "max_seq_len", "kv_cache_config"}),
    image_files={CONFIG_FILE: "trtllm.yaml"},
    fixed_name="models",
    support=_SUPPORT,
    support_versions={"gpu": "1.2.1"},
)
