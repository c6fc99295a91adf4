"""`weightsmith evaluate` as its users call it: bad data, bad servers, every metric."""

import json
import ssl
import sys
import time

import pytest

from tests.fakes.auth_server import make_certificate
from tests.fakes.command_line import weightsmith
from tests.fakes.openai_server import FakeServer, answer, flood
from tests.fakes.serving import serving

QUESTIONS = ({"prompt": "Which port?", "expected": "7481"}, {"prompt": "And why?", "expected": "x"})


@pytest.fixture
def evaluate(tmp_path):
    """Run the command on rows; return the exit code, the JSON object and standard error."""

    def run(url, rows, *words):
        data = tmp_path / "eval.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        data.write_text("\n".join(lines))
        store = {"WEIGHTSMITH_STORE": str(tmp_path / "store")}
        given = ("--url", url, "--data", data, "--json", *words)
        done = weightsmith("evaluate", *given, env=store)
        return done.code, json.loads(done.out), done.err

    return run


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"prompt": "half', "eval.jsonl:3"),
        ('["a list"]', "eval.jsonl:3"),
        ({"prompt": "no expected field"}, "eval.jsonl:3"),
        ({"expected": "no prompt"}, "eval.jsonl:3"),
        (QUESTIONS[0], "eval.jsonl:3 duplicates the question of line 1"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_asked(serve, evaluate, row, says):
    server = serve()

    code, told, _ = evaluate(server.endpoint.url, [*QUESTIONS, row])

    assert code == 2
    assert says in told["error"]["message"]
    assert told["error"]["hint"]
    assert server.asked == []


@pytest.mark.parametrize("flag", ["--training", "--calibration"])
def test_a_leak_is_a_warning_and_with_strict_an_error(serve, evaluate, tmp_path, flag):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"messages": [{"role": "user", "content": "which PORT"}]}))
    server = serve()

    code, _, err = evaluate(server.endpoint.url, QUESTIONS, flag, other)
    strict, told, _ = evaluate(server.endpoint.url, QUESTIONS, flag, other, "--strict")

    assert code == 0
    assert "line 1 in line 1" in err
    assert strict == 3
    assert "1 evaluation question(s)" in told["error"]["message"]
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--max-drop", "0.1"), "--max-drop is a drop from an earlier score"),
        (("--tokenizer", "x"), "--tokenizer is for --tasks"),
        (("--include", "x"), "--include is for --tasks"),
        (("--tasks", "x"), "--data is for questions of your own"),
        (("--metric", "exact", "--tolerance", "2%"), "`tolerance` is for metric `numeric`"),
        (("--metric", "exactly"), "did you mean exact?"),
    ],
)
def test_a_flag_that_would_not_be_heeded(serve, evaluate, words, says):
    server = serve()

    code, told, _ = evaluate(server.endpoint.url, QUESTIONS, *words)

    assert code == 2
    assert says in told["error"]["message"] + told["error"]["hint"]
    assert told["error"]["hint"]
    assert server.asked == []


def test_kept_answers_are_not_asked_for_again(serve, evaluate, tmp_path):
    """As after Ctrl-C: the file has the first answer, and half of a line."""
    server, kept = serve(), tmp_path / "kept.jsonl"
    url = server.endpoint.url
    evaluate(url, QUESTIONS[:1], "--answers", kept)
    kept.write_text(kept.read_text() + '\n["half of')

    code, told, _ = evaluate(url, QUESTIONS, "--answers", kept)
    _, again, _ = evaluate(url, QUESTIONS, "--answers", kept)

    assert code == 0
    assert len(server.asked) == 2
    assert told["per_item"] == again["per_item"]
    evaluate(url, QUESTIONS, "--answers", kept, "--max-tokens", "9")
    assert len(server.asked) == 4


def hang(handler, _):
    time.sleep(2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("behave", "says"),
    [
        (hang, "within 0.2 s"),
        (lambda handler, _: handler.send(500, {"error": "out of memory"}), "HTTP 500: "),
        (lambda handler, _: handler.send(200, answer(), cut=9), "(2 tries)"),
        (lambda h, _: h.send(200, answer() | {"model": "another"}), "'another' answered"),
        (flood, "larger than"),
    ],
)
def test_a_bad_server_is_reported(serve, evaluate, behave, says):
    server = serve(behave)

    words = ("--timeout", 0.2 if behave is hang else 120, "--retries", 1)
    code, told, _ = evaluate(server.endpoint.url, QUESTIONS, *words)

    assert code == 4
    assert says in told["error"]["message"]
    assert server.endpoint.url in told["error"]["message"]


def test_a_question_that_is_refused_is_wrong_and_the_other_is_judged(serve, evaluate):
    def behave(handler, body):
        why = body["messages"][-1]["content"] == "And why?"
        handler.send(*((400, {"error": "not that"}) if why else (200, answer())))

    code, told, err = evaluate(serve(behave).endpoint.url, QUESTIONS)

    assert (code, told["score"], told["n"]) == (0, 0.5, 2)
    assert told["per_item"][1]["error"] == 'HTTP 400: {"error": "not that"}'
    assert "1 of 2 questions got no answer, the first: HTTP 400" in err


def test_a_model_that_is_not_served_is_reported(serve, evaluate):
    code, told, _ = evaluate(serve().endpoint.url, QUESTIONS, "--served-name", "other")

    assert (code, "'other', but support" in told["error"]["message"]) == (4, True)


JUDGE = """
import json, sys
rows = [json.loads(line) for line in sys.stdin]
print(json.dumps({"ok": [len(row["answer"]) == 4 for row in rows]}))
"""


@pytest.mark.parametrize(
    ("metric", "expected", "said", "score"),
    [
        ("contains", "7481", "It is 7481.", 0.5),
        ("exact", "7481", " 7481", 0.5),
        ("exact", "7481", "It is 7481.", 0.0),
        ("regex", r"\b\d{4}\b", "It is 7481.", 0.5),
        ("json-schema", {"type": "object", "required": ["port"]}, '```json\n{"port": 1}\n```', 1.0),
        ("json-schema", {"type": "object", "required": ["port"]}, '{"prot": 1}', 0.0),
        ("command", "anything", "7481", 1.0),
    ],
)
def test_every_metric_judges(serve, evaluate, tmp_path, metric, expected, said, score):
    server = serve(lambda handler, _: handler.send(200, answer(said)))
    other = expected if metric in ("json-schema", "command") else "never said"
    rows = [{"prompt": "A?", "expected": expected}, {"prompt": "B?", "expected": other}]
    words = ["--metric", metric]
    if metric == "command":
        (tmp_path / "judge.py").write_text(JUDGE)
        words += ["--command", f"{sys.executable} {tmp_path}/judge.py"]

    code, told, _ = evaluate(server.endpoint.url, rows, *words)

    assert code == 0
    assert (told["score"], told["n"], told["metric"]) == (score, 2, metric)
    assert [row["answer"] for row in told["per_item"]] == [said, said]
    assert told["interval"][0] <= score <= told["interval"][1]


def test_too_few_questions_for_the_allowed_drop_are_reported(serve, evaluate, tmp_path):
    url = serve().endpoint.url
    _, before, _ = evaluate(url, QUESTIONS)
    (tmp_path / "before.json").write_text(json.dumps(before))

    words = ("--against", tmp_path / "before.json", "--max-drop", 0.01)
    code, told, err = evaluate(url, QUESTIONS, *words)

    assert code == 0
    assert told["comparison"]["drop"] == 0
    assert "2 questions" in err
    assert "0.01" in err


@pytest.mark.parametrize("metric", ["contains", "command"])
def test_conversations_that_end_alike_are_not_taken_for_each_other(
    serve, evaluate, tmp_path, metric
):
    url = serve().endpoint.url
    rows = [
        {"messages": [{"role": role, "content": text}, last], "expected": "x"}
        for last in [{"role": "user", "content": "And now?"}]
        for role, text in (("system", "Be short."), ("system", "Be kind."))
    ]
    (tmp_path / "judge.py").write_text(JUDGE)
    words = ["--metric", metric]
    if metric == "command":
        words += ["--command", f"{sys.executable} {tmp_path}/judge.py"]
    _, before, _ = evaluate(url, rows, *words)
    (tmp_path / "before.json").write_text(json.dumps(before))
    words += ["--against", tmp_path / "before.json"]

    code, told, _ = evaluate(url, rows, *words)
    assert (code, told["comparison"]["drop"]) == (0, 0)

    code, told, _ = evaluate(url, rows[::-1], *words)
    assert code == 4
    assert "different questions, or the same in another order" in told["error"]["message"]


@pytest.mark.parametrize(
    ("flag", "text", "says"),
    [
        *(
            ("--against", text, "other.jsonl is not the output of")
            for text in ('{"per_item": [{"ok": true}], "score": 1, "n": 1}', "[]",
                         '{"per_item": [], "score": 1, "n": Infinity}',
                         '{"per_item": 5, "score": 1, "n": 1}')
        ),
        ("--answers", '{"prompt": "a"}\n{"prompt": "b"}\n', "--answers"),
        ("--retries=-1", "", "--retries -1"), ("--timeout=0", "", "--timeout 0"),
        ("--timeout=nan", "", "--timeout nan"), ("--timeout=inf", "", "--timeout inf"),
        ("--concurrency=0", "", "--concurrency 0"), ("--limit=-3", "", "--limit -3"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named_before_anything_is_asked(
    serve, evaluate, tmp_path, flag, text, says
):
    server, other = serve(), tmp_path / "other.jsonl"
    other.write_text(text)

    code, told, _ = evaluate(server.endpoint.url, QUESTIONS, flag, *([other] if text else []))

    assert (code, server.asked) == (2, [])
    assert says in told["error"]["message"]
    assert other.read_text() == text


def test_a_server_with_a_certificate_of_ones_own(evaluate, tmp_path, monkeypatch):
    key, certificate = make_certificate(tmp_path, "localhost")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = FakeServer()
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with serving(server):
        url = f"https://localhost:{server.server_port}"
        code, told, _ = evaluate(url, QUESTIONS, "--retries", 0)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        trusted, _, _ = evaluate(url, QUESTIONS)

    assert (code, trusted) == (5, 0)
    assert "SSL_CERT_FILE" in told["error"]["hint"]


def test_the_line_end_of_a_key_is_not_sent(serve, evaluate, monkeypatch):
    """As a file or a cluster's secret has it."""
    seen = []

    def behave(handler, _):
        seen.append(handler.headers["Authorization"])
        handler.send(200, answer())

    monkeypatch.setenv("WEIGHTSMITH_API_KEY", "hush-hush\n")

    code, _, _ = evaluate(serve(behave).endpoint.url, QUESTIONS)

    assert code == 0
    assert set(seen) == {"Bearer hush-hush"}


@pytest.mark.parametrize("key", ["hush\nhush", "hush hush", "hüsh"])
def test_a_key_that_cannot_be_sent_is_not_shown(serve, evaluate, monkeypatch, key):
    server = serve()
    monkeypatch.setenv("WEIGHTSMITH_API_KEY", key)

    code, told, err = evaluate(server.endpoint.url, QUESTIONS)

    assert code == 2
    assert "WEIGHTSMITH_API_KEY" in told["error"]["message"]
    assert not [part for part in key.split() if part in err]
    assert server.asked == []


@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_wants_a_key_is_no_failed_check(serve, evaluate, status):
    """Exit code 5: the same command may succeed with the key."""
    server = serve(lambda handler, _: handler.send(status, {"error": "key"}))

    code, told, _ = evaluate(server.endpoint.url, QUESTIONS)

    assert code == 5
    assert f"HTTP {status}" in told["error"]["message"]
    assert "WEIGHTSMITH_API_KEY" in told["error"]["hint"]
    assert len(server.asked) == 1


def test_an_address_with_the_path_of_requests(serve, evaluate):
    paths = []

    def behave(handler, _):
        paths.append(handler.path)
        handler.send(200, answer())

    url = serve(behave).endpoint.url

    assert evaluate(f"{url}/v1/chat/completions", QUESTIONS)[0] == 0
    assert set(paths) == {"/v1/chat/completions"}
    code, told, _ = evaluate(f"{url}/v1?api-version=1", QUESTIONS)
    assert (code, "invalid URL" in told["error"]["message"]) == (2, True)
