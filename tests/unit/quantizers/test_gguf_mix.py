"""Mixes of llama.cpp's types: budgets, files of mixes, and what is refused."""

import json

import pytest
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.quantizers import formats, of_format
from weightsmith.quantizers.gguf_header import GgufTensorInfo
from weightsmith.quantizers.gguf_mix import (
    BOUND,
    LOSS,
    budget_options,
    guessed_type,
    kinds_of_rows,
    mixed,
    read_mix,
)

BITS = {
    "MXFP4": 4.25,
    "Q4_0": 4.5,
    "Q4_1": 5,
    "Q5_0": 5.5,
    "Q5_1": 6,
    "Q8_0": 8.5,
    "F16": 16,
    "F32": 32,
}


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
    """Bytes of a row without llama.cpp's library."""
    monkeypatch.setattr(
        "weightsmith.core.kernels.quants.row_bytes",
        lambda kind, columns: int(columns * BITS[kind.upper()] / 8),
    )


NAMES = ("blk.0.attn_q.weight", "blk.0.ffn_up.weight", "token_embd.weight")
TENSORS = {
    name: GgufTensorInfo(name=name, shape=shape, kind=0, offset=0)
    for name, shape in [
        *((name, (64, 64)) for name in NAMES),
        ("blk.0.attn_norm.weight", (64,)),
        ("blk.0.odd.weight", (32, 64)),
    ]
}
TARGETS = dict.fromkeys(TENSORS, ("Q8_0", True)) | {"blk.0.attn_norm.weight": ("F32", False)}
LOSSES = {
    name: {kind: harm * 4 ** -BITS[kind] for kind in BITS if kind not in ("F16", "F32")}
    for name, harm in zip(NAMES, (100, 1, 10), strict=True)
}
WEIGHTS = sum(each.rows * each.columns for each in TENSORS.values())


def bytes_of(types):
    fixed = int(64 * 32 / 8)
    return fixed + sum(
        int(TENSORS[n].columns * BITS[kind.upper()] / 8) * TENSORS[n].rows
        for n, kind in types.items()
    )


@pytest.mark.parametrize("bits", [5.6, 6, 7, 9])
def test_bits_are_those_of_the_whole_file(bits):
    found = mixed({"bits": bits}, TENSORS, TARGETS, LOSSES, 1000)

    assert bytes_of(found.types) * 8 / WEIGHTS <= bits
    assert found.types["blk.0.odd.weight"] == "q8_0"
    assert BITS[found.types[NAMES[0]].upper()] >= BITS[found.types[NAMES[1]].upper()]
    assert 0 <= float(found.about[BOUND]) <= float(found.about[LOSS])


def test_rows_of_no_block_at_all_keep_the_type_that_llamacpp_gives_them():
    """None of their types were measured, since there is none."""
    targets = TARGETS | {"blk.0.odd.weight": ("F16", True)}

    found = mixed({"bits": 9}, TENSORS, targets, {**LOSSES, "blk.0.odd.weight": {}}, 1000)

    assert found.types["blk.0.odd.weight"] == "f16"


def test_a_size_is_that_of_the_file_with_its_header():
    small = mixed({"size": 19_000}, TENSORS, TARGETS, LOSSES, 1000)
    large = mixed({"size": 40_000}, TENSORS, TARGETS, LOSSES, 1000)

    assert bytes_of(small.types) + 1000 < 19_000
    assert {*large.types.values()} == {"q8_0"}


@pytest.mark.parametrize("wanted", [{"bits": 4.3}, {"size": 9000}])
def test_a_budget_below_the_smallest_types_names_what_works(wanted):
    with pytest.raises(InputRefused, match="no mix is that small") as refused:
        mixed(wanted, TENSORS, TARGETS, LOSSES, 1000)

    bits = float(refused.value.hint.split("quantize.bits to ")[1].split(",")[0])
    size = int(refused.value.hint.split("quantize.size to ")[1].split("MB")[0]) * 10**6
    assert mixed({"bits": bits}, TENSORS, TARGETS, LOSSES, 1000).types
    assert mixed({"size": size}, TENSORS, TARGETS, LOSSES, 1000).types


def test_a_file_has_the_type_of_each_tensor():
    types = {name: "q4_0" for name, (_, quantized) in TARGETS.items() if quantized}

    found = mixed({"mix": {**types, "blk.0.attn_norm.weight": "f32"}}, TENSORS, TARGETS, {}, 0)

    assert (found.types, found.about) == (types, {})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"blk.7.attn_q.weight": "q4_0"}, "another model: this one has no 'blk.7.attn_q.weight'$"),
        ({NAMES[0]: None}, "it has no type for blk.0.attn_q"),
        ({NAMES[0]: "q4_k"}, "rows of 64 weights are no multiple of 256"),
    ],
)
def test_the_mix_of_another_model_is_refused(change, why):
    types = dict.fromkeys(TENSORS, "q4_0") | change
    given = {name: kind for name, kind in types.items() if kind}

    with pytest.raises(InputRefused, match=why):
        mixed({"mix": given}, TENSORS, TARGETS, {}, 0)


def test_a_build_says_its_mix(tmp_path):
    file = tmp_path / "build.json"
    file.write_text(json.dumps({"artifact": {"details": {"tensor_types": {"a": "Q4_K"}}}}))
    assert read_mix(file) == {"a": "q4_k"}
    file.write_text(json.dumps({"tensor_types": {"b": "iq4_xs"}}))
    assert read_mix(file) == {"b": "iq4_xs"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is not JSON"),
        ("[]", "has no tensor_types"),
        ('{"artifact": [1]}', "has no tensor_types"),
        ('{"tensor_types": ["q4_k"]}', "has no tensor_types"),
        ('{"tensor_types": {"a": "int4"}}', "no type 'int4' for 'a'"),
        ('{"tensor_types": {"a": "q4_k", "a": "q8_0"}}', "duplicate"),
        ('{"tensor_types": {"a\\u0007": "int4"}}', r"for 'a\\x07'"),
        ('{"tensor_types": {"a": ["q4_k"]}}', "no type"),
    ],
)
def test_what_is_no_mix_is_refused(tmp_path, text, why):
    (tmp_path / "mix.json").write_text(text)

    with pytest.raises(InputRefused, match=why):
        read_mix(tmp_path / "mix.json")
    with pytest.raises(InputRefused, match="cannot read"):
        read_mix(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, "needs a budget"),
        ({"bits": 4.4, "size": 10**9}, r"quantize\.bits and quantize\.size cannot be combined"),
        ({"bits": 3.9}, r"3\.9 is not between 4\.25"),
        ({"bits": 2.5, "allow_low_bits": True}, r"not between 2\.625"),
        ({"bits": 5, "tensor_types": {"attn": "q8_0"}}, "tensor_types is not supported by mix"),
        ({"bits": 5, "split_max_size": "1G"}, "split_max_size is not supported by mix"),
    ],
)
def test_options_that_make_no_mix_are_refused(settings, why):
    with pytest.raises(UsageError, match=why):
        of_format("mix").options(formats()["mix"], settings)


def test_low_types_are_mixed_where_they_are_allowed():
    assert budget_options({"bits": 3, "allow_low_bits": True}) == {"bits": 3, "low": True}
    assert "Q3_K" in kinds_of_rows(512, low=True)
    assert "Q3_K" not in kinds_of_rows(512, low=False)
    assert "Q4_K" not in kinds_of_rows(576, low=True)
    assert kinds_of_rows(100, low=True) == ()


@pytest.mark.parametrize(
    ("kinds", "name"),
    [
        (["Q4_K", "Q4_K", "Q6_K", "F32", "F32", "F32"], "q4_k_m"),
        (["q5_0", "q8_0", "q5_0"], "q5_0"),
        (["mxfp4"], "mxfp4_moe"),
        (["f16"], "q8_0"),
    ],
)
def test_the_file_type_is_what_llamacpp_would_guess(kinds, name):
    assert guessed_type(kinds) == name
