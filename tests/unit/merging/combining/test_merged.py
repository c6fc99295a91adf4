"""Whole merges by every method, against deltas combined with other code; what is kept of them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.merging import stream
from weightsmith.merging.combining.changes import adapter_digest
from weightsmith.merging.combining.methods import drop_at_random

from tests.unit.merging.conftest import MakeAdapter, MakeModel
from tests.unit.merging.oracle import MakeBase, merged, train, unmerged
from tests.unit.merging.oracle import run as merge_pairs

WEIGHTS = (0.7, -0.4, 1.2)
PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
Deltas = dict[str, list[torch.Tensor]]


@pytest.fixture
def three(make_model: MakeModel, make_adapter: MakeAdapter) -> tuple[Path, list[Path]]:
    """Adapters of different ranks, scalings and modules; one of them rank-stabilised."""
    base = make_model()
    return base, [
        make_adapter(base, "one", 1, r=4, lora_alpha=6),
        make_adapter(base, "two", 2, r=6, lora_alpha=3, use_rslora=True),
        make_adapter(base, "three", 3, r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"]),
    ]


def run(base: Path, adapters: list[Path], out: Path, **options: Any) -> dict[str, Any]:
    return merge_pairs(base, list(zip(adapters, WEIGHTS, strict=False)), out, **options)


def deltas_of(adapters: list[Path]) -> Deltas:
    """Return each adapter's delta of each tensor in float64, from its files alone."""
    found: Deltas = {}
    for adapter in adapters:
        config = json.loads((adapter / "adapter_config.json").read_text())
        root = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
        tensors = load_file(adapter / "adapter_model.safetensors")
        for key, a in tensors.items():
            if "lora_A" in key:
                b = tensors[key.replace("lora_A", "lora_B")]
                name = key.removeprefix("base_model.model.").replace(".lora_A", "")
                delta = b.double() @ a.double() * (config["lora_alpha"] / root)
                found.setdefault(name, []).append(delta)
    return found


def wanted(
    method: str, name: str, deltas: Deltas, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> torch.Tensor:
    weights = torch.tensor(WEIGHTS[: len(deltas[name])], dtype=torch.float64)
    rule = method.removesuffix("_svd")
    if rule in ("linear", "cat", "sequential", "svd"):
        delta = merge_utils.task_arithmetic(deltas[name], weights)
    else:
        parts = [part.float().double() for part in deltas[name]]
        if rule.startswith("dare"):
            masked = []
            for part, adapter in zip(parts, adapters, strict=False):
                array = part.numpy().astype(np.float32)
                drop_at_random(array, 0.4, "5", name, adapter_digest(adapter, stream.OpenFiles()))
                masked.append(torch.from_numpy(array).double())
            given = iter(masked)
            monkeypatch.setattr(merge_utils, "prune", lambda *_, **__: next(given))
        delta = getattr(merge_utils, rule)(parts, weights, 0.4)
        monkeypatch.undo()
    if method.endswith("svd"):
        rank = 3
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        delta = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return delta  # type: ignore[no-any-return]


def test_each_adapter_is_hashed_once_for_all_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 200 adapters of 400 MB, each of 560 tensors asks for all in turn."""
    roots = [tmp_path / str(number) for number in range(200)]
    for root in roots:
        root.mkdir()
        (root / "adapter_model.safetensors").write_text(root.name)
    own, hashed = stream.sha256_file, list[Path]()
    monkeypatch.setattr(stream, "sha256_file", lambda path: hashed.append(path) or own(path))

    files = stream.OpenFiles()
    found = [[adapter_digest(root, files) for root in roots] for _tensor in range(2)]

    assert found[0] == found[1]
    assert len({*found[0]}) == len(hashed) == 200


@pytest.mark.grid(4)
@pytest.mark.parametrize(
    "method", ["sequential", "linear", "cat", "svd", *PRUNING, *(f"{m}_svd" for m in PRUNING)]
)
def test_methods_in_delta_space(
    method: str, three: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapters = three
    options: dict[str, Any] = {"method": method}
    if method.startswith(PRUNING):
        options["density"] = 0.4
    if method.startswith("dare"):
        options["seed"] = 5
    if method.endswith("svd"):
        options["rank"] = 3
    result = run(base, adapters, tmp_path / "out", **options)
    deltas = deltas_of(adapters)
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert result["tensors"]["merged"] == len(deltas) == 14
    for name, tensor in before.items():
        delta = (
            wanted(method, name, deltas, adapters, monkeypatch)
            if name in deltas
            else torch.zeros_like(tensor)
        )
        # Half a unit of float32, and what float32 factors of a truncation are off by.
        off = (after[name].double() - (tensor.double() + delta)).abs().max()
        assert off < (1e-6 if method.endswith("svd") else 3e-7), name


@pytest.mark.parametrize(
    ("method", "space", "options"),
    [
        ("ties", "delta", {}),
        ("dare_linear", "factors", {}),
        ("linear", "delta", {"use_dora": True}),
        ("linear", "delta", {"modules_to_save": ["norm"]}),
        ("magnitude_prune", "delta", {"trainable_token_indices": [1, 5]}),
    ],
)
def test_one_folder_given_twice_is_two_adapters(
    method: str,
    space: str,
    options: dict[str, Any],
    make_model: MakeModel,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    base = make_model()
    one = make_adapter(base, target_modules=["q_proj"], **options)
    other = shutil.copytree(one, tmp_path / "other")
    density = {} if method == "linear" else {"density": 0.5}

    twice, copied = (
        run(base, [one, second], tmp_path / name, method=method, space=space, **density)
        for name, second in (("twice", one), ("copied", other))
    )

    assert twice["shards"] == copied["shards"]


@pytest.mark.parametrize("method", ["dare_ties", "ties_svd"])
def test_bytes_do_not_depend_on_threads(
    method: str, three: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, adapters = three
    made = [
        run(base, adapters, tmp_path / str(workers), method=method, density=0.5, workers=workers)
        for workers in (1, 3)
    ]
    assert made[0]["shards"] == made[1]["shards"]


def test_the_seed_and_the_order_of_adapters(three: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, adapters = three
    pairs = tuple(zip(adapters, WEIGHTS, strict=True))

    def shards(name: str, seed: int, order: Callable[[Any], Any] = tuple) -> Any:
        options = {"method": "dare_linear", "density": 0.5, "seed": seed, "dtype": "bfloat16"}
        return merge_pairs(base, order(pairs), tmp_path / f"out-{name}", **options)["shards"]

    one = shards("one", 1)
    assert shards("again", 1) == one
    assert shards("other", 2) != one
    # float64 sums in another order round to the same bfloat16.
    assert shards("turned", 1, lambda p: tuple(reversed(p))) == one


@pytest.mark.parametrize("method", ["linear", "ties", "svd"])
def test_dora_is_combined_by_its_whole_change(
    method: str, make_model: MakeModel, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """With one adapter and nothing pruned, every method is the adapter itself."""
    base = make_model()
    adapter = make_adapter(base, "dora", 1, use_dora=True)
    options: dict[str, Any] = {"ties": {"density": 1.0}, "svd": {"rank": 32}}.get(method, {})
    merge_pairs(base, adapter, tmp_path / "plain")
    merge_pairs(base, adapter, tmp_path / "out", method=method, **options)
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in plain.items():
        assert torch.allclose(found[name], tensor, atol=2e-6), name


@pytest.mark.parametrize("method", ["linear", "cat", "ties", "magnitude_prune"])
def test_factor_space_is_pefts(
    method: str, make_model: MakeModel, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = make_model()
    adapters = [
        make_adapter(base, "one", 1, r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"]),
        make_adapter(base, "two", 2, r=4, lora_alpha=3, target_modules=["q_proj", "v_proj"]),
    ]
    density = 0.5 if method in ("ties", "magnitude_prune") else None
    run(base, adapters, tmp_path / "out", method=method, density=density, space="factors")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapters[0], adapter_name="one")
    model.load_adapter(adapters[1], adapter_name="two")
    model.add_weighted_adapter(
        ["one", "two"], list(WEIGHTS[:2]), "both", combination_type=method, density=density
    )
    after = load_file(tmp_path / "out" / "model.safetensors")
    layer: Any
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "lora_A") and "both" in layer.lora_A:
            b, a = layer.lora_B["both"].weight, layer.lora_A["both"].weight
            delta = b.double() @ a.double() * layer.scaling["both"]
            exact = (layer.base_layer.weight.double() + delta).float()
            assert torch.equal(after[f"{name}.weight"], exact), name


def test_what_peft_gets_wrong_is_refused(
    make_model: MakeModel, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = make_model()
    plain = make_adapter(base, "plain", 1)
    for name, options, what in (
        ("stabilised", {"use_rslora": True}, "rslora"),
        ("dora", {"use_dora": True}, "more than one pair"),
        ("ranks", {"r": 3}, "ranks .* differ"),
    ):
        other = make_adapter(base, name, 2, **options)
        with pytest.raises(InputRefused, match=what) as caught:
            run(base, [other, plain], tmp_path / "out", method="linear", space="factors")
        assert "--space" in caught.value.hint


COPIED: dict[str, dict[str, Any]] = {
    "sequential": {},
    "ties": {"method": "ties", "density": 0.1},
    "svd": {"method": "svd", "rank": 2},
    "factors": {"method": "cat", "space": "factors"},
}


@pytest.mark.parametrize(
    ("method", "saved"),
    # A copy of another type counts as a trained tensor, which no factors have.
    [
        *((m, torch.bfloat16) for m in COPIED),
        ("sequential", torch.float32),
        ("ties", torch.float32),
    ],
)
def test_a_copy_of_the_base_beside_the_factors_changes_nothing(
    method: str,
    saved: torch.dtype,
    make_model: MakeModel,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    """PEFT saves the weight of a targeted head or embedding with the factors, as it was loaded."""
    base = make_model(dtype=torch.bfloat16)
    written = {}
    for copies in (False, True):
        targets = {"target_modules": ["q_proj", "lm_head"]}
        adapters = [make_adapter(base, f"{n}-{copies}", n, copies, **targets) for n in (1, 2)]
        for adapter in adapters if copies else ():
            path = adapter / "adapter_model.safetensors"
            tensors, key = load_file(path), "base_model.model.lm_head.base_layer.weight"
            save_file(tensors | {key: tensors[key].to(saved)}, path, {"format": "pt"})
        for count in (1, 2):
            out = tmp_path / f"out-{copies}-{count}"
            pairs = [(adapter, 1.0) for adapter in adapters[:count]]
            merge_pairs(base, pairs, out, dtype="float32", **COPIED[method])
            written[copies, count] = load_file(out / "model.safetensors")
    for count in (1, 2):
        for name, tensor in written[False, count].items():
            torch.testing.assert_close(written[True, count][name], tensor, rtol=0, atol=2e-6)


@pytest.fixture
def pair(make_model: MakeModel, make_adapter: MakeAdapter) -> tuple[Path, list[Path]]:
    base = make_model()
    return base, [
        make_adapter(base, "one", 1, r=4, lora_alpha=6),
        make_adapter(base, "two", 2, r=6, use_rslora=True, target_modules=["q_proj", "up_proj"]),
    ]


@pytest.mark.grid(5)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "linear"},
        {"method": "cat"},
        {"method": "svd", "rank": 3},
        {"method": "svd"},
        {"method": "ties_svd", "density": 0.5, "rank": 5},
        {"method": "cat", "space": "factors"},
    ],
    ids=str,
)
def test_peft_loads_what_is_kept(
    kind: str,
    options: dict[str, Any],
    make_model: MakeModel,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    base = make_model(kind)
    narrow = ["q_proj", "up_proj"] if kind == "llama" else ["c_attn"]
    wide = "all-linear" if kind == "llama" else ["c_attn", "c_proj"]
    adapters = [
        make_adapter(base, "one", 1, r=4, lora_alpha=6, target_modules=wide),
        make_adapter(base, "two", 2, r=6, lora_alpha=8, target_modules=narrow),
    ]
    result = run(base, adapters, tmp_path / "kept", keep_adapter=True, **options)
    run(base, adapters, tmp_path / "merged", **options)
    assert {entry["path"] for entry in result["files"]} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    wanted, before = merged(tmp_path / "merged", kind), merged(base, kind)
    found = unmerged(base, kind, tmp_path / "kept")
    signal = (wanted - before).abs().max()
    assert signal > 1e-3
    assert (found - wanted).abs().max() < 1e-4 * signal
    # And the kept adapter, merged, is the merge.
    merge_pairs(base, tmp_path / "kept", tmp_path / "again")
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("merged", "again"))
    assert all(torch.allclose(tensor, two[name], atol=1e-6) for name, tensor in one.items())


def test_tokenizer_and_template_go_with_the_adapter(
    pair: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """As in a merge the last one's win, a tokenizer as a whole set."""
    base, (one, two) = pair
    own = {"tokenizer.json": "{}", "tokenizer_config.json": '{"eos_token": "</s>"}'}
    for name, text in (own | {"vocab.json": "{}", "chat_template.jinja": "one"}).items():
        (one / name).write_text(text)
    for name, text in (own | {"generation_config.json": '{"eos_token_id": 3}'}).items():
        (two / name).write_text(text)

    result = run(base, [one, two], tmp_path / "kept", keep_adapter=True, method="cat")

    names = {file.name for file in (tmp_path / "kept").iterdir()}
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    assert names == weights | set(own) | {"generation_config.json", "chat_template.jinja"}
    assert names == {file["path"] for file in result["files"]}
    assert (tmp_path / "kept" / "chat_template.jinja").read_text() == "one"
    assert any("taken from the adapter two" in finding for finding in result["findings"])


def test_a_module_has_no_more_than_the_ranks_of_its_adapters(
    pair: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """Together they may have less than the rank that is asked for."""
    base, adapters = pair
    result = run(base, adapters, tmp_path / "kept", keep_adapter=True, method="svd", rank=8)
    run(base, adapters, tmp_path / "merged", method="svd", rank=8)
    assert result["ranks"] == [4, 8]
    found = unmerged(base, "llama", tmp_path / "kept")
    assert (found - merged(tmp_path / "merged", "llama")).abs().max() < 1e-5
    result = run(base, adapters, tmp_path / "three", keep_adapter=True, method="svd", rank=3)
    tensors = load_file(tmp_path / "three" / "adapter_model.safetensors")
    assert {min(tensor.shape) for tensor in tensors.values()} == {*result["ranks"]} == {3}


def test_what_is_no_adapter_is_not_kept(
    pair: tuple[Path, list[Path]], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    base, adapters = pair
    with pytest.raises(UsageError, match="full rank"):
        run(base, adapters, tmp_path / "k", keep_adapter=True, method="ties", density=0.5)
    dora = make_adapter(base, "dora", 3, use_dora=True)
    with pytest.raises(InputRefused, match="more than pairs"):
        run(base, [adapters[0], dora], tmp_path / "k2", keep_adapter=True)
    assert not list(tmp_path.glob("k*/*.safetensors"))


def test_conflicts_are_measured_and_reported(pair: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, adapters = pair
    against = tmp_path / "against"
    against.mkdir()
    tensors = load_file(adapters[0] / "adapter_model.safetensors")
    turned = {n: -2 * t if "lora_B" in n else t for n, t in tensors.items()}
    save_file(turned, against / "adapter_model.safetensors")
    (against / "adapter_config.json").write_bytes(
        (adapters[0] / "adapter_config.json").read_bytes()
    )
    # The second weight is negative, so that the turned adapter pulls the same way.
    for method in ("sequential", "svd"):
        result = run(base, [adapters[0], against], tmp_path / f"same-{method}", method=method)
        (numbers,) = result["conflicts"]
        assert numbers["adapters"] == ["one", "against"]
        assert numbers["cosine"] == pytest.approx(1.0)
        assert numbers["opposing_signs"] == 0.0
        assert numbers["norm_ratio"] == pytest.approx(0.8 / 0.7, rel=1e-3)
        assert not [f for f in result["findings"] if "conflict" in f]
    result = merge_pairs(base, [(adapters[0], 1.0), (against, 1.0)], tmp_path / "opposed")
    (numbers,) = result["conflicts"]
    assert numbers["cosine"] == pytest.approx(-1.0)
    assert numbers["opposing_signs"] == 1.0
    assert len(numbers["cosine_per_tensor"]) == 14
    (warning,) = [f for f in result["findings"] if "conflict" in f]
    assert "-1.000" in warning
    assert "100%" in warning


KIND = "sarvam_moe"
FUSED = "model.layers.1.attention.query_key_value.weight"
LAYERS = (["q_proj", "v_proj"], ["q_proj", "k_proj"])


@pytest.fixture
def two(bases: MakeBase, tmp_path: Path) -> tuple[Path, list[Path]]:
    """Adapters of which both change the query, and each one other part."""
    base = bases(KIND)
    return base, [
        train(base, KIND, tmp_path / f"{n}", LoraConfig(r=4 + n, target_modules=names))
        for n, names in enumerate(LAYERS)
    ]


def parts_of(adapter: Path) -> dict[str, torch.Tensor]:
    """Return the deltas of the layer in FUSED by the names of its parts, from the files alone."""
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for part in config["target_modules"]:
        prefix = f"base_model.model.model.layers.1.self_attn.{part}"
        a, b = (tensors[f"{prefix}.lora_{side}.weight"].double() for side in "AB")
        found[part] = b @ a * (config["lora_alpha"] / config["r"])
    return found


@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_each_layer_is_pruned_by_itself(
    method: str, two: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, adapters = two
    run(base, adapters, tmp_path / "out", method=method, density=0.4)

    folders = base, tmp_path / "out"
    before, after = (load_file(root / "model.safetensors")[FUSED] for root in folders)
    deltas, first = [parts_of(adapter) for adapter in adapters], 0
    for part in ("q_proj", "k_proj", "v_proj"):
        pairs = zip(deltas, WEIGHTS, strict=False)
        mine, weights = zip(*((d[part], w) for d, w in pairs if part in d), strict=True)
        combine = getattr(merge_utils, method)
        wanted = combine(list(mine), torch.tensor(weights, dtype=torch.float64), 0.4)
        rows = slice(first, first + len(wanted))
        found = after[rows].double() - before[rows].double()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        first = rows.stop
    assert first == len(after)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "linear"},
        {"method": "svd", "rank": 8},
        {"method": "ties_svd", "density": 0.4, "rank": 8},
        {"method": "ties", "density": 0.4, "space": "factors", "equal": True},
    ],
    ids=str,
)
def test_what_is_kept_is_the_merge(
    options: dict[str, Any], two: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, adapters = two
    if options.pop("equal", False):  # factors are combined where their ranks are equal
        config = LoraConfig(r=4, target_modules=LAYERS[1])
        adapters = [adapters[0], train(base, KIND, tmp_path / "of-4", config)]
    run(base, adapters, tmp_path / "out", **options)
    run(base, adapters, tmp_path / "kept", keep_adapter=True, **options)

    found, wanted = unmerged(base, KIND, tmp_path / "kept"), merged(tmp_path / "out", KIND)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
