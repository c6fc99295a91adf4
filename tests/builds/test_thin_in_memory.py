"""Thin images built in memory, and what they do when they start: their own program, run here."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from weightsmith.api.commands.bench import bench
from weightsmith.api.commands.evaluate import evaluate_subject
from weightsmith.api.commands.images import inspect_image
from weightsmith.api.commands.rebase import rebase_image
from weightsmith.api.commands.recipes import recipe_of_image
from weightsmith.api.commands.requests import BenchCommand, EvaluateCommand, RebaseCommand
from weightsmith.api.commands.verify import verify_image
from weightsmith.building.wiring import make_readers
from weightsmith.core.errors import CheckFailed, InputRefused, UsageError
from weightsmith.core.ports import Silent
from weightsmith.core.values import FileEntry, Sources
from weightsmith.oci.references import Reference
from weightsmith.oci.weights import weight_layers
from weightsmith.provenance import attest
from weightsmith.stages.bake import ThinStep

from tests.fakes.baking import push_base
from tests.fakes.fleet import run, write_fleet
from tests.fakes.images import tree_of
from tests.fakes.memory import Memory
from tests.fakes.thin import (
    THIN,
    Container,
    as_tensors,
    files,
    model_of,
    round_really,
    use_bfloat16,
)
from tests.fakes.tiny import write_adapter


@pytest.fixture
def container(memory: Memory, tmp_path: Path) -> Container:
    memory.use_vllm()
    memory.build(THIN)
    return Container.of(files(memory, "vllm-thin"), tmp_path / "root")


@pytest.mark.grid(2)
@pytest.mark.parametrize(
    "target",
    [
        "vllm",
        "vllm-fp8",
        "vllm-fp8-block",
        "vllm-w8a8",
        "vllm-nvfp4a16",
        "vllm-mxfp4a16",
        "vllm-mxfp8",
        "vllm-nvfp4a16-4o6",
    ],
)
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_it_serves_the_bytes_of_the_image_that_was_tested(
    memory: Memory, tmp_path: Path, target: str, kind: str
) -> None:
    if kind == "bfloat16":
        use_bfloat16(memory)
    round_really(memory)
    memory.use_vllm(target, serve={"gpu": "nvidia-h100", "max_model_len": 512})
    memory.build(THIN)
    fat, thin = files(memory, target), files(memory, f"{target}-thin")
    container = Container.of(thin, tmp_path / "root")

    done = container.start()

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("served ['.weightsmith.json', 'config.json'")
    assert as_tensors(container.model()) == as_tensors(model_of(fat))
    assert "/tmp/model" in thin["/etc/weightsmith/vllm.yaml"].decode()


def test_a_second_start_compares_and_merges_nothing(container: Container) -> None:
    assert "merging: 100 %" in container.start().stderr
    again = container.start()

    assert again.returncode == 0
    assert again.stdout == container.start(WEIGHTSMITH_CHECK="time").stdout
    assert "comparing: 100 %" in again.stderr
    assert "merging" not in again.stderr
    told = json.loads((container.root / "merging.json").read_text())
    assert told["state"] == "ready"
    assert told["done_bytes"] == told["total_bytes"]


def test_without_a_server_it_only_merges(container: Container) -> None:
    env = {"PATH": os.environ["PATH"]}
    done = subprocess.run(container.command(), env=env, capture_output=True, check=False)

    assert done.returncode == 0
    assert done.stdout == b""
    assert (container.served / "model.safetensors").is_file()


@pytest.mark.parametrize("check", ["digest", "time"])
def test_a_file_that_was_altered_in_the_volume_is_made_anew(
    container: Container, check: str
) -> None:
    container.start()
    path = (container.served / "model.safetensors").resolve()
    right = path.read_bytes()
    times = path.stat().st_mtime_ns
    path.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    if check == "digest":
        os.utime(path, ns=(times, times))

    done = container.start(WEIGHTSMITH_CHECK=check)

    assert "model.safetensors is not as it was merged: merging anew" in done.stderr
    assert (container.served / "model.safetensors").read_bytes() == right


@pytest.mark.parametrize("check", ["digest", "time"])
@pytest.mark.parametrize("name", ["chat_template.jinja", "extra.safetensors", "sub/"])
def test_what_was_added_to_the_volume_is_not_served(
    container: Container, check: str, name: str
) -> None:
    """Servers read a template, and vLLM all weights, that lie beside the model's own."""
    container.start()
    right = container.model()
    added = container.served / name
    added.mkdir() if name.endswith("/") else added.write_text("{{ 1 }}")

    done = container.start(WEIGHTSMITH_CHECK=check)

    assert done.returncode == 0
    assert f"{name.strip('/')} is not as it was merged: merging anew" in done.stderr
    assert container.model() == right
    assert not added.exists()


@pytest.mark.parametrize("name", ["model.safetensors", ".weightsmith.json"])
def test_a_manifest_that_names_a_file_twice_is_refused(container: Container, name: str) -> None:
    told = json.loads(container.manifest.read_text())
    told["copied"][0]["name"] = name
    container.manifest.write_text(json.dumps(told))

    done = container.start()

    assert done.returncode == 3
    assert f"{name!r} is the name of two files" in done.stderr
    assert container.left() == []


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("adapters/0/adapter_model.safetensors", "model.safetensors is not what was tested"),
        (
            "models/model-layers.mlp.up_proj-001.safetensors",
            "model.safetensors is not what was tested",
        ),
        ("models/tokenizer_config.json", "tokenizer_config.json is not what was tested"),
    ],
)
def test_what_differs_from_what_was_tested_is_never_served(
    container: Container, place: str, said: str
) -> None:
    path = container.root / place
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)

    done = container.start()

    assert done.returncode == 4
    assert done.stdout == ""
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert container.left() == []
    assert not container.served.exists()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"made": 3}'])
def test_a_damaged_manifest_is_refused(container: Container, text: str) -> None:
    container.manifest.write_text(text)
    done = container.start()

    assert done.returncode == 3
    assert "Traceback" not in done.stderr


def test_sigterm_while_it_merges_leaves_nothing_behind(container: Container) -> None:
    slow = (
        "import time, weightsmith.worker.merging_at_start as made\n"
        "made._copy = lambda *_: time.sleep(600)"
    )
    env = {"PATH": os.environ["PATH"]}
    with subprocess.Popen(
        container.command("true", before=slow), env=env, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "100 %" in line:
                break
        assert container.left() != []
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143

    assert container.left() == []
    assert not container.served.exists()
    assert json.loads((container.root / "merging.json").read_text())["state"] == "failed"


def test_it_waits_for_another_container_that_merges(container: Container) -> None:
    handle = os.open(container.volume, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    env = {"PATH": os.environ["PATH"]}
    with subprocess.Popen(
        container.command("true"), env=env, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert any("waiting for another container" in line for line in process.stderr)
        os.close(handle)
        process.communicate(timeout=60)
        assert process.returncode == 0


def test_a_volume_that_is_full_or_cannot_be_written_to_is_named(
    container: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = "import shutil, types\nshutil.disk_usage = lambda _: types.SimpleNamespace(free=9)"
    env = {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        container.command("true", before=full), env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 5
    assert "--shm-size" in done.stderr

    container.volume.rmdir()
    container.volume.write_bytes(b"")
    done = container.start()
    assert done.returncode == 5
    assert "mount a volume at" in done.stderr


def test_base_layers_are_those_of_an_image_of_the_base_and_of_other_fine_tunes(
    memory: Memory, tmp_path: Path
) -> None:
    memory.use_vllm()
    memory.build(THIN, push=True)
    thin = pulled(memory, "vllm-thin")
    write_adapter(memory.home / "other", seed=7)
    memory.write_recipe(
        targets=["vllm"],
        image={"repository": memory.repository, "base": f"{memory.registry.host}/engines/vllm:1"},
        adapters=[{"source": "./other", "version": "v1"}],
        version="2.0.0",
        evaluate=None,
    )
    other = memory.build(THIN, push=True)["vllm"]
    memory.write_recipe(
        targets=["vllm"],
        image={"repository": memory.repository, "base": f"{memory.registry.host}/engines/vllm:1"},
        adapters=None,
        version="3.0.0",
        evaluate=None,
    )
    memory.build(push=True)

    shared = {layer.digest for layer in thin.layers}
    second, plain = pulled(memory, "vllm-thin", "2.0.0"), pulled(memory, "vllm", "3.0.0")
    own = [layer for layer in second.layers if layer.digest not in shared]
    assert sum(layer.size for layer in own) < 0.05 * memory_size(memory.home / "base")
    assert other.forms["thin"].uploaded_bytes < 0.1 * memory_size(memory.home / "base")
    base = [layer.digest for layer in plain.layers if layer.file.startswith("models/")]
    assert base
    assert set(base) <= shared


def pulled(memory: Memory, target: str, version: str = "1.0.0") -> Any:
    return memory.client.pull(Reference.parse(f"{memory.repository}:{version}-{target}"))


def memory_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_targets_and_merges_that_cannot_be_thin_are_refused_before_any_work(
    memory: Memory,
) -> None:
    with pytest.raises(UsageError, match="has no thin image"):
        memory.build(THIN)
    memory.use_vllm("vllm-awq")
    with pytest.raises(UsageError, match="made with calibration"):
        memory.forecast(THIN)
    with pytest.raises(UsageError, match="made with calibration"):
        memory.build(THIN)
    memory.use_vllm("vllm-lora")
    with pytest.raises(UsageError, match="nothing is merged"):
        memory.build(THIN)
    memory.use_vllm()
    with pytest.raises(InputRefused, match="no thin image of this merge"):
        memory.forecast(THIN, "merge.method=ties", "merge.density=0.5")
    assert memory.jobs() == []


def test_of_several_targets_those_that_can_have_one(memory: Memory) -> None:
    memory.use_vllm()
    request = memory.request(THIN, targets=["vllm", "llamacpp-q4_k_m"])

    assert [request.forms_of(target) for target in request.targets] == [("thin",), ()]


@pytest.mark.parametrize("size", ["auto", "none"])
def test_verify_compares_base_and_adapters_with_what_was_merged(
    memory: Memory, tmp_path: Path, size: str
) -> None:
    """Also where the base's file is cut; the start then joins its parts again."""
    base = memory.use_vllm()
    image = {"repository": memory.repository, "base": base, "max_layer_size": size}
    memory.write_recipe(targets=["vllm"], image=image)
    thin = memory.build(THIN, push=True)["vllm"].forms["thin"]
    checks = verify_image(thin.reference, None, memory.client, Silent()).checks
    found = {check.name: check.found for check in checks}

    assert found["files base"].endswith(", split") == (size == "auto")
    assert found["files adapter:0"].startswith("2 files of ")
    assert "model.cdx.json" in found["documents"]
    told = inspect_image(thin.reference, memory.client, memory.engine)
    assert told["labels"]["dev.weightsmith.kind"] == "thin"
    memory.build(THIN)
    container = Container.of(files(memory, "vllm-thin"), tmp_path / "root")
    assert container.start().returncode == 0


def test_verify_finds_another_base_below_the_adapters(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.use_vllm()
    right = attest.ThinParts.files.fget
    assert right is not None

    def others(parts: attest.ThinParts) -> tuple[FileEntry, ...]:
        return tuple(file for file in right(parts) if file.path != "tokenizer_config.json")

    monkeypatch.setattr(attest.ThinParts, "files", property(others))
    thin = memory.build(THIN, push=True)["vllm"].forms["thin"]

    with pytest.raises(CheckFailed, match=r"weights.*tokenizer_config\.json"):
        verify_image(thin.reference, None, memory.client, Silent())


def test_verify_finds_files_that_are_not_the_base_that_was_merged(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the image's own statement lists them."""
    memory.use_vllm()
    other = weight_layers(tree_of(tmp_path / "other", {"model.safetensors": b"other"}), "/models")

    def wrong(_step: object, _image: object, sources: Sources, _store: object) -> Any:
        return other, sources.base.digest

    monkeypatch.setattr(ThinStep, "_base", wrong)
    thin = memory.build(THIN, push=True)["vllm"].forms["thin"]

    with pytest.raises(CheckFailed, match="failed verification: files base"):
        verify_image(thin.reference, None, memory.client, Silent())


def test_another_engine_below_it_keeps_what_it_merges(memory: Memory, tmp_path: Path) -> None:
    base = memory.use_vllm()
    built = memory.build(THIN, push=True)["vllm"].forms["thin"]
    newer = base.replace(":1", ":2")
    push_base(memory.client, newer, {"dev.weightsmith.engine": "vllm"}, {"usr/bin/vllm": b"2"})
    to = f"{memory.repository}:moved"

    asked = RebaseCommand(source=built.reference, onto=newer, to=to, smoke=False)
    rebase_image(asked, memory.tools)
    old, new = (memory.client.pull(Reference.parse(name)) for name in (built.reference, to))

    assert new.layers[1:] != ()
    assert [layer.digest for layer in new.layers[1:]] == [layer.digest for layer in old.layers[1:]]
    assert new.config["Entrypoint"] == old.config["Entrypoint"]
    verify_image(to, None, memory.client, Silent())


def test_without_image_the_thin_one_alone_is_pushed(memory: Memory) -> None:
    """The tested image stays here, with its scores; a taken tag is found before anything goes."""
    memory.use_vllm()
    built = memory.build("outputs=[thin]", push=True)["vllm"]
    tags = {tag for _, tag in memory.registry.manifests if tag.startswith("1.0.0")}

    assert {tag.partition("-thin")[0] + "-thin" for tag in tags} == {"1.0.0-vllm-thin"}
    assert f"{memory.repository}:1.0.0-vllm" in memory.engine.names
    readme = (memory.results("vllm") / "thin" / "README.md").read_text()
    assert f"1.0.0-vllm-thin@{built.forms['thin'].digest}" in readme
    before = memory.seen()

    memory.store.forget("quantize")
    with pytest.raises(UsageError, match=r"1\.0\.0-vllm-thin"):
        memory.build("outputs=[thin]", "image.labels.a=b", push=True)
    assert memory.seen() == before


def test_bench_and_evaluate_start_it_with_room_for_what_it_merges(memory: Memory) -> None:
    memory.use_vllm()
    built = memory.build(THIN, load=True)["vllm"]
    image = f"{memory.repository}:1.0.0-vllm-thin"
    size = sum(file["size"] for key in ("made", "copied") for file in told_of(memory)[key])

    said, _ = bench(BenchCommand(image=image, concurrency=(2,), requests=4), memory.tools)
    found = evaluate_subject(
        EvaluateCommand(image=image, data=memory.home / "a.jsonl"), memory.tools
    )

    assert built.forms["thin"].digest
    (run,) = said["runs"]
    assert (run.requests, run.errors) == (4, 0)
    assert found.score == 1
    first, *others = (one.shm_bytes for one in memory.launcher.started)
    assert others == [first + size] * 2


def told_of(memory: Memory) -> dict[str, Any]:
    return dict(json.loads(files(memory, "vllm-thin")["/etc/weightsmith/thin.json"]))


@pytest.mark.parametrize(
    ("target", "gpu", "python"),
    [
        ("sglang", "nvidia-h100", "python3"),
        ("sglang-fp8", "nvidia-h100", "python3"),
        ("tgi", "nvidia-l4", "/usr/src/.venv/bin/python"),
        ("vllm", "nvidia-h100", "python3"),
    ],
)
def test_images_for_gpus_of_other_engines(
    memory: Memory, tmp_path: Path, target: str, gpu: str, python: str
) -> None:
    """They are not started here; their program gives the same bytes, and then the engine's."""
    round_really(memory)
    use_bfloat16(memory)
    engine = target.partition("-")[0]
    base, labels = f"{memory.registry.host}/engines/{engine}:1", {"dev.weightsmith.engine": engine}
    push_base(memory.client, base, labels, {"usr/bin/engine": b"engine"})
    memory.write_recipe(
        targets=[target],
        image={"repository": memory.repository, "base": base},
        serve={"gpu": gpu, "max_model_len": 512, "max_num_seqs": 2},
    )
    memory.build(THIN)
    fat, thin = files(memory, target), files(memory, f"{target}-thin")
    settings = [
        memory.engine.held(f"{memory.repository}:1.0.0-{tag}").settings["config"]  # type: ignore[union-attr]
        for tag in (target, f"{target}-thin")
    ]
    container = Container.of(thin, tmp_path / "root")

    assert container.start().returncode == 0
    assert as_tensors(container.model()) == as_tensors(model_of(fat))
    first = [python, "-I", "-B", "/opt/weightsmith"]
    assert settings[1]["Entrypoint"] == first + settings[0]["Entrypoint"]
    assert settings[1].get("Cmd") == settings[0].get("Cmd")
    said = str(settings[1]["Env"]) + "".join(
        data.decode()
        for name, data in thin.items()
        if name.startswith(f"/etc/weightsmith/{engine}")
    )
    assert "/tmp/model" in said
    assert "/models" not in said
    kubernetes = (memory.results(target) / "thin" / "kubernetes.yaml").read_text()
    assert "nvidia.com/gpu: 1" in kubernetes
    assert "mountPath: /model" in kubernetes


def test_a_fleet_pushes_a_thin_image_of_each_adapter(two: Memory) -> None:
    base = two.use_vllm()
    image = {"repository": two.repository, "base": base}
    two.write_recipe(adapters=None, targets=["vllm"], image=image, outputs=["thin"])
    path = write_fleet(two, targets=["vllm"])
    first, _ = run(two, path, outputs={"push": True})
    again, engine = run(two, path, outputs={"push": True})

    images = [
        two.client.pull(Reference.parse(f"{two.repository}-{n}:1.0.0-vllm-thin")) for n in "ab"
    ]
    shared = {layer.digest for layer in images[0].layers} & {
        layer.digest for layer in images[1].layers
    }
    assert any(
        layer.digest in shared for layer in images[0].layers if layer.file.startswith("models/")
    )
    assert [row.digest for row in again.cells] == [row.digest for row in first.cells]
    assert engine.done == []


def test_it_is_built_again_from_what_it_states(memory: Memory, tmp_path: Path) -> None:
    memory.use_vllm()
    thin = memory.build(THIN, push=True)["vllm"].forms["thin"]
    found = recipe_of_image(
        thin.reference,
        base=str(memory.home / "base"),
        check=None,
        dist=tmp_path / "again",
        registry=memory.client,
        progress=Silent(),
    )

    recipe = yaml.safe_load(found.read_text())
    assert recipe["targets"] == ["vllm"]
    (adapter,) = recipe["adapters"]
    inside = found.parent / adapter["source"] / "adapter_model.safetensors"
    assert inside.read_bytes() == (memory.home / "a" / inside.name).read_bytes()


def test_the_plan_says_what_is_shared(memory: Memory) -> None:
    memory.use_vllm()
    row = memory.planned("publish", THIN)

    assert "thin: 1.6 MiB that all fine-tunes of the base share, 4.4 KiB of its own" in row["why"]


def build_on_volume(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> tuple[Reference, Any]:
    """Push a volume of the base, then a thin image without the base; return both."""
    base = memory.use_vllm(adapters=None, evaluate=None, version="0.1.0")
    tools_of = Memory.tools.fget

    def tools(self: Memory) -> object:
        found = tools_of(self)
        return replace(found, readers=make_readers(found.store, self.client, lambda: self.folder))

    monkeypatch.setattr(Memory, "tools", property(tools))
    volume = memory.build("outputs=[image, volume]", push=True, load=True)["vllm"].forms["volume"]
    place = Reference.parse(volume.reference).at(volume.digest)
    memory.write_recipe(
        targets=["vllm"],
        base={"source": f"oci://{place}"},
        image={"repository": memory.repository, "base": base},
    )
    words = ("outputs.kinds=[image, thin]", "outputs.mount_base=true")
    built = memory.build(*words, push=True, load=True)
    return place, built["vllm"].forms["thin"]


def test_the_base_may_be_an_image_that_is_mounted(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, thin = build_on_volume(memory, monkeypatch)
    fat, inside = files(memory, "vllm"), files(memory, "vllm-thin")
    checks = verify_image(thin.reference, None, memory.client, Silent()).checks

    assert not [name for name in inside if name.startswith("/models")]
    (found,) = (check for check in checks if check.name == "files base")
    assert (found.ok, str(place.digest)[:19] in found.found) == (None, True)
    container = Container.of(inside, tmp_path / "root")
    done = container.start()
    assert done.returncode == 5
    assert "nothing is mounted at" in done.stderr
    assert f"mount the folder models of the image {place} there" in done.stderr
    volume = memory.engine.held(f"{memory.repository}:0.1.0-vllm-volume").files()
    (container.root / "models").mkdir()
    for name, data in model_of(volume).items():
        (container.root / "models" / name).write_bytes(data)
    assert container.start().returncode == 0
    assert as_tensors(container.model()) == as_tensors(model_of(fat))


@pytest.mark.docker
@pytest.mark.slow
def test_a_container_merges_into_the_base_that_is_mounted(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image is thin's own files alone; its Python is this machine's, mounted as well."""
    build_on_volume(memory, monkeypatch)
    volume = memory.engine.held(f"{memory.repository}:0.1.0-vllm-volume").files()
    root, base = tmp_path / "root", tmp_path / "base"
    for folder, held in ((root, files(memory, "vllm-thin")), (base, model_of(volume))):
        for name, data in held.items():
            path = folder / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    name, merged = f"weightsmith-thin:{tmp_path.name.replace('_', '-').lower()}", tmp_path / "model"
    merged.mkdir()
    with subprocess.Popen(["tar", "-cC", root, "."], stdout=subprocess.PIPE) as tar:
        start_with = 'ENTRYPOINT ["python3", "-I", "-B", "/opt/weightsmith"]'
        command = ["docker", "import", "--change", start_with]
        subprocess.run([*command, "-", name], stdin=tar.stdout, capture_output=True, check=True)
    places = {*("/usr", "/lib", "/lib64", "/bin"), sys.prefix, sys.base_prefix}
    mounts = [f"--volume={place}:{place}:ro" for place in places if Path(place).is_dir()]

    def start() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["docker", "run", "--rm", "--network=none", "--read-only", "--tmpfs=/tmp", *mounts,
             f"--env=PATH={sys.prefix}/bin:/usr/bin", f"--volume={base}:/models:ro",
             f"--volume={merged}:/model", name, "/bin/sh", "-c", "ls /tmp/model/"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    try:
        done = start()
        assert done.returncode == 0, done.stderr
        assert "model.safetensors" in done.stdout
        (served,) = merged.iterdir()
        made = {path.name: path.read_bytes() for path in served.iterdir() if path.name[0] != "."}
        assert as_tensors(made) == as_tensors(model_of(files(memory, "vllm")))
        shutil.rmtree(served)
        wrong = next(base.glob("*.safetensors"))
        wrong.write_bytes(wrong.read_bytes()[:-1] + b"?")
        done = start()
        assert (done.returncode, done.stdout) == (4, "")
        assert "is not what was tested" in done.stderr
    finally:
        subprocess.run(["docker", "rmi", "--force", name], capture_output=True, check=True)


def test_manifests_mount_it(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    place, _ = build_on_volume(memory, monkeypatch)
    folder = memory.results("vllm") / "thin"

    for name, merges in (
        ("kubernetes.yaml", "containers"),
        ("kubernetes-volume.yaml", "initContainers"),
    ):
        documents = list(yaml.safe_load_all((folder / name).read_text()))
        for one in documents:
            for version in ("1.33", "1.36", "1.37"):
                kubernetes_validate.validate(one, version, strict=True)
        (pod,) = (
            one["spec"]["template"]["spec"] for one in documents if one["kind"] == "Deployment"
        )
        (volume,) = (one for one in pod["volumes"] if "image" in one)
        assert volume["image"]["reference"] == str(place)
        mounted = {
            kind: [
                (m["mountPath"], m["subPath"], m["readOnly"])
                for c in pod.get(kind, [])
                for m in c["volumeMounts"]
                if m["name"] == volume["name"]
            ]
            for kind in ("containers", "initContainers")
        }
        assert mounted.pop(merges) == [("/models", "models", True)]
        assert list(mounted.values()) == [[]]
    compose = yaml.safe_load((folder / "compose.yaml").read_text())
    assert compose["services"]["model"]["volumes"][1]["source"] == str(place)
    assert f"--mount type=image,source={place},target=/models" in (folder / "README.md").read_text()


def test_a_base_that_cannot_be_mounted_is_refused_before_any_work(memory: Memory) -> None:
    memory.use_vllm()
    with pytest.raises(UsageError, match="no image that can be mounted"):
        memory.forecast("outputs.kinds=[thin]", "outputs.mount_base=true")
    with pytest.raises(UsageError, match="no image that can be mounted"):
        memory.build("outputs.kinds=[thin]", "outputs.mount_base=true")
    with pytest.raises(UsageError, match="mount_base"):
        memory.build("outputs.kinds=[image]", "outputs.mount_base=true")
    assert memory.jobs() == []
