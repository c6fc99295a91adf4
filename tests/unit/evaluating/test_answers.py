"""Answers to one question, as rows of a report."""

import copy

from weightsmith.evaluating.views import answer_rows, asked

from tests.fakes.records import BUILD, failing


def test_equal_answers_stand_together():
    build = copy.deepcopy(BUILD)
    build["items"][0]["image"] = build["items"][0]["adapter"]
    (row,) = answer_rows(asked(build["items"]))

    assert [said.who for said in row.answers] == [["base"], ["adapter", "image"]]
    assert (row.changed, row.worded, row.wrong, row.lost) == (
        False,
        False,
        False,
        False,
    )
    (lost,) = answer_rows(asked(failing()["items"]))
    assert (lost.changed, lost.worded, lost.wrong, lost.lost) == (
        True,
        True,
        True,
        True,
    )


def test_what_dequantized_weights_lost_is_lost_too():
    build = failing()
    (item,) = build["items"]
    for found in (item, item["ok"]):
        found["dequantized"] = found.pop("image")

    (row,) = answer_rows(asked(build["items"]))
    assert (row.wrong, row.lost) == (True, True)
    item["ok"]["dequantized"] = True
    (row,) = answer_rows(asked(build["items"]))
    assert (row.wrong, row.lost) == (False, False)
