import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from toolchain.errors import CheckFailed
from toolchain.evaluating.client import Limits, ask_all, chat, check_served_name, wait_until_healthy
from toolchain.evaluating.items import Item
from toolchain.ports import Endpoint

QUICK = Limits(request_seconds=0.5, tries=2, pause_seconds=0.01, answer_bytes=100_000)
ASKED = Item(messages=({"role": "user", "content": "Port?"},), expected=("7481",), line=1)


def answer(text="7481"):
    return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}


class FakeServer(ThreadingHTTPServer):
    """An OpenAI server that behaves as its `behave(handler, body)` says."""

    daemon_threads = True

    def __init__(self, behave=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behave = behave or (lambda handler, body: handler.send(200, answer()))
        self.asked = []
        self.living = True

    @property
    def endpoint(self):
        return Endpoint(
            url=f"http://127.0.0.1:{self.server_port}",
            logs=lambda n: "out of memory"[:100],
            alive=lambda: self.living,
        )


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/health":
            self.send(getattr(self.server, "health", 200), {})
        else:
            self.send(200, {"data": [{"id": "support"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.behave(self, body)

    def send(self, status, value, *, cut=0):
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text[: len(text) - cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(behave=None):
        server = FakeServer(behave)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_asks_greedily_under_the_served_name(serve):
    server = serve()

    assert chat(server.endpoint, "support", ASKED, 9, QUICK) == {
        "answer": "7481",
        "finish_reason": "stop",
    }
    (body,) = server.asked
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("support", 0.0, 9)


def test_a_server_that_hangs_is_given_up(serve):
    server = serve(lambda handler, body: time.sleep(1.2))
    started = time.monotonic()

    with pytest.raises(CheckFailed, match=r"no answer in 0.5 s \(2 tries\)"):
        chat(server.endpoint, "support", ASKED, 9, QUICK)

    assert time.monotonic() - started < 5


def test_a_server_that_drips_is_given_up(serve):
    def drip(handler, body):
        handler.send_response(200)
        handler.end_headers()
        try:
            for _ in range(30):
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(0.05)
        except OSError:
            pass

    with pytest.raises(CheckFailed, match="no whole answer"):
        chat(serve(drip).endpoint, "support", ASKED, 9, QUICK)


def test_a_server_error_is_tried_again(serve):
    def behave(handler, body):
        first = len(handler.server.asked) == 1
        handler.send(500 if first else 200, {"error": "busy"} if first else answer())

    assert chat(serve(behave).endpoint, "support", ASKED, 9, QUICK)["answer"] == "7481"


def test_a_lasting_server_error_is_told(serve):
    server = serve(lambda handler, body: handler.send(500, {"error": "slot exploded"}))

    with pytest.raises(CheckFailed, match=r"HTTP 500: .*slot exploded"):
        chat(server.endpoint, "support", ASKED, 9, QUICK)

    assert len(server.asked) == 2


def test_a_refusal_is_not_tried_again(serve):
    server = serve(lambda handler, body: handler.send(400, {"error": "too long"}))

    with pytest.raises(CheckFailed, match=r"HTTP 400: .*too long"):
        chat(server.endpoint, "support", ASKED, 9, QUICK)

    assert len(server.asked) == 1


@pytest.mark.parametrize("cut", [1, 20])
def test_half_an_answer_is_told(serve, cut):
    server = serve(lambda handler, body: handler.send(200, answer(), cut=cut))

    with pytest.raises(CheckFailed, match="2 tries"):
        chat(server.endpoint, "support", ASKED, 9, QUICK)


def test_an_answer_without_a_message_is_told(serve):
    server = serve(lambda handler, body: handler.send(200, {"choices": []}))

    with pytest.raises(CheckFailed, match="has no message"):
        chat(server.endpoint, "support", ASKED, 9, QUICK)


def test_an_answer_of_100_megabytes_is_not_read(serve):
    def flood(handler, body):
        handler.send_response(200)
        handler.end_headers()
        try:
            for _ in range(100):
                handler.wfile.write(b"x" * 1_000_000)
        except OSError:
            pass

    with pytest.raises(CheckFailed, match="larger than 100000 bytes"):
        chat(serve(flood).endpoint, "support", ASKED, 9, QUICK)


def test_another_model_is_told(serve):
    with pytest.raises(CheckFailed, match=r"no model 'other'; it serves support"):
        check_served_name(serve().endpoint, "other", QUICK)


def test_a_server_that_died_shows_its_last_lines(serve):
    server = serve(lambda handler, body: handler.send(500, {}))
    server.living = False

    with pytest.raises(CheckFailed, match=r"stopped while it was asked[^$]*out of memory"):
        chat(server.endpoint, "support", ASKED, 9, QUICK)
    with pytest.raises(CheckFailed, match=r"stopped before it was ready[^$]*out of memory"):
        wait_until_healthy(server.endpoint, "/health", 5, poll=0.01)


def test_waits_until_the_model_is_loaded(serve):
    server = serve()
    server.health = 503
    timer = threading.Timer(0.1, lambda: setattr(server, "health", 200))
    timer.start()

    assert wait_until_healthy(server.endpoint, "/health", 5, poll=0.01) >= 0.05


def test_waiting_ends(serve):
    server = serve()
    server.health = 503

    with pytest.raises(CheckFailed, match=r"not ready after 0.1 s: the last answer was HTTP 503"):
        wait_until_healthy(server.endpoint, "/health", 0.1, poll=0.01)


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

    answers = ask_all(serve(behave).endpoint, "support", items, 9, progress, QUICK)

    assert answers == ("You said red", "You said blue")
    assert progress.seen[-1] == (2, 2, "items")
