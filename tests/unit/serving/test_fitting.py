"""The room for weights, against the engines' own plans on both sides of the limit."""

from dataclasses import replace

import pytest
from weightsmith.core.errors import UsageError
from weightsmith.serving import engines
from weightsmith.serving.engine import ServeOptions
from weightsmith.serving.fitting import WeightRoom

from tests.fakes.configs import LLAMA_8B, facts

WANTED = ServeOptions(gpu="nvidia-l4", max_model_len=16384, max_num_seqs=4)


def room(engine, **changes):
    return WeightRoom.of(engines()[engine], facts(LLAMA_8B), replace(WANTED, **changes))


def fits(found, size):
    try:
        return found.engine.plan(found.model, size, found.options).fits
    except UsageError as error:
        if "plan" in error.details:
            return False
        raise


@pytest.mark.parametrize("engine", ["llamacpp", "vllm"])
@pytest.mark.parametrize("changes", [{}, {"max_num_seqs": None}, {"gpu_count": 2}])
def test_a_byte_more_does_not_fit(engine, changes):
    found = room(engine, **changes)
    size = found.bytes

    assert size > 8 << 30
    assert fits(found, size)
    assert not fits(found, size + 1)


@pytest.mark.parametrize("engine", ["llamacpp", "vllm"])
def test_more_requests_leave_less_room(engine):
    two, eight = (room(engine, max_num_seqs=n) for n in (2, 8))
    cache = 6 * two.engine.plan(two.model, 1 << 30, two.options).kv_bytes_per_request

    assert two.bytes - eight.bytes == pytest.approx(cache, rel=0.1)


@pytest.mark.parametrize("engine", ["llamacpp", "vllm"])
def test_without_room_it_names_the_longest_request_that_leaves_some(engine):
    none = room(engine, max_model_len=131072, max_num_seqs=8)
    tokens = none.longest(4 << 30)

    assert none.bytes == 0
    assert 1024 < tokens < 131072
    assert room(engine, max_model_len=tokens, max_num_seqs=8).bytes >= 4 << 30
    assert room(engine, max_model_len=tokens + 256, max_num_seqs=8).bytes < 4 << 30


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"gpu": ""}, "needs the GPU"),
        ({"gpu": "cpu-amx"}, "needs the GPU"),
        ({"gpu": "nvidia-l5"}, "unknown GPU"),
        ({"max_model_len": None}, "needs the length"),
        ({"max_model_len": 1 << 20}, "longer than the model's"),
    ],
)
def test_what_the_room_needs_is_asked_for(changes, why):
    with pytest.raises(UsageError, match=why):
        assert room("vllm", **changes).bytes
