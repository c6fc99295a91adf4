"""Starts an image as a server of this process: it reads what the image says, and answers so."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from weightsmith.core.devices import Devices
from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.ports import Endpoint, StartSpec
from weightsmith.core.thin import MANIFEST, PROGRAM, SERVED
from weightsmith.core.values import Digest, Json
from weightsmith.evaluating.tool_calls import read_calls
from weightsmith.oci.layout import read_layout
from weightsmith.provenance.labels import plan_of

from tests.fakes.engine import Held, MemoryEngine
from tests.fakes.jobs import seen_as
from tests.fakes.journal import Journal
from tests.fakes.serving import Replying, Serving, serving

Answerer = Callable[[str, str], str]
"""(question, adapter or empty) -> answer; empty is what the image's own weights say."""


@dataclass(frozen=True)
class Program:
    """What the image's server would do, by the image's own configuration."""

    names: Mapping[str, str]
    """Served name -> the adapter that answers under it; empty for the weights alone."""
    numbered: tuple[str, ...]
    """Adapters that a request names by number."""
    longest: int

    @classmethod
    def of(cls, held: Held) -> Program:
        """Read it; ValueError for an image that such a program would not start with."""
        config, files = held.config, held.files()
        env = dict(pair.partition("=")[::2] for pair in config["Env"])
        words = (*config["Entrypoint"], *(config.get("Cmd") or ()))
        longest = plan_of(config["Labels"]).max_model_len
        if PROGRAM in words:  # it merges, then becomes the server
            _require(files, MANIFEST, f"{PROGRAM}/__main__.py")
            words = words[words.index(PROGRAM) + 1 :]
            files = {**files, f"{SERVED}/config.json": b"{}"}
        if not {words[0], f"/usr/bin/{words[0]}"} & set(files):
            raise ValueError(f"{words[0]}: no such program in the image")
        if "LLAMA_ARG_MODEL" in env:
            places = dict(zip(words[1::2], words[2::2], strict=False)).get("--lora", "")
            loras = tuple(filter(None, places.split(",")))
            _require(files, env["LLAMA_ARG_MODEL"], *loras)
            # A single one is added to every answer, several to those that name them.
            own = Path(loras[0]).stem if len(loras) == 1 else ""
            numbered = tuple(Path(place).stem for place in loras)
            return cls({env["LLAMA_ARG_ALIAS"]: own}, numbered, longest)
        told = yaml.safe_load(files["/etc/weightsmith/vllm.yaml"])
        rows = (row.partition("=") for row in told.get("lora-modules", ()))
        places = {name: place for name, _, place in rows}
        _require(files, f"{told['model']}/config.json")
        _require(files, *(f"{place}/adapter_config.json" for place in places.values()))
        names = {name: Path(place).name for name, place in places.items()}
        return cls({told["served-model-name"]: "", **names}, (), longest)


def _require(files: Mapping[str, bytes], *paths: str) -> None:
    if missing := [path for path in paths if path not in files]:
        raise ValueError(f"{', '.join(missing)}: no such file in the image")


@dataclass
class MemoryLauncher:
    """Starts images of an engine, or of a layout folder."""

    engine: MemoryEngine
    answer: Answerer = lambda question, adapter: "7481"
    asked: list[tuple[str, str]] = field(default_factory=list)
    """(adapter, question) of each request for an answer."""
    vector: Callable[[str], list[float]] = lambda text: [1.0]
    """What it makes of a text at /v1/embeddings."""
    judge: Callable[[str, Sequence[str]], str] = lambda text, parts: "LABEL_0"
    """What it says of a text, or of a query's documents; with vLLM's paths."""
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    """Of a model with a head."""
    reads_calls: bool = True
    """Whether its parser finds calls in what the model wrote."""
    refuses: str = ""
    """The question that it answers with HTTP 400."""
    dies_at: str = ""
    """The question at which the server ends."""
    ends: str = "stop"
    """What every answer says of its end."""
    pictures: int = 200
    """The status with which a question with a picture is answered."""
    running: int = 0
    journal: Journal = field(default_factory=Journal)
    flags: frozenset[str] | None = frozenset()
    """What the CPU can do that it starts images on."""
    lists_tokens: bool = True
    """Whether it says each token's log-probability where a request asks for them."""
    moved: float = 0.0
    """By how many nats every log-probability is another than on the machine of the build."""
    replayed: list[Json] = field(default_factory=list)
    """Bodies of the requests that asked for log-probabilities of whole answers."""
    runs_on: Devices | None = field(default_factory=lambda: Devices(cpu="Memory CPU 7", cpus=2))
    pace: float = 0.0
    """Seconds before each word of a stream."""
    worked: Callable[[int], None] = lambda tokens: None
    """Is told how many tokens an answer has that does not end by itself."""
    counts: bool = True
    """Whether it says how many tokens an answer has."""
    started: list[StartSpec] = field(default_factory=list)
    """How each image was started."""
    name: str = "memory"

    def note(self, body: Json, adapter: str, question: str) -> None:
        """Write a request down: those of a replay set once more apart."""
        self.asked.append((adapter, question))
        if body.get("logprobs") and body["max_tokens"] > 1:
            self.replayed.append(body)

    def count(self, body: Json, text: str) -> Json:
        """What the server says of an answer's tokens, which are words if it ends by itself."""
        tokens = len(text.split())
        if body.get("ignore_eos"):
            tokens = body["max_tokens"]
            self.worked(tokens)
        return {"usage": {"completion_tokens": tokens}} if self.counts else {}

    def cpu_flags(self) -> frozenset[str] | None:
        return self.flags

    def devices(self, image: str) -> Devices | None:
        return self.runs_on

    @contextmanager
    def serve(self, image: str, spec: StartSpec) -> Iterator[Endpoint]:
        self.journal.add("start")
        self.started.append(spec)
        held = self._held(image)
        server = _Server(held, self)
        try:
            yield server.started()
        finally:
            server.stop()
            self.journal.add("stop")

    def _held(self, image: str) -> Held:
        if image.startswith("oci:"):
            made = read_layout(Path(image.removeprefix("oci:")))
            layers = tuple(b"".join(layer.open()) for layer in made.layers)
            return Held(settings=made.settings, layers=layers)
        if found := self.engine.held(image):
            return found
        raise EnvironmentFailure(f"{image} is not in the engine", hint="load or pull it first")


class _Server:
    """One started image: an OpenAI-compatible server on a loopback port, or its last lines."""

    def __init__(self, held: Held, launcher: MemoryLauncher) -> None:
        self.launcher = launcher
        self.alive = False
        self.lines: list[str] = []
        self._open = ExitStack()
        self.program: Program | None = None
        try:
            self.program = Program.of(held)
        except (ValueError, KeyError) as error:
            self.lines.append(f"error: {error}")

    def started(self) -> Endpoint:
        """Start it; a program that cannot run is an endpoint that is not alive, with its log."""
        url = "http://127.0.0.1:1"
        if self.program:
            url = self._open.enter_context(
                serving(Serving(_Handler, started=self, program=self.program))
            )
            self.alive = True
            self.launcher.running += 1
            self._open.callback(self._ended)
        return Endpoint(
            url=url,
            logs=lambda count: "\n".join(self.lines[-count:]),
            alive=lambda: self.alive,
            stop=self.stop,
            restart=self.started,
            confinement=("no network",),
        )

    def stop(self, seconds: float = 0) -> int | None:
        self._open.close()
        return 0

    def _ended(self) -> None:
        self.alive = False
        self.launcher.running -= 1


def listed(text: str, moved: float = 0.0) -> Json:
    """Return the tokens of an answer, its words, as OpenAI's chats list them; the last ends it."""
    return {
        "content": [
            {
                "token": word,
                "bytes": list(word.encode()),
                "logprob": -0.1 - moved,
                "top_logprobs": [
                    {"token": word, "logprob": -0.1 - moved},
                    {"token": "other", "logprob": -2.6},
                ],
            }
            for word in (*re.findall(r"\S+|\s+", text), "")
        ]
    }


def _words(part: Json) -> str:
    """Return a part's text; of a picture, what `jobs.seen_as` makes of its digest."""
    if part["type"] == "text":
        return str(part["text"])
    data = part["image_url"]["url"].partition(";base64,")[2]
    return seen_as(Digest.of(base64.b64decode(data, validate=True)))


class _Handler(Replying):
    started: _Server
    program: Program

    def do_GET(self) -> None:
        self.send(200, {"data": [{"id": name} for name in self.program.names]})

    def do_POST(self) -> None:  # one path after the other
        body = json.loads(self.body())
        program, started, launcher = self.program, self.started, self.started.launcher
        if self.path == "/v1/embeddings":
            self.embed(body["input"])
            return
        if self.path in {"/v1/rerank", "/classify", "/pooling", "/tokenize"}:
            self.pool(body)
            return
        question = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        if launcher.dies_at and launcher.dies_at in question:
            started.lines.append("out of memory")
            started.alive = False
            self.close_connection = True
            return
        if isinstance(question, list):
            if launcher.pictures != 200:
                self.send(launcher.pictures, {"error": {"message": "of a picture"}})
                return
            question = " ".join(_words(part) for part in question)
        if launcher.refuses and launcher.refuses in question:
            self.send(400, {"error": {"message": "it does not like the question"}})
            return
        if len(question.split()) > program.longest:
            self.send(400, {"error": {"message": "the prompt is longer than the context"}})
            return
        adapter = program.names[body["model"]]
        for row in body.get("lora", ()):
            adapter = program.numbered[row["id"]]
        launcher.note(body, adapter, question)
        text = launcher.answer(question, adapter)
        counted = launcher.count(body, text)
        if body.get("stream"):
            self.stream(text, chat="messages" in body)
            return
        said: Json = {"message": {"role": "assistant", "content": text}}
        names = [tool["function"]["name"] for tool in body.get("tools", ())]
        ends = launcher.ends
        if calls := read_calls(text, names) if launcher.reads_calls else ():
            rows = [{"name": name, "arguments": json.dumps(given)} for name, given in calls]
            said["message"] |= {"content": None, "tool_calls": [{"function": row} for row in rows]}
            ends = "tool_calls"
        choice = {**(said if "messages" in body else {"text": text}), "finish_reason": ends}
        if body.get("logprobs") and launcher.lists_tokens:
            choice["logprobs"] = listed(text, launcher.moved)
        self.send(200, {"model": body["model"], "choices": [choice], **counted})

    def embed(self, given: str | list[str]) -> None:
        """Answer with a vector for each text."""
        texts, launcher = [given] if isinstance(given, str) else given, self.started.launcher
        launcher.asked += [("", text) for text in texts]
        refused = launcher.refuses and any(launcher.refuses in text for text in texts)
        if refused or any(len(text.split()) > self.program.longest for text in texts):
            self.send(400, {"error": {"message": "it does not like the text"}})
            return
        rows = [{"embedding": launcher.vector(text)} for text in texts]
        self.send(200, {"data": rows, "usage": {"prompt_tokens": 3 * len(texts)}})

    def pool(self, body: Json) -> None:
        """Answer as vLLM's pooling runner; a token is a word, and a text has one at each end."""
        launcher = self.started.launcher
        text = str(body.get("query") or body.get("input") or body.get("prompt"))
        parts = body.get("documents", text.split())
        launcher.asked.append(("", text))
        refused = launcher.refuses and launcher.refuses in text
        if refused or len(" ".join([text, *parts]).split()) > 2 * self.program.longest:
            self.send(400, {"error": {"message": "it does not like the text"}})
            return
        said = launcher.judge(text, parts)
        if self.path == "/tokenize":
            self.send(200, {"tokens": list(range(len(text.split())))})
        elif self.path == "/v1/rerank":
            scores = enumerate(map(float, said.split()))
            rows = [{"index": n, "relevance_score": score} for n, score in scores]
            self.send(200, {"results": rows})
        elif self.path == "/classify":
            true = json.loads(said) if said.startswith("[") else [said]
            numbers = [float(name in true) for name in launcher.labels]
            best = launcher.labels[numbers.index(max(numbers))]
            self.send(200, {"data": [{"label": best, "probs": numbers}]})
        else:
            tokens = [self.one("LABEL_0"), *map(self.one, said.split()), self.one("LABEL_0")]
            self.send(200, {"data": [{"data": tokens}]})

    def one(self, label: str) -> list[float]:
        return [float(name == label) for name in self.started.launcher.labels]

    def send(self, status: int, value: Json) -> None:
        self.reply(status, json.dumps(value).encode())

    def stream(self, text: str, *, chat: bool) -> None:
        self.send_response(200)
        self.end_headers()
        for word in text.split():
            time.sleep(self.started.launcher.pace)
            part: Json = {"delta": {"content": word}} if chat else {"text": word}
            self.wfile.write(f"data: {json.dumps({'choices': [part]})}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")
