"""Plain and rank-stabilised LoRA on linear layers: W + factor · B·A."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from toolchain.checkpoints.safetensors import TensorInfo
from toolchain.errors import InputRefused
from toolchain.merging.families.family import AdapterView, Claim, Family
from toolchain.merging.names import module_key
from toolchain.merging.outputs import Part, Term

_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?!weight$)[^.]+)?\.weight")
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_CONV1D_MODULES = ("c_attn", "q_attn", "c_proj", "c_fc")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_HEADS = ("lm_head", "embed_out", "output_layer")
_SHOWN = 5


def _claim(view: AdapterView) -> Iterator[Claim]:
    misfits: list[str] = []
    for module, sides in _pairs(view).items():
        if set(sides) != {"A", "B"}:
            raise InputRefused(
                f"{view.path}: {module} has only one of lora_A and lora_B",
                hint="the adapter is incomplete; export it again with save_pretrained",
            )
        a, b = (view.keys[sides[side]] for side in "AB")
        _check_rank(view, module, a, b)
        target = _target(view, module)
        scaling = view.config.scaling(module)
        left = Part(stored=view.stored(b.name), height=b.shape[0])
        right = Part(stored=view.stored(a.name), height=a.shape[0])
        if _is_transposed(view, module, target, a, b):
            left, right = right.turned, left.turned
        term = Term(
            adapter=view.index,
            left=left,
            right=right,
            scaling=scaling,
            factor=view.factor(scaling),
        )
        shape = view.sources[target].shape
        if shape != term.shape:
            misfits.append(f"{target}: base {list(shape)}, adapter {list(term.shape)}")
        yield Claim(keys=(sides["A"], sides["B"]), module=module, target=target, terms=(term,))
    if misfits:
        raise InputRefused(
            f"{view.path} was trained on another model; {len(misfits)} shapes differ, such as "
            + "; ".join(misfits[:_SHOWN]),
            hint=f"its configuration names the base {view.config.base_model or '(none)'!r}",
        )


FAMILY = Family(name="lora", kinds=frozenset({"LORA"}), claim=_claim)


def _pairs(view: AdapterView) -> dict[str, dict[str, str]]:
    """Sort the family's keys by module and side."""
    pairs: dict[str, dict[str, str]] = {}
    for key in view.keys:
        if match := _KEY.fullmatch(module_key(key)):
            sides = pairs.setdefault(match["module"], {})
            if match["side"] in sides:
                raise InputRefused(
                    f"{view.path} has lora_{match['side']} of {match['module']} twice:"
                    f" {sides[match['side']]} and {key}",
                    hint="export one adapter per folder",
                )
            sides[match["side"]] = key
    return pairs


def _check_rank(view: AdapterView, module: str, a: TensorInfo, b: TensorInfo) -> None:
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise InputRefused(
            f"{view.path}: {module} is no linear layer (lora_A {list(a.shape)},"
            f" lora_B {list(b.shape)})",
            hint="only LoRA on linear layers can be merged yet; serve this adapter unmerged",
        )
    rank = view.config.rank(module)
    if not a.shape[0] == b.shape[1] == rank:
        raise InputRefused(
            f"{view.path}: {module} has rank {a.shape[0]} in lora_A and {b.shape[1]} in lora_B,"
            f" but {rank} in adapter_config.json",
            hint="configuration and weights are of different trainings; export both together",
        )
    for info in (a, b):
        if info.dtype not in ("F32", "F16", "BF16"):
            raise InputRefused(
                f"{view.path}: {info.name} is of type {info.dtype}",
                hint="save the adapter in float32, float16 or bfloat16",
            )


def _target(view: AdapterView, module: str) -> str:
    """Return the name of the one base tensor that a module means; never a guess."""
    last = module.rpartition(".")[2]
    found = view.names.find(f"{module}.weight")
    tied = _is_tied(view.base_config, view.sources)
    if last in _EMBEDDINGS or (last in _HEADS and (tied or not found)):
        raise InputRefused(
            f"{view.path} has LoRA on {module}, an embedding or a head that shares its weight",
            hint="train without it in target_modules, or serve this adapter unmerged: adding to a "
            "shared weight would change both its uses",
        )
    return view.need(module)


def _is_tied(config: Mapping[str, object], tensors: Mapping[str, object]) -> bool:
    has_head = any(name.split(".")[-2:] == [head, "weight"] for name in tensors for head in _HEADS)
    text = config.get("text_config")
    nested = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    return not has_head or bool(config.get("tie_word_embeddings", nested))


def _is_transposed(
    view: AdapterView, module: str, target: str, a: TensorInfo, b: TensorInfo
) -> bool:
    """Say whether the base stores (in, out).

    The layer's class decides, as in PEFT, which overrules `fan_in_fan_out`; where the class is not
    known, the shape does, and a square matrix that only `fan_in_fan_out` speaks about is refused.
    """
    shape, straight = view.sources[target].shape, (b.shape[0], a.shape[1])
    kind = str(view.base_config.get("model_type", ""))
    if kind in _CONV1D_MODELS:
        return module.rpartition(".")[2] in _CONV1D_MODULES
    if not view.config.fan_in_fan_out or straight[0] != straight[1]:
        return view.config.fan_in_fan_out and shape == straight[::-1]
    raise InputRefused(
        f"{view.path} sets fan_in_fan_out, but {target} is square and {kind or 'this model'!r} is "
        "not known to store its weights transposed",
        hint="set fan_in_fan_out to false in adapter_config.json if its layers are nn.Linear",
    )
