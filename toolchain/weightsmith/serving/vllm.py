"""vLLM: 16-bit, AWQ, GPTQ and FP8 checkpoints on GPUs and CPUs, with an OpenAI-compatible API.

Compiled code stays out of images: it is made for one GPU, at the first start on it. Manifests have
a volume for it, commented out, because the server runs what it finds there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.values import PACKED, Format, JsonValue
from weightsmith.models.facts import ModelFacts, Packing
from weightsmith.serving.compatibility import check_blocks
from weightsmith.serving.devices import AMX, CPU, GPUS, is_cpu
from weightsmith.serving.engine import (
    OFFLINE,
    Engine,
    EngineBase,
    ExpertKernel,
    ServedModel,
    ServeOptions,
    Support,
    checked_name,
)
from weightsmith.serving.machine import Machine
from weightsmith.serving.memory import GIB
from weightsmith.serving.options import NO_TLS, OptionList, load_options
from weightsmith.serving.paged_capacity import PagedCapacity, Rules, Switches
from weightsmith.serving.paged_plan import plan_paged
from weightsmith.serving.parsers import parsers_of
from weightsmith.serving.plan import DRAIN_SECONDS, ServingPlan
from weightsmith.serving.pooling import (
    lacks_vllm,
    notes_of,
    require_no_cache_type,
    vllm_settings,
)
from weightsmith.serving.speculation import Speculation

_SOFTMAX = frozenset({
    "DeepseekV2ForCausalLM", "GraniteMoeForCausalLM", "GraniteMoeHybridForCausalLM",
    "GraniteMoeSharedForCausalLM", "MixtralForCausalLM", "OlmoeForCausalLM", "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM", "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration",
})  # fmt: skip
"""Models that choose experts by a softmax, without a bias: RoutingMethodType.Default and
RenormalizeNaive (layers/fused_moe/config.py, get_routing_method_type)."""
_GROUPED = frozenset({
    "DeepseekV3ForCausalLM", "ExaoneMoeForCausalLM", "Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM",
})  # fmt: skip
"""By a sigmoid with a bias, in groups: RoutingMethodType.DeepSeekV3."""

# Of other hidden sizes, check_moe_marlin_supports_config leaves AWQ and GPTQ to MoeWNA16Config,
# whose weights the kernel does not take (oracle/int_wna16.py, _process_weights_cpu). Group sizes
# divide all rows anyway.
INT4 = ExpertKernel(name="CPUExpertsInt4", architectures=_SOFTMAX, hidden=128)
INT8 = ExpertKernel(name="CPUExpertsInt8", architectures=_SOFTMAX, hidden=32, width=32)
# Whole blocks: validate_fp8_block_shape_moe. Hidden sizes: convert_weight_packed.
FP8_BLOCK = ExpertKernel(
    name="CPUExpertsFp8", architectures=_SOFTMAX | _GROUPED, hidden=32, width=128
)

_BFLOAT16 = frozenset({"fp8-block", "w8a8"})
"""Formats whose kernels end the server at its first float16 token: `scalar path not implemented` in
csrc/cpu/sgl-kernels/gemm_int8.cpp, moe_int8.cpp and gemm_fp8.cpp."""


_BFLOAT16_ON_GPUS = frozenset({"mxfp4", "mxfp8"})
"""Kinds whose kernel for GPUs before Blackwell, Marlin, multiplies no float16: generate_kernels.py
in csrc/quantization/marlin has exponents as scales with bfloat16 only. Another kernel, Humming,
multiplies mxfp4a8; which types it takes is not known here."""
_BLACKWELL = (10, 0)


def without_float16(
    format_: Format, device: str, own: str, options: ServeOptions
) -> tuple[ServeOptions, tuple[str, ...]]:
    """Return options that serve a format in bfloat16 where its kernels have no float16, and why.

    That is for every CPU, because one that an image for any CPU starts on may have AMX, and for
    every GPU. `own` is the checkpoint's type. Raises UsageError if the options want float16 on a
    device that has no kernel for it.
    """
    on_cpu, card = is_cpu(device), GPUS.get(device)
    if format_.name not in _BFLOAT16 if on_cpu else format_.kind not in _BFLOAT16_ON_GPUS:
        return options, ()
    marlin = card and (0, 0) < card.compute_capability < _BLACKWELL  # (0, 0): AMD's
    marlin = marlin and format_.name != "mxfp4a8"
    if options.dtype == "float16" and (device == AMX or marlin):
        raise UsageError(
            f"{format_.name} weights: vLLM has no kernel for float16 on {device}",
            hint="set serve.dtype=bfloat16, or leave it out",
        )
    if options.dtype or own != "float16":
        return options, ()
    where = "on CPUs with AMX" if on_cpu else "on GPUs before Blackwell"
    note = f"{format_.name} weights are served in bfloat16: {where}, vLLM has no float16"
    return replace(options, dtype="bfloat16"), (note,)


def slow_fp8(format_: Format, device: str) -> tuple[str, ...]:
    """Return a note if a CPU's server multiplies a format's FP8 weights one by one, else ().

    With a scale per row, vLLM 0.32 leaves them to torch._scaled_mm (kernels/linear/scaled_mm), but
    for CPUs with AMX-FP8. On others with AMX, torch 2.13 takes oneDNN's matmul, which has only its
    reference there (`ref:any` in ONEDNN_VERBOSE): 57 ns a weight and token, a hundred times what
    torch takes to multiply in float32, as it does on CPUs without AMX.
    """
    if not is_cpu(device) or format_.kind not in {"fp8", "mix"} or format_.name == "fp8-block":
        return ()
    said = (
        "on CPUs with AMX vLLM multiplies fp8 weights one by one: about 60 ns for each weight and"
        " token, a minute a token for a billion weights; vllm-w8a8 has a fast kernel there, and"
        " for adapters vllm-awq-lora"
    )
    return (said,)


GPU_IMAGE = "docker.io/vllm/vllm-openai:v0.33.0"
"""Upstream's CUDA 13 build; images/bases.lock has its digest."""

ROCM_IMAGE = "docker.io/vllm/vllm-openai-rocm:v0.33.0"

_VERSIONS: Mapping[str, str] = {"gpu": "0.33.0", "cpu": "0.32.0"}

CONFIG_FILE = "/etc/weightsmith/vllm.yaml"

_PORT = 8000
_DRAIN = "shutdown-timeout"
"""Without it, requests that are running are aborted at SIGTERM."""
_OPTIONS = Path(__file__).with_name("vllm_options.json")
_CPU_REQUESTS = 16
_NO_CACHE = 1 << 26
"""Bytes that an encoder is told to take, and does not: it has no layer with a cache."""

# What a plan decides, or what a baked image must not do; option -> what to do instead.
_NOT_HERE: Mapping[str, str] = {
    "model": "the image's own model is served",
    "served-model-name": "set the recipe's name, or serve.served_model_name",
    "tokenizer": "the image's own tokenizer is used",
    "max-model-len": "set serve.max_model_len",
    "max-num-seqs": "set serve.max_num_seqs",
    "max-num-batched-tokens": "set serve.max_num_batched_tokens",
    "kv-cache-dtype": "set serve.kv_cache_dtype",
    "kv-cache-memory-bytes": "set serve.gpu_memory_utilization, or serve.memory on a CPU",
    "gpu-memory-utilization": "set serve.gpu_memory_utilization",
    "device-memory-utilization": "set serve.gpu_memory_utilization",
    "num-gpu-blocks-override": "the plan works out the blocks",
    "dtype": "set serve.dtype",
    "tensor-parallel-size": "set serve.tensor_parallel_size",
    "pipeline-parallel-size": "set serve.pipeline_parallel_size",
    "data-parallel-size": "run more replicas: each has its own memory plan",
    "quantization": "vLLM reads it from the checkpoint; a wrong name stops the start",
    "config": "there is one file, this one",
    "host": "publish the port where you want it",
    "port": "publish port 8000 as the port you want",
    "uds": "the image serves a port",
    "api-key": "a key does not belong in an image: set VLLM_API_KEY where it runs",
    "hf-token": "a token does not belong in an image",
    "ssl-keyfile": NO_TLS,
    "ssl-certfile": NO_TLS,
    "trust-remote-code": "an image runs no code of a checkpoint",
    "download-dir": "an image downloads nothing",
    "runner": "it follows from what the model gives: text, vectors or scores",
    "convert": "it follows from what the model gives: text, vectors or scores",
    "enable-lora": "choose the target vllm-lora",
    "lora-modules": "choose the target vllm-lora",
    "max-loras": "choose the target vllm-lora",
    "max-lora-rank": "choose the target vllm-lora",
}


def _batched_tokens(machine: Machine) -> int:
    """Return vLLM's default of max_num_batched_tokens (0.33, config/scheduler.py)."""
    if not machine.gpus or machine.bytes_each < 70 * GIB or "a100" in machine.device:
        return 2048
    return 16384 if machine.bytes_each >= 160 * GIB else 8192


def _most_requests(machine: Machine) -> int:
    """Return vLLM's default of max_num_seqs (0.33, engine/arg_utils.py); fewer on a CPU.

    A CPU computes so many at once that more would only wait, each with memory of its own.
    """
    if not machine.gpus:
        return _CPU_REQUESTS
    large = machine.bytes_each >= 70 * GIB and "a100" not in machine.device
    return 1024 if large else 256


RULES = Rules(
    name="vllm",
    block=16,
    cpu_block=32,
    keeps_windows_small=True,
    null_block=True,
    fraction=0.92,
    fraction_of="all",
    data_parallel="vllm serve with --data-parallel-size and --enable-expert-parallel",
    small_target="vllm-awq",
    batched_tokens=_batched_tokens,
    most_requests=_most_requests,
    cache_dtypes={"float16": 2, "bfloat16": 2}
    | dict.fromkeys(("fp8", "fp8_e4m3", "fp8_e5m2", "fp8_ds_mla"), 1),
    runs_on_cpu=True,
)


@cache
def known_options(*, cpu: bool = False) -> OptionList:
    """Return the options of the pinned version; the CPU build's may be an earlier one."""
    if not cpu:
        return load_options(_OPTIONS, _NOT_HERE)
    data = json.loads(_OPTIONS.read_text("utf-8"))
    known = load_options(_OPTIONS, _NOT_HERE, without=frozenset(data["not_on_cpu"]))
    later: dict[str, list[str]] = data["words_not_on_cpu"]
    words = {
        option: [word for word in words if word not in later.get(option, ())]
        for option, words in known.words.items()
    }
    return replace(known, version=_VERSIONS["cpu"], words=words)


def plan(model: ModelFacts, weight_bytes: int, options: ServeOptions) -> ServingPlan:
    """Return the plan of a checkpoint of `weight_bytes` by vLLM's own block rules.

    Raises InputRefused for numbers in config.json that are wrong, and UsageError for options that
    do not fit, with the nearest that do.
    """
    on_cpu = is_cpu(options.gpu or CPU) and not options.gpu_memory_bytes
    device = options.gpu or (CPU if on_cpu else "")
    options, own = without_float16(options.format, device, model.shape.dtype, options)
    known = known_options(cpu=on_cpu)
    extra = known.checked(options.extra)
    chosen = switches(extra)
    require_no_cache_type(model, options.kv_cache_dtype)
    if on_cpu and options.speculation and options.speculation.method == "ngram":
        raise InputRefused(
            "serve.speculative: vLLM's image for CPUs has no method ngram: it lacks numba, which"
            " vLLM searches with (0.32, v1/spec_decode/ngram_proposer.py)",
            hint="choose method draft, a GPU with serve.gpu, or a llamacpp target",
        )
    pools = model.task.kind != "generate"
    if pools:
        # A text is computed at once: engine/arg_utils.py turns chunks off but for a few decoders.
        chosen = replace(chosen, chunked_prefill=False)
    if on_cpu and model.shape.latent_cache:
        # Latent attention there takes a prompt as a whole (platforms/cpu.py).
        chosen = replace(chosen, chunked_prefill=False)
    if options.adapters:
        # vLLM has buffers for the largest rank and for A and B of all seven linear layers, whatever
        # an adapter has.
        shape = model.shape
        width = shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
        ends = 4 * shape.hidden + width + 3 * (shape.hidden + shape.intermediate)
        each = 2 * _lora_rank(options) * shape.layers * ends
        chosen = replace(chosen, adapter_bytes=len(options.adapters) * each)
    planned, capacity = plan_paged(model, weight_bytes, options, RULES, chosen)
    check_blocks(model, options.format, planned.tensor_parallel_size, options.group_size)
    notes = (*own, *slow_fp8(options.format, device), *planned.notes)
    notes = (*notes, *check_packing(model.packing, capacity.machine))
    settings = _settings(planned, capacity)
    if options.speculation:
        settings["speculative-config"] = _speculative(options.speculation)
    if pools:
        settings |= vllm_settings(model)
        notes = (*notes, *notes_of(model, normalizes=False))
        return replace(planned, notes=notes, settings={**settings, **extra})
    parsers = parsers_of(model, "vllm", known, options)
    tools = str(extra.get("tool-call-parser", parsers.tools))
    settings |= {"enable-auto-tool-choice": True, "tool-call-parser": tools} if tools else {}
    settings |= {"reasoning-parser": parsers.thoughts} if parsers.thoughts else {}
    notes = (*notes, *parsers.notes)
    if model.sees_images:
        notes = (*notes, *check_pictures(model.architecture, extra, on_cpu=not planned.gpus))
        # By default two of its processes keep 4 GiB of prepared pictures each.
        settings |= {} if planned.gpus else {"mm-processor-cache-gb": 0}
    return replace(planned, notes=notes, settings={**settings, **extra})


def switches(extra: Mapping[str, JsonValue]) -> Switches:
    """Return what these options change of the cache."""
    block = extra.get("block-size", 0)
    if isinstance(block, bool) or not isinstance(block, int) or block < 0 or block % 8:
        raise UsageError(
            f"serve.extra.block-size is {block!r}", hint="a multiple of 16, such as 16 or 32"
        )
    state = str(extra.get("mamba-ssm-cache-dtype", "auto"))
    if state not in {"auto", "float32", "float16", "bfloat16"}:
        raise UsageError(
            f"serve.extra.mamba-ssm-cache-dtype is {state!r}",
            hint="one of auto, float32, float16, bfloat16",
        )
    return Switches(
        block=block,
        prefix_caching=extra.get("enable-prefix-caching") is not False,
        hybrid=extra.get("disable-hybrid-kv-cache-manager") is not True,
        chunked_prefill=extra.get("enable-chunked-prefill") is not False,
        overlapping=extra.get("async-scheduling") is not False,
        graphs=extra.get("enforce-eager") is not True,
        state_dtype="" if state == "auto" else state,
    )


_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of max-lora-rank (0.33, config/lora.py)."""


def _lora_rank(options: ServeOptions) -> int:
    largest = max(adapter.rank for adapter in options.adapters)
    if largest > _RANKS[-1]:
        raise UsageError(
            f"an adapter of rank {largest}: vLLM serves up to {_RANKS[-1]}", hint="merge it"
        )
    return min(rank for rank in _RANKS if rank >= largest)


def _settings(planned: ServingPlan, capacity: PagedCapacity) -> dict[str, JsonValue]:
    """Return the keys of vLLM's file: dashed, none of them null, no `false` without a `--no-`."""
    settings: dict[str, JsonValue] = {
        "dtype": capacity.dtype,
        "max-model-len": planned.max_model_len,
        "max-num-seqs": planned.max_num_seqs,
        "max-num-batched-tokens": planned.max_num_batched_tokens,
        _DRAIN: DRAIN_SECONDS,
    }
    if capacity.options.kv_cache_dtype:
        settings["kv-cache-dtype"] = capacity.options.kv_cache_dtype
    if capacity.options.adapters:
        settings |= {
            "enable-lora": True,
            "max-loras": len(capacity.options.adapters),
            "max-lora-rank": _lora_rank(capacity.options),
        }
    if planned.gpus:
        settings["gpu-memory-utilization"] = planned.gpu_memory_utilization
        settings["tensor-parallel-size"] = planned.tensor_parallel_size
        if planned.pipeline_parallel_size > 1:
            settings["pipeline-parallel-size"] = planned.pipeline_parallel_size
        return settings
    if (
        capacity.shape.cache and not capacity.shape.latent_cache
    ):  # the CPU's kernel for latent attention has blocks of 16
        settings["block-size"] = capacity.cache.block
    # By default a CPU server takes 92 % of the host; one block is vLLM's own (the null block).
    cache = planned.kv_bytes_total + capacity.cache.bytes_per_block
    settings["kv-cache-memory-bytes"] = cache or _NO_CACHE
    # Compiling takes a C++ compiler, which an image has not, and minutes at every start.
    settings["enforce-eager"] = True
    return settings


def _speculative(wanted: Speculation) -> str:
    """Return vLLM's `--speculative-config`, as JSON (0.33, config/speculative.py)."""
    found: dict[str, JsonValue] = {
        "method": "draft_model" if wanted.method == "draft" else wanted.method,
        "num_speculative_tokens": wanted.tokens,
        **({"model": wanted.path} if wanted.path else {}),
    }
    if wanted.method == "ngram":  # tokens that must be found again
        found |= {"prompt_lookup_min": 2, "prompt_lookup_max": 4}
    return json.dumps(found, sort_keys=True)


def env(plan: ServingPlan, model: ServedModel) -> Mapping[str, str]:
    """Return the environment: offline, silent about usage, writing below /tmp only."""
    found = {
        **OFFLINE,
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CACHE_ROOT": "/tmp/vllm",  # noqa: S108
        "VLLM_CONFIG_ROOT": "/tmp/vllm/config",  # noqa: S108
        "TRITON_CACHE_DIR": "/tmp/triton",  # noqa: S108
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/inductor",  # noqa: S108
        "VLLM_ENGINE_READY_TIMEOUT_S": str(model.startup_seconds),
    }
    if not plan.gpus:
        # Else 4-bit weights meet activations rounded to 8 bits on CPUs with AMX.
        found["VLLM_CPU_INT4_W4A8"] = "0"
        # Some of its functions are compiled at their first call (0.32, v1/sample/ops/logprobs.py),
        # also with enforce-eager: without a C++ compiler a request for logprobs ends the server.
        found["TORCH_COMPILE_DISABLE"] = "1"
    return found


def command(plan: ServingPlan, model: ServedModel) -> tuple[str, ...]:
    """Return the arguments: two words, because vLLM does not read `--config=FILE`."""
    del plan, model
    return ("--config", CONFIG_FILE)


def file_settings(plan: ServingPlan, model: ServedModel) -> Mapping[str, JsonValue]:
    """Return everything that vllm.yaml says.

    What is off is said twice: `vllm serve` looks for `--no-KEY` among the options of the wrong
    parser and drops `KEY: false` (0.33, utils/argparse_utils.py); `no-KEY: true` it reads.

    Raises UsageError for a name that an argument parser would take for an option.
    """
    served = checked_name(model)
    adapters = model.adapters
    return {
        "model": model.path,
        # A single adapter has the model's name, so that clients ask for it.
        "served-model-name": f"{served}-base" if served in adapters else served,
        **({"lora-modules": [f"{n}={path}" for n, path in adapters.items()]} if adapters else {}),
        "host": "0.0.0.0",  # noqa: S104  # a container is reached through its published port
        "port": _PORT,
        "disable-access-log-for-endpoints": "/health,/metrics,/ping",
        **plan.settings,
        **{f"no-{key}": True for key, value in plan.settings.items() if value is False},
    }


# Paths are below vllm/model_executor/layers/quantization/ or vllm/model_executor/.
_4_BITS_ON_CPUS = "kernels/linear/mixed_precision/cpu.py CPUWNA16LinearKernel"
_SUPPORT: Mapping[str, Support] = {
    "awq": Support(
        capability=(7, 5),
        cpu=True,
        source=f"quantization/auto_awq.py get_min_capability; {_4_BITS_ON_CPUS}",
        cpu_experts="layers/fused_moe/experts/cpu_moe.py CPUExpertsInt4: only with AMX",
        amx_experts=INT4,
    ),
    "gptq": Support(
        capability=(6, 0),
        cpu=True,
        source=f"quantization/auto_gptq.py get_min_capability; {_4_BITS_ON_CPUS}",
        cpu_experts="layers/fused_moe/experts/cpu_moe.py CPUExpertsInt4: only with AMX",
        amx_experts=INT4,
    ),
    "awq-compressed": Support(
        capability=(7, 5),
        cpu=True,
        source=f"compressed_tensors_wNa16.py get_min_capability; {_4_BITS_ON_CPUS}",
    ),
    # From 8.9 on with FP8 arithmetic, below with FP8 weights alone.
    "fp8": Support(
        capability=(7, 5),
        cpu=True,
        source="compressed_tensors_w8a16_fp8.py get_min_capability; "
        "kernels/linear/scaled_mm/pytorch.py _supports_torch_fp8_scaled_mm",
        cpu_experts="layers/fused_moe/experts/cpu_moe.py CPUExpertsFp8: blocks only, with AMX",
    ),
    # Of 4-bit integers, and of fp8 as above.
    "mix": Support(
        capability=(7, 5),
        cpu=True,
        source=f"compressed_tensors_wNa16.py get_min_capability; {_4_BITS_ON_CPUS}; "
        "kernels/linear/scaled_mm/pytorch.py _supports_torch_fp8_scaled_mm",
        cpu_experts="layers/fused_moe/experts/cpu_moe.py: a layer's experts may have 4 bits or "
        "FP8, whose kernels need AMX, or blocks",
    ),
    "fp8-static": Support(
        capability=(7, 5),
        source="compressed_tensors_w8a16_fp8.py get_min_capability; its CPU build lacks "
        "the operator static_scaled_fp8_quant",
    ),
    # Below 8.9 with the weights alone in FP8.
    "fp8-block": Support(
        capability=(7, 5),
        amx=True,
        source="compressed_tensors_w8a16_fp8.py get_min_capability; its kernel for CPUs, "
        "kernels/linear/scaled_mm/cpu.py CPUFp8BlockScaledMMKernel, needs AMX",
        cpu_experts="layers/fused_moe/experts/cpu_moe.py CPUExpertsFp8: blocks only, with AMX",
        amx_experts=FP8_BLOCK,
    ),
    "nvfp4a16": Support(
        capability=(7, 5),
        amd=False,
        source="compressed_tensors_w4a4_nvfp4.py get_min_capability; "
        "kernels/linear/__init__.py init_nvfp4_linear_kernel a16_kernels",
    ),
    # Activations are rounded from 10.0 on, else the weights alone are used.
    "nvfp4": Support(
        capability=(7, 5),
        amd=False,
        source="compressed_tensors_w4a4_nvfp4.py get_min_capability; "
        "kernels/linear/__init__.py init_nvfp4_linear_kernel",
    ),
    # On Blackwell activations are rounded, too.
    "mxfp4a16": Support(
        capability=(8, 0),
        source="compressed_tensors_w4a4_mxfp4.py get_min_capability; "
        "kernels/linear/__init__.py _POSSIBLE_MXFP4_KERNELS",
    ),
    # Humming multiplies FP8 by MXFP4 where there is FP8 arithmetic; where it is missing, vLLM falls
    # back to what it does with mxfp4a16.
    "mxfp4a8": Support(
        capability=(8, 9),
        amd=False,
        source="compressed_tensors_w4a8_mxfp4.py; kernels/linear/mxfp4/humming.py "
        "_supports_quant_scheme",
    ),
    # Its emulation on AMD's GPUs makes 16 bits of the weights, so that the plan would be wrong.
    "mxfp8": Support(
        capability=(8, 0),
        amd=False,
        source="compressed_tensors_w8a8_mxfp8.py get_min_capability; "
        "kernels/linear/mxfp8/marlin.py, which multiplies bfloat16",
    ),
    **{
        name: Support(
            capability=(7, 5),
            amd=False,
            source="compressed_tensors_wNa16.py get_min_capability; "
            "kernels/linear/mixed_precision/humming.py can_implement: CUDA only",
        )
        for name in ("w2a16", "w3a16", "w5a16")
    },
    "w8a8": Support(
        capability=(7, 5),
        cpu=True,
        source="compressed_tensors_w8a8_int8.py get_min_capability; "
        "kernels/linear/scaled_mm/cpu.py CPUInt8ScaledMMLinearKernel",
        cpu_adapters="kernels/linear/scaled_mm/cpu.py process_weights_for_onednn drops the weight"
        " that lora/layers/utils.py _get_lora_device looks for",
        cpu_experts="layers/fused_moe/experts/cpu_moe.py CPUExpertsInt8: only with AMX",
        amx_experts=INT8,
    ),
}


ENGINE = Engine(
    name="vllm",
    title="vLLM",
    accepts=frozenset(
        {"safetensors", "awq", "gptq", "fp8", "nvfp4", "mxfp4", "mxfp8", "lora"}
        | {"compressed-tensors", "mix"}
    ),
    layouts=frozenset({PACKED}),
    base=EngineBase(cpu="engine:vllm-cpu", gpu=GPU_IMAGE, rocm=ROCM_IMAGE),
    port=_PORT,
    health_path="/health",
    load_metrics=("vllm:num_requests_running", "vllm:num_requests_waiting"),
    can_be_picked=True,
    plan=plan,
    env=env,
    python="python3",
    entrypoint=("vllm", "serve"),
    command=command,
    file_settings=file_settings,
    key_variable="VLLM_API_KEY",
    threads_variable="OMP_NUM_THREADS",
    drain_setting=_DRAIN,
    neutral_settings=frozenset(
        {"max-num-seqs", "max-model-len", "kv-cache-memory-bytes", "gpu-memory-utilization", _DRAIN}
    ),
    has_parsers=True,
    speculates=frozenset({"draft", "eagle3", "mtp", "ngram"}),
    draft_counters=(
        "vllm:spec_decode_num_drafts_total",
        "vllm:spec_decode_num_draft_tokens_total",
        "vllm:spec_decode_num_accepted_tokens_total",
    ),
    undrafted=({}, ("--speculative-config", "None")),  # optional_type in its engine/arg_utils.py
    test_arguments=("--enable-scale-out",),
    lacks=lacks_vllm,
    image_files={CONFIG_FILE: "vllm.yaml"},
    support=_SUPPORT,
    expert_adapters="lora/layers/fused_moe.py asks for LoRAExpertsMixin, and no experts of"
    " layers/fused_moe/experts/cpu_moe.py have it",
    support_versions=_VERSIONS,
)


_BOTH_WAYS = frozenset({"Gemma3ForConditionalGeneration", "PaliGemmaForConditionalGeneration"})
"""Whose tokens of a picture see each other (MM_PREFIX_LM_MODELS in transformers_utils)."""
_LACKING = {"SmolVLMForConditionalGeneration": "num2words"}
"""Architecture -> the package that its processor needs, and the engine for CPUs lacks."""

_UNPLANNED = (
    "the server reads pictures; what preparing and encoding one takes is not in this plan, so leave"
    " memory for it"
)


def check_pictures(architecture: str, extra: Mapping[str, JsonValue], *, on_cpu: bool) -> list[str]:
    """Return notes on the pictures that a model with a vision tower is served with.

    Raises UsageError for a model whose server would not start on a CPU, unless `extra` turns
    pictures off.
    """
    limit = extra.get("limit-mm-per-prompt")
    if isinstance(limit, Mapping) and limit.get("image") == 0:
        return []
    lacking = _LACKING.get(architecture, "") if on_cpu else ""
    if lacking:
        raise UsageError(
            f"vLLM's engine for CPUs cannot start {architecture}: its pictures need the package"
            f" {lacking}, which the engine does not have",
            hint="choose a llamacpp target, a GPU, or text alone: serve.extra.limit-mm-per-prompt"
            ' as {"image": 0, "video": 0}',
        )
    notes = [_UNPLANNED]
    if on_cpu and architecture in _BOTH_WAYS:
        # v1/attention/backends/cpu_attn.py has no ranges of tokens that see each other.
        notes.append(
            f"on a CPU, vLLM reads the pictures of {architecture} in one direction, not in both as"
            " it was trained, so answers about them can be worse than on a GPU"
        )
    return notes


_GONE: Mapping[str, str] = {
    "gguf": "vLLM dropped GGUF in 0.24: choose a llamacpp target",
    "bitsandbytes": "vLLM dropped it in 0.28: start from the 16-bit checkpoint",
    "fbgemm_fp8": "vLLM refuses it as deprecated: choose vllm-fp8 from the 16-bit checkpoint",
    "fp_quant": "vLLM refuses it as deprecated: choose vllm-fp8 from the 16-bit checkpoint",
}
_GROUPS = frozenset({-1, 32, 64, 128})
"""Group sizes that the Marlin kernels have."""


def check_packing(packing: Packing | None, machine: Machine) -> tuple[str, ...]:
    """Return notes on a packed checkpoint for a machine; () for one that is not packed.

    Raises InputRefused for a packing that vLLM does not load, UsageError for one that this
    machine does not run.
    """
    if packing is None:
        return ()
    method = packing.method
    if method in _GONE:
        raise InputRefused(f"vLLM does not load {method} checkpoints", hint=_GONE[method])
    card = machine.gpu
    least = (7, 0) if method == "compressed-tensors" else (7, 5)
    if card and any(card.compute_capability) and card.compute_capability < least:
        raise UsageError(
            f"{method} needs compute capability {least[0]}.{least[1]}, which {card.name} does "
            "not have",
            hint="choose a later GPU, or another format",
        )
    if method == "awq" and packing.bits != 4:
        raise InputRefused(
            f"AWQ with {packing.bits} bits: vLLM has kernels for 4", hint="quantize it again"
        )
    if method == "gptq":
        return _gptq(packing, machine)
    if method == "fp8":
        return _fp8(packing, machine)
    return ()


def _gptq(packing: Packing, machine: Machine) -> tuple[str, ...]:
    bits, group = packing.bits, packing.group_size
    if packing.reordered and group != -1:
        raise InputRefused(
            "GPTQ with desc_act=true: vLLM dropped group activation ordering in 0.30",
            hint="quantize it again with desc_act=false, or static ordering",
        )
    if not packing.symmetric:
        raise InputRefused("GPTQ with sym=false: vLLM loads symmetric ones", hint="quantize anew")
    if bits not in {4, 8}:
        raise InputRefused(f"GPTQ with {bits} bits: vLLM loads 4 and 8", hint="quantize it again")
    if not machine.gpus and bits == 8:
        raise UsageError(
            "GPTQ with 8 bits does not run on a CPU", hint="choose 4 bits, or plan for a GPU"
        )
    if machine.gpus and group not in _GROUPS:
        return (f"group_size {group} has no fast kernel; -1, 32, 64 and 128 have",)
    return ()


def _fp8(packing: Packing, machine: Machine) -> tuple[str, ...]:
    if not machine.gpus:
        if packing.block and packing.block[-1] != 128:
            raise UsageError(
                f"FP8 in blocks of {list(packing.block)} does not run on a CPU",
                hint="blocks of 128 do",
            )
        if machine.device == AMX:
            return ()
        return ("FP8 on a CPU needs AMX (Intel's Sapphire Rapids or later) for most layouts",)
    if machine.gpu and not machine.gpu.fp8:
        return (f"{machine.device} has no FP8 arithmetic: weights are widened as they are used",)
    return ()
