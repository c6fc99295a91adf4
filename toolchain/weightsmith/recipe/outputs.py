"""The recipe's sections about what comes out: names, kinds and the model's card."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import AfterValidator, Field

from weightsmith.core.platforms import usual_names
from weightsmith.recipe.section import Flag, Section

SIZE = r"^(\d+(\.\d+)?\s*([KMGTkmgt]i?)?[Bb]?)?$"
"""Pattern of a size, such as `10GB`, or nothing."""


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
    order: Literal["engine-first", "weights-first"] = Field(
        "engine-first",
        description="Order of layers. With `weights-first`, nodes do not download the weights "
        "again after an engine update.",
    )
    max_layer_size: str = Field(
        "auto",
        pattern=rf"^(auto|none)$|{SIZE}",
        description="Largest layer, such as `10GB`; larger safetensors files are split. `auto`: "
        "about 0.5 GB, which nodes pull fastest; `none`: each file stays whole.",
    )


Kind: TypeAlias = Literal["image", "modelcar", "volume", "modelpack", "modelpack-tar", "ollama"]
KINDS: tuple[str, ...] = get_args(Kind)
"""`image` runs a server; `modelcar` is for KServe and has a shell; `volume` has only weights;
`modelpack` is no image, but an artifact with the model's files, for model runners to pull;
`modelpack-tar` is one of the image's own layers; `ollama` is what Ollama pulls, for GGUF."""
LOADABLE = ("image", "modelcar", "volume")
"""Kinds that a container engine can load."""


class Outputs(Section):
    """What is published of each target, beside the image that was tested."""

    kinds: tuple[Kind, ...] = Field(
        ("image",),
        description="`image`: always, since it is what was tested; the other kinds hold the same "
        "weights, under the image's name and `-KIND`. `ollama` is made of GGUF targets only.",
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


def kinds_alone(value: Any) -> Any:
    """Return a list of kinds as the section that it stands for."""
    return {"kinds": value} if isinstance(value, list | tuple) else value


def list_or_section(schema: dict[str, Any]) -> None:
    """Let editors accept the list of kinds as well as the section."""
    section = {"$ref": schema.pop("$ref", "#/$defs/Outputs")}
    kinds = {"items": {"enum": list(KINDS), "type": "string"}, "type": "array"}
    schema["anyOf"] = [section, kinds]


class Card(Section):
    """What the model's card says; it goes into the bill of materials and onto a hub."""

    description: str = Field("", max_length=2000, description="What the model is.")
    license: str = Field("", max_length=100, description="Licence; default: the base's.")
    intended_use: str = Field("", max_length=2000, description="What it is meant for.")
    limitations: str = Field("", max_length=2000, description="What it is not good for.")
