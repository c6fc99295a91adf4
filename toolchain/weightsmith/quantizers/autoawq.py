"""AWQ by AutoAWQ (archived upstream): a second engine for the layout of `awq`.

AWQ's two searches are patched: on a CPU one corrupts weights and the other takes half an hour.

Scales: AutoAWQ saves a layer's weights by `tensor.cpu()`, which only copies from a GPU, and then
multiplies them in place. On a CPU every matrix stays multiplied by the first candidate scales.

Clipping: AutoAWQ and GPTQModel multiply every sampled input by every weight for each of eleven
limits. Here the squared error of a group's output over all tokens is computed as `d G d`, with d
the change of its weights and G the inputs' Gram matrix, which is computed once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from weightsmith.core.errors import UsageError
from weightsmith.core.trees import discard
from weightsmith.core.values import Format
from weightsmith.quantizers import checkpoints, running
from weightsmith.quantizers.architectures import LLAMAS
from weightsmith.quantizers.packed import view_of
from weightsmith.quantizers.packed_check import checked
from weightsmith.quantizers.quantizer import Options, Quantizer

if TYPE_CHECKING:
    from weightsmith.forward.kinds import Module, Tensor

_SAMPLED_TOKENS = 512
_GRID, _STEPS = 20, 10
"""Candidate limits: a group's largest weight times 1 - step / grid. All are AutoAWQ's values."""
AWQ_AUTOAWQ = Format(name="awq-autoawq", kind="awq", bits_per_weight=4.16)


def _options(format_: Format, requested: Options) -> Options:
    checkpoints.zero_point_option(format_, requested)
    if keep := checkpoints.keep_option(requested):
        raise UsageError(
            f"keep: {keep[0]} cannot stay in 16 bits, because AutoAWQ scales the inputs of every "
            "matrix",
            hint="use awq or awq-compressed, which support keep",
        )
    return {"group_size": checkpoints.group_option(requested)}


def main() -> None:
    """Run in the builder: quantize as set in the settings file of the command line."""
    settings = running.read_settings()
    raw, model = settings.raw, settings.model
    discard(raw)
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    library: Any = importlib.import_module("awq")
    patch_searches(importlib.import_module("awq.quantize.quantizer").AwqQuantizer)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    texts = running.texts(settings.calibration)
    joined = running.equal_length(running.samples(texts, tokenizer))
    gpu = torch.cuda.is_available()
    loaded = library.AutoAWQForCausalLM.from_pretrained(
        str(model),
        trust_remote_code=False,
        device_map="cuda" if gpu else "cpu",
        **({} if gpu else {"torch_dtype": torch.float32}),
    )
    group = settings.group_size
    config = {"zero_point": True, "q_group_size": group, "w_bit": 4, "version": "GEMM"}
    # AutoAWQ concatenates and splits the samples again; it silently drops samples that are longer
    # than its limit, and an incomplete last one.
    loaded.quantize(
        tokenizer, quant_config=config, calib_data=joined, max_calib_seq_len=len(joined[0]),
        max_calib_samples=len(joined), n_parallel_calib_samples=8,
    )  # fmt: skip
    loaded.save_quantized(str(raw), safetensors=True)
    checkpoints.finish(model, raw, settings.out, checkpoints.grouped_config("awq", group))


def patch_searches(search: Any) -> None:
    """Patch both searches of AutoAWQ 0.2.9's class AwqQuantizer (quantize/quantizer.py)."""
    upstream = search._compute_best_scale  # noqa: SLF001 - there is no public hook

    def best_scale(
        quantizer: object, x: Tensor, w: Tensor, seen: Tensor, module: Module, *more: object
    ) -> object:
        own, changed = module.state_dict, vars(module)
        changed["state_dict"] = lambda: {name: value.clone() for name, value in own().items()}
        try:
            return upstream(quantizer, x, w, seen, module, *more)
        finally:
            del changed["state_dict"]

    search._compute_best_scale = best_scale  # noqa: SLF001
    search._compute_best_clip = lambda own, weight, inputs: best_clip(  # noqa: SLF001
        own.group_size, own.pseudo_quantize_tensor, weight, inputs
    )


def best_clip(
    size: int, rounded: Callable[[Tensor], Sequence[Tensor]], weight: Tensor, inputs: Tensor
) -> Tensor:
    """Return each group's clipping limit with the smallest squared error of its output.

    weight [out, in] and inputs [..., in] are torch tensors, a group has `size` inputs, and
    `rounded` returns the quantized weights as its first value. The result is [out, groups, 1], as
    in AutoAWQ 0.2.9 (quantize/quantizer.py, _compute_best_clip) except for the rounding of sums.
    """
    rows = inputs.detach().reshape(-1, inputs.shape[-1])
    rows = rows[:: max(1, rows.shape[0] // _SAMPLED_TOKENS)].to(weight.device, weight.dtype)
    seen = rows.reshape(rows.shape[0], -1, size).transpose(0, 1)
    gram = seen.transpose(1, 2) @ seen  # [groups, size, size]
    own = weight.detach().reshape(weight.shape[0], -1, size).transpose(0, 1).contiguous()
    largest = own.abs().amax(-1, keepdim=True)  # [groups, out, 1]
    best, least = largest.clone(), None
    for step in range(_STEPS):
        limit = largest * (1 - step / _GRID)
        moved = rounded(own.clamp(-limit, limit))[0] - own
        error = (moved @ gram).mul_(moved).sum(-1, keepdim=True)
        if least is None:
            least = error
            continue
        better = error < least
        best[better], least[better] = limit[better], error[better]
    return best.transpose(0, 1)


QUANTIZER = Quantizer(
    name="autoawq",
    builder="autoawq",
    formats=(AWQ_AUTOAWQ,),
    recipe_number=5,
    check_input=lambda _format, model: checkpoints.check_grouped(model, LLAMAS),
    steps=lambda request: checkpoints.grouped_step(
        __name__, request, f"quantizing to {request.format.name} by AutoAWQ"
    ),
    check=lambda request: checked(request, checkpoints.in_groups(request), "autoawq"),
    peak_disk=checkpoints.peak_disk,
    options=_options,
    beside_adapters=checkpoints.refuse_scales,
    check_options=checkpoints.check_group,
    calibrated=lambda _format, _options: True,
    legacy="archived upstream: AutoAWQ is deprecated by its maker, and unchanged since 2025-05-11;"
    " awq makes the same kind of weights with a calibration of our own, for more models",
    view=view_of,
)

if __name__ == "__main__":
    main()
