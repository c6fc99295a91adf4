"""The day on which a GPU is there: what only a GPU can show, as one table and benchmarks/gpu.json.

    python -m tests.gpu.day [--pack FOLDER] [--part TEXT] [--minutes 40] [--out benchmarks/gpu.json]
        [--base oci:DIR] [--cpu]

Rows that are done stay in the file, so another call goes on where the last one stopped. `--part`
does only the rows whose names begin so, done or not. No row is begun that would probably end after
`--minutes`. A row that cannot run says why, and the next one follows. `--cpu` rehearses all of it
with the tiny example, vLLM for CPUs and this machine's builders.

An image is built, started and asked on the GPU where there is a base to put it on (`--base`, or
`base/` of the pack); else weights and settings are the same, and the engine of the pack's wheels is
started on them without an image. How files come here: tests/gpu/pack.py.
"""
# ruff: noqa: T201 - the table is for whoever runs this

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from weightsmith.building.progress import progress_for
from weightsmith.building.targets import target_of
from weightsmith.building.wiring import cache_folder, open_tools
from weightsmith.core import cpus
from weightsmith.core.devices import is_device
from weightsmith.core.errors import InputRefused, WeightsmithError
from weightsmith.core.files import replace_file
from weightsmith.core.ports import Silent, StartSpec
from weightsmith.core.values import LORA
from weightsmith.evaluating.client import wait_until_healthy
from weightsmith.oci.image import Image
from weightsmith.oci.layout import read_layout
from weightsmith.outside import process
from weightsmith.outside.environment import Pins, environment_folder, is_complete
from weightsmith.outside.hardware import gpu_names
from weightsmith.outside.lines import RESULT
from weightsmith.outside.local import LocalRunner
from weightsmith.provenance.labels import plan_of
from weightsmith.recipe.user_config import RunOptions
from weightsmith.serving.compatibility import check_support
from weightsmith.serving.devices import AMX, AMX_FLAGS, CPU, GPUS
from weightsmith.serving.vllm import slow_fp8

from tests import vllm_parts
from tests.fakes.started import free_port
from tests.gpu import pack
from tests.gpu.pack import NotRun
from tests.paths import ROOT, TINY

SUPPORT_BOT = ROOT / "examples" / "support-bot"
LONGEST = 540
"""Seconds that a command may take on a GPU: where one is lent, they are ended after ten minutes."""
TARGETS = (
    "vllm", "vllm-fp8", "vllm-fp8-block", "vllm-awq", "vllm-gptq", "vllm-nvfp4a16",
    "vllm-mxfp4a16", "vllm-mxfp4a8", "vllm-mxfp8", "vllm-w8a8", "vllm-lora", "sglang",
    "sglang-fp8", "sglang-awq", "vllm-w3a16", "vllm-w5a16",
)  # fmt: skip
PROGRAMS = {
    "vllm": ("vllm.entrypoints.cli.main", "serve"),
    "sglang": ("sglang.launch_server",),
}
ALLOWED = {
    "vllm-fp8": 0.05,
    "vllm-fp8-block": 0.05,
    "vllm-mxfp4a8": 0.05,
    "vllm-mxfp8": 0.05,
    "vllm-w8a8": 0.02,
}
"""Nats between the engine's mean log-probability and that of the same weights in float32. Formats
that round a layer's inputs to 8 bits may be further off (tests/real/test_vllm.py measured them)."""
CLOSE = 0.01
REHEARSED = "nvidia-h100-80gb"
"""What a rehearsal plans for where a CPU cannot serve a target."""
LOSSY = ("vllm-w3a16",)
"""Targets whose weights may have forgotten what the support bot was taught."""
MERGED_SCORE = "score.json"
REPLAY = "etc/weightsmith/replay.json"
"""The replay set's path in an image."""


@dataclass(frozen=True)
class Row:
    """What came of one thing that was tried."""

    name: str
    result: str
    """`passed`, `failed`, or `not run`."""
    why: str = ""
    seconds: float = 0.0
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A model of the day, and how it is served."""

    name: str
    base: Path
    adapter: Path
    questions: Path
    calibration: Path
    longest: int = 2048
    at_once: int = 16
    knows: bool = True
    """Whether its answers can be right: the large model's weights are random."""

    def recipe(self, folder: Path, base: str) -> Path:
        """Write its recipe; `base` is the image's."""
        told = {
            "name": self.name,
            "version": "1.0.0",
            "base": {"source": str(self.base)},
            "adapters": [{"source": str(self.adapter), "version": "v1"}],
            "evaluate": {
                "data": str(self.questions), "max_drop": 1.0, "max_tokens": 32, "limit": 33,
            },
            "calibration": {"data": str(self.calibration)},
            # The gate refuses 3 bits of a small model, whose engine is tried all the same.
            "quality": {"gate": "measure"},
            "targets": ["vllm"],
            "serve": {"max_model_len": self.longest, "max_num_seqs": self.at_once},
            "image": {"repository": self.name, **({"base": base} if base else {})},
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(json.dumps(told))  # JSON is YAML
        return folder / "recipe.yaml"


@dataclass(frozen=True)
class Day:
    """Where the rows are made."""

    cpu: bool
    pack: Path | None
    work: Path
    base: str
    """The image below the weights; empty: engines are started without one."""

    @property
    def gpu(self) -> str:
        """The planner's name of this machine's GPU."""
        (name, *_) = gpu_names() or ("",)
        words = [(a, known) for known, gpu in GPUS.items() for a in (known, *gpu.aliases)]
        found = [(len(alias), known) for alias, known in words if is_device(alias, name)]
        return max(found, default=(0, ""))[1]

    def planned_for(self, target: str) -> str:
        """Return the device that a target is planned for."""
        if not self.cpu:
            return self.gpu
        return REHEARSED if self.refusal(target) else own_cpu()

    def refusal(self, target: str) -> str:
        """Return why a rehearsal cannot start a target's server; '' where it can."""
        if not self.cpu:
            return ""
        device, found = own_cpu(), target_of(target)
        if found.engine.name != "vllm":
            return f"{found.engine.title} is not tried on CPUs"
        try:
            check_support(found.engine, found.format, device)
        except InputRefused as refused:
            return refused.message
        alone = device == AMX and "amx_fp8" not in cpus.flags()
        return " ".join(slow_fp8(found.format, device)) if alone else ""

    def models(self) -> tuple[Model, ...]:
        """Return what is built; the large one is written here, as its bytes need not travel."""
        if self.cpu:
            data = (TINY / "eval-a.jsonl", TINY / "calibration.jsonl")
            return (Model("tiny", TINY / "base", TINY / "adapters" / "a", *data, 512, 4),)
        base, large = self.pack_folder / "models" / "smollm2", self.work / "1b"
        texts = SUPPORT_BOT / "calibration.jsonl"
        small = Model(
            "support-bot", base, SUPPORT_BOT / "adapters" / "support-v1",
            SUPPORT_BOT / "eval.jsonl", texts,
        )  # fmt: skip
        questions = large / "questions.jsonl"
        big = Model("1b", large / "base", large / "adapter", questions, texts, knows=False)
        return small, big

    @property
    def pack_folder(self) -> Path:
        """What was packed; raises NotRun without it."""
        if self.pack is None:
            raise NotRun("no pack: make gpu-pack writes one, --pack names its folder")
        return self.pack

    def environment(self) -> dict[str, str]:
        """Return what commands are run with: on the day the pack's wheels, and no index."""
        own = {"PYTHONPATH": f"{ROOT / 'toolchain'}:{ROOT}"}
        if self.pack and gpu_names():
            own |= {"WEIGHTSMITH_WHEELS": str(self.pack / "wheels"), "PIP_NO_INDEX": "1"}
        return os.environ | own

    def command(self, *words: object) -> Any:
        """Return what one of our commands prints; raises NotRun with what it says."""
        printed = list[str]()
        done = process.run(
            [sys.executable, "-m", "weightsmith.cli.program", *map(str, words), "--json"],
            env=self.environment(), cwd=ROOT, on_line=printed.append,
            on_error_line=(errors := list[str]()).append, longest_line=RESULT,
            timeout=LONGEST * (1 if gpu_names() else 6),  # a CPU is slow
        )  # fmt: skip
        told = "\n".join(printed)
        if done.returncode == 0:
            return json.loads(told)
        try:
            error = json.loads(told)["error"]
            said = f"{error['message']}; {error['hint']}"
        except (ValueError, LookupError):
            said = "\n".join(errors)[-1000:]
        if done.returncode == 4:  # a check failed: the row has a result
            raise AssertionError(said)
        raise NotRun(f"{words[0]}: {said}")

    def torch(self, *words: object) -> Any:
        """Return what tests/gpu/numbers.py prints in the merge builder's Python."""
        python = environment_folder(cache_folder(), _pins("merge")) / "bin" / "python"
        printed, errors = list[str](), list[str]()
        done = process.run(
            [python, "-m", "tests.gpu.numbers", *words], env=self.environment(), cwd=ROOT,
            on_line=printed.append, on_error_line=errors.append, longest_line=RESULT,
            timeout=LONGEST,
        )  # fmt: skip
        if done.returncode:
            raise NotRun("\n".join(errors).strip()[-600:])
        return json.loads(printed[-1])


def own_cpu() -> str:
    """Return how plans name this machine's CPU."""
    return AMX if cpus.flags() >= AMX_FLAGS else CPU


def _pins(builder: str) -> Pins:
    return Pins(name=builder, flavour="cuda" if gpu_names() else "cpu")


# What is done, in this order.


def rows_of(day: Day) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield each row's name, and what makes its figures."""
    yield "machine", lambda: machine(day)
    yield "builder merge", lambda: builder(day, "merge")
    yield "forward", lambda: forward(day)
    try:
        models = day.models()
    except NotRun as why:
        print(f"no models: {why}")
        return
    for model in models:
        yield f"merge {model.name}", lambda m=model: merge(day, m)
    for model in models:
        for format_ in ("gptq", "awq"):
            yield (
                f"calibrate {model.name} {format_}",
                lambda m=model, f=format_: calibrate(day, m, f),
            )
    for engine in PROGRAMS:
        yield f"engine {engine}", lambda e=engine: install(day, e)
        for model in models:
            for target in (t for t in TARGETS if t.partition("-")[0] == engine):
                yield f"serve {model.name} {target}", lambda m=model, t=target: serve(day, m, t)


def machine(day: Day) -> dict[str, Any]:
    """Say what this machine is; without a GPU the day ends here."""
    names = gpu_names()
    if not names and not day.cpu:
        raise NotRun("nvidia-smi names no GPU")
    if names and not day.gpu:
        raise NotRun(f"plans do not know {names[0]}: add it to serving/devices.py")
    if day.pack:
        try:
            pack.check(day.pack)
        except SystemExit as why:
            raise NotRun(why) from None
    room = shutil.disk_usage(day.work).free
    driver = _smi("driver_version") if names else ""
    return {
        "gpu": ", ".join(names), "planned_as": day.gpu, "driver": driver,
        "cores": len(os.sched_getaffinity(0)), "disk_gb": round(room / 1e9),
    }  # fmt: skip


def builder(day: Day, name: str) -> dict[str, Any]:
    """Make a builder of the pack's wheels, or of the packages that this machine's Python has."""
    folder = environment_folder(cache_folder(), _pins(name))
    own = ""
    if not is_complete(folder) and day.pack and (lacking := pack.lacking(day.pack, name)):
        own = pack.from_this_machine(folder, day.pack, name)
        print(f"builder {name}: the pack has no {lacking}, so this machine's own are taken")
    os.environ.update(day.environment())
    try:
        LocalRunner(cache_folder()).prepare(name, progress_for())
    except WeightsmithError as error:
        raise NotRun(f"{error.message}; {error.hint}") from None
    found = day.torch("machine") if name == "merge" else {}
    if name == "merge" and not day.cpu and not found["gpu"]:
        raise NotRun(f"torch {found['torch']} (CUDA {found['cuda']}) sees no GPU")
    return {"packages": own or "the pinned ones", **found}


def forward(day: Day) -> dict[str, Any]:
    """Compare answers on the GPU with those on this machine's CPU."""
    found = day.torch("forward")
    assert found["largest_margin"] < 1e-3, found
    return found


def merge(day: Day, model: Model) -> dict[str, Any]:
    """Merge, validate and answer here; the CPU's bytes and answers came with the pack."""
    if not (model.base / "config.json").is_file():
        if model.knows:
            raise NotRun(f"the pack has no {model.base}")
        day.torch("model", model.base.parent, day.pack_folder / "models" / "smollm2")
    out = day.work / model.name / "merged"
    shutil.rmtree(out, ignore_errors=True)
    given = ("--base", model.base, "--adapter", model.adapter, "--runner", "local")
    made = day.command("merge", *given, "--out", out)
    started = time.monotonic()
    proof = day.command("validate", *given, "--merged", out)
    proved = time.monotonic() - started
    asked = day.command(
        "evaluate", "--model", out, "--data", model.questions, "--max-tokens", 32,
        "--runner", "local",
    )  # fmt: skip
    answers = [item["answer"] for item in asked["per_item"]]
    figures = {
        "sha256": {shard["file"]: shard["sha256"] for shard in made["shards"]},
        "merge_seconds": round(made["seconds"], 1), "validate_seconds": round(proved, 1),
        "wrong_elements": proof["elements"]["wrong"], "score": asked["score"], "answers": answers,
    }  # fmt: skip
    (out.parent / MERGED_SCORE).write_text(json.dumps(asked["score"]))
    if expected := _expected(day, f"merge {model.name}"):
        assert figures["sha256"] == expected["sha256"], "other bytes than the CPU's"
        same = sum(map(str.__eq__, answers, expected["answers"]))
        figures["answers_as_on_cpu"] = f"{same} of {len(answers)}"
        assert not model.knows or same == len(answers), f"{same} of {len(answers)} answers equal"
    return figures


def calibrate(day: Day, model: Model, format_: str) -> dict[str, Any]:
    """Quantize on the GPU, with the quality gate; the CPU's loss beside it."""
    started = time.monotonic()
    made = quantized(day, model, format_, anew=True)
    loss = made["quality"]
    figures = {"seconds": round(time.monotonic() - started, 1), "kl_mean": loss["kl_mean"]}
    figures["perplexity_ratio"] = loss["perplexity_ratio"]
    if expected := _expected(day, f"calibrate {model.name} {format_}"):
        figures["kl_mean_on_cpu"] = expected["kl_mean"]
    return figures


def quantized(day: Day, model: Model, format_: str, *, anew: bool = False) -> Any:
    """Quantize the merged model once; return what was said of it."""
    merged, out = (day.work / model.name / name for name in ("merged", format_))
    said = out.with_suffix(".json")
    if not (merged / "config.json").is_file():
        raise NotRun(f"no merged model: do `merge {model.name}` first")
    if anew or not said.is_file():
        shutil.rmtree(out, ignore_errors=True)
        gate = () if anew and model.knows else ("--no-gate",)
        made = day.command(
            "quantize", "--model", merged, "--format", format_, "--calibration", model.calibration,
            "--out", out, "--runner", "local", *gate,
        )  # fmt: skip
        said.write_text(json.dumps(made))
    return json.loads(said.read_text())


def install(day: Day, engine: str) -> dict[str, Any]:
    """Install an engine from the pack's wheels, beside what this machine's Python has."""
    if day.cpu:
        if engine != "vllm" or not vllm_parts.there():
            raise NotRun(f"no {engine} for CPUs here: `python -m tests.builders` makes vLLM's")
        return {"folder": str(vllm_parts.packages())}
    return pack.install(day.pack_folder, engine, day.work / "engines" / engine)


def serve(day: Day, model: Model, target: str) -> dict[str, Any]:
    """Start a target on the GPU, ask it, and compare memory and speed with the plan."""
    started = served_image if day.base else served_program
    before = _used_mib()
    with started(day, model, target) as server:
        url, figures = server.url, server.figures
        figures |= {"score": None, **_metrics(url, server.plan)}
        if model.knows:
            asked = day.command(
                "evaluate", "--url", url, "--served-name", model.name, "--data", model.questions,
                "--max-tokens", 32,
            )  # fmt: skip
            figures["score"] = asked["score"]
        if target.startswith("vllm"):
            figures |= _proof(day, model, target, server)
        packed = day.pack / "replay" / f"{model.name}-{target}.json" if day.pack else Path()
        if (replay := packed if packed.is_file() else server.replay).is_file():
            told = day.command("prove", "--url", url, "--replay", replay)
            figures |= {
                "replay": told["verdict"],
                "replay_of": "cpu" if packed == replay else "image",
            }
        speed = day.command(
            "bench", "--url", url, "--served-name", model.name, "--concurrency",
            f"1,{model.at_once}",
        )  # fmt: skip
        figures |= {f"tokens_per_s_{r['concurrency']}": r["tokens_per_s"] for r in speed["runs"]}
        if before is not None:
            figures["used_gib"] = round((_used_mib() - before) / 1024, 2)
            figures["planned_gib"] = round((server.plan["usable_bytes"]) / (1 << 30), 2)
    merged = day.work / model.name / MERGED_SCORE
    if model.knows and merged.is_file() and target not in LOSSY:
        assert figures["score"] >= json.loads(merged.read_text()) - 0.2, figures
    return figures


@dataclass(frozen=True)
class Served:
    """A server that answers."""

    url: str
    plan: Any
    weights: Path
    """What it serves, to be read by us."""
    replay: Path
    """The image's replay set, if it has one."""
    figures: dict[str, Any]
    """So far."""


@contextmanager
def served_image(day: Day, model: Model, target: str) -> Iterator[Served]:
    """Build an image, which starts and asks it, and start it once more with the local runner."""
    if why := day.refusal(target):
        raise NotRun(why)
    folder = day.work / model.name / f"image-{target}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        built = day.command(
            "build", "--recipe", model.recipe(folder, day.base), "--target", target, "--runner",
            "local", "--dist", folder / "dist", "--layout", folder / "layout",
            *(("--gpu", device) if (device := day.planned_for(target)) else ()),
        )["targets"][target]  # fmt: skip
        record = json.loads((Path(built["report"]).parent / "build.json").read_text())
        plan = record["plan"]
        weights = folder / "models"
        image = read_layout(folder / "layout")
        spec = StartSpec(
            port=8000 if target.startswith("vllm") else 30000, env={}, use_gpu=not day.cpu,
            shm_bytes=plan_of(image.labels).shm_bytes,
        )  # fmt: skip
        began = time.monotonic()
        with (
            open_tools(RunOptions(runner="local"), Silent()) as tools,
            tools.launcher.serve(f"oci:{folder / 'layout'}", spec) as endpoint,
        ):
            wait_until_healthy(endpoint, "/health", LONGEST)
            figures = {
                "started_as": "image", "verdict": built.get("verdict"),
                "start_seconds": round(time.monotonic() - began, 1),
            }  # fmt: skip
            for start in ("models/", REPLAY):
                take(image, start, folder)
            yield Served(endpoint.url, plan, weights, folder / REPLAY, figures)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gigabytes of the engine


def take(image: Image, start: str, folder: Path) -> None:
    """Unpack what begins so of an image, such as `models/`, without the gigabytes of its engine."""
    for layer in image.layers:
        data = pack.Joined(iter(layer.open()))
        with tarfile.open(fileobj=data, mode="r|*") as archive:  # type: ignore[call-overload]
            for member in archive:
                if member.name.startswith(start):
                    archive.extract(member, folder, filter="data")
                elif layer.size > 100_000_000:
                    break


@contextmanager
def served_program(day: Day, model: Model, target: str) -> Iterator[Served]:
    """Start the engine's program on the weights, with the settings that an image would have.

    It ends with this process, however that ends.
    """
    found = target_of(target)
    engine, format_ = found.engine.name, found.format
    folder = day.work / model.name / f"program-{target}"
    shutil.rmtree(folder, ignore_errors=True)
    recipe = model.recipe(folder, "")
    device = day.planned_for(target)
    gpu = ("--gpu", device) if device else ()
    port = free_port()
    if format_ == LORA:
        told = day.command("plan", "--recipe", recipe, "--target", target, *gpu)
        plan, weights = told["plan"][target], model.base
        own = {**plan["settings"], "lora-modules": [f"{model.name}={model.adapter}"]}
        settings = "".join(f"{key}: {json.dumps(value)}\n" for key, value in own.items())
    else:
        weights = day.work / model.name / (format_.name if format_.packed else "merged")
        quantized(day, model, format_.name) if format_.packed else None
        told = day.command(
            "render", "--model", weights, "--target", target, "--out", folder, "--name", model.name,
            "--max-model-len", model.longest, "--max-num-seqs", model.at_once, *gpu,
        )  # fmt: skip
        plan = told["plan"]
        text = (folder / f"{engine}.yaml").read_text()
        settings = re.sub(r"(?m)^(model|model-path|port|served-model-name): .*\n", "", text)
    names = {
        "model" if engine == "vllm" else "model-path": str(weights),
        "served-model-name": f"{model.name}-base" if format_ == LORA else model.name,
        "port": port,
    }
    file = folder / "settings.yaml"
    file.write_text(settings + "".join(f"{k}: {json.dumps(v)}\n" for k, v in names.items()))
    if why := day.refusal(target):
        raise NotRun(f"weights and settings were made, and not served: {why}")
    python, env = _engine(day, engine)
    module, *more = PROGRAMS[engine]
    began = time.monotonic()
    with process.start([*python, "-m", module, *more, "--config", file], env=env) as server:
        url = f"http://127.0.0.1:{port}"
        try:
            while not _healthy(url):
                if not server.alive() or time.monotonic() - began > LONGEST:
                    lines = server.logs(2000).splitlines()
                    said = [line for line in lines if "Error" in line] or lines
                    raise AssertionError(f"the server did not start: {' '.join(said[-6:])}")
                time.sleep(1)
            figures = {"started_as": "program", "start_seconds": round(time.monotonic() - began, 1)}
            yield Served(url, plan, weights, folder / REPLAY, figures)
            server.stop(90)
        finally:
            (folder / "log").write_text(server.logs(2000))


def _engine(day: Day, engine: str) -> tuple[list[str], dict[str, str]]:
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if day.cpu:
        env = {"PATH": os.environ["PATH"], "HOME": str(day.work), "TORCH_COMPILE_DISABLE": "1"}
        env |= {"PYTHONPATH": str(vllm_parts.packages()), "VLLM_CPU_INT4_W4A8": "0", **quiet}
        return [sys.executable, "-S"], env
    folder = day.work / "engines" / engine
    if not (folder / pack.INSTALLED).is_file():
        raise NotRun(f"{engine} is not installed, see the row `engine {engine}`")
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return [pack.own_python()], os.environ | quiet | {"PYTHONPATH": str(folder), "PATH": path}


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=30).is_success
    except httpx.HTTPError:
        return False


def _proof(day: Day, model: Model, target: str, server: Served) -> dict[str, Any]:
    """Hold the engine's log-probabilities against the same weights in float32."""
    adapter = (model.adapter,) if target == "vllm-lora" else ()
    known = day.torch("reference", model.base if adapter else server.weights, *adapter)
    ids, expected = known["ids"], known["said"]
    asked = {
        "model": model.name, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0,
    }  # fmt: skip
    answer = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=120).raise_for_status()
    rows = answer.json()["choices"][0]["prompt_logprobs"]
    found = [row[str(token)]["logprob"] for row, token in zip(rows[1:], ids[1:], strict=True)]
    mean = abs(sum(found) - sum(expected)) / len(found)
    most = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    assert mean <= ALLOWED.get(target, CLOSE), f"off by {mean:.4f} nats on average, {most:.3f}"
    return {"off_mean": round(mean, 5), "off_most": round(most, 3)}


def _metrics(url: str, plan: Any) -> dict[str, Any]:
    """Return the tokens that fit into the server's cache beside those that were planned."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    found = re.search(r"vllm:cache_config_info\{(.*?)\}", text)
    told = dict(re.findall(r'(\w+)="([^"]*)"', found[1])) if found else {}
    each = plan["kv_bytes_per_token"]
    # On a CPU the engine is given what the requests need, on a GPU it takes all that is left.
    planned = plan["kv_cache_bytes" if plan["gpus"] else "kv_bytes_total"] // each if each else 0
    blocks, size = told.get("num_gpu_blocks", ""), told.get("block_size", "")
    had = int(blocks) * int(size) if blocks.isdigit() and size.isdigit() else None
    return {"cache_tokens": had, "planned_cache_tokens": planned}


def _smi(what: str) -> str:
    words = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def _used_mib() -> Any:
    used = _smi("memory.used").splitlines() if gpu_names() else []
    return int(used[0]) if used and used[0].isdigit() else None


def _expected(day: Day, name: str) -> Mapping[str, Any]:
    """Return the CPU's figures of a row, as the pack brings them."""
    file = day.pack / "cpu.json" if day.pack else None
    rows = json.loads(file.read_text())["rows"] if file and file.is_file() else []
    return next((row["figures"] for row in rows if row["name"] == name), {})


# The file and the table.


def read(out: Path) -> dict[str, Row]:
    """Return the rows of an earlier call."""
    if not out.is_file():
        return {}
    return {row["name"]: Row(**row) for row in json.loads(out.read_text())["rows"]}


def write(out: Path, rows: Mapping[str, Row]) -> None:
    """Keep the rows; after each, because the next may never end."""
    text = json.dumps({"rows": [asdict(row) for row in rows.values()]}, indent=1)
    replace_file(out, [f"{text}\n".encode()])


def table(rows: Mapping[str, Row]) -> str:
    """Return the rows in Markdown; long figures stay in the file."""
    lines = ["| row | result | seconds | figures, or why not |", "|---|---|---|---|"]
    for row in rows.values():
        short = {k: v for k, v in row.figures.items() if not isinstance(v, dict | list)}
        said = row.why or ", ".join(f"{k} {v}" for k, v in short.items() if v not in (None, ""))
        flat = " ".join(said.split()).replace("|", "/")
        lines.append(f"| {row.name} | {row.result} | {row.seconds:.0f} | {flat[:400]} |")
    return "\n".join(lines)


def attempt(name: str, make: Callable[[], dict[str, Any]]) -> Row:
    """Make a row; whatever goes wrong is its reason."""
    began = time.monotonic()

    def row(result: str, why: object = "", figures: Mapping[str, Any] | None = None) -> Row:
        return Row(name, result, str(why)[:2000], round(time.monotonic() - began, 1), figures or {})

    try:
        return row("passed", figures=make())
    except NotRun as why:
        return row("not run", why)
    except process.TookTooLong as late:
        return row("not run", late.message)
    except Exception as error:  # noqa: BLE001 - one row's fault must not end the day
        return row("failed", error or type(error).__name__)


def main(words: list[str] | None = None) -> int:
    """Do the rows that are not done; 0 if all have been tried."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pack", type=Path, help="folder that make gpu-pack wrote")
    parser.add_argument("--part", default="", help="only rows whose names begin so, done or not")
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "gpu.json")
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "work" / "gpu-day")
    parser.add_argument("--base", default="", help="image below the weights, such as oci:DIR")
    parser.add_argument("--cpu", action="store_true", help="rehearse with a CPU")
    given = parser.parse_args(words)
    given.work.mkdir(parents=True, exist_ok=True)
    own = given.pack and given.pack / "base"
    base = given.base or (f"oci:{own}" if own and own.is_dir() else "")
    day = Day(given.cpu, given.pack and given.pack.absolute(), given.work.absolute(), base)
    began, longest, rows, left = time.monotonic(), 0.0, read(given.out), 0
    for name, make in rows_of(day):
        done = name in rows and rows[name].result == "passed"
        if not name.startswith(given.part) or (done and not given.part):
            continue
        if time.monotonic() - began + longest > given.minutes * 60:
            left += 1
            continue
        print(f"{name} …", flush=True)
        rows[name] = attempt(name, make)
        print(f"  {rows[name].result} {rows[name].why[:300]}", flush=True)
        longest = max(longest, rows[name].seconds)
        write(given.out, rows)
        if name == "machine" and rows[name].result != "passed":
            break
    print(table(rows))
    if left:
        print(f"{left} rows are left: {given.minutes:g} minutes are over; run it again to go on")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
