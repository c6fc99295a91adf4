"""The day with a GPU, rehearsed without one: nothing may be missing when it comes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from weightsmith.core import cpus
from weightsmith.serving.devices import AMX_FLAGS

from tests import vllm_parts
from tests.fakes.started import until, weightsmith
from tests.gpu import day, pack
from tests.gpu.day import TARGETS, Day, Row
from tests.gpu.pack import NotRun

Make = Callable[[], dict[str, object]]


def run(folder: Path, *words: str) -> tuple[int, dict[str, Row]]:
    out = folder / "gpu.json"
    code = day.main([*words, "--out", str(out), "--work", str(folder / "work")])
    return code, day.read(out)


def fake_rows(monkeypatch: pytest.MonkeyPatch, rows: dict[str, Make]) -> list[str]:
    """Let the day have these rows; return the names of those that are made."""
    made: list[str] = []

    def noted(name: str, make: Make) -> Make:
        return lambda: made.append(name) or make()  # type: ignore[func-returns-value]

    monkeypatch.setattr(day, "rows_of", lambda _: [(n, noted(n, m)) for n, m in rows.items()])
    return made


def not_run() -> dict[str, object]:
    raise NotRun("no such | engine")


def broken() -> dict[str, object]:
    raise KeyError("tokens")


def test_a_row_that_cannot_run_says_why_and_the_day_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"a": lambda: {"score": 1.0, "list": [1]}, "b": not_run, "c": broken, "d": dict}
    made = fake_rows(monkeypatch, rows)

    code, found = run(tmp_path)
    assert code == 0
    assert made == ["a", "b", "c", "d"]
    results = {name: (row.result, row.why) for name, row in found.items()}
    assert results == {
        "a": ("passed", ""), "b": ("not run", "no such | engine"), "c": ("failed", "'tokens'"),
        "d": ("passed", ""),
    }  # fmt: skip
    table = capsys.readouterr().out
    assert "| a | passed | 0 | score 1.0 |" in table
    assert "| b | not run | 0 | no such / engine |" in table

    made.clear()
    run(tmp_path)
    assert made == ["b", "c"]  # what passed is kept
    made.clear()
    run(tmp_path, "--part", "a")
    assert made == ["a"]


def test_no_row_is_begun_that_would_end_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(day.time, "monotonic", lambda: now[0])

    def four_minutes() -> dict[str, object]:
        now[0] += 240
        return {}

    made = fake_rows(monkeypatch, dict.fromkeys("abcd", four_minutes))
    code, _ = run(tmp_path, "--minutes", "10")
    assert (code, made) == (1, ["a", "b"])
    assert "2 rows are left: 10 minutes are over; run it again" in capsys.readouterr().out
    now[0] = 0
    code, found = run(tmp_path, "--minutes", "10")
    assert (code, made, len(found)) == (0, ["a", "b", "c", "d"], 4)


def test_without_a_gpu_the_day_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(day, "gpu_names", tuple)
    _, found = run(tmp_path)
    assert {n: (r.result, r.why) for n, r in found.items()} == {
        "machine": ("not run", "nvidia-smi names no GPU")
    }


def test_a_pack_that_is_not_whole_ends_the_day_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(day, "gpu_names", lambda: ("NVIDIA L4",))
    _, found = run(tmp_path, "--pack", str(tmp_path))
    assert found["machine"].why == f"error: {tmp_path}: missing or broken: pack.json"
    assert len(found) == 1


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb"),
        ("NVIDIA H200", "nvidia-h200-141gb"),
        ("NVIDIA A100-SXM4-80GB", "nvidia-a100-80gb"),
        ("NVIDIA L4", "nvidia-l4"),
        ("NVIDIA Something", ""),
    ],
)
def test_plans_know_the_gpu_by_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, known: str
) -> None:
    monkeypatch.setattr(day, "gpu_names", lambda: (name,))
    assert day.Day(cpu=False, pack=None, work=tmp_path, base="").gpu == known


def test_a_pack_travels_in_pieces(tmp_path: Path) -> None:
    folder, pieces, there = (tmp_path / name for name in ("pack", "pieces", "there"))
    (folder / "wheels").mkdir(parents=True)
    (folder / "wheels" / "large.whl").write_bytes(bytes(range(256)) * 1000)
    (folder / "cpu.json").write_text("{}")
    index = {name: pack.digest(folder / name) for name in ("wheels/large.whl", "cpu.json")}
    (folder / "pack.json").write_text(json.dumps(index))

    pack.split(folder, pieces, 100_000)
    assert max(path.stat().st_size for path in pieces.iterdir()) == 100_000
    assert len(list(pieces.glob("pack.*"))) > 2
    pack.join(pieces, there)
    assert {name: pack.digest(there / name) for name in index} == index

    (there / "cpu.json").write_text("other")
    with pytest.raises(SystemExit, match=r"missing or broken: cpu\.json"):
        pack.check(there)
    (pieces / "pack.0001").unlink()
    with pytest.raises(SystemExit, match=r"1 pieces are missing or broken: pack\.0001"):
        pack.join(pieces, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_pack_of_another_checkout_is_refused(tmp_path: Path) -> None:
    packed = {**pack.pins(), "requirements.lock": "0" * 64}
    (tmp_path / pack.PINS).write_text(json.dumps(packed))
    (tmp_path / "pack.json").write_text(json.dumps({pack.PINS: pack.digest(tmp_path / pack.PINS)}))
    with pytest.raises(SystemExit, match=r"for another checkout: requirements\.lock$"):
        pack.check(tmp_path)


def test_a_pack_says_which_of_the_cpus_figures_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that is done is not done again; one that ran too long is named."""
    done, late = Row("merge 1b", "passed"), Row("calibrate support-bot awq", "not run")
    day.write(tmp_path / "cpu.json", {done.name: done})
    asked = []

    def attempt(words: list[object], *, check: bool) -> None:
        asked.append(words[words.index("--part") + 1])
        rows = day.read(tmp_path / "cpu.json")
        made = late if asked[-1] == late.name else Row(str(asked[-1]), "passed")
        day.write(tmp_path / "cpu.json", {**rows, made.name: made})

    monkeypatch.setattr(pack.subprocess, "run", attempt)
    assert pack.measure(tmp_path) == [late.name]
    assert asked == [name for name in pack.MEASURED if name != done.name]


def test_what_is_packed_is_whole_and_what_lacks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a pack but what it downloads and computes."""

    def puts(name: str, *lacks: str) -> Callable[..., list[str]]:
        def put(*_: object, **__: object) -> list[str]:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_text(name)
            return list(lacks)

        return put

    to = tmp_path / "pack"
    files = {
        "fetch": "wheels/a.whl", "fetch_sources": "wheels/b.tar.gz",
        "pack_engine": "engines/vllm.txt", "ours": "models/smollm2/config.json",
        "measure": "work/left", "write_replay_sets": "replay/bot-vllm.json",
    }  # fmt: skip
    for name, file in files.items():
        monkeypatch.setattr(pack, name, puts(file, *(["x"] if name == "write_replay_sets" else [])))

    assert pack.write_pack(to, "3.12", None, ["vllm==1"]) == ["x"]
    pack.check(to)
    known = {*json.loads((to / "pack.json").read_text())}
    assert known == {*files.values(), pack.PINS} - {"work/left"}
    assert not (to / "work").exists()
    pack.split(to, tmp_path / "pieces", size=4096)
    pack.join(tmp_path / "pieces", tmp_path / "there")
    (to / "wheels" / "a.whl").write_text("another")
    with pytest.raises(SystemExit, match=r"broken: wheels/a\.whl$"):
        pack.check(to)


def test_a_target_that_the_model_cannot_have_does_not_lack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else no pack would ever be whole: SmolLM2's rows are no multiple of fp8-block's."""

    def fails(*_: object) -> None:
        raise subprocess.CalledProcessError(1, "build")

    monkeypatch.setattr(pack, "ours", fails)
    refused = "vllm-fp8-block"
    monkeypatch.setattr(pack, "refusal", lambda _, target: "576" * (target == refused))
    expected = [f"the replay set of {name}" for name in TARGETS if name != refused]
    assert pack.write_replay_sets(tmp_path) == expected
    monkeypatch.undo()
    (tmp_path / "recipe.yaml").write_text("{}")
    assert pack.refusal(tmp_path / "recipe.yaml", "vllm") == ""  # a fault of ours is none


@pytest.mark.slow
def test_each_target_of_the_day_can_be_built_and_no_loss_refuses_its_replay_set(
    tmp_path: Path,
) -> None:
    """A pack that lacks the set of a format which the gate refuses would never be whole."""
    (model,) = day.Day(cpu=True, pack=None, work=tmp_path, base="").models()
    recipe = model.recipe(tmp_path, "engine:modelcar")
    told = json.loads(recipe.read_text())
    assert (told["quality"]["gate"], told["evaluate"]["max_drop"]) == ("measure", 1.0)

    wanted = [word for target in TARGETS for word in ("--target", target)]
    plan = weightsmith("plan", "--recipe", recipe, *wanted, "--gpu", "nvidia-h100-80gb")
    assert set(plan["plan"]) == set(TARGETS)


def test_a_pack_without_torch_says_so_and_an_engine_why_it_is_not_in_it(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "engines").mkdir()
    lacking = pack.lacking(tmp_path, "merge")
    assert lacking.startswith("torch 2.")
    (tmp_path / "wheels" / f"{lacking.replace(' ', '-')}-cp312-cp312-any.whl").touch()
    assert pack.lacking(tmp_path, "merge") == ""

    (tmp_path / "engines" / "vllm.why").write_text("another torch")
    for engine, why in (("vllm", "another torch"), ("sglang", "sglang is not in the pack")):
        with pytest.raises(NotRun, match=why):
            pack.install(tmp_path, engine, tmp_path / "to")


@pytest.mark.full  # the rows are commands that other tests run
@pytest.mark.builders
@pytest.mark.timeout(900)
def test_the_first_rows_on_a_cpu(tmp_path: Path) -> None:
    for part in ("machine", "builder merge", "merge"):
        run(tmp_path, "--cpu", "--part", part)
    found = day.read(tmp_path / "gpu.json")
    assert {name: (row.result, row.why) for name, row in found.items()} == dict.fromkeys(
        ("machine", "builder merge", "merge tiny"), ("passed", "")
    )
    assert found["merge tiny"].figures["score"] == 1.0


def rehearsal(folder: Path) -> Day:
    return Day(cpu=True, pack=None, work=folder, base="")


@pytest.mark.parametrize(
    ("target", "format_"),
    [("vllm-awq", "awq"), ("sglang-awq", "awq-gemm"), ("vllm-gptq", "gptq"), ("sglang-fp8", "fp8")],
)
def test_a_target_is_served_from_the_layout_that_its_engine_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, format_: str
) -> None:
    """SGLang has no kernel for compressed-tensors' integers: its AWQ is AutoAWQ's."""
    asked = dict[str, tuple[object, ...]]()

    def command(_: Day, *words: object) -> dict[str, object]:
        asked[str(words[0])] = words
        out = Path(str(words[words.index("--out") + 1]))
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{target.partition('-')[0]}.yaml").write_text("")
        return {"plan": {}}

    monkeypatch.setattr(Day, "command", command)
    monkeypatch.setattr(Day, "refusal", lambda *_: "a rehearsal")
    (model,) = rehearsal(tmp_path).models()
    (tmp_path / "tiny" / "merged").mkdir(parents=True)
    (tmp_path / "tiny" / "merged" / "config.json").touch()
    with (
        pytest.raises(NotRun, match=r"settings were made, and not served: a rehearsal"),
        day.served_program(rehearsal(tmp_path), model, target),
    ):
        pass
    made = asked["quantize"]
    assert made[made.index("--format") + 1] == format_
    assert made[made.index("--out") + 1] == asked["render"][asked["render"].index("--model") + 1]


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        (frozenset(), {"vllm-fp8-block"}),
        (AMX_FLAGS, {"vllm-fp8"}),
        (AMX_FLAGS | {"amx_fp8"}, set[str]()),
    ],
)
def test_a_rehearsal_says_what_its_cpu_does_not_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: frozenset[str], refused: set[str]
) -> None:
    """On a CPU with AMX alone a token of FP8 takes a hundred times as long (`slow_fp8`)."""
    monkeypatch.setattr(cpus, "flags", lambda: flags)
    here = rehearsal(tmp_path)
    reasons = {target: here.refusal(target) for target in TARGETS}
    served = {"vllm", "vllm-awq", "vllm-gptq", "vllm-w8a8", "vllm-lora"}
    by_flags = {"vllm-fp8", "vllm-fp8-block"}
    assert {name for name, why in reasons.items() if not why} == served | (by_flags - refused)
    assert here.planned_for("sglang") == here.planned_for("vllm-mxfp8") == day.REHEARSED
    assert here.planned_for("vllm") == ("cpu-amx" if flags else "cpu")
    on_the_day = Day(cpu=False, pack=None, work=tmp_path, base="")
    assert not any(map(on_the_day.refusal, TARGETS))


SERVES = """
import subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass

port = next(line for line in open(sys.argv[-1]) if line.startswith("port: "))
server = HTTPServer(("127.0.0.1", int(port[6:])), Healthy)
child = subprocess.Popen(["sleep", "3600"], start_new_session=True)
open("child", "w").write(str(child.pid))
server.serve_forever()
"""
DAY = """
import os, sys, time
from pathlib import Path
from tests.gpu import day

here = day.Day(cpu=True, pack=None, work=Path.cwd(), base="")
day.Day.command = lambda *_: {"plan": {"vllm-lora": {"settings": {}}}}
day._engine = lambda *_: ([sys.executable], {**os.environ, "PYTHONPATH": os.getcwd()})
day.PROGRAMS = {"vllm": ("serves",)}
with day.served_program(here, here.models()[0], "vllm-lora") as served:
    print("ready", flush=True)
    time.sleep(3600)
"""


@pytest.mark.slow
def test_no_server_outlives_the_day(tmp_path: Path) -> None:
    """Nor what a server started: on a GPU it would keep the memory of the next call."""
    (tmp_path / "serves.py").write_text(SERVES)
    with subprocess.Popen(
        [sys.executable, "-c", DAY], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": f"{day.ROOT / 'toolchain'}:{day.ROOT}"},
    ) as running:  # fmt: skip
        assert running.stdout
        assert running.stdout.readline() == "ready\n"
        child = Path("/proc") / (tmp_path / "child").read_text()
        assert child.exists()
        running.send_signal(signal.SIGKILL)
    until(lambda: not child.exists())


@pytest.mark.real
@pytest.mark.builders
@pytest.mark.vllm
@pytest.mark.skipif("WEIGHTSMITH_GPU_DAY" not in os.environ, reason="long: set WEIGHTSMITH_GPU_DAY")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("base", ["", "engine:vllm-cpu"])
def test_the_whole_day_on_a_cpu(tmp_path: Path, base: str) -> None:
    if reason := vllm_parts.absent():
        pytest.skip(reason)
    code, found = run(tmp_path, "--cpu", "--minutes", "120", *(("--base", base) if base else ()))
    assert code == 0
    told = {name: (row.result, row.why) for name, row in found.items()}
    for target in TARGETS:
        result, why = told.pop(f"serve tiny {target}")
        reason = rehearsal(tmp_path).refusal(target)
        assert result == ("not run" if reason else "passed"), (target, why)
        assert why.endswith(reason)
    assert told.pop("engine sglang")[0] == "not run"
    assert {result for result, _ in told.values()} == {"passed"}, told
