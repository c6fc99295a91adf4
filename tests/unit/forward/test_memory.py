"""What a walk is planned to take, against what was measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from weightsmith.forward.greedy import Prefix, Questions, _fits, batch_tokens, batches
from weightsmith.forward.memory import WalkSize, batch_bytes, single_pass_bytes, walk_bytes
from weightsmith.merging.reference import load_network
from weightsmith.models.shape import ModelShape
from weightsmith.quantizers import formats
from weightsmith.stages.quality import quality_memory
from weightsmith.stages.quantize import quantize_memory

from tests.unit.validating.conftest import make_model

MIB, GIB = 1 << 20, 1 << 30


def shape(layers: int, hidden: int, inter: int, heads: int, kv: int, vocab: int) -> ModelShape:
    config = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
    }
    return ModelShape.of(config, "LlamaForCausalLM", "bfloat16")


SMOL = shape(30, 576, 1536, 9, 3, 49152)
HALF = shape(24, 1024, 4096, 16, 8, 49152)
ONE = shape(16, 2048, 8192, 32, 8, 49152)
SEVEN = shape(32, 4096, 14336, 32, 8, 32000)
SEVENTY = shape(80, 8192, 28672, 64, 8, 128256)


@pytest.mark.parametrize(
    ("model", "views", "rows", "tokens", "adapter", "once", "measured"),
    [
        (SMOL, 2, 33, 81, 20, False, 754),
        (HALF, 2, 8, 48, 35, False, 448),
        (ONE, 2, 8, 48, 45, False, 518),
        (SMOL, 3, 8, 80, 12, True, 706),
        (ONE, 3, 8, 80, 45, True, 988),
        (SMOL, 2, 8, 256, 0, True, 602),
        (ONE, 2, 8, 256, 0, True, 965),
    ],
    ids=["0.13B", "0.5B", "1B", "validate 0.13B", "validate 1B", "gate 0.13B", "gate 1B"],
)
def test_a_plan_covers_what_was_measured(
    model: ModelShape, views: int, rows: int, tokens: int, adapter: int, once: bool, measured: int
) -> None:
    """Anonymous memory in MiB, by `RssAnon`, on two cores.

    Of models that answer, or of a single pass (`once`) with 256 MiB for the comparison, which
    validation and gate add.
    """
    walk = WalkSize(views=views, rows=rows, tokens=rows * tokens, adapter_bytes=adapter * MIB)
    planned = (
        single_pass_bytes(model, walk) + 256 * MIB if once else walk_bytes(model, walk, 8 * GIB)
    )

    assert measured * MIB < planned < (1.7 if once else 1.8) * measured * MIB


def test_the_gate_of_a_large_model_needs_no_whole_head() -> None:
    """Measured with one layer and the head of 70B, 1024 tokens: 1244 MiB; the head has 4008."""
    planned = quality_memory(cast("Any", SimpleNamespace(shape=SEVENTY)), 1024)

    assert 1244 * MIB < planned < 6 * 10**9
    assert planned < 4 * SEVENTY.hidden * SEVENTY.vocab


def test_a_large_vocabulary_is_quantized_by_rows() -> None:
    """Measured with one layer and the head of 70B: 887 MiB, all processes of the build together."""
    matrices = SimpleNamespace(experts=0, expert_width=0)
    model = cast("Any", SimpleNamespace(shape=SEVENTY, matrices=matrices))
    options = cast("Any", SimpleNamespace(format=formats()["q4_k_m"], texts=None, options={}))

    assert 887 * MIB < quantize_memory(model, 141 * 10**9, options) < 6 * 10**9


def test_large_models_fit_small_machines_and_more_texts_in_one_pass_take_more() -> None:
    few = WalkSize(views=2, rows=5, tokens=5 * 80, adapter_bytes=170 * MIB)
    many = WalkSize(views=2, rows=33, tokens=33 * 100, adapter_bytes=830 * MIB)

    assert walk_bytes(SEVEN, few, 12 * GIB) < 4 * 10**9
    assert walk_bytes(SEVENTY, many, 12 * GIB) < 6 * 10**9
    assert walk_bytes(SEVENTY, many, 3 * GIB) < 3 * GIB
    passes = [single_pass_bytes(SMOL, WalkSize(views=2, rows=8, tokens=n)) for n in (4096, 16384)]
    assert passes[1] - passes[0] > 400 * MIB


@pytest.mark.parametrize("model", [ONE, SEVEN, SEVENTY], ids=["1B", "7B", "70B"])
def test_any_budget_above_the_least_suffices(model: ModelShape) -> None:
    walk = WalkSize(views=2, rows=33, tokens=33 * 200, adapter_bytes=100 * MIB)
    least, wanted = walk_bytes(model, walk, 1), walk_bytes(model, walk, 64 * GIB)
    between = range(least, wanted, (wanted - least) // 20)

    assert least < wanted
    assert all(walk_bytes(model, walk, budget) <= budget for budget in between)
    sizes = [batch_bytes(model, walk, budget) for budget in between]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 10


def test_batches_fill_the_budget_and_not_more_than_they_need() -> None:
    walk = WalkSize(views=2, rows=1000, tokens=100_000)

    assert batch_bytes(SMOL, walk, 64 * GIB) == 2 * 4096 * 4 * (2 * 30 * 192 + 8 * 576 + 3 * 1536)
    assert batch_bytes(SEVENTY, walk, 64 * GIB) == 4 * GIB
    assert batch_bytes(SEVENTY, walk, GIB // 2) == 256 * MIB
    assert 0 < batch_bytes(ONE, walk, 0) <= 2 * 512 * MIB


def test_a_batch_holds_the_tokens_that_fit(tmp_path: Path) -> None:
    model: Any = load_network(make_model(tmp_path / "base"), [])
    one = 4 * (2 * 3 * 2 * 16 + 8 * 64 + 3 * 96)

    for room, tokens in ((10 * one, 10), (11 * one - 1, 10), (1 << 40, 4096)):
        asked = Questions(prompts=[], ends=[], most=1, batch_bytes=room)
        assert batch_tokens(model, asked) == tokens

    # Only those of one pass have activations.
    kept, passing = 4 * 2 * 3 * 2 * 16, 4 * (8 * 64 + 3 * 96)
    rows = {n: [1] * 10 for n in range(9)}
    room = 3 * ((10 + 90) * kept + 10 * passing)

    for room_, drafts, count in (
        (room, {}, 3),
        (room - 1, {}, 2),
        (room, {0: [1] * 90}, 1),
        (3 * (100 * kept + 65 * passing), {0: [1] * 90}, 3),
    ):
        asked = Questions(prompts=[], ends=[], most=90, batch_bytes=room_)
        fits = _fits(model, asked, Prefix(layers=3), drafts)
        assert len(next(batches(rows, fits))) == count


@pytest.mark.slow
def test_a_batch_is_planned_for_every_architecture() -> None:
    """Sizes can be lists, missing, or refused because layers differ."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    asked, planned = Questions(prompts=[], ends=[], most=1), {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        try:
            config = kind()
            config.get_text_config()
        except Exception:  # noqa: BLE001 - has no default configuration of one text model
            continue
        planned[kind.__name__] = batch_tokens(SimpleNamespace(config=config), asked)

    assert len(planned) > 150
    assert {"BltConfig", "Gemma3nTextConfig", "Gemma4TextConfig", "Dots3NoteConfig"} < set(planned)
    assert all(16 <= tokens <= 4096 for tokens in planned.values())


def test_a_size_of_each_layer_counts_by_the_largest() -> None:
    sizes = {"num_attention_heads": 4, "hidden_size": 64, "num_hidden_layers": 2}
    tokens = []
    for inner in ([96, 5000], 5000, [96, 96]):
        config = SimpleNamespace(**sizes, intermediate_size=inner)
        config.get_text_config = lambda config=config: config
        asked = Questions(prompts=[], ends=[], most=1, batch_bytes=1 << 20)
        tokens.append(batch_tokens(SimpleNamespace(config=config), asked))

    assert tokens[0] == tokens[1] < tokens[2]
