"""What `auto` chooses where length and number are both left to it: by trying all, and in text."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from weightsmith.core.errors import UsageError
from weightsmith.serving.auto import Fitting, choices, choose_length
from weightsmith.serving.engine import ServeOptions
from weightsmith.serving.llamacpp import ENGINE as LLAMACPP
from weightsmith.serving.plan import summary
from weightsmith.serving.vllm import ENGINE as VLLM

from tests.fakes.configs import LLAMA_8B, LLAMA_8B_BYTES, facts
from tests.golden.cases import model

GIB = 1 << 30


@dataclass(frozen=True)
class Pool(Fitting):
    """Holds requests as long as their tokens together are no more than its own."""

    tokens: int
    step = 1

    def fits(self, tokens: int, requests: int) -> bool:
        return tokens * requests <= self.tokens


def tried(pool: Pool, own: int, wanted: int) -> int:
    """Return the length that the page promises, by trying every one that it names."""
    lengths = sorted({own, *(2**n for n in range(20) if 2**n < own)})
    while wanted > 1:
        fitting = [one for one in lengths if pool.most_requests(one, wanted) >= wanted]
        if fitting and fitting[-1] >= min(8192, own):
            return fitting[-1]
        wanted //= 2
    return pool.longest(1, own)


@pytest.mark.parametrize("wanted", [4, 8])
@pytest.mark.parametrize("own", [512, 2048, 8192, 40_960, 131_072])
@pytest.mark.parametrize("tokens", [0, 100, 5000, 9000, 17_000, 91_024, 400_000, 10_000_000])
def test_it_is_the_longest_usual_length_for_several(tokens: int, own: int, wanted: int) -> None:
    pool = Pool(tokens)
    found = choose_length(pool, own, wanted)

    assert found == tried(pool, own, wanted)
    rows = [(row["max_model_len"], row["max_num_seqs"]) for row in choices(pool, own, 256, found)]
    assert rows == sorted(rows, reverse=True)
    assert all(pool.most_requests(length, 256) == most for length, most in rows)
    assert len(rows) != 1
    assert len(rows) <= 6
    if rows:
        assert rows[0][0] == pool.longest(1, own)
        assert pool.most_requests(found, 256) in [most for _, most in rows]


def test_a_large_model_serves_several_clients() -> None:
    told = model("llama-3.1-70b")
    plan = VLLM.plan(facts(told["config"]), 40 * GIB, ServeOptions(gpu="nvidia-h100-80gb"))

    assert plan.max_model_len == 8192
    assert plan.max_num_seqs >= 8
    text = summary("vllm-awq", plan)
    assert "requests at once, of other lengths: 1 of 8" in text
    assert "at which 8 requests fit at once" in text


def test_what_is_asked_for_is_left_alone() -> None:
    wishes = {"gpu": "nvidia-l4", "max_num_seqs": 1}
    plan = VLLM.plan(facts(LLAMA_8B), LLAMA_8B_BYTES, ServeOptions(**wishes))

    assert plan.max_model_len > 8192
    assert plan.max_num_seqs == 1
    assert plan.choices == ()


@pytest.mark.parametrize(
    ("engine", "machine"),
    [(VLLM, {"gpu": "nvidia-h100-80gb"}), (LLAMACPP, {"host_memory_bytes": 16 * GIB})],
)
def test_where_nothing_fits_the_nearest_would_be_of_use(engine, machine: dict) -> None:
    told = facts(model("llama-3.1-70b")["config"])
    with pytest.raises(UsageError, match="max_model_len 8192 x max_num_seqs 1") as caught:
        engine.plan(told, 132 * GIB, ServeOptions(**machine))

    way = caught.value.details["plan"].nearest[-1]
    names = {"gpu": "gpu", "gpu_count": "gpu_count", "memory": "host_memory_bytes"}
    options = {**machine, **{names[key]: way[key] for key in names if key in way}}
    again = engine.plan(told, 132 * GIB, ServeOptions(**options))
    assert again.max_model_len >= 8192


def test_packed_weights_are_not_proposed_to_be_packed() -> None:
    told = model("deepseek-v3")
    with pytest.raises(UsageError) as caught:
        VLLM.plan(facts(told["config"]), told["weight_bytes"], ServeOptions(gpu="nvidia-b200"))

    assert "4-bit" not in caught.value.hint
    assert "8 x nvidia-b200" in caught.value.hint


def test_the_image_holds_no_other_choices() -> None:
    plan = VLLM.plan(facts(LLAMA_8B), LLAMA_8B_BYTES, ServeOptions(gpu="nvidia-l4"))

    assert plan.choices
    assert "choices" not in plan.portable()


def test_a_partial_offload_is_in_the_text() -> None:
    told = facts(model("llama-3.1-70b")["config"])
    plan = LLAMACPP.plan(told, 40 * GIB, ServeOptions(gpu="nvidia-l4"))
    text = summary("llamacpp-q4_k_m", plan)

    assert f"{plan.gpu_layers} of 80 layers fit on nvidia-l4" in text
    assert "many times slower" in text
    assert "it would fit as a whole with:\n   - " in text


@pytest.mark.parametrize(
    ("name", "gpus", "copies"),
    [("deepseek-v3", 8, "8 times"), ("llama-3.1-70b", 16, "2 times"), ("llama-3.1-70b", 8, "")],
)
def test_a_cache_that_is_copied_to_each_gpu_is_said(name: str, gpus: int, copies: str) -> None:
    options = ServeOptions(gpu="nvidia-h200-141gb", gpu_count=gpus)
    plan = VLLM.plan(facts(model(name)["config"]), 600 * GIB, options)
    said = [note for note in plan.notes if "cannot be divided" in note]

    assert len(said) == bool(copies)
    assert all(copies in note and "--data-parallel-size" in note for note in said)
