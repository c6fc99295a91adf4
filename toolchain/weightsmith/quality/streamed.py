"""A model's forward pass with one layer's weights in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from weightsmith.errors import Unmeasurable

Weights = Callable[[str], "torch.Tensor"]
"""Checkpoint name -> float32 tensor; raises KeyError for an unknown name."""
Started = Callable[[int, "torch.Tensor"], "torch.Tensor"]
Ended = Callable[[int, "torch.Tensor"], None]

# transformers stacks a layer's experts in one tensor; checkpoints have one per expert.
_FUSED = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


class StreamedModel:
    """A causal language model that loads each layer's weights only while it runs."""

    def __init__(self, model: Path) -> None:
        """Build the network from config.json without weights; raise Unmeasurable if unsupported."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
        config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
        text = config.get_text_config(decoder=True)
        # Of a multimodal model, the language model.
        config = text if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING else config
        config.use_cache = False
        with _without_weights():
            self.network = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        self.decoder = self.network.get_decoder()
        lists = [m for m in self.decoder.children() if isinstance(m, torch.nn.ModuleList)]
        if len(lists) != 1:
            raise Unmeasurable(
                f"{type(self.network).__name__} has no single list of decoder layers to measure",
                hint="use the task score instead",
            )
        self.layers = lists[0]
        self._names = {id(module): name for name, module in self.network.named_modules()}

    def hidden(
        self, ids: torch.Tensor, weights: Weights, started: Started, ended: Ended
    ) -> torch.Tensor:
        """Return the last hidden states of token ids [batch, length].

        `started(i, states)` may replace layer i's input, `ended(i, states)` gets its output.
        Layers' weights are dropped after use; embedding and final norm are kept for `logits`.
        """
        for module in self._outside_layers():
            self._fill(module, weights)
        handles = []
        for number, layer in enumerate(self.layers):
            handles += _hook(self, number, layer, weights, started, ended)
        try:
            with torch.inference_mode():
                found: torch.Tensor = self.decoder(input_ids=ids, use_cache=False)[0]
        finally:
            for handle in handles:
                handle.remove()
        return found

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits of last hidden states, by the model's head and scaling."""
        own = self.decoder.forward
        from transformers.modeling_outputs import MoeModelOutputWithPast

        self.decoder.forward = lambda *_, **__: MoeModelOutputWithPast(last_hidden_state=states)
        try:
            with torch.inference_mode():
                ids = torch.zeros(states.shape[:2], dtype=torch.long)
                found: torch.Tensor = self.network(input_ids=ids, use_cache=False).logits
        finally:
            self.decoder.forward = own
        return found

    def tensors(self, module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, str]]:
        """Yield each parameter of a module: checkpoint name, owner, key."""
        for path, owner in module.named_modules():
            for key in owner._parameters:  # noqa: SLF001 - torch has no public way to assign
                prefix = self._names[id(module)]
                yield ".".join(part for part in (prefix, path, key) if part), owner, key

    def _outside_layers(self) -> Iterator[torch.nn.Module]:
        """Yield the modules outside of layers: embedding, norms, head."""
        inner = {id(m) for layer in self.layers for m in layer.modules()}
        for module in self.network.modules():
            direct = any(True for _ in module.parameters(recurse=False))
            if direct and id(module) not in inner:
                yield module

    def _fill(self, module: torch.nn.Module, weights: Weights) -> None:
        for name, owner, key in self.tensors(module):
            if owner._parameters[key] is not None:  # noqa: SLF001
                owner._parameters[key] = torch.nn.Parameter(  # noqa: SLF001
                    self._weight(name, weights), requires_grad=False
                )

    def _weight(self, name: str, weights: Weights) -> torch.Tensor:
        """Return a parameter's weights: plain, tied, or stacked by transformers."""
        for spelling in _spellings(name):
            try:
                return weights(spelling)
            except KeyError:
                pass
            if ".experts." in spelling and (fused := _fused(spelling, weights)) is not None:
                return fused
        if name == "lm_head.weight":
            embedding = self._names[id(self.network.get_input_embeddings())]
            return self._weight(f"{embedding}.weight", weights)
        raise Unmeasurable(
            f"the checkpoint has no tensor {name}, which its architecture needs",
            hint="use the task score instead",
        )

    def empty(self, module: torch.nn.Module) -> None:
        """Drop a module's weights."""
        for _, owner, key in self.tensors(module):
            if owner._parameters[key] is not None:  # noqa: SLF001
                shape = owner._parameters[key].shape  # type: ignore[union-attr] # noqa: SLF001
                owner._parameters[key] = torch.nn.Parameter(  # noqa: SLF001
                    torch.empty(shape, device="meta"), requires_grad=False
                )


def _hook(
    model: StreamedModel,
    number: int,
    layer: torch.nn.Module,
    weights: Weights,
    started: Started,
    ended: Ended,
) -> list[Any]:
    def before(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        model._fill(layer, weights)  # noqa: SLF001
        if args:
            return (started(number, args[0]), *args[1:]), named
        return args, {**named, "hidden_states": started(number, named["hidden_states"])}

    def after(_: Any, __: Any, output: Any) -> None:
        ended(number, output[0] if isinstance(output, tuple) else output)
        model.empty(layer)

    return [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after),
    ]


def _spellings(name: str) -> Iterator[str]:
    """Yield a parameter's names in checkpoints: Mixtral's, and those of multimodal models."""
    yield name
    yield name.replace(".mlp.", ".block_sparse_moe.")
    yield f"language_model.{name}"
    yield name.replace("model.", "model.language_model.", 1)


def _fused(name: str, weights: Weights) -> torch.Tensor | None:
    """Return a layer's experts stacked as in transformers 5: [experts, rows, columns]."""
    stem, _, key = name.rpartition(".")
    for parts in _FUSED.get(key, ()):
        found: list[torch.Tensor] = []
        while True:
            try:
                rows = [weights(f"{stem}.{len(found)}.{part}.weight") for part in parts]
            except KeyError:
                break
            found.append(torch.cat(rows))
        if found:
            return torch.stack(found)
    return None


@contextmanager
def _without_weights() -> Iterator[None]:
    """Create modules with parameters on the meta device but real buffers."""
    original = torch.nn.Module.register_parameter

    def register(self: Any, name: str, param: Any) -> None:
        original(self, name, param)
        if param is not None:
            self._parameters[name] = torch.nn.Parameter(param.to("meta"), requires_grad=False)

    torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = original  # type: ignore[method-assign]
