"""Metric choice over servers that echo a prompt's likelihoods, step by step, or not at all."""

from itertools import accumulate

import pytest
from weightsmith.core.errors import CheckFailed, UsageError
from weightsmith.evaluating.client import Served
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.likelihood import choose, scorer, spaced
from weightsmith.evaluating.session import ServerSession, SessionLimits

QUICK = SessionLimits(request_seconds=5, tries=2, pause_seconds=0.01)
PLAIN = Item(
    messages=({"role": "user", "content": "The sky is"},), expected=("blue",), line=1,
    choices=("blue", "green"), plain=True,
)  # fmt: skip
CHAT = Item(
    messages=({"role": "user", "content": "Is it?"},), expected=("Yes",), line=1,
    choices=("Yes", "No way"),
)  # fmt: skip
SCORES = {" blue": -0.5, " green": -3.0, "Yes": -0.25, "No": -1.0, " way": -1.5}


def pieces(text):
    """Cut a text before every space: one token a word."""
    words = text.replace(" ", "\0 ").split("\0")
    return [word for word in words if word]


@pytest.fixture
def serve(serve):
    """Start a server that answers with `behave(path, body)`: a status and JSON."""

    def start(behave):
        return serve(lambda handler, body: handler.send(*behave(handler.path, body))).endpoint

    return start


def scores(endpoint, item):
    with ServerSession(endpoint, QUICK) as session:
        score = scorer(session, Served(name="support"))
        return [score(item, choice) for choice in item.choices]


class Echoing:
    """A server as vLLM's: /v1/completions supports_echo, /tokenize applies the chat template."""

    def __init__(self, *, begin="", offsets=True, extra=True):
        self.begin, self.offsets, self.extra = begin, offsets, extra
        self.vocabulary = []

    def __call__(self, path, body):
        if path == "/tokenize":
            text = body.get("prompt")
            if text is None:
                text = f"<|user|>{body['messages'][0]['content']}<|assistant|>"
            return 200, {"tokens": [self._number(piece) for piece in pieces(text)]}
        if path != "/v1/completions":
            return 404, {"error": "not here"}
        prompt = body["prompt"]
        words = isinstance(prompt, str)
        tokens = pieces(prompt) if words else [self.vocabulary[number] for number in prompt]
        *offsets, place = accumulate(map(len, tokens), initial=0)
        found = [SCORES.get(token, -9.0) for token in tokens]
        if self.begin:
            tokens, offsets, found = [self.begin, *tokens], [0, *offsets], [None, *found]
        else:
            found[0] = None
        if self.extra:  # the one new token that was asked for
            tokens, offsets, found = [*tokens, " and"], [*offsets, place], [*found, -0.125]
        told = {"tokens": tokens, "token_logprobs": found}
        if self.offsets:
            told["text_offset"] = offsets
        return 200, {"choices": [{"text": "", "logprobs": told}]}

    def _number(self, piece):
        if piece not in self.vocabulary:
            self.vocabulary.append(piece)
        return self.vocabulary.index(piece)


@pytest.mark.parametrize(
    "how", [{}, {"offsets": False}, {"extra": False}, {"begin": "<s>"}], ids=str
)
def test_an_echo_is_scored_and_messages_go_through_the_servers_template(serve, how):
    assert scores(serve(Echoing(**how)), PLAIN) == [-0.5, -3.0]
    if "begin" not in how:
        assert scores(serve(Echoing(**how)), CHAT) == [-0.25, -2.5]


def test_messages_need_a_server_that_applies_its_template(serve):
    echoing = Echoing()

    def behave(path, body):
        return (404, {"error": "no"}) if path == "/tokenize" else echoing(path, body)

    with pytest.raises(UsageError, match="cannot apply its chat template") as caught:
        scores(serve(behave), CHAT)
    assert '"prompt"' in caught.value.hint


class Stepping:
    """A server as llama.cpp's: no echo, but the next token's likelihoods."""

    def __init__(self):
        self.vocabulary = [f" w{n}" for n in range(300)]
        self.asked = []

    def __call__(self, path, body):
        if path == "/v1/completions":
            return 400, {"error": {"message": "no echo"}}
        if path == "/apply-template":
            return 200, {"prompt": f"<|user|>{body['messages'][0]['content']}<|assistant|>"}
        if path == "/tokenize":
            for piece in pieces(body["content"]):
                if piece not in self.vocabulary:
                    self.vocabulary.append(piece)
            return 200, {"tokens": [self.vocabulary.index(p) for p in pieces(body["content"])]}
        self.asked.append(body["n_probs"])
        rows = [
            {"id": number, "logprob": SCORES.get(piece, -0.01)}
            for number, piece in enumerate(self.vocabulary)
        ]
        rows.sort(key=lambda row: -row["logprob"])
        return 200, {"completion_probabilities": [{"top_logprobs": rows[: body["n_probs"]]}]}


def test_a_choice_is_scored_step_by_step(serve):
    stepping = Stepping()

    assert scores(serve(stepping), PLAIN) == [-0.5, -3.0]
    assert max(stepping.asked) > 300 > min(stepping.asked)  # the rare token needs a longer list
    # "…<|assistant|>Yes" is another last word than "…<|assistant|>": it is what is scored.
    assert scores(serve(Stepping()), CHAT)[1] == pytest.approx(-0.01 - 1.5)


def test_a_server_that_can_neither_is_refused(serve):
    with pytest.raises(CheckFailed, match=r"log-probabilities.*HTTP 404") as caught:
        scores(serve(lambda path, body: (404, {"error": "not found"})), PLAIN)
    assert "--model" in caught.value.hint


def test_the_likeliest_choice_is_the_answer_and_one_space_stands_before_it():
    assert choose(PLAIN, [-2.0, -1.0]) == {"answer": "green", "log_likelihoods": [-2.0, -1.0]}
    assert spaced("The sky is", "blue") == " blue"
    assert spaced("The sky is ", "blue") == "blue"
    assert spaced("The sky is", " blue") == " blue"
    assert spaced("", "blue") == "blue"
