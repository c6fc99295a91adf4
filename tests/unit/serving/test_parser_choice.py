"""What is chosen by what an engine's own parsers read back."""

import pytest
from weightsmith.serving.parsers import CALL_AFTER_THOUGHTS, ReadBack, choice_of, choice_of_thoughts

BOTH, WHOLE = ["whole", "streamed"], ["whole"]


def found(skipped=None, **read):
    """Each parser's calls and its plain text; all leave the plain text alone but `greedy`."""
    return {
        "read": {
            name: {"a call": ways, "no call": [] if name == "greedy" else BOTH}
            for name, ways in read.items()
        },
        "skipped": skipped or {},
    }


@pytest.mark.parametrize(
    ("read", "first", "chosen"),
    [
        (found(a=BOTH, b=BOTH), ("b", "a"), "b"),
        (found(a=BOTH, b=[]), ("b", "a"), "a"),
        (found(a=BOTH, b=WHOLE), ("b", "a"), "a"),
        (found(a=BOTH, b=WHOLE), ("b",), "b"),  # the family's, though its stream fails
        (found(z=BOTH, c=BOTH), ("b",), "c"),
        (found(z=BOTH, c=WHOLE), (), "z"),
        (found(greedy=BOTH, z=WHOLE), ("greedy",), "z"),
        (found(a=[], b=[]), ("a",), ""),
    ],
)
def test_the_familys_parser_is_taken_if_it_reads_else_one_that_does(read, first, chosen):
    choice = choice_of(ReadBack.from_json(read), first)

    assert choice.tools == chosen
    assert (chosen or "none of 2 parsers") in choice.note
    streams = not chosen or "streamed" in read["read"][chosen]["a call"]
    assert ("not in a stream" in choice.note) is not streams


def test_a_template_that_cannot_be_read_back_leaves_the_choice_to_the_table():
    read = {"read": {"a": {"no call": BOTH}}, "skipped": {"a call": "it is refused"}}

    choice = choice_of(ReadBack.from_json(read), ("a",))

    assert choice.tools == ""
    assert choice.note == "tool calls: nothing could be read back: it is refused; a is taken"


@pytest.mark.parametrize("lost", ["two calls", CALL_AFTER_THOUGHTS])
def test_a_chat_that_no_parser_reads_tells_nothing_of_the_parsers(lost):
    """As where the template writes the first of two calls alone, or thoughts have no parser."""
    read = found(a=BOTH, b=[])
    for chats in read["read"].values():
        chats[lost] = []

    choice = choice_of(ReadBack.from_json(read), ("b", "a"))

    assert choice.tools == "a"
    assert f"no parser reads {lost}" in choice.note


@pytest.mark.parametrize(
    ("read", "skipped", "chosen", "said"),
    [
        ({"b": BOTH, "a": WHOLE, "c": BOTH}, {}, "b", "b reads back what the chat template writes"),
        ({"b": [], "a": WHOLE}, {}, "a", "though not in a stream"),
        ({"b": [], "a": ["streamed"]}, {}, "", "none of 2 parsers"),
        ({}, {"thoughts": "it leaves them out"}, "", "could be read back: it leaves them out"),
    ],
)
def test_a_parser_of_thoughts_is_one_that_reads_them(read, skipped, chosen, said):
    choice = choice_of_thoughts(ReadBack(read={}, thoughts=read, skipped=skipped))

    assert (choice.thoughts, choice.tools) == (chosen, "")
    assert choice.note.startswith("thoughts: ")
    assert said in choice.note
