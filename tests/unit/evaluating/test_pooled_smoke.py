"""The checks of a started image that does not chat, each against a server that breaks it."""

import json
import threading

import pytest
from weightsmith.core.errors import CheckFailed
from weightsmith.core.ports import Endpoint
from weightsmith.evaluating.client import Served
from weightsmith.evaluating.pooled_smoke import POOLING, check_pooling
from weightsmith.evaluating.session import ServerSession, SessionLimits
from weightsmith.evaluating.smoke import Promise, Smoke, check_life
from weightsmith.models.task import ModelTask, SentenceTransformers

from tests.fakes.serving import Replying, Serving, serving

QUICK = SessionLimits(request_seconds=300, tries=1, pause_seconds=0.01)
UNIT = SentenceTransformers(modules=("Transformer", "Pooling", "Normalize"), pooling="mean")
TASKS = {
    "embed": ModelTask(kind="embed", sentence=UNIT),
    "rerank": ModelTask(kind="rerank", labels=("LABEL_0",)),
    "classify": ModelTask(kind="classify", labels=("no", "yes")),
    "token-classify": ModelTask(kind="token-classify", labels=("O", "B")),
}
GOOD = {
    "embed": {"data": [{"embedding": [0.6, 0.8]}]},
    "rerank": {
        "results": [{"index": n, "relevance_score": score} for n, score in ((1, 0.5), (0, -2.0))]
    },
    "classify": {"data": [{"label": "yes", "probs": [0.25, 0.75]}]},
    "token-classify": {"data": [{"data": [[0.5, 0.5], [0.1, 0.9]]}]},
}
PATHS = {
    "embed": "/v1/embeddings",
    "rerank": "/v1/rerank",
    "classify": "/classify",
    "token-classify": "/pooling",
}


class Server(Serving):
    """A good server of one kind, but for what a test changes."""

    def __init__(self, kind):
        super().__init__(Handler)
        self.path, self.answer, self.long_status = PATHS[kind], GOOD[kind], 400
        self.alive, self.restarts, self.told = True, 0, threading.Event()
        self.lost = False
        """Whether a request that SIGTERM interrupts gets no answer."""
        self.always = False
        """Whether that is so after a restart, too."""

    @property
    def endpoint(self):
        return Endpoint(
            url=f"http://127.0.0.1:{self.server_port}",
            logs=lambda n: "the last words",
            alive=lambda: self.alive,
            stop=self.stopped,
            restart=self.restarted,
        )

    def stopped(self, seconds):
        self.told.set()
        return 0

    def restarted(self):
        self.restarts += 1
        self.lost = self.always
        return self.endpoint


class Handler(Replying):
    def do_GET(self):
        self.send(200, {"data": [{"id": "m"}]})

    def do_POST(self):
        body, server = json.loads(self.body()), self.server
        assert body["model"] == "m"
        if self.path != server.path:
            return self.send(404, {"error": "no such path"})
        text = body.get("input", body.get("documents"))
        texts = text if isinstance(text, list) else [text]
        if texts[0].startswith("word") and len(texts[0]) < 300:  # the one that SIGTERM meets
            server.told.wait(60)
            return self.send(503 if server.lost else 200, server.answer)
        if len(texts[0]) > 300:
            return self.send(server.long_status, {"error": "too many tokens"})
        return self.send(200, server.answer)

    def send(self, status, value):
        text = json.dumps(value).encode()
        self.reply(status, text, {"Content-Length": str(len(text))})


@pytest.fixture(params=TASKS)
def kind(request):
    return request.param


@pytest.fixture
def server(kind):
    made = Server(kind)
    with serving(made):
        yield made


def checked(server, kind, **changes):
    """The names of the checks that such a server passes, and what was seen."""
    promise = Promise(
        served=Served(name="m"), health_path="/health", max_model_len=64, max_num_seqs=3,
        start_seconds=60, task=TASKS[kind], grace_seconds=60, **{"width": 2, **changes},
    )  # fmt: skip
    smoke = Smoke()
    with ServerSession(server.endpoint, QUICK) as session:
        check_pooling(smoke, session, promise)
    check_life(smoke, server.endpoint, promise, POOLING)
    return {check["name"]: check["seen"] for check in smoke.checks}


def test_a_good_server_passes(server, kind):
    seen = checked(server, kind)

    assert [*seen] == [
        "model list", kind, "context limit", "3 requests at once", "SIGTERM", "restart",
    ]  # fmt: skip
    assert seen["SIGTERM"] == "exit code 0; a request was answered"
    assert server.restarts == 1


WRONG = {
    "embed": [
        {"data": [{"embedding": [0.6]}]},
        {"data": [{"embedding": [0.0, 0.0]}]},
        {"data": [{"embedding": [3.0, 4.0]}]},
        {"data": [{"embedding": [float("nan"), 1.0]}]},
        {"data": [{"embedding": "AAAA"}]},
    ],
    "rerank": [
        {"results": [{"index": 0, "relevance_score": 1.0}]},
        {"results": [{"index": 0, "relevance_score": 1.0}] * 2},
        {"results": [{"index": n, "relevance_score": None} for n in (0, 1)]},
    ],
    "classify": [
        {"data": [{"label": "yes", "probs": [1.0]}]},
        {"data": [{"label": "LABEL_1", "probs": [0.5, 0.5]}]},
        {"data": [{"label": "yes", "probs": [True, False]}]},
    ],
    "token-classify": [
        {"data": [{"data": []}]},
        {"data": [{"data": [[0.5, 0.5], [1.0]]}]},
        {"data": [{"data": [0.5, 0.5]}]},
    ],
}
SHAPELESS = [{}, {"data": None}, {"data": []}, {"results": {}}, {"data": [[]]}]


def test_an_answer_that_is_none_of_its_kind_is_refused(server, kind):
    for wrong in (*WRONG[kind], *SHAPELESS):
        server.answer = wrong
        with pytest.raises(CheckFailed, match=rf"smoke test '{kind}' failed: .* is no {kind}"):
            checked(server, kind)


def test_a_text_that_is_too_long_must_be_refused(server, kind):
    server.long_status = 500  # as llama.cpp's encoders say it
    assert checked(server, kind)["context limit"].startswith("HTTP 500")
    server.long_status = 200
    with pytest.raises(CheckFailed, match=r"context limit.*longer than 64 tokens got HTTP 200"):
        checked(server, kind)


def test_a_request_that_sigterm_loses_is_told(server, kind):
    server.lost = True

    assert checked(server, kind)["SIGTERM"].endswith("was answered"), "asked again after a restart"
    server.lost = server.always = True
    with pytest.raises(CheckFailed, match="SIGTERM lost a request: HTTP 503"):
        checked(server, kind)


def test_a_server_without_the_endpoint_is_refused(server, kind):
    server.path = "/elsewhere"
    with pytest.raises(CheckFailed, match="404"):
        checked(server, kind)


def test_a_vector_of_unknown_width_is_any(server, kind):
    server.answer = {"data": [{"embedding": [0.36, 0.48, 0.8]}]} if kind == "embed" else GOOD[kind]

    checked(server, kind, width=0)
