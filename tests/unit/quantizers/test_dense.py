"""Architectures that a format does not know are refused."""

import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.quantizers import formats, of_format
from weightsmith.quantizers.architectures import DENSE, GROUPED, LLAMAS, ROUNDED, WALKED
from weightsmith.quantizers.schemes import SCHEMES

from tests.fakes.configs import facts


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
def test_what_an_engine_does_not_know_is_refused_with_what_it_knows(
    name: str, known: frozenset[str]
) -> None:
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
