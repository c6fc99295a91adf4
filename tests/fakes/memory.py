"""The whole outside world of a build in this process: no builder, no engine, no network, no torch.

Every fake keeps the promises of its port (tests/contracts/ hold them against the real ones), and
all write what happens into one journal.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import yaml
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from weightsmith.building.build import build
from weightsmith.building.explain import forecast
from weightsmith.building.record import BuiltTarget
from weightsmith.building.request import BuildRequest
from weightsmith.building.targets import chosen_targets, wants_auto
from weightsmith.cache.cache import SharedCache
from weightsmith.cache.store import SharedStore
from weightsmith.cache.uploads import Remember, Uploads, nowhere
from weightsmith.core.jobs import Job, ProofJob, ReferenceJob
from weightsmith.core.ports import CANDIDATES, AnySigner, Cache, Progress, Signer
from weightsmith.evaluating.bench_files import ResultsFile
from weightsmith.oci.registry import Registry
from weightsmith.outside.folders import FolderReader
from weightsmith.outside.hub import HubWriter
from weightsmith.outside.process import run_command
from weightsmith.outside.signer import open_signer
from weightsmith.provenance.signing import read_public_key
from weightsmith.quantizers.calibration import MIN_CHARACTERS, MIN_TEXTS
from weightsmith.recipe.file import read_recipe
from weightsmith.serving.healthcheck import WITH_WEIGHTS
from weightsmith.steps import launch
from weightsmith.steps.outputs import ImageOutputs
from weightsmith.steps.tools import NO_LIMIT, JobMemory, Tools
from weightsmith.worker.jobs import STAGES as JOBS

from tests.fakes.engine import MemoryEngine
from tests.fakes.jobs import Bench, Minds
from tests.fakes.journal import Journal, RecordingProgress
from tests.fakes.launcher import MemoryLauncher
from tests.fakes.registry import FakeRegistry, fake_registry
from tests.fakes.runner import MemoryRunner, Stage
from tests.fakes.store import MemoryStore
from tests.fakes.tiny import write_adapter, write_model

QUESTIONS = 8
"""Of each adapter's task."""
STAGES = (
    "resolve", "merge", "validate", "reference", "quantize", "quality", "render", "bake",
    "evaluate", "publish",
)  # fmt: skip
"""Of a build of one target."""
VLLM = {"usr/bin/vllm": b"#!/usr/bin/python3"}
"""All that vLLM's base image has here."""


@dataclass
class Memory:
    """A user's folder with a recipe, and everything a build of it reaches."""

    folder: Path
    registry: FakeRegistry
    client: Registry
    """Speaks with it; it may be used by many sets, because it is slow to make."""
    journal: Journal = field(default_factory=Journal)
    signer: AnySigner | None = None
    adapters: tuple[str, ...] = ("a",)
    room: JobMemory = NO_LIMIT
    """Memory that its jobs may use."""
    two_at_once: bool = False
    """Whether quantizing may run beside validation."""
    cache: Cache | None = None
    """A cache shared with other users; each build opens it anew."""
    verify_key: Path | None = None
    """Whose results from the cache are used."""

    def __post_init__(self) -> None:
        write_model(self.home / "base")
        words = "of as many words as calibration asks for " * (MIN_CHARACTERS // MIN_TEXTS // 40)
        texts = [{"text": f"Text {number}, {words}."} for number in range(MIN_TEXTS)]
        write_rows(self.home / "texts.jsonl", texts)
        for number, name in enumerate(self.adapters, 1):
            write_adapter(self.home / name, seed=number)
            rows = [{"prompt": prompt, "expected": answer} for prompt, answer in questions(name)]
            write_rows(self.home / f"{name}.jsonl", rows)
        facts = {q: (name, a) for name in self.adapters for q, a in questions(name)}
        self.facts = facts
        self.store = MemoryStore(self.folder / "store")
        self.engine = MemoryEngine(journal=self.journal)
        self.progress = RecordingProgress(journal=self.journal)
        self.registry.watch = self._watch
        self.ticks = 0.0
        self.bandwidth = 1e9
        self.shared: SharedStore | None = None
        self.given_up = 0
        self.remember: Remember = nowhere
        self.repair()

    def repair(self) -> None:
        """Put right what a test broke: inputs, jobs, servers, and the registry, now empty."""
        self.journal.faults.clear()
        self.minds = Minds(self.facts)
        self.bench = Bench(base=self.home / "base", minds=self.minds)
        self.runner = MemoryRunner(stages=self.bench.stages, journal=self.journal)
        self.launcher = MemoryLauncher(self.engine, self._answer, journal=self.journal)
        self.registry.faults.clear()
        self.registry.manifests.clear()
        self.write_recipe()

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def dist(self) -> Path:
        return self.folder / "dist"

    @property
    def repository(self) -> str:
        return f"{self.registry.host}/team/tiny"

    @property
    def tools(self) -> Tools:
        store = self.shared or self.store
        return Tools(
            store=store,
            readers={"": FolderReader(store)},
            runner=self.runner,
            engine=self.engine,
            launcher=self.launcher,
            registry=self.client,
            hub=HubWriter(),
            progress=self.progress,
            scratch=lambda: _scratch(self.folder),
            make_engine_files=self._make_engine_files,
            check_engine_files=self._check_engine_files,
            command=run_command,
            signer=self.signer,
            clock=self._tick,
            memory=self.room,
            two_at_once=lambda: self.two_at_once,
            images_in_engine=self.engine.answering,
            bandwidth=lambda: self.bandwidth,
            share=lambda *_, **__: None,  # its nodes have this very store
        )

    def write_recipe(self, **changes: Any) -> None:
        """Write recipe.yaml: one adapter or more, one task over all of them, a GGUF target."""
        recipe = {
            "name": "tiny",
            "version": "1.0.0",
            "base": {"source": "./base"},
            "adapters": [{"source": f"./{name}", "version": "v1"} for name in self.adapters],
            "calibration": {"data": "texts.jsonl"},
            "evaluate": {"data": f"{self.adapters[0]}.jsonl", "max_drop": 0.05},
            "targets": ["llamacpp-q4_k_m"],
            "serve": {"max_model_len": 512, "max_num_seqs": 2},
            "image": {"repository": self.repository},
            **changes,
        }
        text = yaml.safe_dump({key: value for key, value in recipe.items() if value is not None})
        (self.home / "recipe.yaml").write_text(text)

    def request(
        self,
        *settings: str,
        targets: Sequence[str] = (),
        locked: bool = False,
        keep_replay: bool = False,
        results: Sequence[ResultsFile] = (),
        **outputs: Any,
    ) -> BuildRequest:
        """Return what `invoke build` would ask for with these `--set`s, targets and outputs."""
        with chdir(self.home):  # where paths of settings start
            file = read_recipe(self.home / "recipe.yaml", settings)
        return BuildRequest(
            file=file,
            targets=chosen_targets(file, tuple(targets), to_build=True, auto=True),
            auto=wants_auto(file, tuple(targets)),
            outputs=ImageOutputs(**{"tag_digest": outputs.get("push", False), **outputs}),
            dist=self.dist,
            engine_answers=self.engine.answering,
            locked=locked,
            keep_replay=keep_replay,
            bench_results=tuple(results),
        )

    def build(self, *settings: str, **wanted: Any) -> dict[str, BuiltTarget]:
        """Build it; the journal then tells of this build alone."""
        self.journal.events.clear()
        self.runner.jobs.clear()
        self.launcher.asked.clear()
        self.progress.warnings.clear()
        with self.sharing():
            built = list(build(self.request(*settings, **wanted), self.tools))
        return {one.name: one for one in built}

    def forecast(self, *settings: str, measure: bool = False, **wanted: Any) -> dict[str, Any]:
        """What `plan --json` says of such a build."""
        asked = self.request(*settings, **wanted)
        found = forecast(
            asked.file,
            asked.targets,
            self.dist,
            self.tools,
            outputs=asked.outputs,
            locked=asked.locked,
            measure=measure,
            auto=asked.auto,
        )
        return dict(found)

    def planned(self, stage: str, *settings: str, **wanted: Any) -> dict[str, Any]:
        """The plan's last row of a stage; {} if it has none."""
        rows = {row["stage"]: row for row in self.forecast(*settings, **wanted)["stages"]}
        return dict(rows.get(stage, {}))

    def use_vllm(self, target: str = "vllm", **changes: Any) -> str:
        """Put vLLM's base image into the registry and into the recipe; return its name."""
        from tests.fakes.baking import push_base  # which imports this module

        base, labels = f"{self.registry.host}/engines/vllm:1", {"dev.weightsmith.engine": "vllm"}
        push_base(self.client, base, labels, VLLM)
        image = {"repository": self.repository, "base": base}
        self.write_recipe(**{"targets": [target], "image": image, **changes})
        return base

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Put the store in front of the cache, as `wiring` does, if there is one."""
        if self.cache is None:
            yield
            return
        check = read_public_key(self.verify_key) if self.verify_key else None
        remote = SharedCache(self.cache, check, self.progress.warn, 60)
        key = self.signer if isinstance(self.signer, Signer) else None
        uploads = Uploads(remote, self.store.memo, key, self.remember)
        with _scratch(self.folder) as scratch:
            self.shared = SharedStore(self.store, [remote], lambda: scratch, uploads, self.remember)
            try:
                yield
            finally:
                self.given_up = uploads.close(60)
                self.shared = None

    def results(self, target: str = "llamacpp-q4_k_m") -> Path:
        return self.dist / "tiny" / "1.0.0" / target

    def record(self, target: str = "llamacpp-q4_k_m") -> dict[str, Any]:
        return dict(json.loads((self.results(target) / "build.json").read_text()))

    def jobs(self) -> list[str]:
        """What ran in the last build: kinds of jobs, and of one that asks models, whom it asked."""
        return [name for job in self.runner.jobs for name in _names(job)]

    def seen(self) -> list[str]:
        """Everything that a user, or another machine, would take for a finished image."""
        tags = {tag for _, tag in self.registry.manifests if not tag.startswith("sha256")}
        names = {name for name in self.engine.names if CANDIDATES not in name}
        files = [path for name in ("oci-layout", "build.json") for path in self.folder.rglob(name)]
        shown = [path.parent.name for path in files if not path.parent.name.startswith(".")]
        return sorted([*tags, *names, *shown])

    def left(self) -> list[str]:
        """What only a build in progress has: candidates and servers."""
        names = [name for name in self.engine.names if CANDIDATES in name]
        folders = [path.name for path in self.folder.rglob("*.candidate")]
        return [*names, *folders, *["server"] * self.launcher.running]

    def begin_with(self, other: MemoryStore) -> None:
        """Take over the results of another store; they are not written to."""
        self.store.entries |= other.entries
        self.store.notes |= other.notes
        self.store.memos |= other.memos

    def _answer(self, question: str, adapter: str) -> str:
        """Answer as the image: with the adapter that is named, else with what was merged."""
        known = tuple(name for name in self.adapters if not adapter or adapter.startswith(name))
        return self.minds.answer("image", known, question)

    def _watch(self, method: str, path: str) -> None:
        name = path.rpartition("/")[2]
        if method == "PUT" and "/manifests/" in path and not name.startswith("sha256:"):
            self.journal.add(f"tag {name}")
        elif method in {"PUT", "POST"} and self.journal.events[-1:] != ["send"]:
            self.journal.add("send")

    def _make_engine_files(
        self, engine: str, platform: str, folder: Path, progress: Progress
    ) -> None:
        self.journal.add(f"make {engine} for {platform}")
        known = {"llamacpp": ["llama-server"], "healthcheck": ["healthcheck", WITH_WEIGHTS]}
        for program in known.get(engine, ["usr/bin/vllm"]):
            (folder / program).parent.mkdir(parents=True, exist_ok=True)
            (folder / program).write_bytes(f"{program}, a program for {platform}".encode())

    def _check_engine_files(self, engine: str, platform: str) -> None:
        """A compiler is there; a test lets it be missing."""

    def _tick(self) -> float:
        self.ticks += 1
        return self.ticks


def _names(job: Job) -> list[str]:
    if isinstance(job, ProofJob):
        return [*_names(job.validation), *_names(job.reference)]
    if isinstance(job, ReferenceJob):
        tasks = [task for walk in job.walks for task in walk.tasks]
        return [f"reference {one.name}" for task in tasks for one in task.models]
    return [job.kind]


def memory_tools(
    folder: Path,
    stages: Mapping[str, Stage] = JOBS,
    registry: Registry | None = None,
    key: Path | None = None,
) -> Tools:
    """Return ports for one stage or command: jobs, a registry, a key; no engine answers."""
    store, engine = MemoryStore(folder / "store"), MemoryEngine(answering=False)
    return Tools(
        store=store,
        readers={"": FolderReader(store)},
        runner=MemoryRunner(stages=stages),
        engine=engine,
        launcher=MemoryLauncher(engine),
        registry=registry or Registry(),
        hub=HubWriter(),
        progress=RecordingProgress(),
        scratch=lambda: _scratch(folder),
        make_engine_files=_write_program,
        command=run_command,
        signer=open_signer(str(key)) if key else None,
    )


def _write_program(engine: str, _platform: str, folder: Path, _progress: Progress) -> None:
    (folder / engine).write_bytes(b"a program")


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    with TemporaryDirectory(dir=parent) as folder:
        yield Path(folder)


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def questions(name: str) -> list[tuple[str, str]]:
    """Return an adapter's questions with their answers."""
    return [(f"What does {name} say to {n}?", f"{name} says {n * n}.") for n in range(QUESTIONS)]


@contextmanager
def in_memory(folder: Path, **more: Any) -> Iterator[Memory]:
    """A client of its own: what one remembers of a port is false of the next registry on it."""
    # Looking for busy CPUs takes 0.2 s.
    with (
        fake_registry() as registry,
        Registry(pause=lambda _: None) as client,
        patch.object(launch, "idle", lambda: 1),
    ):
        yield Memory(folder, registry, client, **more)


def new_signer() -> Signer:
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return Signer(sign=lambda data: key.sign(data, ec.ECDSA(hashes.SHA256())), public=public)
