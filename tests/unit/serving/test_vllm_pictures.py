"""What a plan for vLLM says of a model's pictures."""

import pytest
from weightsmith.core.errors import UsageError
from weightsmith.serving.vllm import check_pictures

GEMMA, SMOL = "Gemma3ForConditionalGeneration", "SmolVLMForConditionalGeneration"
NONE = {"limit-mm-per-prompt": {"image": 0, "video": 0}}


@pytest.mark.parametrize(
    ("architecture", "on_cpu", "told"),
    [(GEMMA, True, True), (GEMMA, False, False), ("LlavaForConditionalGeneration", True, False)],
)
def test_a_plan_says_where_a_picture_is_read_in_one_direction(architecture, on_cpu, told):
    notes = check_pictures(architecture, {}, on_cpu=on_cpu)

    assert "reads pictures" in notes[0]
    assert any("one direction" in note for note in notes) is told


def test_a_server_that_would_not_start_on_a_cpu_is_refused():
    with pytest.raises(UsageError, match="num2words"):
        check_pictures(SMOL, {}, on_cpu=True)

    assert check_pictures(SMOL, {}, on_cpu=False)
    assert check_pictures(SMOL, NONE, on_cpu=True) == []
