"""An OpenAI-compatible server that misbehaves as a test wants it to."""

import json
import time
from contextlib import ExitStack, contextmanager, suppress

from weightsmith.core.ports import Endpoint

from tests.fakes.serving import Replying, Serving, serving


def answer(text="7481"):
    return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}


def flood(handler, body):
    handler.send_response(200)
    handler.end_headers()
    with suppress(OSError):
        for _ in range(100):
            handler.wfile.write(b"x" * 1_000_000)


class FakeServer(Serving):
    def __init__(self, behave=None):
        super().__init__(Handler)
        self.behave = behave or (lambda handler, body: handler.send(200, answer()))
        self.asked = []
        self.health = 200
        self.slow = 0.0
        self.models = {"data": [{"id": "support"}]}
        self.living = True

    @property
    def endpoint(self):
        return Endpoint(
            url=f"http://127.0.0.1:{self.server_port}",
            logs=lambda n: "out of memory"[:100],
            alive=lambda: self.living,
        )


class Handler(Replying):
    def do_GET(self):
        if self.path == "/health":
            time.sleep(self.server.slow)
            self.send(self.server.health, {})
        else:
            self.send(200, self.server.models)

    def do_POST(self):
        body = json.loads(self.body())
        self.server.asked.append(body)
        self.server.behave(self, body)

    def send(self, status, value, *, cut=0):
        text = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.reply(status, text[: len(text) - cut], {"Content-Length": str(len(text))})

    def stream(self, *parts):
        self.send_response(200)
        self.end_headers()
        for part in parts:
            self.wfile.write(part)


@contextmanager
def servers():
    """Yield a function that starts one, as its `behave` says; all end with the context."""
    with ExitStack() as running:

        def start(behave=None):
            server = FakeServer(behave)
            running.enter_context(serving(server))
            return server

        yield start
