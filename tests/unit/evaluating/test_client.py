import gzip
import itertools
import re
import threading
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
from weightsmith.core import network
from weightsmith.core.errors import (
    CheckFailed,
    EnvironmentFailure,
    InputRefused,
    WeightsmithError,
)
from weightsmith.core.ports import Endpoint
from weightsmith.evaluating import client
from weightsmith.evaluating.client import (
    KeptAnswers,
    Served,
    ask_all,
    find_served,
    wait_until_healthy,
)
from weightsmith.evaluating.client import ask as ask_one
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.replaying import request_of
from weightsmith.evaluating.session import NoAnswer, ServerSession, SessionLimits, Unanswered, died
from weightsmith.evaluating.task import Task, ask_server
from weightsmith.merging.reference import UnmergedModel, prompt_tokens, speaker
from weightsmith.serving import engines

from tests.fakes.openai_server import Handler, answer, flood
from tests.fakes.questioned import BEGUN, ITEM, WORDED, model

QUICK = SessionLimits(request_seconds=60, tries=2, pause_seconds=0.01, answer_bytes=100_000)
IMPATIENT = replace(QUICK, request_seconds=0.3)
SUPPORT = Served(name="support")
QUIET = SimpleNamespace(advance=lambda *_: None)
ASKED = Item(messages=({"role": "user", "content": "Port?"},), expected=("7481",), line=1)


def ask(server, limits=QUICK):
    with ServerSession(server.endpoint, limits) as session:
        return ask_one(session, SUPPORT, ASKED, 9)


def test_fields_go_into_each_request_of_the_session_that_adds_them(serve):
    server = serve()
    lora = [{"id": 1, "scale": 1.0}]
    with ServerSession(server.endpoint, QUICK) as session:
        ask_one(session.adding({"lora": lora}), SUPPORT, ASKED, 9)
        ask_one(session, SUPPORT, ASKED, 9)

    assert [body.get("lora") for body in server.asked] == [lora, None]


@pytest.mark.parametrize("lists", [True, False])
def test_a_request_that_is_shared_is_sent_once(serve, lists):
    """Also in place of the same without log-probabilities, unless the server refuses them."""

    def behave(handler, body):
        if body.get("logprobs") and not lists:
            handler.send(400, {"error": "no log-probabilities"})
        else:
            handler.send(200, answer())

    server, other = serve(behave), replace(ASKED, messages=({"role": "user", "content": "Name?"},))
    listed = request_of(SUPPORT, ASKED, 9, {"lora": []})
    with ServerSession(server.endpoint, QUICK) as session:
        session.share([(SUPPORT.path, listed)])
        for item, most in ((ASKED, 9), (ASKED, 9), (ASKED, 10), (other, 9)):
            assert ask_one(session.adding({"lora": []}), SUPPORT, item, most)["answer"] == "7481"
        with nullcontext() if lists else pytest.raises(Unanswered):
            session.post(SUPPORT.path, listed)

    plain = [not body.get("logprobs") for body in server.asked]
    assert plain == ([False, True, True] if lists else [False, True, True, True, True, False])


@pytest.mark.parametrize("said", ["support", "support-2024-08-06", None])
def test_asks_greedily_under_the_served_name(serve, said):
    server = serve(lambda handler, body: handler.send(200, {**answer(), "model": said}))

    assert ask(server) == {"answer": "7481", "finish_reason": "stop"}
    (body,) = server.asked
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("support", 0.0, 9)


def test_a_server_below_a_path_is_asked_there(serve):
    paths = []

    def behave(handler, body):
        paths.append(handler.path)
        handler.send(200, answer())

    endpoint = serve(behave).endpoint
    with ServerSession(replace(endpoint, url=f"{endpoint.url}/proxy/"), QUICK) as session:
        ask_one(session, SUPPORT, ASKED, 9)

    assert paths == ["/proxy/v1/chat/completions"]


def test_a_server_that_hangs_is_given_up(serve):
    given_up = threading.Event()
    server = serve(lambda handler, body: given_up.wait(300))

    with pytest.raises(NoAnswer, match=r"within 0.3 s \(2 tries\)"):
        ask(server, IMPATIENT)

    given_up.set()


def test_a_server_that_drips_is_given_up(serve, monkeypatch):
    """Each piece comes in time, 25 s after the one before, and the whole never."""

    def drip(handler, body):
        handler.send_response(200)
        handler.end_headers()
        with suppress(OSError):
            while True:
                handler.wfile.write(b" " * 70_000)

    looks = itertools.count(0.0, 25.0)
    monkeypatch.setattr(network, "time", SimpleNamespace(monotonic=lambda: next(looks)))

    with pytest.raises(CheckFailed, match=r"within 60 s"):
        ask(serve(drip), replace(QUICK, tries=1, answer_bytes=10**9))

    assert next(looks) == 100.0


def test_a_server_error_is_tried_again(serve):
    def behave(handler, body):
        first = len(handler.server.asked) == 1
        handler.send(500 if first else 200, {"error": "busy"} if first else answer())

    assert ask(serve(behave))["answer"] == "7481"


def bomb(handler, body):
    data = gzip.compress(b" " * 50_000_000)
    handler.send_response(200)
    handler.send_header("Content-Encoding", "gzip")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


@pytest.mark.parametrize(
    ("behave", "says", "tries"),
    [
        (lambda h, _: h.send(500, {"error": "slot exploded"}), "HTTP 500: .*slot exploded", 2),
        (lambda h, _: h.send(400, {"error": "too long"}), "HTTP 400: .*too long", 1),
        (lambda h, _: h.send(200, answer(), cut=1), "2 tries", 2),
        (lambda h, _: h.send(200, answer(), cut=20), "2 tries", 2),
        (lambda h, _: h.send(200, {"choices": []}), "no text", 1),
        (lambda h, _: h.send(200, {**answer(), "model": "x"}), "'support', but 'x' answered", 1),
        (flood, "larger than 100000 bytes", 1),
        (bomb, "invalid JSON", 2),
    ],
    ids=["500", "400", "cut", "half", "no message", "another model", "100 megabytes", "gzip"],
)
def test_what_is_no_answer_is_reported(serve, behave, says, tries):
    server = serve(behave)

    with pytest.raises(CheckFailed, match=says):
        ask(server)
    assert len(server.asked) == tries


def test_nobody_listens(serve):
    server = serve()
    server.server_close()

    with pytest.raises(EnvironmentFailure, match=r"cannot connect to .*refused") as caught:
        ask(server)

    assert "start the server" in caught.value.hint


def test_a_server_that_died_shows_its_last_lines(serve):
    server = serve(lambda handler, body: handler.send(500, {}))
    server.living = False

    with pytest.raises(CheckFailed, match=r"/v1/chat/completions[^$]*out of memory"):
        ask(server)
    with pytest.raises(CheckFailed, match=r"stopped before it was ready[^$]*out of memory"):
        wait_until_healthy(server.endpoint, "/health", 5, poll=0.01)


class Clock:
    """Time that goes on only while the client sleeps; `at_sleep` is called then."""

    def __init__(self):
        self.now = 0.0
        self.at_sleep = lambda: None

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.at_sleep()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(client, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("exec /app/x: exec format error", "another CPU architecture"),
        ("exec /app/x: no such file or directory", "lacks its program"),
        ("x: error while loading shared libraries: libx.so: cannot open", "lacks a shared library"),
        ("ggml: failed to allocate", "too little memory"),
    ],
)
def test_last_words_of_a_loader_are_understood(line, hint):
    endpoint = Endpoint(url="http://x", logs=lambda _: f"first\n{line}", alive=lambda: False)

    assert hint in died(endpoint, "before it was ready").hint


def test_waits_until_the_model_is_loaded(serve, clock):
    server = serve()
    server.health = 503

    def load():
        if clock.now >= 3:
            server.health = 200

    with pytest.raises(CheckFailed, match=r"not ready after 2 s: .*HTTP 503"):
        wait_until_healthy(server.endpoint, "/health", 2, poll=1)
    clock.now, clock.at_sleep = 0, load
    assert wait_until_healthy(server.endpoint, "/health", 5, poll=1) == 3


def ask_many(server, items, concurrency, progress=QUIET):
    with ServerSession(server.endpoint, SessionLimits(request_seconds=300)) as session:
        asking = partial(ask_one, session, SUPPORT, max_tokens=9)
        return ask_all(items, asking, progress, concurrency=concurrency)


def questions(*texts):
    return [replace(ASKED, messages=({"role": "user", "content": text},)) for text in texts]


def test_asks_everything_in_order(serve):
    def behave(handler, body):
        handler.send(200, answer(f"You said {body['messages'][-1]['content']}"))

    seen = []
    progress = SimpleNamespace(advance=lambda *told: seen.append(told))

    answers = ask_many(serve(behave), questions("red", "blue"), 1, progress)

    assert [a["answer"] for a in answers] == ["You said red", "You said blue"]
    assert all(a["seconds"] > 0 for a in answers)
    assert seen[-1] == (2, 2, "items")


def test_many_at_once_stay_in_order(serve):
    together = threading.Barrier(4, timeout=120)

    def behave(handler, body):
        together.wait()  # broken, and so no answer, unless four are asked at once
        handler.send(200, answer(body["messages"][-1]["content"]))

    texts = [f"q{i}" for i in range(12)]
    answers = ask_many(serve(behave), questions(*texts), 4)

    assert [a["answer"] for a in answers] == texts


def test_a_failure_among_many_ends_the_rest(serve):
    server = serve(lambda handler, body: handler.send(400, {"error": "no"}))
    with pytest.raises(CheckFailed, match="HTTP 400"):
        ask_many(server, [ASKED] * 500, 4)

    assert len(server.asked) < 100


def refusing(*bad, large=False):
    """Return a server's behaviour that refuses these questions, or answers them without end."""

    def behave(handler, body):
        said = body["messages"][-1]["content"]
        if said not in bad:
            handler.send(200, answer(said))
        elif large:
            flood(handler, body)
        else:
            handler.send(400, {"error": "I do not like it"})

    return behave


def ask_task(server, texts, limits=QUICK, **more):
    with ServerSession(server.endpoint, limits) as session:
        task = Task(items=tuple(questions(*texts)), max_tokens=9)
        return ask_server(session, SUPPORT, task, QUIET, **more)


@pytest.mark.parametrize("bad", ["q0", "q5", "q11"])
@pytest.mark.parametrize(
    ("large", "says"), [(False, "HTTP 400: "), (True, "the response is larger than 100000 bytes")]
)
def test_a_question_that_is_refused_is_answered_wrongly(serve, bad, large, says):
    texts = [f"q{n}" for n in range(12)]

    found = ask_task(serve(refusing(bad, large=large)), texts)

    (row,) = [one for one in found if "error" in one]
    assert row == found[texts.index(bad)]
    assert (row["answer"], row["finish_reason"]) == ("", "error")
    assert row["error"].startswith(says)
    assert "127.0.0.1" not in row["error"]
    assert [one["answer"] for one in found if one is not row] == [t for t in texts if t != bad]


@pytest.mark.parametrize(
    "sent",
    [
        {},
        [],
        {"choices": []},
        {"choices": [{"message": None}]},
        {"choices": [{"message": {"content": [{"type": "text", "text": "a"}]}}]},
    ],
)
def test_an_answer_without_a_text_is_a_wrong_one(serve, sent):
    def behave(handler, body):
        handler.send(200, sent if body["messages"][-1]["content"] == "q1" else answer())

    first, odd, last = ask_task(serve(behave), ["q0", "q1", "q2"])

    assert "error" not in first.keys() | last.keys()
    assert re.match("the response (has no text|is not a JSON object)", odd["error"])


@pytest.mark.parametrize("count", [1, 3, 500])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_server_that_refuses_every_question_is_at_fault(serve, count, concurrency):
    texts = [f"q{n}" for n in range(count)]
    server = serve(refusing(*texts))

    with pytest.raises(CheckFailed, match=r"HTTP 400: .*I do not like it"):
        ask_task(server, texts, concurrency=concurrency)
    assert len(server.asked) <= min(count, 30)


@pytest.mark.parametrize(
    ("status", "code"), [(404, 4), (401, 5), (403, 5), (429, 4), (502, 4), (503, 4), (504, 4)]
)
def test_what_is_not_the_questions_fault_ends_the_questions(serve, status, code):
    def behave(handler, body):
        bad = body["messages"][-1]["content"] == "q2"
        handler.send(status if bad else 200, {} if bad else answer())

    with pytest.raises(WeightsmithError, match=f"HTTP {status}") as caught:
        ask_task(serve(behave), ["q1", "q2", "q3"])
    assert caught.value.exit_code == code


def silent_on(*bad, how):
    """Return a server's behaviour that fails or cuts its response on these questions."""

    def behave(handler, body):
        said = body["messages"][-1]["content"]
        if said not in bad:
            handler.send(200, answer(said))
        elif how == "fails":
            handler.send(500, {"error": "Failed to parse input"})
        else:
            handler.close_connection = True

    return behave


SILENT = {
    "fails": "HTTP 500: ",
    "cuts": "RemoteProtocolError: ",
}


@pytest.mark.parametrize("bad", [("q0",), ("q2",), ("q4",), ("q0", "q2", "q4")])
@pytest.mark.parametrize("how", SILENT)
def test_a_question_on_which_the_server_is_silent_is_answered_wrongly(serve, how, bad):
    texts = [f"q{n}" for n in range(5)]

    found = ask_task(serve(silent_on(*bad, how=how)), texts)

    assert [text for text, one in zip(texts, found, strict=True) if "error" in one] == list(bad)
    assert all(one["error"].startswith(SILENT[how]) for one in found if "error" in one)
    assert [one["answer"] for one in found] == ["" if text in bad else text for text in texts]


@pytest.mark.parametrize("how", SILENT)
@pytest.mark.parametrize("first", [0, 3])
def test_a_server_that_is_silent_on_questions_in_a_row_is_at_fault(serve, how, first):
    texts = [f"q{n}" for n in range(40)]
    server = serve(silent_on(*texts[first:], how=how))

    with pytest.raises(CheckFailed, match=re.escape(SILENT[how])):
        ask_task(server, texts)
    assert len(server.asked) <= first + 4


def test_a_server_that_is_silent_on_the_one_question_is_at_fault(serve):
    with pytest.raises(CheckFailed, match="HTTP 500"):
        ask_task(serve(silent_on("q0", how="fails")), ["q0"])


def test_a_refused_question_is_asked_again_by_the_next_run(serve, tmp_path):
    texts, path = ["q1", "q2", "q3"], tmp_path / "kept.jsonl"
    first = ask_task(serve(refusing("q2")), texts, kept=KeptAnswers(path))
    again = serve()
    second = ask_task(again, texts, kept=KeptAnswers(path))

    assert ["error" in row for row in first] == [False, True, False]
    assert [row["answer"] for row in second] == ["q1", "7481", "q3"]
    assert len(again.asked) == 1


def test_connections_are_kept(serve):
    ports = set()

    def behave(handler, body):
        ports.add(handler.client_address[1])
        handler.send(200, answer())

    Handler.protocol_version = "HTTP/1.1"
    try:
        with ServerSession(serve(behave).endpoint, QUICK) as session:
            for _ in range(5):
                ask_one(session, SUPPORT, ASKED, 9)
    finally:
        Handler.protocol_version = "HTTP/1.0"

    assert len(ports) == 1


NO_TEMPLATE = "default chat template is no longer allowed, so you must provide a chat template"
CASES = {
    "template": (WORDED, False),
    "plain": ("", False),
    "template and begin token": (BEGUN, True),
    "plain and begin token": ("", True),
}


def as_engines_do(tokenizer, seen, handler, body):
    """vLLM's rules, which SGLang, TGI and TensorRT-LLM share: a chat is worded by the template and
    tokenized without further tokens, a prompt is tokenized as the tokenizer does by itself."""
    if "prompt" in body:
        ids = tokenizer(body["prompt"])["input_ids"]
        choice = {"text": " Sel", "finish_reason": "stop"}
    elif not tokenizer.chat_template:
        handler.send(400, {"error": {"message": NO_TEMPLATE}})
        return
    else:
        text = tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        choice = {"message": {"content": " Sel"}, "finish_reason": "stop"}
    seen.append(list(ids))
    usage = {"prompt_tokens": len(ids)}
    handler.send(200, {"model": body["model"], "choices": [choice], "usage": usage})


@pytest.mark.parametrize("engine", sorted(set(engines()) - {"llamacpp"}))
@pytest.mark.parametrize("case", CASES)
def test_an_engine_gets_the_references_tokens(serve, tmp_path, engine, case):
    template, begins = CASES[case]
    root = model(tmp_path / "model", template, begins=begins)
    tokenizer, seen = speaker(UnmergedModel(model=root)), []
    server = serve(partial(as_engines_do, tokenizer, seen))

    with ServerSession(server.endpoint) as session:
        served = find_served(session, engine)
        said = ask_one(session, served, ITEM, 4)

    expected = prompt_tokens(tokenizer, ITEM.messages, root)
    assert served.chat == bool(template)
    assert seen[-1] == expected
    assert seen[-1].count(1) == begins
    assert said == {"answer": " Sel", "finish_reason": "stop", "prompt_tokens": len(expected)}


def test_a_chat_needs_a_template():
    two = ({"role": "system", "content": "Be brief."}, *ITEM.messages)

    with pytest.raises(InputRefused, match="no chat template, but a question has 2 messages"):
        Served(name="m", chat=False).body(replace(ITEM, messages=two), 4)
