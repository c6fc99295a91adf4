import json

import pytest
from weightsmith.core.errors import UsageError
from weightsmith.evaluating import contamination as leaks
from weightsmith.evaluating.contamination import describe_contamination
from weightsmith.evaluating.items import Item


def item(prompt, line=1):
    return Item(messages=({"role": "user", "content": prompt},), expected=("x",), line=line)


def write(tmp_path, *rows):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    return path


def test_the_same_question_in_other_letters_is_found(tmp_path):
    path = write(
        tmp_path,
        {"text": "nothing of interest"},
        {"messages": [{"role": "user", "content": "which PORT  is it"}]},
    )

    found = describe_contamination(
        [item("Which port is it?", line=7), item("What is the host?")], path
    )

    assert found.startswith(f"{path} contains 1 evaluation question(s): line 7 in line 2; the")


def test_a_long_question_within_a_text_is_found_and_a_short_one_is_not(tmp_path):
    path = write(tmp_path, {"text": "Yes or no? And which port does the gateway use? 7481."})
    asked = [item("Which port does the gateway use?", 1), item("Yes or no?", 2)]

    assert "1 evaluation question(s): line 1 in line 1;" in describe_contamination(asked, path)


def test_of_many_questions_that_begin_and_end_alike_few_are_searched_for(tmp_path, monkeypatch):
    asked = [item(f"Answer this: what is at port {n * 7919}? One word.", n) for n in range(3000)]
    texts = [{"text": f"the thing at {n} " * 20} for n in range(200)]
    path = write(tmp_path, *texts, {"text": f"so: {asked[77].prompt} A gateway."})
    likely, searched = leaks._likely, []

    def counted(*given):
        for question in likely(*given):
            searched.append(question)
            yield question

    monkeypatch.setattr(leaks, "_likely", counted)

    assert "1 evaluation question(s): line 77 in" in describe_contamination(asked, path)
    assert len(searched) < 10


def test_an_answer_that_holds_the_question_is_no_leak(tmp_path):
    said = {"role": "assistant", "content": "You ask which port the gateway uses at work: 7481."}
    path = write(tmp_path, {"messages": [said]}, {"messages": 5}, {"messages": said})

    assert describe_contamination([item("which port the gateway uses")], path) == ""


def test_a_text_that_was_cut_within_an_emoji_is_compared(tmp_path):
    path = write(tmp_path, {"text": "cut \ud83d"}, {"messages": [{"content": "Which port?"}]})

    assert "in line 2;" in describe_contamination([item("which port")], path)


def test_a_file_that_is_none_is_named(tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        describe_contamination([item("q")], tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text("{}\n{")
    with pytest.raises(UsageError, match=r"bad\.jsonl:2: invalid JSON"):
        describe_contamination([item("q")], tmp_path / "bad.jsonl")
