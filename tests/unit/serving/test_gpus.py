import pytest
from weightsmith.core.errors import UsageError
from weightsmith.serving.devices import GPUS, gpu


def test_names_are_lower_case_with_the_maker_first():
    assert all(name.split("-")[0] in {"nvidia", "amd"} and name == name.lower() for name in GPUS)


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("nvidia-l4", "nvidia-l4"),
        ("L4", "nvidia-l4"),
        ("h100", "nvidia-h100-80gb"),
        ("nvidia-h100", "nvidia-h100-80gb"),
        ("h200", "nvidia-h200-141gb"),
        ("RTX 4090", "nvidia-rtx-4090"),
        ("mi300x", "amd-mi300x"),
    ],
)
def test_finds_by_name_and_alias(name, full):
    assert gpu(name).name == full


def test_less_is_usable_than_the_board_has():
    nvidia = [card for card in GPUS.values() if card.name.startswith("nvidia")]

    assert all(0.88 * card.total_bytes < card.usable_bytes for card in nvidia)
    assert all(card.usable_bytes < 1.02 * card.total_bytes for card in GPUS.values())


def test_number_formats_follow_the_compute_capability():
    assert (gpu("t4").bf16, gpu("t4").fp8) == (False, False)
    assert (gpu("a100-80gb").bf16, gpu("a100-80gb").fp8) == (True, False)
    assert (gpu("l4").bf16, gpu("l4").fp8) == (True, True)


def test_generations_follow_too():
    assert (gpu("t4").generation, gpu("h200").generation) == ("Turing", "Hopper")
    assert all(card.generation for card in GPUS.values())


def test_an_unknown_gpu_gets_near_misses_and_a_way_out():
    with pytest.raises(UsageError, match=r"--gpu|gpu|GPU") as caught:
        gpu("nvidia-l44")

    assert "nvidia-l4" in caught.value.hint
    assert "--gpu-memory" in caught.value.hint
