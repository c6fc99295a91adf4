"""SGLang: 16-bit, AWQ, GPTQ and FP8 checkpoints on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

from weightsmith.core.errors import InputRefused, UsageError
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
    checked_name,
)
from weightsmith.serving.machine import Machine
from weightsmith.serving.memory import GIB
from weightsmith.serving.options import NO_TLS, OptionList, load_options
from weightsmith.serving.paged_capacity import Rules, Switches
from weightsmith.serving.paged_plan import plan_paged
from weightsmith.serving.parsers import parsers_of
from weightsmith.serving.plan import ServingPlan
from weightsmith.serving.speculation import Speculation

GPU_IMAGE = "docker.io/lmsysorg/sglang:v0.5.23"
"""Upstream's image, CUDA 13 only since 0.5.19; images/bases.lock has its digest."""

CONFIG_FILE = "/etc/weightsmith/sglang.yaml"

_PORT = 30000
_OPTIONS = Path(__file__).with_name("sglang_options.json")
_IN_FILE = frozenset({"value", "flag"})
"""What its file can say (srt/utils/server_args_config_parser.py); the rest are arguments."""

_NOT_HERE: Mapping[str, str] = {
    "model-path": "the image's own model is served",
    "model": "the image's own model is served",
    "tokenizer-path": "the image's own tokenizer is used",
    "served-model-name": "set the recipe's name, or serve.served_model_name",
    "context-length": "set serve.max_model_len",
    "max-running-requests": "set serve.max_num_seqs",
    "chunked-prefill-size": "set serve.max_num_batched_tokens",
    "max-total-tokens": "the plan works out the tokens",
    "mem-fraction-static": "set serve.gpu_memory_utilization",
    "kv-cache-dtype": "set serve.kv_cache_dtype",
    "dtype": "set serve.dtype",
    "tp-size": "set serve.tensor_parallel_size",
    "tensor-parallel-size": "set serve.tensor_parallel_size",
    "pp-size": "set serve.pipeline_parallel_size",
    "pipeline-parallel-size": "set serve.pipeline_parallel_size",
    "dp-size": "run more replicas: each has its own memory plan",
    "quantization": "SGLang reads it from the checkpoint",
    "config": "there is one file, this one",
    "host": "publish the port where you want it",
    "port": "publish port 30000 as the port you want",
    "api-key": "a key does not belong in an image: give --api-key where it runs",
    "admin-api-key": "a key does not belong in an image",
    "ssl-keyfile-password": "a password does not belong in an image: give it where it runs",
    "ssl-keyfile": NO_TLS,
    "ssl-certfile": NO_TLS,
    "trust-remote-code": "an image runs no code of a checkpoint",
    "download-dir": "an image downloads nothing",
    "enable-lora": "no target serves adapters with SGLang; choose vllm-lora",
    "disable-cuda-graph": "set serve.extra.cuda-graph-backend-decode=disabled, and -prefill",
    "enable-dp-attention": "set serve.extra.attn-dp-size",
    "monokernel-backend": "set serve.extra.enable-amd-monokernel=true",
    "lora-paths": "no target serves adapters with SGLang; choose vllm-lora",
}


def _batched_tokens(machine: Machine) -> int:
    """Return a chunk of prompts that fits: SGLang's own grows with the memory in the same way."""
    if machine.bytes_each < 35 * GIB:
        return 2048
    return 4096 if machine.bytes_each < 90 * GIB else 8192


RULES = Rules(
    name="sglang",
    block=1,
    cpu_block=1,
    keeps_windows_small=False,
    null_block=True,  # slot 0 takes the padding's writes
    fraction=0.9,
    fraction_of="static",
    data_parallel="serve.extra.attn-dp-size",
    small_target="sglang-awq",
    state_dtype="float32",
    batched_tokens=_batched_tokens,
    most_requests=lambda _machine: 256,
    cache_dtypes={"bf16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1},
)


@cache
def known_options() -> OptionList:
    """Return the options of the pinned version."""
    return load_options(_OPTIONS, _NOT_HERE)


def plan(model: ModelFacts, weight_bytes: int, options: ServeOptions) -> ServingPlan:
    """Return the plan of a checkpoint of `weight_bytes` by SGLang's static fraction.

    Raises InputRefused for numbers in config.json that are wrong, and UsageError for options that
    do not fit.
    """
    extra = known_options().checked(options.extra)
    if options.format.kind == "awq" and not options.dtype:
        options = replace(options, dtype="float16")  # its AWQ kernels are written for it
    planned, capacity = plan_paged(model, weight_bytes, options, RULES, Switches())
    card = capacity.machine.gpu
    if card and not any(card.compute_capability):
        raise UsageError(
            f"the SGLang image here is for NVIDIA GPUs, not {card.name}",
            hint="choose an NVIDIA GPU, or name a ROCm image with image.base and gpu_memory",
        )
    check_blocks(model, options.format, planned.tensor_parallel_size, options.group_size)
    if options.format.packed and model.architecture.startswith("Llama4For"):
        # srt/models/mllama4.py permute_qk_weight_for_rotary
        raise InputRefused(
            f"SGLang cannot load {options.format.name} weights of {model.architecture}: it reorders"
            " the rows of Q and K without their scales",
            hint="choose target vllm-fp8, or 16 bits (target sglang)",
        )
    settings: dict[str, JsonValue] = {
        "dtype": capacity.dtype,
        "context-length": planned.max_model_len,
        "max-running-requests": planned.max_num_seqs,
        "chunked-prefill-size": planned.max_num_batched_tokens,
        "mem-fraction-static": planned.gpu_memory_utilization,
        "tp-size": planned.tensor_parallel_size,
    }
    if planned.pipeline_parallel_size > 1:
        settings["pp-size"] = planned.pipeline_parallel_size
    if any(part.kind in {"sliding", "chunked"} for part in capacity.shape.cache):
        # Else windows share the memory by a ratio of its own, which is not planned here.
        settings["disable-hybrid-swa-memory"] = True
    if cache := options.kv_cache_dtype:
        settings["kv-cache-dtype"] = {"fp8": "fp8_e4m3", "bfloat16": "bf16"}.get(cache, cache)
    if options.speculation:
        settings |= _speculative(options.speculation)
    parsers = parsers_of(model, "sglang", known_options(), options)
    settings |= {"tool-call-parser": parsers.tools} if parsers.tools else {}
    settings |= {"reasoning-parser": parsers.thoughts} if parsers.thoughts else {}
    notes = (*planned.notes, *parsers.notes)
    return replace(planned, settings={**settings, **extra}, notes=notes)


_ALGORITHMS = {"draft": "STANDALONE", "eagle3": "EAGLE3", "mtp": "NEXTN", "ngram": "NGRAM"}
"""Method -> SGLang's own name (0.5.23, srt/speculative/spec_info.py)."""


def _speculative(wanted: Speculation) -> dict[str, JsonValue]:
    """Return SGLang's options: a chain of drafted tokens, behind which the model adds one."""
    found: dict[str, JsonValue] = {"speculative-algorithm": _ALGORITHMS[wanted.method]}
    if wanted.method == "ngram":
        return {**found, "speculative-num-draft-tokens": wanted.tokens}
    return {
        **found,
        **({"speculative-draft-model-path": wanted.path} if wanted.path else {}),
        "speculative-num-steps": wanted.tokens,
        "speculative-eagle-topk": 1,
        "speculative-num-draft-tokens": wanted.tokens + 1,
    }


def file_settings(plan: ServingPlan, model: ServedModel) -> Mapping[str, JsonValue]:
    """Return everything that sglang.yaml says: single values, and flags that are on.

    Raises UsageError for a name that an argument parser would take for an option.
    """
    served = checked_name(model)
    kinds = known_options().kinds
    return {
        "model-path": model.path,
        "served-model-name": served,
        "host": "0.0.0.0",  # noqa: S104  # its default is this container alone
        "port": _PORT,
        "enable-metrics": True,
        **{key: value for key, value in plan.settings.items() if kinds[key] in _IN_FILE},
    }


def command(plan: ServingPlan, model: ServedModel) -> tuple[str, ...]:
    """Return the arguments: the file in two words, and what a file cannot say."""
    del model
    argv = ["--config", CONFIG_FILE]
    for key, value in plan.settings.items():
        kind = known_options().kinds[key]
        if kind == "switch":
            argv.append(f"--{key}" if value else f"--no-{key}")
        elif kind == "list":
            argv += [f"--{key}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return tuple(argv)


def env(plan: ServingPlan, model: ServedModel) -> Mapping[str, str]:
    """Return the environment: offline, writing below /tmp only."""
    del plan, model
    return {
        **OFFLINE,
        "TRITON_CACHE_DIR": "/tmp/triton",  # noqa: S108
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/inductor",  # noqa: S108
    }


# Paths are below sglang/srt/layers/quantization/.
_SUPPORT: Mapping[str, Support] = {
    "awq": Support(capability=(7, 5), source="awq/awq.py get_min_capability"),
    "gptq": Support(capability=(6, 0), source="gptq/gptq.py get_min_capability"),
    "fp8": Support(
        capability=(8, 0),
        source="compressed_tensors/schemes/compressed_tensors_w8a16_fp8.py get_min_capability",
    ),
    "fp8-block": Support(
        capability=(8, 9),
        source="compressed_tensors/schemes/compressed_tensors_w8a8_fp8.py get_min_capability",
    ),
    **{
        name: Support(
            capability=(8, 0),
            source="compressed_tensors/schemes/compressed_tensors_w4a16_nvfp4.py"
            " get_min_capability",
        )
        for name in ("nvfp4a16", "nvfp4a16-4o6")
    },
    "nvfp4": Support(
        capability=(10, 0),
        source="compressed_tensors/schemes/compressed_tensors_w4a4_nvfp4.py get_min_capability",
    ),
}

ENGINE = Engine(
    name="sglang",
    title="SGLang",
    accepts=frozenset({"safetensors", "awq", "gptq", "fp8", "nvfp4"}),
    base=EngineBase(cpu="", gpu=GPU_IMAGE),
    port=_PORT,
    drains=True,
    health_path="/health",
    load_metrics=("sglang:num_running_reqs", "sglang:num_queue_reqs"),
    plan=plan,
    env=env,
    python="python3",
    entrypoint=("python3", "-m", "sglang.launch_server"),
    command=command,
    file_settings=file_settings,
    neutral_settings=frozenset(
        {"max-running-requests", "context-length", "mem-fraction-static", "chunked-prefill-size"}
    ),
    # /health generates a token, and waits up to 20 seconds for it.
    probe_seconds=25,
    has_parsers=True,
    speculates=frozenset(_ALGORITHMS),
    draft_length="sglang:spec_accept_length",  # srt/observability/metrics_collector.py
    image_files={CONFIG_FILE: "sglang.yaml"},
    support=_SUPPORT,
    support_versions={"gpu": "0.5.23"},
)
