"""Models with their weights in files, compared with `generate` of transformers and PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from weightsmith.forward import greedy as greedy_module
from weightsmith.forward import heads
from weightsmith.forward.greedy import Questions, greedy
from weightsmith.forward.libraries import ModelFails
from weightsmith.forward.lockstep import Lockstep
from weightsmith.forward.views import view
from weightsmith.merging.reference import UnmergedModel, answers, load_network

from tests.unit.forward import answering
from tests.unit.forward.answering import MOST, walked
from tests.unit.validating.conftest import make_adapter, make_model

PROMPTS = [[1, 7, 9, 200, 31], [1, 50, 60], [1, 300, 301, 302, 303, 304, 305, 306], [1, 4]]


def generated(root: Path, adapter: Path | None = None) -> list[list[int]]:
    """Return what transformers generates for each prompt alone, everything in memory."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return answering.generated(model.eval(), PROMPTS)


def asked(drafts: dict[int, Sequence[int]] | None = None) -> Questions:
    return Questions(prompts=PROMPTS, ends=[2], most=MOST, filler=3, drafts=drafts or {})


def answer(root: Path, adapter: Path | None = None, **more: Any) -> list[list[int]]:
    (found,) = walked(root, asked(**more), [(adapter, 1.0)] if adapter else [])
    return found.tokens


def adapter_of(tmp_path: Path, base: Path, kind: str, **options: Any) -> Path:
    targets = ["c_attn", "c_proj"] if kind == "gpt2" else ["q_proj", "o_proj"]
    return make_adapter(tmp_path / "lora", base, target_modules=targets, **options)


@pytest.mark.grid(6)
@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "gemma3",
        "qwen3_moe",
        pytest.param("qwen2", marks=pytest.mark.slow),
        pytest.param("gpt2", marks=pytest.mark.slow),
    ],
)
def test_a_view_answers_as_the_whole_model(tmp_path: Path, kind: str) -> None:
    base = make_model(tmp_path / "base", kind)
    lora = adapter_of(tmp_path, base, kind)

    assert answer(base) == generated(base)
    assert answer(base, lora) == generated(base, lora)


def test_a_layer_that_reads_the_base_has_its_weight(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    dora = adapter_of(tmp_path, base, "llama", use_dora=True)

    assert answer(base, dora) == generated(base, dora)


@pytest.mark.slow
def test_an_architecture_that_cannot_be_streamed_is_asked_in_memory(tmp_path: Path) -> None:
    """Jamba's state spaces use weights without calling their module."""
    base = make_model(tmp_path / "base", "jamba")
    chat = [[{"role": "user", "content": "What is the capital of France?"}]]

    with pytest.raises(ModelFails, match="not finite"):
        answer(base)

    network: Any = load_network(base, [])
    questions = Questions(prompts=PROMPTS, ends=[2], most=MOST, filler=3)
    assert greedy(network, questions, lambda _: None).tokens == generated(base)
    assert answers({"": UnmergedModel(model=base)}, chat, 3)[""][0]["finish_reason"]


@pytest.mark.grid(4)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_draft_changes_no_answer(tmp_path: Path, kind: str) -> None:
    base = make_model(tmp_path / "base", kind)
    true = generated(base)
    wrong = [[*row[:3], 11, *row[4:]] for row in true]

    for drafts in (
        dict(enumerate(true)),
        dict(enumerate(wrong)),
        {0: true[0][:5], 2: [9] * 30},
        {1: [], 3: [*true[3], 2, 2, 2]},
    ):
        assert answer(base, drafts=drafts) == true


def test_an_answer_ends_with_the_first_end_token_of_a_draft_or_of_its_own(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    true = generated(base)
    ends = [true[0][2], true[1][5], 2]
    wanted = [row[: next((i for i, t in enumerate(row) if t in ends), MOST) + 1] for row in true]

    for drafts in ({}, dict(enumerate(true))):
        (found,) = walked(base, Questions(prompts=PROMPTS, ends=ends, most=MOST, drafts=drafts), [])
        assert found.tokens == wanted


@pytest.mark.slow
def test_views_of_one_checkpoint_read_each_matrix_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model(tmp_path / "base")
    lora = adapter_of(tmp_path, base, "llama")
    shared: list[int] = []
    multiply = Lockstep._multiply

    def counted(self: Lockstep, requests: Any) -> None:
        shared.append(len(requests))
        multiply(self, requests)

    monkeypatch.setattr(Lockstep, "_multiply", counted)

    alone, adapted = walked(base, asked(), [], [(lora, 1.0)])

    assert alone.tokens == generated(base)
    assert adapted.tokens == generated(base, lora)
    assert shared.count(2) > 0.9 * len(shared)


@pytest.mark.slow
def test_a_view_with_replicated_layers_meets_its_base_at_the_right_matrices(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", num_key_value_heads=4, intermediate_size=64)
    spans = [[0, 2], [0, 3]]
    lora = make_adapter(tmp_path / "lora", base, target_modules=["q_proj"], layer_replication=spans)

    alone, adapted = walked(base, asked(), [], [(lora, 1.0)])

    assert alone.tokens == generated(base)
    assert adapted.tokens == generated(base, lora)


def multiplied_rows(monkeypatch: pytest.MonkeyPatch, height: int = 0) -> list[int]:
    """Return a list that gets the number of rows of each product, with such matrices alone."""
    found: list[int] = []
    multiply = Lockstep.multiply

    def counted(self: Lockstep, key: Any, inputs: torch.Tensor, matrix: torch.Tensor) -> Any:
        found.extend([inputs[..., 0].numel()] * (height in {0, len(matrix)}))
        return multiply(self, key, inputs, matrix)

    monkeypatch.setattr(Lockstep, "multiply", counted)
    return found


def test_a_draft_saves_the_steps_of_what_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pass is a product with each of seven matrices in three layers, and with the head."""
    base = make_model(tmp_path / "base")
    true, rows = generated(base), multiplied_rows(monkeypatch)
    other = next(token for token in range(9, 99) if all(token not in row for row in true))
    drafts = {
        "none": {},
        "right": dict(enumerate(true)),
        "one wrong token": {n: [*row[:5], 499, *row[6:]] for n, row in enumerate(true)},
        "another text": {n: [other] * 40 for n in range(len(PROMPTS))},
    }
    passes, read = {}, {}
    for how, given in drafts.items():
        rows.clear()
        assert answer(base, drafts=given) == true
        passes[how], read[how] = len(rows) // 22, sum(rows)
        if how == "none":
            tokens = sum(map(len, PROMPTS))
            # In the last layer, only those with logits.
            assert rows[:22] == [*([tokens] * 7 * 2), *([tokens] * 3), *([len(PROMPTS)] * 5)]

    assert passes == {"none": MOST, "right": 1, "one wrong token": 2, "another text": MOST}
    assert read["another text"] - read["none"] <= len(PROMPTS) * (MOST - 1) * 22


def test_drafts_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    model = view(base, [], Lockstep(2), 0)
    beyond = {0: [10_000, 5], 1: [*generated(base)[1][:2], 10_000]}

    assert answer(base, drafts=beyond) == generated(base)

    empty = Questions(prompts=[[1], []], ends=[2], most=4, drafts={1: [7, 7]})
    assert greedy_module._usable_drafts(model, empty) == {}
    # Nor do positions that depend on the length of the text.
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    model = view(make_model(tmp_path / "dynamic", rope_parameters=scaling), [], Lockstep(2), 0)
    assert greedy_module._usable_drafts(model, asked({0: [1, 2]})) == {}


def test_gemmas_scaled_embedding_reads_the_rows_that_are_used(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "gemma3", vocab_size=20_000)
    model = view(base, [], Lockstep(2), 0)
    embed = model.get_input_embeddings()

    found = embed(torch.tensor([[5, 9, 5]]))

    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).get_input_embeddings()
    torch.testing.assert_close(found, whole(torch.tensor([[5, 9, 5]])))
    assert embed.weight.untyped_storage().nbytes() < 1000


@pytest.mark.grid(4)
@pytest.mark.parametrize(
    ("kind", "options", "drafted", "positions"),
    [
        ("llama", {}, False, 100),
        ("llama", {}, True, 3),
        ("gemma3", {"final_logit_softcapping": 5.0}, True, 3),
        ("granite", {"logits_scaling": 3.0}, True, 3),
    ],
)
def test_margins_are_those_of_a_forward_pass(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    options: dict[str, float],
    drafted: bool,
    positions: int,
) -> None:
    """Against the whole model's logits over the finished text, generated or read from a draft.

    However few positions' logits are computed at a time, also if the model scales them.
    """
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(heads, "LOGIT_BYTES", positions * 4 * 512)
    most = multiplied_rows(monkeypatch, 512)  # of the head
    root = make_model(tmp_path / "base", kind, **options)
    expected = generated(root)
    drafts = {n: [*row[:5], 5, *row[6:]] for n, row in enumerate(expected)} if drafted else {}
    model = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
    (found,) = walked(root, asked(drafts), [])

    assert max(most) <= max(positions, len(PROMPTS))
    assert found.tokens == expected
    for prompt, row, margins in zip(PROMPTS, found.tokens, found.margins, strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*prompt, *row]])).logits[0]
        best = logits[len(prompt) - 1 : -1].topk(2).values
        assert margins == pytest.approx((best[:, 0] - best[:, 1]).tolist(), abs=1e-3)


def test_texts_with_states_that_mix_are_written_one_by_one() -> None:
    from transformers import RwkvConfig, RwkvForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2}
    model = RwkvForCausalLM(RwkvConfig(**sizes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    prompts = [list(range(first, first + 9)) for first in (30, 50, 70)]

    found = greedy(model, Questions(prompts=prompts, ends=[], most=8), lambda _: None)

    for prompt, tokens in zip(prompts, found.tokens, strict=True):
        text = [*prompt]
        for _ in range(8):
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([text]), use_cache=False).logits
            text.append(int(logits[0, -1].argmax()))
        assert tokens == text[len(prompt) :]
