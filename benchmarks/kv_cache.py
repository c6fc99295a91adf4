"""What rounding the KV cache to float8_e4m3 costs, with calibrated scales and with 1.0.

    python benchmarks/kv_cache.py MODEL CALIBRATION TEXT [TOKENS]

CALIBRATION and TEXT are JSON Lines of `text` or `messages`. Keys and values are rounded in
transformers' cache as vLLM's kernels do: divided by the scale, cut at 448, rounded, multiplied.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from weightsmith.quantizers.layerwise.maxima import cache_scales
from weightsmith.quantizers.quality.texts import as_lines


class Rounded(DynamicCache):
    """A cache that returns keys and values as an 8-bit one would."""

    def __init__(self, scales: list[tuple[float, float]]) -> None:
        super().__init__()
        self.scales, self.cut, self.count = scales, 0, 0

    def update(self, keys: Any, values: Any, layer: int, *more: Any, **named: Any) -> Any:
        """Keep what the first forward gives, rounded."""
        pair = (self._of(one, s) for one, s in zip((keys, values), self.scales[layer], strict=True))
        return super().update(*pair, layer, *more, **named)

    def _of(self, states: torch.Tensor, scale: float) -> torch.Tensor:
        divided = states / scale
        self.cut += int((divided.abs() > 448).sum())
        self.count += states.numel()
        return divided.clamp(-448, 448).to(torch.float8_e4m3fn).to(states.dtype) * scale


def rows(path: str) -> tuple[dict[str, Any], ...]:
    """Return the lines of a file."""
    return tuple(json.loads(line) for line in Path(path).read_text("utf-8").splitlines() if line)


def texts(model: Path, path: str) -> list[str]:
    """Return the texts as the model reads them."""
    return [json.loads(line)["text"] for line in as_lines(model, rows(path)).splitlines()]


def main() -> None:
    """Print a table of the divergence from the model with a cache that is not rounded."""
    model, tokens = Path(sys.argv[1]), int(sys.argv[4]) if sys.argv[4:] else 2048
    found = list(cache_scales(model, texts(model, sys.argv[2])).values())
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = "\n".join(texts(model, sys.argv[3]))
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][:, :tokens]
    argument = "cache" if "cache" in _names(network) else "past_key_values"
    with torch.inference_mode():
        right = network(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        print(f"{ids.shape[1]} tokens; nats: mean, mean of the last half, largest; top-1")
        for name, scales in (("calibrated", found), ("1.0", [(1.0, 1.0)] * len(found))):
            cache = Rounded(scales)
            made = network(input_ids=ids, use_cache=True, **{argument: cache}).logits[0]
            other = made.log_softmax(-1)
            loss = (right.exp() * (right - other)).sum(-1)
            top = float((right.argmax(-1) == other.argmax(-1)).float().mean())
            half = float(loss[len(loss) // 2 :].mean())
            print(
                f"| {name} | {float(loss.mean()):.6f} | {half:.6f} | {float(loss.max()):.4f} |"
                f" {100 * top:.2f} % | {cache.cut} of {cache.count} cut |"
            )
    for kind, one in zip("kv", zip(*found, strict=True), strict=True):
        print(f"{kind}_scale: {min(one):.4f} to {max(one):.4f}")


def _names(network: Any) -> tuple[str, ...]:
    import inspect

    return tuple(inspect.signature(type(network).forward).parameters)


if __name__ == "__main__":
    main()
