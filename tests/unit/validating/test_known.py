"""Answers of the reference job that are a probe's text, so that it is not generated again."""

import pytest
from weightsmith.validating.probes import known

END = 9


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ([1, 2, END], [1, 2, END]),
        ([1, 2, 3, 4], [1, 2, 3, 4]),
        ([1, 2, 3, 4, 5, END], [1, 2, 3, 4]),
        ([1, END, 2], [1, END]),
        ([1, 2], None),  # cut off by a shorter limit: the next token is not known
        ([], None),
    ],
)
def test_an_answer_is_the_text_if_it_is_long_enough_or_ended(answer, text):
    found = known([[7, 8]], [([7, 8], answer)], [END], 4)
    assert found == ({} if text is None else {0: text})


def test_only_whole_questions_are_known():
    answers = [([5, 7, 8], [1, END]), ([6], [2, END])]
    assert known([[7, 8], [6], [5]], answers, [END], 4) == {1: [2, END]}
