"""The load test against a server whose every pause is known."""

import json
import threading
from types import SimpleNamespace

import pytest
from weightsmith.core.ports import Silent
from weightsmith.evaluating import load
from weightsmith.evaluating.client import Served
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.load import (
    Sample,
    Spread,
    load_test,
    measure,
    percentile,
    summary,
)
from weightsmith.evaluating.session import ServerSession, SessionLimits

QUESTIONS = tuple(
    Item(messages=({"role": "user", "content": f"q{n}"},), expected=(), line=n) for n in range(3)
)


def event(value):
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode()


def piece(text, key="content"):
    return event({"choices": [{"delta": {key: text}}]})


@pytest.fixture
def serve(serve):
    """Start a server that behaves as `behave(handler, body)` does; return a session with it."""

    def start(behave):
        return ServerSession(serve(behave).endpoint, SessionLimits(request_seconds=300))

    return start


@pytest.mark.parametrize("key", ["content", "reasoning_content", "reasoning"])
def test_measures_first_piece_and_gaps(serve, monkeypatch, key):
    """By a clock that is looked at when the request is sent and at each piece of text."""
    role = event({"choices": [{"delta": {"role": "assistant", "content": None}}]})
    session = serve(
        lambda handler, body: handler.stream(
            role, piece("a", key), piece("b", key), role, piece("c"), event("[DONE]")
        )
    )
    looks = iter([100.0, 100.5, 102.5, 103.5])
    monkeypatch.setattr(load, "time", SimpleNamespace(monotonic=lambda: next(looks)))

    with session:
        sample = measure(session, Served(name="m"), QUESTIONS[0], 8)

    assert sample == Sample(first=0.5, gaps=(2.0, 1.0), whole=3.5)
    assert list(looks) == []


@pytest.mark.parametrize(
    ("behave", "says"),
    [
        (lambda h, b: h.send_error(500), "HTTP 500"),
        (lambda h, b: h.stream(event("[DONE]")), "no text"),
        (lambda h, b: h.stream(event("{half")), "not JSON"),
        (lambda h, b: h.stream(event({"error": {"message": "slot exploded"}})), "slot exploded"),
    ],
)
def test_a_failure_is_counted_not_raised(serve, behave, says):
    with serve(behave) as session:
        run = load_test(session, Served(name="m"), QUESTIONS, 2, 4, 8, Silent())

    assert (run.errors, run.requests, run.requests_per_s) == (4, 4, 0.0)
    assert says in " ".join(run.failures)
    assert run.ttft_ms == Spread(None, None)


def test_as_many_at_once_as_asked(serve):
    together = threading.Barrier(3, timeout=120)
    asked = []

    def behave(handler, body):
        asked.append(body["messages"][0]["content"])
        together.wait()
        handler.stream(piece("a"), piece("b"), event("[DONE]"))

    with serve(behave) as session:
        run = load_test(session, Served(name="m"), QUESTIONS, 3, 9, 8, Silent())

    assert (run.concurrency, run.errors) == (3, 0)
    assert sorted(asked) == sorted(["q0", "q1", "q2"] * 3)
    # Both are rounded, to a hundredth and a thousandth.
    assert run.tokens_per_s == pytest.approx(2 * run.requests_per_s, abs=0.0061)


def test_a_summary_by_hand():
    samples = [
        Sample(first=0.1, gaps=(0.01, 0.03), whole=0.14),
        Sample(first=0.3, gaps=(0.02,), whole=0.32),
        Sample(error="HTTP 500"),
    ]

    run = summary(samples, 2, 2.0)

    assert (run.requests_per_s, run.tokens_per_s) == (1.0, 2.5)
    assert (run.ttft_ms, run.itl_ms) == (Spread(100.0, 300.0), Spread(20.0, 30.0))
    assert (run.errors, run.failures) == (1, {"HTTP 500": 1})


def test_percentiles_are_measured_values():
    hundred = [n / 1000 for n in range(1, 101)]

    assert percentile(hundred, 0.5) == 50.0
    assert percentile(hundred, 0.95) == 95.0
    assert percentile([0.007], 0.95) == 7.0
    assert percentile([], 0.5) is None
