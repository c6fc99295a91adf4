"""FRoD: a basis and a sparsity pattern per role of layers, and values per layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from weightsmith.core.errors import InputRefused
from weightsmith.merging.claim import AdapterView, Claim, Family, Variant
from weightsmith.merging.frod import Frod
from weightsmith.merging.names import is_conv1d, module_key

_SHARED = ("frod_V", "frod_s_indices", "frod_s_size")
_OWN = ("frod_lambda_l", "frod_lambda_s_values")


def _claim(view: AdapterView) -> Iterator[Claim]:
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    shared: dict[str, dict[str, str]] = defaultdict(dict)
    for key in view.keys:
        parts = module_key(key).removeprefix("base_model.").split(".")
        if parts[0] in _SHARED and len(parts) == 2:
            shared[parts[1]][parts[0]] = key
        elif parts[-1] in _OWN:
            modules[".".join(parts[:-1])][parts[-1]] = key
    for role, keys in shared.items():
        yield Claim(keys=tuple(keys.values()), module=role)
    for module, keys in modules.items():
        yield _layer(view, module, keys, shared[_role(module)])


def _role(module: str) -> str:
    """Return PEFT's name of a layer's role (`_category_from_key` in its frod/model.py)."""
    parts = module.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    role = f"{parts[-2]}_{parts[-1]}"
    return "attention_output" if role == "output_dense" and parts[-3:-2] == ["attention"] else role


def _layer(view: AdapterView, module: str, own: dict[str, str], shared: dict[str, str]) -> Claim:
    if missing := [name for name in _SHARED if name not in shared]:
        raise InputRefused(
            f"{view.path} has no {', '.join(missing)} for {module}: computing its basis again "
            "from all layers is not reproducible across machines",
            hint="export it with save_projection=True on the machine where it was trained",
        )
    if missing := [name for name in _OWN if name not in own]:
        raise InputRefused(
            f"{view.path} has no {', '.join(missing)} for {module}",
            hint="the adapter is incomplete; export it again with save_pretrained",
        )
    target = view.need(module)
    shape = view.shape(target)
    transposed = is_conv1d(str(view.base_config.get("model_type", "")), module)
    width = shape[0] if transposed else shape[-1]
    count = view.keys[own["frod_lambda_s_values"]].shape
    expected = {
        shared["frod_V"]: (width, width),
        shared["frod_s_indices"]: (2, *count),
        own["frod_lambda_l"]: (width,),
    }
    shapes = {key: view.keys[key].shape for key in expected}
    wrong = [f"{key} {list(shape)}" for key, shape in shapes.items() if shape != expected[key]]
    if wrong or len(shape) != 2:
        raise InputRefused(
            f"{view.path}: {', '.join(wrong) or module} does not fit {target} {list(shape)}",
            hint="the adapter was trained on another model",
        )
    change = Frod(
        basis=view.stored(shared["frod_V"]),
        places=view.stored(shared["frod_s_indices"]),
        values=view.stored(own["frod_lambda_s_values"]),
        lengths=view.stored(own["frod_lambda_l"]),
        transposed=transposed,
    )
    return Claim(keys=tuple(own.values()), module=module, target=target, change=change)


FAMILY = Family(
    name="frod",
    kinds=frozenset({"FROD"}),
    claim=_claim,
    variants=(
        Variant(
            name="FRoD",
            how="float64 in the adapter's basis, rounded once; needs `save_projection`",
        ),
    ),
)
