"""Asks vLLM's own code about configs; run by vLLM's Python, not by this project's.

Reads one JSON object per line: `config`, a rendered vllm.yaml; `model`, a folder with config.json;
`keys`, the settings to tell; `block`, `batches` and `kv_cache_bytes` of the cache. Writes one per
line: what `vllm serve` made of the file, what `create_engine_config` made of that, and what vLLM's
cache rules say of one request. Starts nothing.
"""

import json
import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")

import torch
from vllm.distributed.utils import get_pp_indices
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.model_executor.models import ModelRegistry
from vllm.platforms.interface import Platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.core import kv_cache_utils as rules
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)


def main():
    parser = FlexibleArgumentParser(prog="vllm")
    ServeSubcommand().subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            told = about(parser, asked)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever it is, it is the answer
            told = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write("TOLD " + json.dumps(told, default=vars) + "\n")
        sys.stdout.flush()


def about(parser, asked):
    args = parser.parse_args(["serve", "--config", asked["config"]])
    read = {name: getattr(args, name) for name in asked["keys"]}
    args.model = args.tokenizer = args.model_tag = asked["model"]
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    return {
        "read": read,
        "max_model_len": config.model_config.max_model_len,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
        "pipeline_parallel_size": config.parallel_config.pipeline_parallel_size,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        **cache(config, asked),
    }


def cache(config, asked):
    """What vLLM's block pool would be with the memory asked: its groups, its figures."""
    # GPUs schedule the next batch while one runs; this build's CPU platform does not.
    type(config).max_concurrent_batches = property(lambda self: asked["batches"])
    config.cache_config.block_size = asked["block"]
    if config.model_config.is_hybrid:
        as_on_a_gpu(config, asked["state_dtype"])
    config.cache_config.kv_cache_layout = "LBNHC"  # each layer apart, as FlashAttention has it
    groups = rules.get_kv_cache_groups(config, specs(config, config.cache_config.block_size))
    tokens, concurrency = rules.get_kv_cache_capacity(
        config, rules.get_kv_cache_config_from_groups(config, groups, asked["kv_cache_bytes"])
    )
    return {
        "request": rules._max_memory_usage_bytes_from_groups(config, groups),
        "tokens": tokens,
        "concurrency": concurrency,
    }


def as_on_a_gpu(config, state_dtype):
    """Undo what the CPU's platform chose for states, and align blocks as FlashAttention has it."""
    own = type(config.model_config.hf_text_config).__name__
    if not own.startswith("NemotronH"):  # which asks for float32 itself
        config.cache_config.mamba_ssm_cache_dtype = state_dtype
    config.cache_config.mamba_page_size_padded = None
    Platform._align_hybrid_block_size.__func__(Platform, config, FlashAttentionBackend)


def state_spec(config, block):
    model, cache = config.model_config, config.cache_config
    kind, _ = ModelRegistry.resolve_model_cls(model.architectures, model)
    return MambaSpec(
        shapes=kind.get_mamba_state_shape_from_config(config),
        dtypes=kind.get_mamba_state_dtype_from_config(config),
        block_size=block,
        page_size_padded=cache.mamba_page_size_padded,
        mamba_cache_mode=cache.mamba_cache_mode,
    )


def specs(config, block):
    """One spec per layer of the largest stage, as the model's own attention layers give them."""
    model, text = config.model_config, config.model_config.hf_text_config
    dtype = torch.uint8 if config.cache_config.cache_dtype.startswith("fp8") else model.dtype
    common = {
        "block_size": block,
        "num_kv_heads": model.get_num_kv_heads(config.parallel_config),
        "head_size": model.get_head_size(),
        "dtype": dtype,
    }
    stages = config.parallel_config.pipeline_parallel_size
    spans = [get_pp_indices(text.num_hidden_layers, n, stages) for n in range(stages)]
    start, end = max(spans, key=lambda span: span[1] - span[0])
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    kinds = kinds or ["full_attention"] * text.num_hidden_layers
    found = {}
    for number in range(start, end):
        name = f"model.layers.{number}.self_attn.attn"
        if kinds[number] in {"mamba", "linear_attention"}:
            found[name] = state_spec(config, block)
        elif kinds[number] in {"mlp", "moe"}:
            continue
        elif model.use_mla:
            found[name] = MLAAttentionSpec(**common)
        elif kinds[number] == "sliding_attention":
            found[name] = SlidingWindowSpec(**common, sliding_window=text.sliding_window)
        else:
            found[name] = FullAttentionSpec(**common)
    return found


main()
