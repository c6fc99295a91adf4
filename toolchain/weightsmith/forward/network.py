"""Models built without weights, which are read from files while the model runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from weightsmith.forward.libraries import reading
from weightsmith.forward.weights import Weights
from weightsmith.models.folder import check_model_folder, check_no_code, scan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from weightsmith.forward.kinds import Model

Places: TypeAlias = dict[tuple[torch.nn.Module, str], str]
"""(module, attribute) -> the model's name of a parameter"""
PEFT_PREFIX = "base_model.model."
_CONFIG_HINT = (
    "compare config.json with the published one: it is damaged, or of an architecture that this "
    "version of transformers does not know"
)
_WRAPPERS = frozenset({"base_layer", "original_module", "token_adapter"})


@dataclass(frozen=True, slots=True)
class Head:
    """What a network ends in, if not in the logits of tokens."""

    kind: str
    """The name of one of transformers' auto classes, such as AutoModelForSequenceClassification."""
    labels: tuple[str, ...] = ()
    """Of its outputs, if it has any of its own."""


def skeleton(root: Path, head: Head | None = None) -> Model:
    """Return the folder's model in float32 with every parameter missing but real buffers.

    A missing parameter is one NaN expanded to the parameter's shape, so that using it by mistake
    gives NaN. Without a `head` it is one that generates text. Raises InputRefused if transformers
    cannot build what config.json describes.
    """
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    check_no_code(root, scan(root))
    with reading(f"the model in {root}", _CONFIG_HINT):
        config = AutoConfig.from_pretrained(root, local_files_only=True, trust_remote_code=False)
        text = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        kind: Any = AutoModelForCausalLM if text else AutoModelForImageTextToText
        if head:
            kind = getattr(transformers, head.kind)
            if head.labels:
                config.id2label = dict(enumerate(head.labels))
                config.label2id = {label: number for number, label in enumerate(head.labels)}
        with _without_memory(), _nothing_drawn():
            model = kind.from_config(config, dtype=torch.float32, trust_remote_code=False)
    set_missing(model)
    return model.eval()


@contextmanager
def _without_memory() -> Iterator[None]:
    own = nn.Module.register_parameter

    def register(module: nn.Module, name: str, values: nn.Parameter | None) -> None:
        if values is not None:
            values = nn.Parameter(values.to("meta"), requires_grad=values.requires_grad)
        own(module, name, values)

    setattr(nn.Module, "register_parameter", register)  # noqa: B010
    try:
        yield
    finally:
        setattr(nn.Module, "register_parameter", own)  # noqa: B010


@contextmanager
def _nothing_drawn() -> Iterator[None]:
    """Draw no random weights: all are missing, and drawing takes half the time.

    Transformers leaves parameters that have this mark as they are. Torch's modules would draw where
    there is no memory to draw into, for which torch imports its compiler. Buffers are computed as
    ever.
    """
    mark = "_is_hf_initialized"
    names = (name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_"))
    own = {name: getattr(nn.init, name) for name in names}

    def leave(draw: Callable[..., object], *given: object, **named: object) -> object:
        values = given[0] if given else named["tensor"]  # named where a mode replaces functions
        return values if isinstance(values, nn.Parameter) else draw(*given, **named)

    setattr(nn.Parameter, mark, True)
    for name, draw in own.items():
        setattr(nn.init, name, partial(leave, draw))
    try:
        yield
    finally:
        delattr(nn.Parameter, mark)
        for name, draw in own.items():
            setattr(nn.init, name, draw)


def set_missing(model: Model) -> None:
    """Make every parameter on the meta device a missing one."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.device.type == "meta":
                setattr(module, name, missing(parameter.shape))


def skeleton_with_weights(root: Path, head: Head | None = None) -> tuple[Model, Weights]:
    """Return the folder's model, with no weights but its buffers, and the weights in its files."""
    check_model_folder(root)
    model = skeleton(root, head)
    weights = Weights(root, model)
    for name, buffer in model.named_buffers():
        if weights.has(name):
            buffer.copy_(weights.whole(name))
    return model, weights


def lacking(model: Model, weights: Weights) -> list[str]:
    """Return the parameters that the model needs and its checkpoint does not have."""
    # Transformers' patterns of parameters that checkpoints may leave out.
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    optional = [re.compile(pattern) for pattern in patterns]
    return [
        name
        for name, _ in model.named_parameters()
        if not weights.has(name) and not any(pattern.search(name) for pattern in optional)
    ]


def is_missing(parameter: torch.Tensor) -> bool:
    """Return whether a parameter has no weights yet."""
    return not any(parameter.stride()) and has_no_weights(parameter)


def has_no_weights(parameter: torch.Tensor) -> bool:
    """Return whether a parameter begins with NaN, as missing ones and copies of them do."""
    return parameter.numel() > 0 and bool(torch.isnan(parameter[(0,) * parameter.dim()]))


def base_name(name: str) -> str:
    """Return the model's name of a parameter that PEFT has wrapped."""
    parts = name.removeprefix(PEFT_PREFIX).split(".")
    return ".".join(part for part in parts if part not in _WRAPPERS)


def fill_while_running(outer: torch.nn.Module, weights: Weights, places: Places) -> None:
    """Load a module's missing parameters before it runs, and drop them afterwards."""
    outer.register_forward_pre_hook(lambda *_: _load(places, weights))
    outer.register_forward_hook(lambda *_: _drop(places), always_call=True)


@contextmanager
def filled(outer: torch.nn.Module, path: str, weights: Weights) -> Iterator[None]:
    """Load the missing parameters below `outer`, and drop them at the end."""
    places = missing_below(outer, path)
    _load(places, weights)
    try:
        yield
    finally:
        _drop(places)


def _load(places: Places, weights: Weights) -> None:
    for (module, name), parameter in places.items():
        getattr(module, name).data = weights.whole(parameter)


def _drop(places: Places) -> None:
    for module, name in places:
        part = getattr(module, name)
        part.data = missing(part.shape).data


def missing_below(outer: torch.nn.Module, path: str) -> Places:
    """Return every missing parameter below `outer`."""
    return {
        (module, name): base_name(".".join(p for p in (path, inner, name) if p))
        for inner, module in outer.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if is_missing(parameter)
    }


def fill(model: Model, weights: Weights, skip: Sequence[torch.nn.Module] = ()) -> None:
    """Load every missing parameter of a model, and keep it; modules in `skip` are left alone."""
    left = {id(module) for layer in skip for module in layer.modules()}
    places = missing_below(model, "").items()
    _load({place: name for place, name in places if id(place[0]) not in left}, weights)


def decoder_of(model: Model) -> PreTrainedModel:
    """Return the module between embeddings and head; Llama 4 names its whole language model."""
    decoder = model.get_decoder()
    head = model.get_output_embeddings()
    return decoder.model if any(part is head for part in decoder.children()) else decoder


def modules_without_text(model: Model) -> list[torch.nn.Module]:
    """Return the modules that text does not run through, such as a vision tower."""
    parts = (decoder_of(model), model.get_input_embeddings(), model.get_output_embeddings())
    kept = {id(module) for part in parts for module in part.modules()}
    return [m for m in model.modules() if not any(id(part) in kept for part in m.modules())]


def decoder_layers(model: Model) -> list[torch.nn.Module]:
    """Return the model's decoder layers: its longest list of modules."""
    lists: list[Any] = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=len, default=()))


def missing(shape: Sequence[int]) -> nn.Parameter:
    """Return a parameter without weights: one NaN, expanded to the shape."""
    value = torch.full((), math.nan).expand(tuple(shape))
    return nn.Parameter(value, requires_grad=False)
