"""FRoD: a basis and a sparsity pattern per role of layers, and values per layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.errors import InputRefused
from weightsmith.merging.claim import AdapterView, Claim, Family
from weightsmith.merging.names import is_conv1d, module_key
from weightsmith.merging.outputs import Files, MergedTensor, Rows, StoredTensor

if TYPE_CHECKING:
    import numpy as np

_SHARED = ("frod_V", "frod_s_indices", "frod_s_size")
_OWN = ("frod_lambda_l", "frod_lambda_s_values")
_SMALLEST = 1e-12
"""Norms below it count as zero; PEFT's limit."""


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
        # PEFT's name of a layer's role (`_category_from_key` in its frod/model.py).
        parts = module.split(".")
        alone = len(parts) == 1 or parts[-2].isdigit()
        role = parts[-1] if alone else f"{parts[-2]}_{parts[-1]}"
        if not alone and parts[-3:] == ["attention", "output", "dense"]:
            role = "attention_output"
        yield _layer(view, module, keys, shared[role])


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
    change = _Frod(
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
    variants={
        "FRoD": "float64 in the adapter's basis, rounded once; needs `save_projection`",
    },
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frod:
    """U (diag(l) + S) Vᵀ in float64, where U has the normalised columns of W V⁻ᵀ.

    `FrodLayer` in peft/tuners/frod/layer.py. PEFT recomputes V from the weights of all layers
    each time it loads; here it is the adapter's, which was used in training.
    """

    basis: StoredTensor
    """V, (in, in)."""
    places: StoredTensor
    """Rows and columns of the nonzeros of S, (2, n)."""
    values: StoredTensor
    """The nonzeros of S, (n,)."""
    lengths: StoredTensor
    """l, (in,)."""
    transposed: bool
    """True if the base stores (in, out)."""
    whole: bool = True
    by_row: bool = False

    def held_elements(self, output: MergedTensor) -> int:
        width = output.rows if self.transposed else output.columns
        return 3 * output.rows * output.columns + 3 * width * width

    def begin(self, output: MergedTensor, files: Files) -> Rows:
        import numpy as np

        def rows(first: int, count: int) -> np.ndarray:
            weight = output.source.rows(files, 0, output.rows, output.columns).astype("float64")
            weight = weight.T if self.transposed else weight
            basis = files.array(self.basis).astype("float64")
            try:
                coordinates = np.linalg.solve(basis, weight.T).T
            except np.linalg.LinAlgError as error:
                raise InputRefused(
                    f"{self.basis.info.name} is singular, so {output.name} cannot be merged",
                    hint="the adapter's file is damaged; export it again with save_pretrained",
                ) from error
            norms = np.sqrt(np.einsum("ij,ij->j", coordinates, coordinates))
            kept = norms > _SMALLEST
            coordinates = np.where(kept, coordinates, 0.0) / np.where(kept, norms, 1.0)
            inner = np.diag(files.array(self.lengths).astype("float64"))
            at = files.array(self.places).astype("int64")
            if at.size and not (at.min() >= 0 and at.max() < len(inner)):
                raise InputRefused(
                    f"{self.places.info.name} has indices outside of {list(inner.shape)}",
                    hint="the adapter's file is damaged; export it again with save_pretrained",
                )
            new = files.array(self.values).astype("float64")
            np.add.at(inner, (at[0], at[1]), new)
            changed = coordinates @ inner @ basis.T
            changed = changed.T if self.transposed else changed
            return np.ascontiguousarray(changed[first : first + count])

        return rows
