"""Text Generation Inference 3.3, frozen: upstream is archived, existing users are served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.values import JsonValue
from weightsmith.models.facts import ModelFacts
from weightsmith.serving.compatibility import check_blocks
from weightsmith.serving.engine import Engine, EngineBase, ServedModel, ServeOptions, Support
from weightsmith.serving.options import OptionList, load_options
from weightsmith.serving.paged_capacity import PagedCapacity, Rules, Switches
from weightsmith.serving.paged_plan import plan_paged
from weightsmith.serving.plan import ServingPlan

GPU_IMAGE = "ghcr.io/huggingface/text-generation-inference:3.3.5"
"""The last image that the documentation names; images/bases.lock has its digest."""

LEGACY = (
    "archived upstream: TGI is in maintenance mode since 2025-12-11 and its repository read-only"
    " since 2026-03-21, so nobody mends it; the same recipe makes an image of vLLM with vllm in the"
    " target's name instead of tgi, and clients keep /v1/chat/completions"
)
"""The first date is of its own commit 34988476, the second is reported in
github.com/aws-solutions-library-samples/global-capacity-orchestrator-on-aws/pull/387."""

_PORT = 8080  # the image's own is 80, which only root may open
_OPTIONS = Path(__file__).with_name("tgi_options.json")

# server/text_generation_server/models/__init__.py at db931fcf: the models with kernels of its own.
_MODEL_TYPES = frozenset(
    {"bloom", "cohere", "dbrx", "deepseek_v2", "deepseek_v3", "falcon", "gemma", "gemma2"}
    | {"gemma3", "gemma3_text", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "granite", "llama"}
    | {"llama4", "mistral", "mixtral", "mpt", "opt", "phi", "phi3", "phimoe", "qwen2"}
    | {"santacoder", "starcoder2"}
)

_NOT_HERE: Mapping[str, str] = {
    "model-id": "the image's own model is served",
    "revision": "the image's own model is served",
    "max-total-tokens": "set serve.max_model_len",
    "max-input-tokens": "set serve.max_model_len",
    "max-input-length": "set serve.max_model_len; with max-input-tokens the launcher stops",
    "max-batch-prefill-tokens": "set serve.max_num_batched_tokens",
    "max-batch-total-tokens": "the launcher measures it; the plan says what it will find",
    "max-batch-size": "set serve.max_num_seqs",
    "num-shard": "set serve.tensor_parallel_size",
    "sharded": "set serve.tensor_parallel_size",
    "dtype": "set serve.dtype",
    "kv-cache-dtype": "set serve.kv_cache_dtype",
    "quantize": "TGI reads it from the checkpoint",
    "cuda-memory-fraction": "set serve.gpu_memory_utilization",
    "port": "publish port 8080 as the port you want",
    "hostname": "publish the port where you want it",
    "trust-remote-code": "an image runs no code of a checkpoint",
    "api-key": "a key does not belong in an image: set API_KEY where it runs",
    "ngrok": "an image opens no tunnel",
    "ngrok-authtoken": "an image opens no tunnel",
    "ngrok-edge": "an image opens no tunnel",
    "env": "it prints and exits",
    "lora-adapters": "an image downloads nothing",
}


RULES = Rules(
    name="tgi",
    block=1,  # flashinfer's pages, with prefix caching
    cpu_block=1,
    keeps_windows_small=False,
    null_block=True,  # one page is for padding
    fraction=1.0,
    fraction_of="all",
    wiggle=0.9,  # TGI_WIGGLE_ROOM of the server; the launcher's is 0.95
    # Its image has kernels for 8.0, 8.6 and 9.0, and code that later cards of 9.x can compile.
    capabilities=((8, 0), (10, 0)),
    splits_by_layers=False,
    small_target="tgi-awq",
    batched_tokens=lambda _machine: 4096,
    most_requests=lambda _machine: 128,  # the launcher's MAX_CONCURRENT_REQUESTS
    cache_dtypes={"fp8": 1, "fp8_e4m3": 1, "fp8_e4m3fn": 1, "fp8_e5m2": 1},
)

_ROPE_THETA = 10000.0


@cache
def known_options() -> OptionList:
    """Return the launcher's options; each has a variable of the same name."""
    return load_options(_OPTIONS, _NOT_HERE)


def plan(model: ModelFacts, weight_bytes: int, options: ServeOptions) -> ServingPlan:
    """Return the plan of a checkpoint of `weight_bytes` by TGI's token budgets.

    Raises InputRefused for a model it does not know, UsageError for a GPU it has no kernels for
    and for options that do not fit.
    """
    extra = known_options().checked(options.extra)
    kind = model.model_type
    if kind and kind not in _MODEL_TYPES:
        raise InputRefused(
            f"TGI 3.3 knows no model of type {kind!r}, and there will be no later version",
            hint="choose a vllm or sglang target",
        )
    if model.tokenizer_class.startswith("TokenizersBackend"):
        raise InputRefused(
            "the tokenizer was saved by transformers 5 (TokenizersBackend), which TGI cannot read",
            hint="keep the base's tokenizer files as they were, or choose a vllm target",
        )
    # transformers 5 writes `rope_parameters`; TGI's transformers 4 looks for `rope_theta` and
    # `rope_scaling`, and takes 10000 and nothing where they are not, without a word.
    positions = model.positions
    usual = positions.scaling == "default" and positions.theta == _ROPE_THETA
    if positions.transformers_5_only and not usual:
        raise InputRefused(
            "config.json has rope_parameters, as transformers 5 writes them, and TGI reads"
            " rope_theta and rope_scaling: it would answer nonsense",
            hint="add rope_theta, and rope_scaling where rope_type is not default, to the base's"
            " config.json, or choose a vllm target",
        )
    planned, capacity = plan_paged(model, weight_bytes, options, RULES, _switches(model))
    card = capacity.machine.gpu
    if card and not RULES.knows(card):
        raise UsageError(
            f"TGI 3.3 has no kernels for {card.name}",
            hint="choose an A10G, A100, L4, L40S or H100, or a vllm target",
        )
    if capacity.dtype == "float32":
        raise UsageError("TGI has no float32", hint="set serve.dtype=bfloat16 or float16")
    if "awq" in {options.format.kind, model.packing.method if model.packing else ""}:
        # Weights.get_sharded of the scales; scales of GPTQ that cannot be divided are on each GPU.
        check_blocks(model, options.format, planned.tensor_parallel_size, options.group_size)
    if planned.max_model_len < 2:
        raise UsageError(
            "max_model_len 1 leaves no token for the answer", hint="nearest: max_model_len 2"
        )
    return replace(planned, settings={**_settings(planned, capacity), **extra})


_FLASHINFER_HEADS = frozenset({64, 128, 256})


def _switches(model: ModelFacts) -> Switches:
    """Return what the model changes of the cache: launcher/src/main.rs, resolve_attention.

    With flash decoding instead of flashinfer a block has 256 tokens
    (server/text_generation_server/models/globals.py). Gemma 3 with images takes prompts whole, so a
    batch of prompts must hold the longest (backends/v3/src/main.rs).
    """
    kind, other = model.model_type, model.shape.head_dim not in _FLASHINFER_HEADS
    return Switches(
        block=256 if other or kind in {"falcon", "deepseek_v2"} else 1,
        chunked_prefill=kind != "gemma3",
    )


def _settings(planned: ServingPlan, capacity: PagedCapacity) -> dict[str, JsonValue]:
    """Return the launcher's options: input < total <= the batch, prefill <= the batch."""
    batch = planned.max_model_len * planned.max_num_seqs
    settings: dict[str, JsonValue] = {
        "max-total-tokens": planned.max_model_len,
        "max-input-tokens": planned.max_model_len - 1,
        "max-batch-prefill-tokens": min(planned.max_num_batched_tokens, batch),
        "max-batch-size": planned.max_num_seqs,
        # Admission, not the batch: more than that wait, and beyond this they are sent away.
        "max-concurrent-requests": max(128, planned.max_num_seqs),
        "num-shard": planned.tensor_parallel_size,
        "dtype": capacity.dtype,
        "cuda-memory-fraction": planned.gpu_memory_utilization,
    }
    if cache := capacity.options.kv_cache_dtype:
        settings["kv-cache-dtype"] = "fp8_e4m3fn" if cache in {"fp8", "fp8_e4m3"} else cache
    return settings


def env(plan: ServingPlan, model: ServedModel) -> Mapping[str, str]:
    """Return the environment, which holds everything: the image's start script splits arguments."""
    served: dict[str, JsonValue] = {
        "model-id": model.path,
        "hostname": "0.0.0.0",  # noqa: S104  # a container is reached through its published port
        "port": _PORT,
        "usage-stats": "off",
        "huggingface-hub-cache": "/tmp/hub",  # noqa: S108
        **plan.settings,
    }
    texts = {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in served.items()}
    return {
        **{key.upper().replace("-", "_"): text for key, text in texts.items()},
        "HF_HUB_OFFLINE": "1",
        "HOME": "/tmp",  # noqa: S108
        "HF_HOME": "/tmp/hub",  # noqa: S108
    }


# Paths are below server/text_generation_server/.
_SUPPORT: Mapping[str, Support] = {
    "awq": Support(
        capability=(7, 5), amd=False, source="layers/gptq/__init__.py GPTQWeight.get_linear"
    ),
    "gptq": Support(capability=(7, 5), source="layers/gptq/exllamav2.py"),
}

ENGINE = Engine(
    name="tgi",
    title="Text Generation Inference",
    accepts=frozenset({"safetensors", "awq", "gptq"}),
    base=EngineBase(cpu="", gpu=GPU_IMAGE),
    port=_PORT,
    drains=True,
    health_path="/health",
    load_metrics=("tgi_batch_current_size", "tgi_queue_size"),
    plan=plan,
    env=env,
    python="/usr/src/.venv/bin/python",
    entrypoint=("/tgi-entrypoint.sh",),
    command=lambda _plan, _model: (),
    key_variable="API_KEY",
    port_variable="PORT",
    host_variable="HOSTNAME",
    neutral_settings=frozenset({"max-batch-size", "max-concurrent-requests"}),
    image_files={"/etc/weightsmith/tgi.env": "tgi.env"},
    fixed_name="/models",
    legacy=LEGACY,
    support=_SUPPORT,
    support_versions={"gpu": "3.3"},
)
