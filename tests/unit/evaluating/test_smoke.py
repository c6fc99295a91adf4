"""The checks of a started image, each against a server that breaks exactly that promise."""

import base64
import json
import threading
import zlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
from weightsmith.core.errors import CheckFailed
from weightsmith.core.ports import Endpoint
from weightsmith.evaluating.client import Served
from weightsmith.evaluating.session import ServerSession, SessionLimits
from weightsmith.evaluating.smoke import Promise, Smoke, check_life, check_serving

from tests.fakes import openai_server
from tests.fakes.serving import Serving, serving

QUICK = SessionLimits(request_seconds=300, tries=1, pause_seconds=0.01)
PROMISE = Promise(
    served=Served(name="support"),
    health_path="/health",
    max_model_len=64,
    max_num_seqs=3,
    start_seconds=60,
)


CALL = '{"name": "get_weather", "arguments": {"city": "Rome"}}'


class Server(Serving):
    """A good server, but for what a test changes."""

    name = "support"
    text = "Hello there"
    finish = "stop"
    events = ("Hello", " there")
    done = True
    long_status, long_error = 400, "request (99 tokens) exceeds the available context size"
    most_at_once = 100
    logprobs_status = 200
    picture_status = 200
    tools = 200, {"choices": [{"message": {"content": None, "tool_calls": [{"id": "1"}]}}]}

    def __init__(self):
        super().__init__(Handler)
        self.busy, self.together = 0, 0
        self.pictures = []
        self.lock = threading.Lock()
        self.crowd = None
        """Where those meet that are asked at once: after the long prompt, as the checks go."""
        self.alive, self.exit_code, self.restarts = True, 0, 0
        self.told = threading.Event()
        """Set by SIGTERM, for which the answers wait that it interrupts."""
        self.late = 0
        """How many requests come after SIGTERM."""
        self.after = "answers"
        """Or `cuts the stream`, `loses the other`, `refuses it`."""

    @property
    def endpoint(self):
        return Endpoint(
            url=f"http://127.0.0.1:{self.server_port}",
            logs=lambda n: "the last words of the server",
            alive=lambda: self.alive,
            stop=self._stop,
            restart=self._restart,
        )

    def _stop(self, seconds):
        self.told.set()
        self.patience = seconds
        return self.exit_code

    def _restart(self):
        self.restarts += 1
        return self.endpoint


class Handler(openai_server.Handler):
    def do_GET(self):
        self.send(200, {"data": [{"id": self.server.name}]})

    def do_POST(self):
        server, body = self.server, json.loads(self.body())
        if isinstance(body["messages"][0]["content"], list):
            server.pictures.append(body["messages"][0]["content"])
            self.send(server.picture_status, {"choices": [{"message": {"content": "red"}}]})
            return
        if "tools" in body:
            self.send(*server.tools)
            return
        if len(body["messages"][0]["content"].split()) > 64:
            server.crowd = threading.Barrier(PROMISE.max_num_seqs, timeout=120)
            self.send(server.long_status, {"error": {"message": server.long_error}})
            return
        if "logprobs" in body and server.logprobs_status != 200:
            self.send(server.logprobs_status, {"error": {"message": "EngineDeadError"}})
            return
        if body.get("ignore_eos") and not body["stream"]:
            self.end_plain()
            return
        with server.lock:
            server.busy += 1
            server.together = max(server.together, server.busy)
        if server.crowd and "logprobs" not in body and body["max_tokens"] < 64:
            server.crowd.wait()  # broken, and so no answer, unless as many are asked at once
        with server.lock:
            text = server.text if server.busy <= server.most_at_once else ""
            server.busy -= 1
        if body["stream"]:
            self.stream(interrupted="ignore_eos" in body)
            return
        message = {"message": {"content": text}, "finish_reason": server.finish}
        self.send(200, {"choices": [message]})

    def end_plain(self):
        assert self.server.told.wait(120)
        if self.server.after == "refuses it" or self.server.restarts < self.server.late:
            self.send(503, {"error": {"message": "it ends"}})
        elif self.server.after != "loses the other":
            self.send(200, {"choices": [{"message": {"content": "Hello"}}]})

    def stream(self, *, interrupted=False):
        if not self.server.alive:
            return  # it died with the question
        self.send_response(200)
        self.end_headers()
        for text in self.server.events:
            value = {"choices": [{"delta": {"content": text}}]}
            self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
            if interrupted:
                assert self.server.told.wait(120)
                if self.server.after == "cuts the stream":
                    return
        if self.server.done:
            self.wfile.write(b"data: [DONE]\n\n")


@pytest.fixture
def server():
    server = Server()
    with serving(server):
        yield server


def look(server, promise=PROMISE):
    smoke = Smoke()
    with ServerSession(server.endpoint, QUICK) as session:
        check_serving(smoke, session, promise)
    return {check["name"]: check["seen"] for check in smoke.checks}


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (Server.tools, "called the tool"),
        ((200, {"choices": [{"message": {"content": "Sunny."}}]}), "answered without a call"),
        ((400, {"error": {"message": '"auto" tool choice requires'}}), "!tools got HTTP 400"),
        (
            (200, {"choices": [{"message": {"content": f"<tool_call>{CALL}</tool_call>"}}]}),
            "!left a tool call in the text",
        ),
    ],
)
def test_a_server_with_a_parser_reads_calls(server, reply, says):
    server.tools = reply
    promise = replace(PROMISE, calls=True)

    if says.startswith("!"):
        with pytest.raises(CheckFailed, match=says[1:]):
            look(server, promise)
    else:
        assert look(server, promise)["tools"].startswith(says)


def test_a_server_with_a_parser_keeps_thoughts_out_of_the_answer(server):
    promise = replace(PROMISE, thinks=True)
    assert look(server, promise)["thoughts"] == "none: Hello there"

    server.text, server.crowd = "<think>The user greets.</think>Hello", None
    with pytest.raises(CheckFailed, match="left thoughts in the answer: The user greets"):
        look(server, promise)


def test_a_good_server_passes_and_what_was_seen_is_kept(server):
    seen = look(server)

    assert list(seen) == [
        "model list", "chat", "streaming", "end of answer", "context limit", "3 requests at once",
        "log-probabilities",
    ]  # fmt: skip
    assert seen["chat"] == "Hello there"
    assert seen["end of answer"] == "the answer ends by itself"
    assert "exceeds the available context" in seen["context limit"]
    assert server.together == 3


@pytest.mark.parametrize(
    ("change", "check", "says"),
    [
        ({"name": "other"}, "model list", "'support', but other"),
        ({"text": " "}, "chat", "empty answer"),
        ({"events": ()}, "streaming", "no text"),
        ({"done": False}, "streaming", r"no \[DONE\]"),
        ({"alive": False}, "streaming", "the server stopped"),
        ({"long_status": 200}, "context limit", "HTTP 200 instead of an error"),
        ({"long_status": 500}, "context limit", "HTTP 500 instead of an error"),
        ({"long_error": "nope"}, "context limit", "does not say why"),
        ({"most_at_once": 2}, "3 requests at once", "got an empty answer"),
        ({"logprobs_status": 500}, "log-probabilities", "HTTP 500"),
    ],
)
def test_a_broken_promise_is_named_with_the_servers_last_words(server, change, check, says):
    vars(server).update(change)

    with pytest.raises(CheckFailed, match=f"'{check}' failed: .*{says}") as caught:
        look(server)
    assert "the last words of the server" in caught.value.message


def test_what_is_reported_and_no_failure(server):
    server.finish, server.logprobs_status = "length", 400
    seen = look(server)

    assert "did not end" in seen["end of answer"]
    assert seen["log-probabilities"].startswith("HTTP 400")
    assert "picture" not in seen, "the model sees nothing"
    assert server.pictures == []


GRACE = replace(PROMISE, grace_seconds=60)


def life(server, promise=PROMISE):
    smoke = Smoke()
    check_life(smoke, server.endpoint, promise)
    return {check["name"]: check["seen"] for check in smoke.checks}


@pytest.mark.parametrize("code", [0, 143, -15])
def test_it_ends_and_starts_again(server, code):
    server.exit_code = code

    assert list(life(server)) == ["SIGTERM", "restart"]
    assert server.restarts == 1


def test_requests_that_run_at_sigterm_are_answered(server):
    assert life(server, GRACE)["SIGTERM"] == (
        "exit code 0; a stream went on for 1 events, and a request was answered"
    )
    assert server.patience == 60


def test_a_request_that_came_after_sigterm_is_sent_again_to_the_next_server(server):
    server.late = 2

    assert "a request was answered" in life(server, GRACE)["SIGTERM"]
    assert server.restarts == 3


@pytest.mark.parametrize(
    ("promise", "change", "says"),
    [
        (PROMISE, {"exit_code": None}, "10 s after SIGTERM"),
        (PROMISE, {"exit_code": 139}, "code 139"),
        (GRACE, {"exit_code": None}, "60 s after SIGTERM"),
        (GRACE, {"exit_code": 137}, "code 137"),
        (GRACE, {"after": "cuts the stream"}, "SIGTERM cut a stream, 0 events later"),
        (GRACE, {"after": "loses the other"}, "SIGTERM lost a request: .*disconnected"),
        (GRACE, {"after": "refuses it"}, "SIGTERM lost a request: HTTP 503.*it ends"),
    ],
)
def test_an_end_that_is_none_or_loses_a_request_is_reported(server, promise, change, says):
    vars(server).update(change)

    with pytest.raises(CheckFailed, match=f"'SIGTERM' failed: .*{says}"):
        life(server, promise)


def test_a_server_that_answers_nothing_after_its_restart_is_reported(server):
    server.text = ""
    with pytest.raises(CheckFailed, match=r"'restart' failed: .*empty answer"):
        life(server)
    server._restart = lambda: Endpoint(
        url="http://127.0.0.1:9", logs=lambda n: "cannot bind", alive=lambda: False
    )

    with pytest.raises(CheckFailed, match=r"'restart' failed: the server stopped[^$]*cannot bind"):
        life(server)


def test_what_cannot_be_stopped_is_not_checked():
    fixed = Endpoint(url="http://127.0.0.1:9", logs=lambda n: "", alive=lambda: True)

    assert life(SimpleNamespace(endpoint=fixed)) == {}


def test_a_model_that_sees_gets_a_picture(server):
    assert look(server, replace(PROMISE, sees=True))["picture"] == "answered"
    (((picture, question)),) = server.pictures
    kind, data = picture["image_url"]["url"].split(";base64,")
    png = base64.b64decode(data)
    assert kind == "data:image/png"
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert png[16:24] == bytes([0, 0, 0, 64] * 2)  # width and height
    size = int.from_bytes(png[33:37])
    assert png[37:41] == b"IDAT"
    assert zlib.decompress(png[41 : 41 + size])[:4] == bytes([0, 0xC0, 0x20, 0x20])
    assert question["type"] == "text"


def test_a_picture_may_be_refused_but_nothing_may_fail(server):
    """With a chat template for text alone, vLLM answers HTTP 500 for some models."""
    sees = replace(PROMISE, sees=True)
    server.picture_status = 400
    assert look(server, sees)["picture"].startswith("refused with HTTP 400")
    server.picture_status, server.crowd = 500, None
    with pytest.raises(CheckFailed, match=r"'picture' failed: .*HTTP 500"):
        look(server, sees)
    server.crowd = None
    seen = look(server, replace(sees, parts=False))["picture"]
    assert seen == "refused with HTTP 500: the chat template is for text alone"
