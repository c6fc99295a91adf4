"""Settings that no target reads are refused; those that one of several reads are not."""

import pytest
from weightsmith.building.ignored import check_read
from weightsmith.building.targets import target_of
from weightsmith.core.errors import UsageError
from weightsmith.recipe.file import check_recipe
from weightsmith.recipe.schema import Quantize

VALUES = {
    "shared_layers": True,
    "split_max_size": "4G",
    "tensor_types": {"attn_v": "q8_0"},
    "bits": 5.0,
    "size": "2GB",
    "fit": "gpu",
    "mix": "nofile",
    "group_size": 64,
    "zero_point": False,
    "keep": ["down_proj"],
}


def check(targets=(), named=(), auto=None, serve=None, **quantize):
    data = {"name": "x", "base": {"source": "b"}, "targets": targets, "quantize": quantize}
    data |= {"serve": serve} if serve else {}
    recipe = check_recipe({**data, **({"auto": auto} if auto else {})}, "test")
    wanted = [one for one in named or targets if one != "auto"]
    check_read(recipe, [target_of(one) for one in wanted], auto="auto" in named)


def test_every_key_is_known():
    permissions = {"allow_low_bits", "allow_text_only", "imatrix"}
    assert VALUES.keys() == Quantize.model_fields.keys() - permissions


@pytest.mark.parametrize("key", VALUES)
def test_the_targets_that_the_hint_names_read_the_key(key):
    with pytest.raises(UsageError, match=f"quantize.{key}: vllm does not read it$") as caught:
        check(["vllm"], **{key: VALUES[key]})
    named = caught.value.hint.partition("that does: ")[2].removesuffix(" …").split(", ")
    for target in named:
        assert target.startswith(("llamacpp-", "vllm-"))
        check([target], **{key: VALUES[key]})


@pytest.mark.parametrize(
    ("targets", "quantize"),
    [
        (["llamacpp-q4_k_m"], {"bits": 4}),
        (["llamacpp-q8_0"], {"mix": "nofile"}),
        (["vllm-awq", "vllm-fp8"], {"size": "2GB"}),
        (["llamacpp-q4_k_m"], {"keep": ["down_proj"]}),
        (["vllm-awq"], {"tensor_types": {"attn_v": "q8_0"}}),
        (["vllm-fp8"], {"group_size": 64}),
    ],
)
def test_a_key_that_no_target_reads(targets, quantize):
    with pytest.raises(UsageError, match="does not read it"):
        check(targets, **quantize)


@pytest.mark.parametrize(
    ("key", "engines"),
    [("group_size", "llamacpp"), ("keep", "llamacpp"), ("zero_point", "llamacpp"),
     ("shared_layers", "vllm"), ("split_max_size", "vllm"), ("group_size", ["llamacpp"])],
)  # fmt: skip
def test_a_key_that_no_format_reads_of_which_one_is_chosen(key, engines):
    with pytest.raises(UsageError, match=f"quantize.{key}: no format of .* reads it") as caught:
        check(["auto"], auto={"engine": engines}, **{key: VALUES[key]})
    (other, *_) = caught.value.hint.partition("of which it is read: ")[2].split(", ")
    check(["auto"], auto={"engine": ["llamacpp", other]}, **{key: VALUES[key]})


def test_a_hint_names_no_target_where_none_takes_the_values():
    with pytest.raises(UsageError, match="bits: vllm-awq does not read it") as caught:
        check(["vllm-awq"], bits=4.4, size="8GB")
    assert caught.value.hint == "leave it out"


def test_another_target_of_the_recipe_reads_it():
    """One of a recipe's targets is built alone, as in a job of CI."""
    check(["llamacpp-mix", "llamacpp-q8_0"], bits=5)
    check(["llamacpp-mix", "llamacpp-q8_0"], ["llamacpp-q8_0"], bits=5)
    check(["llamacpp-q4_k_m-lora"], tensor_types={"attn_v": "q8_0"})
    check(["llamacpp-f16"], imatrix="walk", allow_low_bits=True)


@pytest.mark.parametrize("key", ["tool_parser", "reasoning_parser"])
def test_a_parser_is_for_engines_that_have_some(key):
    for name in ("auto", "none"):
        check(["llamacpp-q4_k_m"], serve={key: name})
    check(["llamacpp-q4_k_m", "vllm"], ["llamacpp-q4_k_m"], serve={key: "hermes"})
    with pytest.raises(UsageError, match=f"serve.{key} is 'hermes', and llama.cpp"):
        check(["llamacpp-q4_k_m"], serve={key: "hermes"})


def test_auto_without_the_target():
    auto = {"engine": "llamacpp"}
    check(["auto"], auto=auto)
    check(["auto", "vllm"], ["vllm"], auto=auto)
    check([], ["auto"], auto=auto, split_max_size="4G")
    check(["auto"], auto={"engine": "vllm"}, keep=["down_proj"])
    with pytest.raises(UsageError, match="no target is auto") as caught:
        check(["vllm"], auto=auto)
    assert "--target auto" in caught.value.hint


@pytest.mark.parametrize("change", [{"probe": False}, {"keep": "digests"}, {"keep": "none"}])
def test_weights_are_read_by_a_startup_probe_alone(change):
    suite = {"data": "questions.jsonl", "max_drop": 0.1}
    recipe = {"name": "x", "base": {"source": "x"}, "targets": ["vllm"], "evaluate": suite}
    told = recipe | {"replay": {"read_weights": True}}
    target = target_of("vllm")
    check_read(check_recipe(told, "test"), [target], auto=False)
    told["replay"] |= change
    with pytest.raises(UsageError, match="no startup probe asks these images"):
        check_read(check_recipe(told, "test"), [target], auto=False)
