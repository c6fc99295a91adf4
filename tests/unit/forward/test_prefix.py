"""Prompts that begin alike, compared with `generate` of transformers for each prompt alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from weightsmith.forward.greedy import Prefix, Questions, empty_prefix, greedy, shared_prefix
from weightsmith.forward.keys import Keys
from weightsmith.merging.reference import load_network

from tests.unit.forward.answering import MOST, generated, walked
from tests.unit.validating.conftest import edit_tensors, make_adapter, make_model

HEAD = [1, *range(40, 99)]
PROMPTS = [[*HEAD, *tail] for tail in ([7, 9, 200, 31], [50], [300, 301, 302, 303, 304], [4, 4])]
KINDS = ["llama", "qwen2", "gpt2", "gemma3", "qwen3_moe", "bloom", "opt", "mistral"]


@pytest.mark.grid(8)
@pytest.mark.parametrize("kind", KINDS)
def test_answers_after_a_shared_prefix_are_those_of_each_prompt_alone(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model(tmp_path / "base", kind)
    true = generated(load_network(base, []), PROMPTS)
    lengths: list[int] = []
    rows = Prefix.rows
    monkeypatch.setattr(Prefix, "rows", lambda p, *n: (lengths.append(p.length), rows(p, *n))[1])
    wrong = [[*row[:3], 11, *row[4:]] for row in true]

    for drafts in ({}, dict(enumerate(true)), dict(enumerate(wrong)), {0: true[0][:4]}):
        asked = Questions(prompts=PROMPTS, ends=[2], most=MOST, filler=3, drafts=drafts)
        assert walked(base, asked, [])[0].tokens == true
    assert len(HEAD) in lengths


@pytest.mark.slow
def test_an_adapter_has_its_own_prefix(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    lora = make_adapter(tmp_path / "lora", base, target_modules=["q_proj", "v_proj"])
    both = [], [(lora, 1.0)]

    found = walked(base, Questions(prompts=PROMPTS, ends=[2], most=MOST), *both)

    for one, adapters in zip(found, both, strict=True):
        assert one.tokens == generated(load_network(base, adapters), PROMPTS)


@pytest.mark.parametrize("window", [8, 4096])
def test_a_window_shorter_than_the_text_has_no_shared_prefix(tmp_path: Path, window: int) -> None:
    base = make_model(tmp_path / "base", "mistral", sliding_window=window)
    network = load_network(base, [])
    asked = Questions(prompts=PROMPTS, ends=[2], most=MOST)

    prefix = shared_prefix(network, PROMPTS, empty_prefix(network, PROMPTS, MOST))

    assert prefix.length == (0 if window == 8 else len(HEAD))
    assert greedy(network, asked, lambda _: None).tokens == generated(network, PROMPTS)


@pytest.mark.parametrize("kind", ["mpt", "gpt_neo", "doge"])
@pytest.mark.parametrize("prompts", [PROMPTS, [prompt[-7:] for prompt in PROMPTS]])
def test_attention_that_counts_columns_finds_no_holes(
    tmp_path: Path, kind: str, prompts: list[list[int]]
) -> None:
    base = make_model(tmp_path / "base", kind)
    # What Doge makes of all values, strong enough to decide tokens.
    edit_tensors(base, lambda t: t.update({n: 40 * t[n] for n in t if n.endswith(".A")}))
    true = generated(load_network(base, []), prompts)
    wrong = [[*row[:3], 11, *row[4:]] for row in true]

    for drafts in ({}, {0: true[0], 1: wrong[1]}):
        asked = Questions(prompts=prompts, ends=[], most=MOST, filler=3, drafts=drafts)
        assert walked(base, asked, [])[0].tokens == true


def test_only_plain_caches_and_windows_that_hold_the_text_have_a_prefix(tmp_path: Path) -> None:
    text = len(HEAD) + 5 + 200  # and no more than a pass leaves
    short, long = ("mistral", {"sliding_window": text}), ("mistral", {"sliding_window": text + 81})

    for (kind, options), layers in ((short, 0), (long, 3), (("jamba", {}), 0)):
        base = make_model(tmp_path / f"{kind}{layers}", kind, **options)
        assert empty_prefix(load_network(base, []), PROMPTS, 200).layers == layers


def test_what_prompts_share(tmp_path: Path) -> None:
    network = load_network(make_model(tmp_path / "base"), [])
    for prompts, length in (
        ([], 0),
        ([HEAD], 0),  # nothing is saved
        ([HEAD] * 5, len(HEAD) - 1),  # the last token is left to each
        ([HEAD[:3]] * 5, 0),  # saves less than it costs
        ([[5, *HEAD], *[HEAD] * 9], 0),
        ([HEAD[:20], *[HEAD] * 9], 19),
    ):
        with torch.inference_mode():
            prefix = shared_prefix(network, prompts, empty_prefix(network, prompts, MOST))

        assert prefix.length == length
        assert {(len(keys), keys.shape[2]) for _, keys, _ in prefix.states} <= {(1, length)}


def test_answers_that_have_ended_leave_the_batch(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    network = load_network(base, [])
    prompts = [[*prompt, extra] for prompt in PROMPTS for extra in (5, 6, 90)]
    whole = generated(network, prompts)
    ends = [row[2 * n % MOST] for n, row in enumerate(whole)]
    wanted = [row[: next((i for i, t in enumerate(row) if t in ends), MOST) + 1] for row in whole]
    rows: list[int] = []
    network.register_forward_pre_hook(
        lambda _, __, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )

    found = greedy(network, Questions(prompts=prompts, ends=ends, most=MOST), lambda _: None)

    assert found.tokens == wanted
    assert len({*map(len, wanted)}) > 2
    assert rows[0] == 1  # the prefix
    assert rows[1:] == sorted(rows[1:], reverse=True)
    assert rows[-1] < len(prompts) / 2


def test_rows_of_keys_keep_their_tokens_without_the_holes() -> None:
    keys = Keys(layers=1, rows=3, room=4, positioned=True)
    for first in (0, 4):
        states = torch.arange(12.0).view(3, 1, 4, 1) + 100 * first
        keys.cache.update(states, -states, 0)
        keys.keep(torch.tensor([4, 1, 2]), 4)

    assert keys.lengths.tolist() == [8, 2, 4]
    assert keys.holes == 0
    keys.select([2, 1])

    layer = keys.cache.layers[0]
    assert keys.lengths.tolist() == [4, 2]
    assert layer.keys.shape == (2, 1, 4, 1)
    assert layer.keys[0].flatten().tolist() == [8, 9, 408, 409]
    assert layer.keys[1].flatten().tolist()[2:] == [4, 404]
    assert layer.values[0].flatten().tolist() == [-8, -9, -408, -409]
    mask = keys.given(torch.tensor([2, 1]), 2)
    assert mask["attention_mask"].tolist() == [[1] * 6, [0, 0, 1, 1, 1, 1]]
    assert mask["position_ids"].tolist() == [[4, 5], [2, 2]]
