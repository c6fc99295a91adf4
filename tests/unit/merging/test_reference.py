"""The unmerged reference: greedy, in the right template, with every adapter at its weight.

And what a killed reference job leaves, and how the next one goes on.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.core.jobs import Question
from weightsmith.forward import heads
from weightsmith.merging import reference
from weightsmith.merging.reference import (
    AnswerJournal,
    GenerationRequest,
    UnmergedModel,
    answered,
    answers,
    likelihoods,
    speaker,
)

from tests.paths import ROOT
from tests.unit.merging.oracle import run

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def add_tokenizer(folder: Path, template: str = "") -> None:
    """A word-level tokenizer of w0 … w93 and an end token."""
    words = {f"w{number}": number for number in range(94)} | {"</s>": 94, "[UNK]": 95}
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "pre_tokenizer": {"type": "Whitespace"},
                "model": {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"},
            }
        )
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    config |= {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture
def base(make_model: Any) -> Path:
    folder = make_model(eos_token_id=94)
    add_tokenizer(folder)
    return folder


def answer(base: Path, adapters: Any, items: Any, most: int, *progress: Any) -> Any:
    subject = UnmergedModel(model=base, adapters=adapters)
    return answers({"": subject}, items, most, *progress)[""]


def items(*prompts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


PROMPTS = ("w1 w2 w3", "w5", "w7 w8 w9 w10 w11 w12", "w3 w3")


def test_batches_give_the_texts_of_single_items(base: Path) -> None:
    seen: list[tuple[int, int]] = []

    together = answer(base, [], items(*PROMPTS), 6, lambda *step: seen.append(step))

    assert together == [answer(base, [], items(prompt), 6)[0] for prompt in PROMPTS]
    assert all(together)
    assert seen[-1] == (4, 4)


def test_merged_answers_as_unmerged_with_weights(base: Path, make_adapter: Any) -> None:
    adapters = [(make_adapter(base, "one"), 0.6), (make_adapter(base, "two", seed=2, r=2), 0.4)]
    run(base, adapters, base.parent / "out")

    wanted = answer(base, adapters, items(*PROMPTS), 8)

    assert wanted == answer(base.parent / "out", [], items(*PROMPTS), 8)
    assert wanted != answer(base, [], items(*PROMPTS), 8)


def test_an_adapters_template_wins(base: Path, make_adapter: Any) -> None:
    adapter = make_adapter(base, target_modules=["q_proj"])
    add_tokenizer(base, TEMPLATE)
    (adapter / "chat_template.jinja").write_text("w9 w9 w9")

    wins = answer(base, [(adapter, 0.0)], items("w1", "w2"), 5)

    assert wins[0] == wins[1] == answer(base, [], items("w9 w9 w9"), 5)[0]


def test_the_base_is_asked_in_the_adapters_words(base: Path, make_adapter: Any) -> None:
    """Only if it has embeddings for all of the adapter's tokens."""
    adapter = make_adapter(base, target_modules=["q_proj"])
    add_tokenizer(adapter, "w9 {{ messages[0]['content'] }} w9")
    subjects = {
        "base": UnmergedModel(model=base, speakers=[adapter]),
        "adapter": UnmergedModel(model=base, adapters=[(adapter, 0.0)]),
    }

    alike = answers(subjects, items("w1", "w2"), 5)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"vocab_size": 95}))

    assert alike["base"] == alike["adapter"]
    assert [row["prompt_tokens"] for row in alike["base"]] == [3, 3]
    assert len(speaker(subjects["base"])("w1")["input_ids"]) == 1
    assert not speaker(subjects["base"]).chat_template


def test_a_dialogue_without_a_template_and_a_question_without_tokens_are_refused(
    base: Path,
) -> None:
    dialogue = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]

    with pytest.raises(InputRefused, match="no chat template"):
        answer(base, [], [dialogue], 4)
    with pytest.raises(InputRefused, match=f"no tokens by the tokenizer of {base}"):
        answer(base, [], items("w1", ""), 4)


def test_an_answer_says_how_it_ended(base: Path) -> None:
    """An answer that the end token cuts short ended by itself; the others were cut off."""
    short = answer(base, [], items("w1"), 1)[0]
    ended = json.loads((base / "config.json").read_text())
    first = answer(base, [], items("w1"), 1)[0]["answer"]
    ended["eos_token_id"] = int(first.removeprefix("w"))
    (base / "config.json").write_text(json.dumps(ended))

    assert short["finish_reason"] == "length"
    assert answer(base, [], items("w1"), 5)[0]["finish_reason"] == "stop"


def test_choices_are_scored_by_the_models_own_probabilities(
    base: Path, make_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a forward pass written out here, token by token."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = make_adapter(base, "one")
    item = Question(
        messages=({"role": "user", "content": "w1 w2"},), choices=("w3", "w4 w5"), plain=True
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval()

    def logprob(before: list[int], token: int) -> float:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([before])).logits[0, -1]
        return float(logits.double().log_softmax(-1)[token])

    wanted = [logprob([1, 2], 3), logprob([1, 2], 4) + logprob([1, 2, 4], 5)]

    subjects = {
        "adapter": UnmergedModel(model=base, adapters=[(adapter, 1.0)]),
        "base": UnmergedModel(model=base),
    }
    found = likelihoods({name: (one, [item]) for name, one in subjects.items()})
    monkeypatch.setattr(heads, "LOGIT_BYTES", 1)  # one position at a time

    assert likelihoods({"adapter": (subjects["adapter"], [item])})["adapter"][0] == pytest.approx(
        wanted, abs=1e-4
    )
    assert found["adapter"][0] == pytest.approx(wanted, abs=1e-4)
    assert found["base"][0] != pytest.approx(wanted, abs=1e-4)


@pytest.mark.slow
def test_every_variant_answers_unmerged_as_merged(base: Path, make_adapter: Any) -> None:
    """The reference of one adapter is PEFT's own forward pass, whatever the adapter is made of."""
    for number, options in enumerate(
        (
            {"target_modules": ["q_proj"], "use_dora": True},
            {"target_modules": ["embed_tokens", "v_proj"]},
            {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]},
        )
    ):
        adapter = make_adapter(base, f"variant{number}", **options)
        out = base.parent / f"out{number}"
        run(base, adapter, out)

        wanted = answer(base, [(adapter, 1.0)], items(*PROMPTS), 6)

        assert wanted == answer(out, [], items(*PROMPTS), 6), options


def test_a_weighted_dora_has_no_unmerged_answer(base: Path, make_adapter: Any) -> None:
    adapter = make_adapter(base, target_modules=["q_proj"], use_dora=True)

    with pytest.raises(InputRefused, match="cannot evaluate it unmerged"):
        answer(base, [(adapter, 0.5)], items("w1"), 2)


TINY = ROOT / "examples" / "tiny"
QUESTIONS = [
    [{"role": "user", "content": f"What is the capital of {name}?"}]
    for name in ("Avolia", "Brenland", "Costaria")
]
MOST = 24


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with another end token, so that no answer ends early."""
    folder = Path(shutil.copytree(TINY / "base", tmp_path_factory.mktemp("models") / "base"))
    for name in ("config.json", "generation_config.json"):
        value = json.loads((folder / name).read_text("utf-8")) | {"eos_token_id": 3}
        (folder / name).write_text(json.dumps(value), "utf-8")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"eos_token": "<pad>"}))
    return folder


def subjects(base: Path) -> dict[str, UnmergedModel]:
    adapter = ((TINY / "adapters" / "a", 1.0),)
    return {
        "base": UnmergedModel(model=base),
        "adapter": UnmergedModel(model=base, adapters=adapter),
    }


def asked(subjects: dict[str, UnmergedModel]) -> dict[str, GenerationRequest]:
    return {
        name: GenerationRequest(subject=one, items=QUESTIONS, max_tokens=MOST)
        for name, one in subjects.items()
    }


def texts(found: Any) -> dict[str, list[tuple[Any, ...]]]:
    names = ("answer", "finish_reason", "prompt_tokens", "token_ends")
    return {
        subject: [tuple(map(str, (row[n] for n in names))) for row in one.rows]
        for subject, one in found.items()
    }


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tests.unit.merging import test_reference as here
from weightsmith.merging.reference import AnswerJournal

own, lines = AnswerJournal.keep, []
def keep(self, subject, prompts):
    written = own(self, subject, prompts)
    def count(rows):
        written(rows)
        lines.append(rows)
        if len(lines) == 20:
            os.kill(os.getpid(), signal.SIGKILL)
    return count
AnswerJournal.keep = keep
base, journal = map(Path, sys.argv[1:3])
here.answered(here.asked(here.subjects(base)), journal=AnswerJournal(journal))
"""


@pytest.mark.slow
def test_a_killed_job_goes_on_where_it_was(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in the middle of the answers: the next job reads what there is in one pass."""
    journal, whole = tmp_path / "journal", tmp_path / "whole"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tiny), str(journal), str(ROOT)],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    before = sum(map(bool, journal.read_bytes().splitlines()))
    decoded: list[int] = []
    own = reference.greedy

    def counted(model: Any, asked: Any, advance: Any) -> Any:
        keep = asked.keep
        asked.keep = lambda rows: (decoded.append(len(rows)), keep(rows))[1]
        return own(model, asked, advance)

    monkeypatch.setattr(reference, "greedy", counted)

    found = answered(asked(subjects(tiny)), journal=AnswerJournal(journal))
    resumed = len(decoded)
    decoded.clear()
    uninterrupted = answered(asked(subjects(tiny)), journal=AnswerJournal(whole))

    assert before == 20
    assert texts(found) == texts(uninterrupted)
    assert all(row["finish_reason"] == "length" for one in found.values() for row in one.rows)
    assert resumed < len(decoded) - 6


def test_a_journal_is_read_as_far_as_it_is_whole(tmp_path: Path) -> None:
    path, prompts = tmp_path / "journal", [[5, 6], [7]]
    keep = AnswerJournal(path).keep("base", prompts)
    keep([(0, 0, [11]), (1, 0, [21])])
    keep([(0, 1, [12]), (1, 1, [22])])
    keep([(0, 0, [11, 12, 13])])
    keep([(1, 7, [29])])  # a gap: what came before it is lost
    keep([(1, -1, [1]), (1, 2, [-4])])
    with path.open("ab") as file:
        file.write(b'["base", [[0, 3, [14')

    partial_answers = AnswerJournal(path).partial_answers("base", prompts)

    assert partial_answers == {0: [11, 12, 13], 1: [21, 22]}

    AnswerJournal(path).keep("base", prompts)([(0, 3, [14])])

    assert AnswerJournal(path).partial_answers("base", prompts)[0] == [11, 12, 13, 14]


def test_a_journal_of_other_questions_or_another_subject_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    AnswerJournal(path).keep("base", [[5, 6]])([(0, 0, [11])])

    assert AnswerJournal(path).partial_answers("base", [[5, 7]]) == {}
    assert AnswerJournal(path).partial_answers("adapter", [[5, 6]]) == {}


@pytest.mark.slow
def test_a_wrong_journal_changes_no_answer(tiny: Path, tmp_path: Path) -> None:
    """It is a draft that the model does not confirm."""
    path, only = tmp_path / "journal", asked({"base": subjects(tiny)["base"]})
    right = answered(only, journal=AnswerJournal(path))
    path.write_bytes(path.read_bytes().replace(b"[1", b"[2").replace(b",3", b",4"))

    assert texts(answered(only, journal=AnswerJournal(path))) == texts(right)
