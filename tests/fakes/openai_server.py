"""An OpenAI-compatible server that misbehaves as a test wants it to."""

import json
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from weightsmith.core.ports import Endpoint

from tests.fakes.serving import serving


def answer(text="7481"):
    return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}


def flood(handler, body):
    """Answer with a hundred megabytes."""
    handler.send_response(200)
    handler.end_headers()
    with suppress(OSError):
        for _ in range(100):
            handler.wfile.write(b"x" * 1_000_000)


class FakeServer(ThreadingHTTPServer):
    """An OpenAI server that behaves as its `behave(handler, body)` says."""

    daemon_threads = True

    def __init__(self, behave=None):
        super().__init__(("127.0.0.1", 0), Handler)
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


class Handler(BaseHTTPRequestHandler):
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

    def stream(self, *parts):
        self.send_response(200)
        self.end_headers()
        for part in parts:
            self.wfile.write(part)

    def log_message(self, *args):
        pass


@contextmanager
def servers():
    """Yield a function that starts one, as its `behave` says; all end with the context."""
    with ExitStack() as running:

        def start(behave=None):
            server = FakeServer(behave)
            running.enter_context(serving(server))
            return server

        yield start
