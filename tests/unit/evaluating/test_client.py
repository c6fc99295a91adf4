import itertools
import threading
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
from weightsmith.core import network
from weightsmith.core.errors import CheckFailed, EnvironmentFailure
from weightsmith.core.ports import Endpoint
from weightsmith.evaluating import client
from weightsmith.evaluating.client import Served, ask_all, check_served_name, wait_until_healthy
from weightsmith.evaluating.client import ask as ask_one
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.session import ServerSession, SessionLimits, died

from tests.fakes.openai_server import Handler, answer, flood

QUICK = SessionLimits(request_seconds=60, tries=2, pause_seconds=0.01, answer_bytes=100_000)
IMPATIENT = replace(QUICK, request_seconds=0.3)
SUPPORT = Served(name="support")
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


def test_asks_greedily_under_the_served_name(serve):
    server = serve()

    assert ask(server) == {
        "answer": "7481",
        "finish_reason": "stop",
    }
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

    with pytest.raises(CheckFailed, match=r"within 0.3 s \(2 tries\)"):
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


def test_a_lasting_server_error_is_reported(serve):
    server = serve(lambda handler, body: handler.send(500, {"error": "slot exploded"}))

    with pytest.raises(CheckFailed, match=r"HTTP 500: .*slot exploded"):
        ask(server)

    assert len(server.asked) == 2


def test_nobody_listens(serve):
    server = serve()
    server.server_close()

    with pytest.raises(EnvironmentFailure, match=r"cannot connect to .*refused") as caught:
        ask(server)

    assert "start the server" in caught.value.hint


def test_a_refusal_is_not_tried_again(serve):
    server = serve(lambda handler, body: handler.send(400, {"error": "too long"}))

    with pytest.raises(CheckFailed, match=r"HTTP 400: .*too long"):
        ask(server)

    assert len(server.asked) == 1


@pytest.mark.parametrize("cut", [1, 20])
def test_half_an_answer_is_reported(serve, cut):
    server = serve(lambda handler, body: handler.send(200, answer(), cut=cut))

    with pytest.raises(CheckFailed, match="2 tries"):
        ask(server)


def test_an_answer_without_a_message_is_reported(serve):
    server = serve(lambda handler, body: handler.send(200, {"choices": []}))

    with pytest.raises(CheckFailed, match="no text"):
        ask(server)


def test_an_answer_of_100_megabytes_is_not_read(serve):
    with pytest.raises(CheckFailed, match="larger than 100000 bytes"):
        ask(serve(flood))


def test_another_model_is_reported(serve):
    with pytest.raises(CheckFailed, match=r"'other', but support"):
        check_served_name(ServerSession(serve().endpoint, QUICK), "other")


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

    clock.at_sleep = load

    assert wait_until_healthy(server.endpoint, "/health", 5, poll=1) == 3


def test_waiting_ends(serve, clock):
    server = serve()
    server.health = 503

    with pytest.raises(CheckFailed, match=r"not ready after 5 s: .*HTTP 503"):
        wait_until_healthy(server.endpoint, "/health", 5, poll=1)

    assert clock.now == 5


class Quiet:
    """Counts the items that were asked."""

    def __init__(self):
        self.seen = []

    def advance(self, done, total, unit):
        self.seen.append((done, total, unit))


def test_asks_everything_in_order(serve):
    def behave(handler, body):
        handler.send(200, answer(f"You said {body['messages'][-1]['content']}"))

    items = [
        Item(messages=({"role": "user", "content": text},), expected=(want,), line=1)
        for text, want in (("red", "red"), ("blue", "green"))
    ]
    progress = Quiet()

    with ServerSession(serve(behave).endpoint, QUICK) as session:
        answers = ask_all(items, lambda item: ask_one(session, SUPPORT, item, 9), progress)

    assert [a["answer"] for a in answers] == ["You said red", "You said blue"]
    assert all(a["seconds"] > 0 for a in answers)
    assert progress.seen[-1] == (2, 2, "items")


def test_many_at_once_stay_in_order(serve):
    together = threading.Barrier(4, timeout=120)

    def behave(handler, body):
        together.wait()  # broken, and so no answer, unless four are asked at once
        handler.send(200, answer(body["messages"][-1]["content"]))

    items = [
        Item(messages=({"role": "user", "content": f"q{i}"},), expected=("x",), line=i)
        for i in range(12)
    ]
    with ServerSession(serve(behave).endpoint, SessionLimits(request_seconds=300)) as session:
        answers = ask_all(
            items, lambda item: ask_one(session, SUPPORT, item, 9), Quiet(), concurrency=4
        )

    assert [a["answer"] for a in answers] == [f"q{i}" for i in range(12)]


def test_a_failure_among_many_ends_the_rest(serve):
    def behave(handler, body):
        handler.send(400, {"error": "no"})

    server = serve(behave)
    items = [ASKED] * 500
    with (
        ServerSession(server.endpoint, QUICK) as session,
        pytest.raises(CheckFailed, match="HTTP 400"),
    ):
        ask_all(items, lambda item: ask_one(session, SUPPORT, item, 9), Quiet(), concurrency=4)

    assert len(server.asked) < 100


def test_another_models_answer_is_reported(serve):
    def behave(handler, body):
        handler.send(200, {**answer(), "model": "someone-else"})

    with pytest.raises(CheckFailed, match=r"'support', but 'someone-else'"):
        ask(serve(behave))


@pytest.mark.parametrize("said", ["support", "support-2024-08-06", None])
def test_its_own_name_in_the_answer_is_fine(serve, said):
    server = serve(lambda handler, body: handler.send(200, {**answer(), "model": said}))

    assert ask(server)["answer"] == "7481"


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


def test_a_compressed_answer_is_not_unpacked(serve):
    import gzip

    bomb = gzip.compress(b" " * 50_000_000)

    def behave(handler, body):
        handler.send_response(200)
        handler.send_header("Content-Encoding", "gzip")
        handler.send_header("Content-Length", str(len(bomb)))
        handler.end_headers()
        handler.wfile.write(bomb)

    with pytest.raises(CheckFailed, match="invalid JSON"):
        ask(serve(behave))
