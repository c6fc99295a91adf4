import pytest
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.quantizers import formats, of_format, quantizers
from weightsmith.quantizers.architectures import DENSE, GROUPED, LLAMAS, ROUNDED, WALKED
from weightsmith.quantizers.schemes import SCHEMES

from tests.fakes.configs import facts


def test_quantizers_are_found_by_listing_the_folder():
    assert "gguf" in quantizers()
    assert all(name == quantizer.name for name, quantizer in quantizers().items())


def test_every_format_has_one_maker():
    names = [format_.name for q in quantizers().values() for format_ in q.formats]

    assert len(names) == len(set(names)) == len(formats())
    assert of_format("q4_k_m").name == "gguf"


def test_an_unknown_format_gets_near_misses_and_the_list():
    with pytest.raises(UsageError, match="unknown format") as caught:
        of_format("Q4_KM")

    assert "q4_k_m" in caught.value.hint
    assert "f16" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "known"),
    [
        *((name, ROUNDED) for name in SCHEMES),
        ("gptq", GROUPED),
        ("nvfp4", WALKED),
        ("awq", GROUPED),
        ("gptq-gptqmodel", DENSE),
        ("awq-gptqmodel", DENSE - {"Gemma3ForCausalLM", "Cohere2ForCausalLM"}),
        ("awq-autoawq", LLAMAS),
        ("awq-compressed", LLAMAS),
        ("fp8-static", LLAMAS),
    ],
)
def test_what_an_engine_does_not_know_is_refused_with_what_it_knows(name, known):
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4}
    shape |= {"num_hidden_layers": 2, "vocab_size": 100}
    for architecture in sorted(DENSE | {"Phi3ForCausalLM", "FalconForCausalLM"}):
        model = facts({**shape, "architectures": [architecture]})
        check = of_format(name).check_input
        if architecture in known:
            check(formats()[name], model)
            continue
        with pytest.raises(InputRefused, match="unsupported architecture") as caught:
            check(formats()[name], model)
        named = "LlamaForCausalLM" if len(known) <= 20 else "docs/reference/architectures.md"
        assert named in caught.value.message
