"""llama.cpp's own server: GGUF files on CPUs and NVIDIA GPUs, with an OpenAI-compatible API.

The server maps its file, and nobody reads ahead for it: 585 MB that are not in memory answer after
1.0 s mapped, 0.9 s if the kernel is first asked for all of it, and 1.3 s without mapping. llama.cpp
asks the kernel itself.
"""

from __future__ import annotations

from collections.abc import Mapping

from weightsmith.core.values import JsonValue
from weightsmith.serving.engine import Engine, EngineBase, ServedModel
from weightsmith.serving.llamacpp_options import as_arguments, as_environment
from weightsmith.serving.llamacpp_plan import plan
from weightsmith.serving.plan import ServingPlan
from weightsmith.serving.pooling import lacks_llamacpp

CPU_IMAGE = "ghcr.io/ggml-org/llama.cpp:server-b11434"
CUDA_IMAGE = "ghcr.io/ggml-org/llama.cpp:server-cuda-b11434"
"""Upstream's CUDA build; images/bases.lock has its digest."""

_PORT = 8080


def env(plan: ServingPlan, model: ServedModel) -> Mapping[str, str]:
    """Return the LLAMA_ARG_ variables of a plan.

    Everything a plan depends on is explicit, so the
    server neither fits nor downloads anything of its own (`--fit off`, `--offline`).
    """
    served: dict[str, JsonValue] = {
        "model": model.path,
        **({"mmproj": model.projector} if model.projector else {}),
        "alias": model.name,
        "host": "0.0.0.0",  # noqa: S104  # a container is reached through its published port
        "port": _PORT,
        "metrics": True,
        "jinja": True,
        "ui": False,
        "offline": True,
    }
    return as_environment({**served, **plan.settings})


def command(plan: ServingPlan, model: ServedModel) -> tuple[str, ...]:
    """Return the arguments for what has no variable: adapters, and a few options of `serve.extra`.

    A single adapter is added to every request. Of several none is, until a request names it by
    its number, in the order of the arguments: `"lora": [{"id": 0, "scale": 1.0}]`.
    """
    adapters = model.adapters
    loaded = ("--lora", ",".join(adapters.values())) if adapters else ()
    quiet = ("--lora-init-without-apply",) if len(adapters) > 1 else ()
    return (*loaded, *quiet, *as_arguments(plan.settings))


ENGINE = Engine(
    name="llamacpp",
    title="llama.cpp's server",
    accepts=frozenset({"gguf", "lora"}),
    base=EngineBase(cpu="engine:llamacpp", gpu=CUDA_IMAGE, stock_cpu=CPU_IMAGE),
    port=_PORT,
    health_path="/health",
    tells_size=True,
    load_metrics=("llamacpp:requests_processing", "llamacpp:requests_deferred"),
    plan=plan,
    env=env,
    entrypoint=("/app/llama-server",),
    command=command,
    key_variable="LLAMA_API_KEY",
    port_variable="LLAMA_ARG_PORT",
    host_variable="LLAMA_ARG_HOST",
    adapter_fields=lambda number: {"lora": [{"id": number, "scale": 1.0}]},
    pictures=("png", "jpeg"),  # stb_image's
    reads_calls=True,
    speculates=frozenset({"draft", "ngram"}),
    drafts_unplanned={
        "mtp": "llama-server has it as draft-mtp, but the memory of its second context, which reads"
        " the model's further layers, is not planned",
        "eagle3": "llama-server has it as draft-eagle3, but the step that converts a draft does not"
        " give the converter the model, whose tokenizer such a head needs (--target-model-dir)",
    },
    draft_counters=(
        "llamacpp:spec_decode_num_drafts_total",
        "llamacpp:spec_decode_num_draft_tokens_total",
        "llamacpp:spec_decode_num_accepted_tokens_total",
    ),
    undrafted=({"LLAMA_ARG_SPEC_TYPE": "none"}, ()),  # an argument would only add to it
    most_apart=128,  # SPEC_VOCAB_MAX_SIZE_DIFFERENCE of its common/speculative.cpp
    lacks=lacks_llamacpp,
    threads_variable="LLAMA_ARG_THREADS",
    neutral_settings=frozenset({"ctx-size", "parallel", "threads", "cache-ram"}),
    image_files={"/etc/weightsmith/llamacpp.env": "llamacpp.env"},
)
