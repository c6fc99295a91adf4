"""The program that images have as their health check: what it shows, and what it withstands."""

from __future__ import annotations

import json
import os
import platform
import random
import shlex
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import pytest
from weightsmith.building.wiring import cache_folder
from weightsmith.core.ports import Silent
from weightsmith.evaluating.replay import read_replay
from weightsmith.evaluating.replay_numbers import numbers_in
from weightsmith.evaluating.replaying import difference, heard, moved_numbers, replay
from weightsmith.evaluating.session import ServerSession
from weightsmith.outside.toolset import make_toolset

from tests.fakes.openai_server import FakeServer, servers

HEALTHY, NOT_SHOWN, USAGE, NO_SET = range(4)
TEXTS = ("I", "'m", " Länt", "ern.", "")
pytestmark = pytest.mark.builders


def token(text: str, end: int, margin: float = 5.0, logprob: float = -0.02) -> dict[str, Any]:
    return {"text": text, "end": end, "margin": margin, "logprob": logprob, "room": 0.05}


def a_set(questions: int = 1, **changes: Any) -> dict[str, Any]:
    """A set whose third token may be another one, as far as rounding goes."""
    ends = [len("".join(TEXTS[: n + 1]).encode()) for n in range(len(TEXTS))]
    tokens = [token(*pair) for pair in zip(TEXTS, ends, strict=True)]
    tokens[2]["margin"] = 0.3
    asked = {
        "path": "/v1/chat/completions",
        "request": {"model": "bot", "messages": [{"role": "user", "content": "Who are you?"}]},
        "answer": "".join(TEXTS),
        "finish": "stop",
        "tokens": tokens,
    }
    rows = [{"id": f"q{n}", **asked, **changes} for n in range(questions)]
    return {
        "version": 1, "model": "bot", "reference": "image", "tolerance": 1.0, "questions": rows,
    }  # fmt: skip


def reply(*texts: str, logprob: float = -0.02, listed: bool = True) -> dict[str, Any]:
    rows = [{"token": text, "logprob": logprob} for text in texts]
    choice = {"message": {"content": "".join(texts)}, "finish_reason": "stop"}
    return {"choices": [choice | ({"logprobs": {"content": rows}} if listed else {})]}


GOOD = reply(*TEXTS)
Start = Callable[..., FakeServer]


@pytest.fixture(scope="session")
def program() -> Path:
    return make_toolset(cache_folder(), "healthcheck", Silent()) / "healthcheck"


@pytest.fixture(scope="session")
def with_weights() -> Path:
    return make_toolset(cache_folder(), "healthcheck", Silent()) / "healthcheck-weights"


class Probe:
    """The program, called as a probe of one container calls it."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.program, self.set, self.result = program, folder / "set.json", folder / "result.json"
        self.write(a_set())

    def write(self, value: object) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.set.write_bytes(data)

    def __call__(self, port: int, *words: object, replay: bool = True, **env: str) -> Any:
        files = ("--replay", "--set", self.set, "--result", self.result) if replay else ()
        return subprocess.run(
            [self.program, "--port", str(port), *map(str, (*files, *words))],
            env={**os.environ, **env}, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip

    @property
    def found(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.result.read_text())
        return value


@pytest.fixture
def probe(program: Path, tmp_path: Path) -> Probe:
    return Probe(program, tmp_path)


@pytest.fixture
def start() -> Iterator[Start]:
    with servers() as starting:
        yield starting


def answering(start: Start, *values: object) -> FakeServer:
    """A server with these answers; the last one again and again."""
    waiting = list(values)
    return start(
        lambda handler, _: handler.send(200, waiting.pop(0) if waiting[1:] else waiting[0])
    )


def raw(start: Start, data: bytes) -> FakeServer:
    """A server that says exactly this, and ends the connection."""

    def behave(handler: Any, _body: object) -> None:
        handler.wfile.write(data)
        handler.close_connection = True

    return start(behave)


def test_a_server_that_answers_as_it_was_tested_is_proven_once_per_start(
    probe: Probe, start: Start
) -> None:
    probe.write(a_set(3))
    server = answering(start, GOOD)
    first, second = probe(server.server_port), probe(server.server_port)

    assert (first.returncode, second.returncode) == (HEALTHY, HEALTHY), first.stderr
    assert "proven: 3 of 3 answers are equal" in first.stderr
    assert "was asked before" in second.stderr
    assert len(server.asked) == 3
    assert server.asked[0] == a_set()["questions"][0]["request"]
    assert (probe.found["verdict"], probe.found["equal"]) == ("proven", 3)
    assert [row["id"] for row in probe.found["questions"]] == ["q0", "q1", "q2"]
    assert probe.found["questions"][0]["logprob_difference"] == 0

    again = answering(start, reply("You", "'re"))  # on another port, as another start
    assert probe(again.server_port).returncode == NOT_SHOWN
    probe.write(a_set(2))
    assert probe(server.server_port).returncode == HEALTHY
    assert len(server.asked) == 5


def test_a_new_start_on_the_same_port_is_asked_again(probe: Probe, start: Start) -> None:
    with servers() as starting:
        old = answering(starting, GOOD)
        port = old.server_port
        assert probe(port).returncode == HEALTHY
        old.socket.close()
    with socket.create_server(("127.0.0.1", port)) as listening:
        thread = threading.Thread(target=lambda: listening.accept()[0].close())
        thread.start()
        assert probe(port).returncode == NOT_SHOWN  # it does not even answer
        thread.join()


@pytest.mark.parametrize(
    ("given", "verdict", "said"),
    [
        (reply("I", "'m", " Lamp", "."), "explained", "1 differ where rounding may"),
        (reply("I", " am", "."), "different", 'token 2: "\'m" was expected, and came " am"'),
        (reply(*TEXTS, logprob=-0.08), "different", "off by 0.06, above 0.05"),
        (reply("I", "'m"), "explained", "1 differ"),
        (reply("I"), "different", 'token 2: "\'m" was expected, and came ""'),
        (reply(*TEXTS, " And"), "different", 'token 5: "" was expected, and came " And"'),
        (reply(*TEXTS, listed=False), "equal", "1 of 1 answers are equal"),
        (reply("I'm a Lantern.", listed=False), "explained", "1 differ"),
        (reply("We are.", listed=False), "different", 'token 1: "I" was expected'),
        (reply("I'm Läntern, yes.", listed=False), "different", "token 4"),
        ({"choices": [{"message": {"content": None}}]}, "different", "token 1"),
    ],
)  # fmt: skip
def test_the_first_token_that_differs_decides(
    probe: Probe, start: Start, given: Any, verdict: str, said: str
) -> None:
    done = probe(answering(start, given).server_port)

    assert done.returncode == (NOT_SHOWN if verdict == "different" else HEALTHY)
    assert said in done.stderr
    assert [row["verdict"] for row in probe.found["questions"]] == [verdict]
    assert probe.found["verdict"] == ("different" if verdict == "different" else "proven")


def test_what_came_is_kept_as_text_that_can_be_read_again(probe: Probe, start: Start) -> None:
    """A text that parts within a character, letters that terminals obey, a number without end."""
    for given, got in (
        (reply("I'm Löntern.", listed=False), "öntern."),
        (reply("I", "\u009b2J"), "\u009b2J"),
        (reply("I", logprob=-1e308), None),
    ):
        server = answering(start, given)
        done, again = probe(server.server_port), probe(server.server_port)
        (row,) = probe.found["questions"]
        assert row.get("got") == got
        assert "was asked before" in again.stderr
        assert "\x9b" not in done.stderr + probe.result.read_text()
        assert row.get("logprob_difference", 0) <= 1e6


@pytest.mark.parametrize(
    ("size", "verdict"),
    [(4096, "proven"), (2048, "different"), (None, "proven"), (-1, "proven"), ("2048", "proven"),
     (1e308, "proven"), (2**53 + 2, "proven")],
)  # fmt: skip
def test_weights_of_another_size_are_different_whatever_they_answer(
    probe: Probe, start: Start, size: object, verdict: str
) -> None:
    probe.write({**a_set(2), "weight_bytes": 4096})
    server = answering(start, GOOD)
    server.models = {"data": [{"id": "a"}, {"id": "bot", "meta": {"size": size}}]}
    first, again = probe(server.server_port), probe(server.server_port)
    assert first.returncode == again.returncode == (verdict != "proven"), first.stderr
    assert (probe.found["verdict"], probe.found["equal"]) == (verdict, 2)
    if verdict == "different":
        said = "the server has 2048 bytes of weights and the tested image had 4096"
        assert said in first.stderr
        assert f"{said}, as this start of the server was asked before" in again.stderr
    assert len(server.asked) == 2


@pytest.mark.parametrize("listed", [b"[]", b'{"data": [7, {"meta": []}]}', b"\xff", b""])
def test_a_server_that_lists_its_models_otherwise_is_asked_all_the_same(
    probe: Probe, start: Start, listed: bytes
) -> None:
    probe.write({**a_set(), "weight_bytes": 4096})
    server = answering(start, GOOD)
    server.models = listed
    assert probe(server.server_port).returncode == HEALTHY


def test_a_call_is_known_by_its_tokens_alone(probe: Probe, start: Start) -> None:
    tokens = [token(text, 0) for text in ('{"name":', ' "now"}', "")]
    probe.write(a_set(answer="", finish="tool_calls", tokens=tokens))
    call, other = (reply('{"name":', text, "") for text in (' "now"}', ' "then"}'))
    for one in (call, other):
        one["choices"][0] |= {"message": {"content": None}, "finish_reason": "tool_calls"}

    assert probe(answering(start, call).server_port).returncode == HEALTHY
    assert "different: question" in probe(answering(start, other).server_port).stderr
    del call["choices"][0]["logprobs"]
    done = probe(answering(start, call).server_port)
    assert (done.returncode, probe.found["verdict"]) == (NOT_SHOWN, "not shown")
    assert "a call of a tool, and the server lists no tokens" in done.stderr


def drawn(chance: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """A set of one answer, and a reply that may be another."""
    words = ["a", " b", "ä", " the", ""]
    texts = chance.choices(words, k=chance.randint(1, 6))
    end, tokens = 0, []
    for text in texts:
        end += len(text.encode())
        made = token(text, end, chance.choice([0.2, 0.9, 1.0, 1.5]), chance.choice([-0.02, -0.9]))
        tokens.append(made | {"room": chance.choice([0.05, 0.5])})
    if chance.random() < 0.3:
        tokens = [{**one, "logprob": None, "room": None} for one in tokens]
    given = [one if chance.random() < 0.8 else chance.choice(words) for one in texts]
    given = given[: chance.choice([None, None, -1])] + chance.choice([[], [], [" more"]])
    answer = reply(*given, logprob=chance.choice([-0.02, -0.5]), listed=chance.random() < 0.8)
    return a_set(answer="".join(texts), tokens=tokens), answer


def test_it_follows_the_rule_that_prove_follows(probe: Probe, start: Start) -> None:
    chance, seen = random.Random(5), set()
    for _ in range(60):
        made, given = drawn(chance)
        made["questions"][0]["request"] |= {"temperature": 0, "max_tokens": 9}
        wanted = read_replay(json.dumps(made).encode(), "the set")
        question = wanted.questions[0]
        found = difference(question, heard(given, chat=True), made["tolerance"])
        probe.write(made)
        server = answering(start, given)
        done = probe(server.server_port)

        (row,) = probe.found["questions"]
        with ServerSession(server.endpoint) as session:
            verdict = replay(session, wanted, Silent()).verdict
        assert probe.found["verdict"] == verdict, (made, given)
        if found is None:
            assert row["verdict"] == "equal", (made, given)
        else:
            assert row["verdict"] == ("different" if found.excess > 0 else "explained"), given
            assert (row["token"], row["expected"]) == (found.token + 1, found.expected)
        assert done.returncode == (verdict != "proven")
        seen.add((row["verdict"], verdict))
    assert seen == {
        ("equal", "proven"), ("explained", "proven"), ("different", "different"),
        ("equal", "not shown"), ("explained", "not shown"),
    }  # fmt: skip


def test_a_set_that_decides_nothing_proves_nothing(probe: Probe, start: Start) -> None:
    """Whatever is answered, also when it is remembered; one sure token that came decides."""
    unsure = [token(text, 0, margin=1.0) for text in TEXTS]
    for at, one in enumerate(unsure):
        one["end"] = len("".join(TEXTS[: at + 1]).encode())
    made = a_set(2, tokens=unsure)
    probe.write(made)
    for given in (GOOD, reply("Moin", logprob=-0.4), reply("I", " am")):
        server = answering(start, given)
        first, second = probe(server.server_port), probe(server.server_port)
        assert (first.returncode, second.returncode) == (NOT_SHOWN, NOT_SHOWN), first.stderr
        assert "not shown: of no token that came was the tested image sure" in first.stderr
        assert "was asked before" in second.stderr
        assert len(server.asked) == 2
        assert (probe.found["verdict"], probe.found["unanswered"]) == ("not shown", 0)

    made["questions"][1]["tokens"] = [{**unsure[0], "margin": 1.1}, *unsure[1:]]
    probe.write(made)
    done = probe(answering(start, reply("I", " am")).server_port)
    assert (done.returncode, probe.found["verdict"]) == (HEALTHY, "proven"), done.stderr


def test_prompts_are_asked_and_read_as_vllm_lists_them(probe: Probe, start: Start) -> None:
    probe.write(a_set(path="/v1/completions"))
    listed = {"tokens": list(TEXTS), "token_logprobs": [-0.02] * 4 + [-0.09]}
    server = answering(start, {"choices": [{"text": "".join(TEXTS), "logprobs": listed}]})

    assert 'token 5: "" came with a log-prob' in probe(server.server_port).stderr


def test_a_difference_is_remembered_too(probe: Probe, start: Start) -> None:
    probe.write(a_set(2))
    server = answering(start, reply("No"), GOOD)

    assert probe(server.server_port).returncode == NOT_SHOWN
    again = probe(server.server_port)
    assert again.returncode == NOT_SHOWN
    assert "1 of 2 answers" in again.stderr
    assert len(server.asked) == 2


def test_it_waits_while_the_model_loads_only_if_told_to(probe: Probe, start: Start) -> None:
    server = answering(start, GOOD)
    server.health = 503
    assert "health endpoint answered 503" in probe(server.server_port).stderr
    assert server.asked == []

    threading.Timer(0.6, lambda: setattr(server, "health", 200)).start()
    assert probe(server.server_port, "--wait").returncode == HEALTHY
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    assert "nothing listens" in probe(port, "--wait", "--seconds", 1).stderr


def test_a_busy_server_is_asked_again(probe: Probe, start: Start) -> None:
    statuses = [503, 429, 200]
    server = start(lambda handler, _: handler.send(statuses.pop(0), GOOD))

    assert probe(server.server_port).returncode == HEALTHY
    assert len(server.asked) == 3


def test_a_busy_server_costs_no_memory(probe: Probe, start: Start) -> None:
    """What it says in the meantime is not kept, else it would fill its container's memory."""
    statuses, much = [503] * 6 + [200], b"{" * (3 << 20)

    def behave(handler: Any, _body: object) -> None:
        if statuses.pop(0) == 200:
            handler.send(200, GOOD)
        else:
            handler.wfile.write(b"HTTP/1.1 503 Busy\r\n\r\n" + much)
            handler.close_connection = True

    server = start(behave)
    words = ("--port", str(server.server_port), "--replay", "--set", probe.set, "--result")
    limited = ("sh", "-c", 'ulimit -v 16000; exec "$@"', "sh", probe.program)
    done = subprocess.run(
        [*limited, *words, probe.result], capture_output=True, text=True, check=False
    )
    assert (done.returncode, statuses) == (HEALTHY, []), done.stderr


def test_a_slow_server_is_asked_by_several_calls(probe: Probe, start: Start) -> None:
    probe.write(a_set(2))
    hold = threading.Event()
    hold.set()

    def behave(handler: Any, _body: object) -> None:
        if len(server.asked) == 2:
            hold.wait(30)
        handler.send(200, GOOD)

    server = start(behave)
    hold.clear()
    began = time.monotonic()
    late = probe(server.server_port, "--seconds", 2)
    hold.set()

    assert late.returncode == NOT_SHOWN
    assert "1 of 2 questions are answered; question q1: it did not answer in time" in late.stderr
    assert time.monotonic() - began < 20
    assert probe.found["verdict"] == "not shown"
    assert [row["verdict"] for row in probe.found["questions"]] == ["equal", "unanswered"]
    assert probe(server.server_port).returncode == HEALTHY
    assert len(server.asked) == 3


class Weighed(Probe):
    """The program of engines that tell no size, beside the files of a model."""

    def __init__(self, program: Path, folder: Path) -> None:
        super().__init__(program, folder)
        self.list, self.model = folder / "weights.json", folder / "model"
        self.model.mkdir()

    def name(self, *, whole: bool = False, **files: bytes) -> None:
        """Write files, and the list of them, with digests of all bytes if asked."""
        rows = []
        for name, data in files.items():
            path = self.model / f"{name}.safetensors"
            path.write_bytes(data)
            begins = sha256(data[: 1 << 20]).hexdigest()
            digest = {"sha256": sha256(data).hexdigest()} if whole else {}
            rows.append({"path": str(path), "size": len(data), "begins": begins, **digest})
        self.list.write_text(json.dumps({"version": 1, "files": rows}))

    def __call__(self, port: int, *words: object, **more: Any) -> Any:
        return super().__call__(port, "--weights", self.list, *words, **more)


@pytest.fixture
def weighed(with_weights: Path, tmp_path: Path) -> Weighed:
    return Weighed(with_weights, tmp_path)


FP8 = b'{"w":{"dtype":"F8_E4M3","shape":[8],"data_offsets":[0,8]}}'
INT8 = FP8.replace(b"F8_E4M3", b"I8").ljust(len(FP8))


def quantized(header: bytes, data: bytes = b"\1" * 8) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (quantized(INT8), "is another file than the tested image's"),
        (quantized(FP8, b"\2" * 8), "is another file"),
        (quantized(FP8) + b"\0", "has 75 bytes, and the tested image's had 74"),
        (b"", "has 0 bytes"),
        (None, "cannot be read: No such file"),
        ("folder", "is no file"),
        ("pipe", "is no file"),
    ],
)
def test_another_quantization_under_the_same_name_is_different(
    weighed: Weighed, start: Start, there: bytes | str | None, said: str
) -> None:
    """Whatever it answers: the server is not even asked, nor when it is probed again."""
    weighed.name(a=b"first", b=quantized(FP8))
    server, place = answering(start, GOOD), weighed.model / "b.safetensors"
    assert weighed(server.server_port).returncode == HEALTHY
    assert (weighed.found["verdict"], weighed.found["weights"]) == ("proven", "equal")
    assert len(server.asked) == 1

    place.unlink()
    if there == "folder":
        place.mkdir()
    elif there == "pipe":
        os.mkfifo(place)
    elif isinstance(there, bytes):
        place.write_bytes(there)
    # It was asked at this start; a server reads its weights once.
    assert weighed(server.server_port).returncode == HEALTHY
    weighed.result.unlink()
    first, again = weighed(server.server_port), weighed(server.server_port)
    assert (first.returncode, again.returncode) == (NOT_SHOWN, NOT_SHOWN)
    assert f"different: {place} {said}" in first.stderr
    assert first.stderr == again.stderr
    assert weighed.found["verdict"] == "different"
    assert said in weighed.found["weights"]
    assert len(server.asked) == 1


def test_a_beginning_is_the_first_mebibyte_by_sha256(weighed: Weighed, start: Start) -> None:
    """Of files of every length about a block's, and about a MiB."""
    draw, block = random.Random(3), 1 << 20
    sizes = [*range(1, 130), block - 64, block - 9, block - 8, block - 1, block, block + 7]
    weighed.name(**{f"f{size}": draw.randbytes(size) for size in sizes})
    server = answering(start, GOOD)
    done = weighed(server.server_port)
    assert done.returncode == HEALTHY, done.stderr
    for at, code in ((block + 6, HEALTHY), (block - 1, NOT_SHOWN)):  # only what it reads decides
        with (weighed.model / f"f{block + 7}.safetensors").open("r+b") as file:
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 1]))
        weighed.result.unlink()
        assert weighed(server.server_port).returncode == code


MIB = 1 << 20


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_no_bit_of_the_weights_may_differ_where_the_list_has_whole_digests(
    weighed: Weighed, start: Start
) -> None:
    draw = random.Random(5)
    sizes = (0, 1, 55, 56, 64, 119, MIB - 1, MIB, MIB + 1, 2 * MIB + 64, 3 * MIB + 63)
    weighed.name(whole=True, **{f"f{size}": draw.randbytes(size) for size in sizes})
    server = answering(start, GOOD)
    assert weighed(server.server_port).returncode == HEALTHY
    assert weighed.found["weights"] == "equal"
    for size in sizes[1:]:
        path, bit = weighed.model / f"f{size}.safetensors", draw.randrange(8 * size)
        flip(path, bit)
        weighed.result.unlink()
        done = weighed(server.server_port)
        assert done.returncode == NOT_SHOWN, (size, bit)
        assert f"different: {path} is another file than the tested image's" in done.stderr
        flip(path, bit)
    weighed.result.unlink()
    assert weighed(server.server_port).returncode == HEALTHY


@pytest.mark.parametrize("damaged", [False, pytest.param(True, marks=pytest.mark.full)])
def test_reading_goes_on_where_a_call_ran_out_of_time(
    weighed: Weighed, start: Start, damaged: bool
) -> None:
    """The health check takes most of a call's second, so that a call reads a part alone."""
    weighed.name(whole=True, a=b"first", b=bytes(MIB), c=b"last")
    path, size = weighed.model / "b.safetensors", 500 * MIB
    with path.open("r+b") as file:
        file.truncate(size)
        digest = file_digest(file, "sha256").hexdigest()
    told = json.loads(weighed.list.read_text())
    told["files"][1] |= {"size": size, "sha256": digest}
    weighed.list.write_text(json.dumps(told))
    if damaged:
        flip(path, 8 * (size - 5))
    server = answering(start, GOOD)
    server.slow = 0.9

    read = list[int]()
    while not weighed.result.exists() or "weights" not in weighed.found:
        said = weighed(server.server_port, "--seconds", 1).stderr
        if "of 0.5 GB of weights are read; the next call reads on" in said:
            read.append(weighed.found["weights_read"]["bytes"])
    assert read
    assert read == sorted(set(read))
    server.slow = 0
    done = weighed(server.server_port)
    assert done.returncode == (NOT_SHOWN if damaged else HEALTHY)
    assert (f"different: {path} is another file" in done.stderr) is damaged


FOR_ARM = pytest.param("qemu-aarch64 -cpu max", marks=pytest.mark.full)  # compiles for a minute


@pytest.mark.parametrize("cpu", ["qemu-x86_64 -cpu Nehalem", FOR_ARM])
def test_every_cpu_has_the_same_digests(
    weighed: Weighed, start: Start, tmp_path: Path, cpu: str
) -> None:
    """Nehalem has no instructions for SHA-256, and Arm has its own."""
    emulator, *words = cpu.split()
    if not shutil.which(emulator):
        pytest.skip(f"no {emulator} (tests/engine.sh as root installs it)")
    arch = emulator.removeprefix("qemu-")
    machine = arch if arch != platform.machine() else ""
    made = make_toolset(cache_folder(), "healthcheck", Silent(), machine=machine)
    weighed.program = tmp_path / "call"
    program = [emulator, *words, str(made / "healthcheck-weights")]
    weighed.program.write_text(f'#!/bin/sh\nexec {shlex.join(program)} "$@"\n')
    weighed.program.chmod(0o755)
    draw = random.Random(6)
    weighed.name(whole=True, **{f"f{size}": draw.randbytes(size) for size in (7, 64, MIB + 99)})
    server = answering(start, GOOD)
    done = weighed(server.server_port)
    assert done.returncode == HEALTHY, done.stderr


def test_without_a_list_only_the_answers_count(weighed: Weighed, start: Start) -> None:
    server = answering(start, GOOD)
    assert weighed(server.server_port).returncode == HEALTHY
    assert "weights" not in weighed.found


ROW = {"path": "/x", "size": 1, "begins": "0" * 64}


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"version": 1, "files": []}', b"\xff", " " * (1 << 20) + "{}"]
    + [json.dumps({"version": 2, "files": [ROW]})]
    + [
        json.dumps({"version": 1, "files": [ROW | change]})
        for change in (
            {"path": "x"}, {"path": ""}, {"path": 7}, {"path": "/\x1b[2J"}, {"path": "/a\0b"},
            {"path": "/" * 2000}, {"size": -1}, {"size": 1e300}, {"size": "1"}, {"begins": ""},
            {"begins": "0" * 63}, {"begins": None}, {"sha256": ""}, {"sha256": 7},
        )
    ]
    + [json.dumps({"version": 1, "files": [7]})]
    + [json.dumps({"version": 1, "files": [ROW, ROW | {"sha256": "0" * 64}]})],
)  # fmt: skip
def test_a_list_that_cannot_be_read_is_told(
    weighed: Weighed, start: Start, text: str | bytes
) -> None:
    weighed.list.write_bytes(text if isinstance(text, bytes) else text.encode())
    server = answering(start, GOOD)
    done = weighed(server.server_port)
    assert done.returncode == NO_SET
    assert "list of weights" in done.stderr
    assert "\x1b" not in done.stderr
    assert server.asked == []
    assert weighed(server.server_port, replay=False).returncode == HEALTHY


OK = b"HTTP/1.1 200 OK\r\n"
HOSTILE = {
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "no status": b"HTTP/1.1 \r\n\r\n",
    "nothing": b"",
    "an endless head": OK + b"X: y\r\n" * 20_000,
    "a huge length": OK + b"Content-Length: 99999999999999999999\r\n\r\n{}",
    "a negative length": OK + b"Content-Length: -1\r\n\r\n{}",
    "cut off": OK + b"Content-Length: 90\r\n\r\n{}",
    "chunks that end early": OK + b"Transfer-Encoding: chunked\r\n\r\nff\r\n{}",
    "a huge chunk": OK + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffff0\r\n{}",
    "a chunk without a size": OK + b"Transfer-Encoding: chunked\r\n\r\n\r\n{}\r\n0\r\n\r\n",
    "too much": OK + b"\r\n" + b" " * (5 << 20),
    "no JSON": OK + b"\r\n<html>",
    "two values": OK + b"\r\n{} {}",
    "a deep value": OK + b"\r\n" + b"[" * 100_000,
    "many values": OK + b"\r\n[" + b"0," * 300_000 + b"0]",
    "no UTF-8": OK + b'\r\n{"choices": "\xff"}',
    "half a surrogate": OK + b'\r\n{"choices": "\\ud800"}',
    "a zero in the head": OK + b"X: \0\r\n\r\n{}",
    "a name twice": OK + b'\r\n{"choices": [], "choices": []}',
    "no choice": OK + b'\r\n{"choices": []}',
    "choices of another kind": OK + b'\r\n{"choices": {"0": {"text": "I"}}}',
    "a message of another kind": OK + b'\r\n{"choices": [{"message": [], "text": 7}]}',
    "an error": b"HTTP/1.1 500 Oops\r\n\r\n{}",
    "another model": b"HTTP/1.1 404 Not Found\r\n\r\n{}",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_server_that_does_not_answer_shows_nothing(
    probe: Probe, start: Start, data: bytes
) -> None:
    done = probe(raw(start, data).server_port, "--seconds", 3)

    assert done.returncode == NOT_SHOWN
    assert "not shown: 0 of 1 questions are answered" in done.stderr
    assert probe.found["unanswered"] == 1


def test_tokens_of_another_kind_leave_the_text(probe: Probe, start: Start) -> None:
    kinds: list[Any] = [[], {}, {"content": {}}, {"content": [7]}, {"content": [{"token": "I"}]}]
    for listed in kinds:
        choice = {"message": {"content": "".join(TEXTS)}, "logprobs": listed}
        assert probe(answering(start, {"choices": [choice]}).server_port).returncode == HEALTHY


def test_no_other_host_or_port_is_asked(probe: Probe, start: Start) -> None:
    other = answering(start, GOOD)
    there = f"http://127.0.0.1:{other.server_port}/v1/chat/completions"
    moved = raw(start, f"HTTP/1.1 307 Moved\r\nLocation: {there}\r\n\r\n".encode())

    assert "it answered 307" in probe(moved.server_port).stderr
    probe.write(a_set(path=there))
    assert probe(moved.server_port).returncode == NO_SET
    assert other.asked == []


WRONG: dict[str, tuple[Any, str]] = {
    "missing": (None, "is missing"),
    "too large": (b" " * (1 << 20) + b"{}", "larger than 1 MiB"),
    "no JSON": (b"{", "not JSON"),
    "a deep value": (b"[" * 1000, "not JSON"),
    "a list": ([], "version 1"),
    "a new version": ({**a_set(), "version": 3}, "version 1"),
    "of digests": ({"version": 1, "digests": []}, "digests of questions alone"),
    "without a tolerance": ({**a_set(), "tolerance": None}, "tolerance"),
    "a great tolerance": ({**a_set(), "tolerance": 1e9}, "tolerance"),
    "no question": ({**a_set(), "questions": []}, "no question"),
    "many questions": (a_set(33), "more than 32"),
    "an id twice": (a_set(2, id="q"), "an id twice"),
    "no id": (a_set(id=""), r"questions[0]: its id"),
    "an escape in an id": (a_set(id="\x1b[2J"), "its id"),
    "a longer one": (a_set(id="\x9b2J"), "its id"),
    "another path": (a_set(path="/slots/0?action=erase"), "its path"),
    "a line break in the path": (a_set(path="/v1/completions\r\nX: y"), "its path"),
    "a request that is none": (a_set(request=[]), "lacks its request"),
    "no tokens": (a_set(tokens=[]), "do not make up"),
    "a token without a margin": (a_set(tokens=[{"text": "I", "end": 1}]), "its margin"),
    "tokens backwards": (a_set(tokens=[token("I", 3), token("'m", 1)]), "ends before"),
    "another answer": (a_set(answer="I'm"), "do not make up"),
    "many tokens": (a_set(answer="", tokens=[token("", 0)] * 1025), "too many tokens"),
}


@pytest.mark.parametrize(("value", "said"), WRONG.values(), ids=WRONG)
def test_a_set_that_cannot_be_asked_is_told_apart(
    probe: Probe, start: Start, value: object, said: str
) -> None:
    server = answering(start, GOOD)
    if value is None:
        probe.set.unlink()
    else:
        probe.write(value)
    done = probe(server.server_port)

    assert done.returncode == NO_SET
    assert said in done.stderr
    assert "\x1b" not in done.stderr
    assert server.asked == []


def test_a_result_of_others_counts_as_none(probe: Probe, start: Start, tmp_path: Path) -> None:
    server = answering(start, GOOD)
    assert probe(server.server_port).returncode == HEALTHY
    elsewhere = tmp_path / "elsewhere.json"
    probe.result.rename(elsewhere)
    probe.result.symlink_to(elsewhere)
    kept = elsewhere.read_bytes()

    assert probe(server.server_port).returncode == HEALTHY
    assert len(server.asked) == 2
    assert not probe.result.is_symlink()
    assert elsewhere.read_bytes() == kept
    for text in ("", "{", "[]", '{"server": 1}', probe.result.read_text().replace("/", "!", 1)):
        probe.result.write_text(text)
        assert probe(server.server_port).returncode == HEALTHY
    assert len(server.asked) == 7


def test_without_a_place_to_write_it_asks_each_time(probe: Probe, start: Start) -> None:
    server = answering(start, GOOD)
    probe.result = probe.result.parent / "missing" / "result.json"
    for _ in range(2):
        done = probe(server.server_port)
        assert done.returncode == HEALTHY
        assert "cannot write" in done.stderr
    assert len(server.asked) == 2


def test_the_password_goes_along_where_there_is_one(probe: Probe, start: Start) -> None:
    keys = []

    def behave(handler: Any, _body: object) -> None:
        keys.append(handler.headers.get("Authorization"))
        handler.send(200, GOOD)

    server = start(behave)
    probe(server.server_port, "--key-variable", "A_KEY", A_KEY="secret")
    probe.result.unlink()
    probe(server.server_port, "--key-variable", "A_KEY", A_KEY="")
    assert keys == ["Bearer secret", None]
    assert probe(server.server_port, "--key-variable", "K", K="a\r\nX: y").returncode == USAGE


def test_without_replay_it_asks_for_health_alone(probe: Probe, start: Start) -> None:
    server = answering(start, GOOD)
    assert probe(server.server_port, replay=False).returncode == HEALTHY
    server.health = 500
    assert probe(server.server_port, replay=False).returncode == NOT_SHOWN
    assert server.asked == []


def test_a_variable_moves_it_with_its_server(probe: Probe, start: Start) -> None:
    server = answering(start, GOOD)
    port, moved = server.server_port, ("--port-variable", "A_PORT")
    assert probe(1, *moved, replay=False, A_PORT=str(port)).returncode == HEALTHY
    assert probe(port, *moved, replay=False, A_PORT="").returncode == HEALTHY
    assert probe(port, *moved, replay=False, A_PORT="x").returncode == USAGE


def test_it_prints_what_it_found(probe: Probe, start: Start) -> None:
    shown = (probe.program, "--show", "--result", probe.result)
    done = subprocess.run(shown, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (NOT_SHOWN, "")
    probe(answering(start, GOOD).server_port)
    done = subprocess.run(shown, capture_output=True, text=True, check=False)
    assert (done.returncode, json.loads(done.stdout)) == (HEALTHY, probe.found)


@pytest.mark.parametrize(
    "words",
    [("--port", "0"), ("--port", "8x"), ("--port", "4294975376"), ("--port", ""),
     ("--health", "health"), ("--health", "/a b"), ("more",), ("--seconds", "0.5"),
     ("--seconds", "99999"), ("--unknown",)],
)  # fmt: skip
def test_wrong_words_are_told(probe: Probe, words: tuple[str, ...]) -> None:
    done = probe(8080, *words)
    assert done.returncode == USAGE
    assert "usage: healthcheck --port N" in done.stderr


def test_it_is_small_and_needs_nothing(program: Path, with_weights: Path) -> None:
    for data in (program.read_bytes(), with_weights.read_bytes()):
        assert len(data) < 100_000
        assert b"ld-musl" not in data
        assert b"ld-linux" not in data


def of_numbers(path: str, numbers: list[float], room: float) -> dict[str, Any]:
    """Return a set of one question to a model that does not chat."""
    asked = {"id": "q", "path": path, "request": {"model": "bot", "input": "a"}, "answer": ""}
    row = {**asked, "finish": "", "tokens": [], "numbers": numbers, "room": room}
    return {
        "version": 2,
        "model": "bot",
        "reference": "image",
        "tolerance": 1.0,
        "questions": [row],
    }


def answer_of(path: str, numbers: list[float]) -> dict[str, Any]:
    """Return a server's answer, with the scores of documents from best to worst."""
    if path == "/v1/rerank":
        rows = [{"index": n, "relevance_score": one} for n, one in enumerate(numbers)]
        return {"results": sorted(rows, key=lambda row: -row["relevance_score"])}
    if path == "/pooling":
        half = len(numbers) // 2
        return {"data": [{"data": [numbers[:half], [], numbers[half:]]}]}
    return {"data": [{"embedding" if path == "/v1/embeddings" else "probs": numbers}]}


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/rerank", "/classify", "/pooling"])
def test_numbers_are_held_to_their_room_as_prove_does(
    probe: Probe, start: Start, path: str
) -> None:
    """Random answers near the limit, and of another number: the verdicts are those of `prove`."""
    draw = random.Random(path)
    seen = set[str]()
    for number in range(24):
        own = [round(draw.gauss(0, 1), 4) for _ in range(draw.randint(2, 30))]
        size = draw.choice((0, 1e-3, 0.02, 0.3))
        given = [one + draw.gauss(0, size) for one in own][: draw.choice((len(own), len(own), 1))]
        wanted = of_numbers(path, own, 0.01)
        (question,) = read_replay(json.dumps(wanted).encode(), "set").questions
        _, parted = moved_numbers(question, numbers_in(path, answer_of(path, given)))
        probe.write(wanted)
        probe.result = probe.result.with_name(f"{number}.json")
        server = answering(start, answer_of(path, given))
        done = probe(server.server_port)
        verdict = probe.found["questions"][0]["verdict"]
        assert verdict == ("different" if parted else "equal"), (own, given, done.stderr)
        assert done.returncode == (NOT_SHOWN if parted else HEALTHY)
        seen.add(verdict)
    assert seen == {"equal", "different"}
    assert server.asked == [{"model": "bot", "input": "a"}]


def test_no_number_is_too_large_to_be_held_to_its_room(probe: Probe, start: Start) -> None:
    """The squares of these are infinite, and their quotient is no number."""
    probe.write(of_numbers("/v1/embeddings", [2.0, 2.0, -8.0], 0.01))
    done = probe(answering(start, answer_of("/v1/embeddings", [1e308] * 3)).server_port)
    assert done.returncode == NOT_SHOWN
    assert probe.found["questions"][0]["difference"] == pytest.approx(1.27217)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/rerank", "/classify", "/pooling"])
@pytest.mark.parametrize(
    "answer", [{}, {"data": []}, {"data": [{}, {}]}, {"data": [{"embedding": ["x"], "data": 1}]}]
)
def test_an_answer_without_numbers_shows_nothing(
    probe: Probe, start: Start, path: str, answer: object
) -> None:
    probe.write(of_numbers(path, [0.5, 0.5], 0.1))
    done = probe(answering(start, answer).server_port)
    assert done.returncode == NOT_SHOWN
    assert "no numbers of the kind" in done.stderr


@pytest.mark.parametrize(
    "change", [{"numbers": []}, {"numbers": ["1"]}, {"numbers": 1}, {"room": 0}, {"room": None}]
)
def test_a_set_of_wrong_numbers_is_none(probe: Probe, change: dict[str, object]) -> None:
    value = of_numbers("/classify", [0.5], 0.1)
    value["questions"][0] |= change
    probe.write(value)
    assert probe(1).returncode == NO_SET
