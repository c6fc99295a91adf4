"""The judge of every merge: PEFT's unmerged model, in float64, on tiny real architectures."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from weightsmith.merging.engine import MergeRequest, merge

from tests.unit.merging.models import build, model_class

MakeBase = Callable[..., Path]
Case = tuple[str, dict[str, Any], dict[str, Any]]
"""An architecture, options of its configuration, and those of an adapter's."""


def case(kind: str, *targets: str, base: dict[str, Any] | None = None, **lora: Any) -> Case:
    """Return a case whose adapter has these `target_modules`, if `lora` has none."""
    return kind, base or {}, {"target_modules": list(targets)} | lora


def make_base(folder: Path, kind: str, **options: Any) -> Path:
    """Save a tiny model with random weights."""
    torch.manual_seed(0)
    model = build(kind, **options)
    for name, parameter in model.named_parameters():
        scale, shift = (0.1, 1.0) if "norm" in name and "weight" in name else (0.2, 0.0)
        torch.nn.init.normal_(parameter, mean=shift, std=scale)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def train(base: Path, kind: str, folder: Path, config: Any, resize: int = 0) -> Path:
    """Save an adapter whose trained tensors are all random."""
    from peft import get_peft_model

    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_class(kind).from_pretrained(base, dtype=torch.float32)
        if resize:
            model.resize_token_embeddings(resize)
        tuned = get_peft_model(model, config)
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                shift = 1.0 if "magnitude" in name or "norm" in name else 0.0
                torch.nn.init.normal_(parameter, mean=shift, std=0.2)
        save_adapter(tuned, folder)
    return folder


def save_adapter(tuned: Any, folder: Path, **options: Any) -> None:
    """Save an adapter without its model card, which takes a third of the time."""
    setattr(tuned, "create_or_update_model_card", lambda _: None)  # noqa: B010 - as mypy wants it
    tuned.save_pretrained(folder, **options)


def answers(model: Any, kind: str) -> torch.Tensor:
    """What a model makes of fixed inputs, in float64."""
    model = model.double().eval()
    if hasattr(model, "set_experts_implementation"):
        # The fast ones have no float64.
        model.set_experts_implementation("eager")
    with torch.no_grad():
        if kind in ("vit", "cnn"):
            pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
            found = model(pixel_values=pixels.double())
            return next(iter(found.values()))
        ids = torch.arange(40).view(2, 20) % 90
        more = {"decoder_input_ids": ids} if kind in ("t5", "bart") else {}
        return model(input_ids=ids, **more).logits


def unmerged(
    base: Path, kind: str, adapters: Path | Sequence[tuple[Path, float]], resize: int = 0
) -> torch.Tensor:
    """The oracle: PEFT's forward pass with the adapters beside the weights."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    pairs = [(adapters, 1.0)] if isinstance(adapters, Path) else adapters
    names = [f"adapter_{number}" for number in range(len(pairs))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_class(kind).from_pretrained(base, dtype=torch.float32)
        if resize:
            model.resize_token_embeddings(resize)
        network = PeftModel.from_pretrained(model, pairs[0][0], names[0])
        for name, (root, _) in zip(names[1:], pairs[1:], strict=True):
            network.load_adapter(root, name)
    if len(names) > 1:
        network.base_model.set_adapter(names)
    for layer in network.modules():
        if isinstance(layer, LoraLayer):
            for name, (_, weight) in zip(names, pairs, strict=True):
                if name in layer.scaling:
                    layer.scaling[name] *= weight
    return answers(network, kind)


def merged(folder: Path, kind: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, told = model_class(kind).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert not told["mismatched_keys"]
    return answers(model, kind)


def run(
    base: Path, adapters: Path | Sequence[tuple[Path, float]], out: Path, **options: Any
) -> dict[str, Any]:
    """Merge one adapter, or several with their weights."""
    pairs = ((adapters, 1.0),) if isinstance(adapters, Path) else tuple(adapters)
    return merge(MergeRequest(base=base, adapters=pairs, out=out, **options))


def check(
    base: Path,
    kind: str,
    tmp_path: Path,
    lora: dict[str, Any],
    resize: int = 0,
    room: float = 2e-6,
) -> dict[str, Any]:
    """Train, merge, and compare; return the merge's result."""
    from peft import LoraConfig

    options = {"r": 4, "lora_alpha": 6} | lora
    adapter = train(base, kind, tmp_path / "adapter", LoraConfig(**options), resize)
    out = tmp_path / "out"
    result = run(base, adapter, out, workers=2)

    wanted, got = unmerged(base, kind, adapter, resize), merged(out, kind)
    scale = float(wanted.abs().max())
    if not resize:
        assert (merged(base, kind) - wanted).abs().max() > 1e-3 * scale
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=room * max(1.0, scale))
    return result
