"""Builders are whole or absent: environments, compiled tools, and the wheels they take."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from weightsmith.building.checks import require_builder
from weightsmith.building.targets import all_targets
from weightsmith.core import resources
from weightsmith.core.errors import EnvironmentFailure, UsageError
from weightsmith.core.resources import builder_pins, containerfile, engine_pins
from weightsmith.outside import docker_images, environment, process, toolset
from weightsmith.outside.docker_images import configured_wheels, pick_wheels
from weightsmith.outside.environment import Pins, environment_folder, is_complete
from weightsmith.outside.local import LocalRunner
from weightsmith.outside.toolset import make_engine_files

from tests.fakes.journal import RecordingProgress

TORCH = "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl"


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder of builders and engines of our own; the builder `tiny` needs no package."""
    root = tmp_path / "images"
    tiny, engine = root / "builders" / "tiny", root / "engines" / "toy"
    for folder in (tiny, engine):
        folder.mkdir(parents=True)
        (folder / "requirements.txt").write_text("# nothing\n")
    (engine / "source.json").write_text('{"builders": ["tiny"]}')
    (engine / "fetch.py").write_text(
        "import pathlib, sys; pathlib.Path(sys.argv[sys.argv.index('--out') + 1]).mkdir()"
    )
    (engine / "compile.py").write_text(
        "import pathlib, sys\n"
        "print('[1/2] first'); print('[2/2] second')\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1]); out.mkdir()\n"
        "(out / 'tool').write_text('compiled')\n"
    )
    for module in (environment, toolset, docker_images):
        monkeypatch.setattr(module, "images", lambda: root)
    monkeypatch.setattr("weightsmith.core.resources.images", lambda: root)
    for name in ("_builder_pins", "_engine_pins"):  # tests change the folders as they go
        monkeypatch.setattr(resources, name, getattr(resources, name).__wrapped__)
    return root


@pytest.fixture
def bare(monkeypatch):
    """Scripts of engines run in this environment: making one takes seconds."""
    python = Path(sys.executable)
    monkeypatch.setattr(toolset, "make_bare_environment", lambda *_: python)


@pytest.mark.slow
def test_an_environment_is_made_anew_if_interrupted_and_once_if_complete(images, tmp_path):
    pins, progress = Pins(name="tiny", flavour="cpu"), RecordingProgress()
    folder = environment_folder(tmp_path / "cache", pins)
    folder.mkdir(parents=True)
    (folder / "half").write_text("")

    assert environment.make_environment(tmp_path / "cache", pins, progress) == folder

    assert is_complete(folder)
    assert not (folder / "half").exists()
    assert (folder / "bin" / "python").exists()
    before = (folder / ".complete").stat().st_mtime_ns
    assert environment.make_environment(tmp_path / "cache", pins, progress) == folder
    assert (folder / ".complete").stat().st_mtime_ns == before


@pytest.mark.slow
def test_packages_that_cannot_be_had_are_an_environment_failure(images, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    (images / "builders" / "tiny" / "requirements.txt").write_text(
        f"no-such-package==1.0 --hash=sha256:{'0' * 64}\n"
    )
    pins = Pins(name="tiny", flavour="cpu")

    with pytest.raises(EnvironmentFailure, match=r"installing tiny/requirements\.txt") as caught:
        environment.make_environment(tmp_path / "cache", pins, RecordingProgress())
    assert "WEIGHTSMITH_WHEELS" in caught.value.hint
    assert not is_complete(environment_folder(tmp_path / "cache", pins))


@pytest.mark.parametrize(("version", "found"), [("2.13.0+cpu", "merge"), ("2.12.0+cpu", None)])
def test_a_builder_without_cuda_pins_falls_back_to_the_merge_builders(images, version, found):
    """A machine for whose Python there is no CPU build needs some torch for every builder."""
    builders = images / "builders"
    (builders / "merge").mkdir(exist_ok=True)
    (builders / "merge" / "requirements-cuda.txt").write_text("nvidia==1\ntorch==2.13.0 \\\n")
    (builders / "tiny" / "requirements-cpu.txt").write_text(f"torch=={version} \\\n")

    fallback = Pins(name="tiny", flavour="cpu").cuda

    assert (fallback.parent.name if fallback else None) == found


@pytest.mark.parametrize(
    ("works", "tried"),
    [(0, ["folder"]), (1, ["folder", "torch's index"]), (2, ["folder", "torch's index", "PyPI"])],
)
def test_torch_is_taken_from_the_folder_then_its_index_then_pypi(monkeypatch, works, tried):
    seen = []

    class Installer:
        progress = RecordingProgress()

        def try_torch(self, requirements, *options):
            assert requirements.name == "requirements-cpu.txt"
            seen.append("torch's index" if environment.TORCH_CPU_INDEX in options else "folder")
            return len(seen) > works

        def install(self, requirements):
            assert requirements.name == "requirements-cuda.txt"
            seen.append("PyPI")

    monkeypatch.setattr(environment, "_answers", lambda _: True)
    environment._install_torch(Pins(name="merge", flavour="cpu"), Installer())
    assert seen == tried


def test_the_environment_follows_the_pins_but_not_the_comments(images):
    pins = Pins(name="tiny", flavour="cpu")
    file = images / "builders" / "tiny" / "requirements.txt"
    before = pins.key

    file.write_text("# something else\n")
    assert pins.key == before

    file.write_text("numpy==2.0\n")
    assert pins.key != before


def test_a_missing_compiler_is_reported_before_anything_is_made(tmp_path, monkeypatch):
    runner = LocalRunner(tmp_path)
    which = shutil.which
    monkeypatch.setattr(  # Python itself is there, and no other program
        "shutil.which", lambda name, **where: which(name, **where) if "python" in name else None
    )
    with pytest.raises(EnvironmentFailure, match=r"compile pypcre.*no C compiler"):
        runner.check("gptqmodel")
    with pytest.raises(EnvironmentFailure, match="no C compiler"):
        runner.prepare("gptqmodel", RecordingProgress())
    assert not list(tmp_path.glob("builders/*/"))

    runner.check("autoawq")  # its source is Python alone
    for other in ("vllm-awq", "vllm-gptq"):
        with pytest.raises(EnvironmentFailure) as caught:
            require_builder(all_targets()[f"{other}-gptqmodel"], runner)
        assert f"the target {other} can be built" in caught.value.hint
    folder = environment_folder(tmp_path, Pins(name="gptqmodel", flavour="cpu"))
    folder.mkdir(parents=True)
    (folder / ".complete").touch()
    runner.check("gptqmodel")


def test_a_builder_of_packages_alone_takes_the_containerfile_of_all(images):
    """Its image is another one when that file changes, as it is when its own does."""
    builders = images / "builders"
    (builders / "Containerfile").write_text("FROM a\n")
    before = builder_pins("tiny")
    assert containerfile("tiny") == builders / "Containerfile"

    (builders / "Containerfile").write_text("FROM b\n")
    shared = builder_pins("tiny")
    assert shared != before

    own = builders / "tiny" / "Containerfile"
    own.write_text("FROM a\n")
    assert containerfile("tiny") == own
    mine = builder_pins("tiny")
    (builders / "Containerfile").write_text("FROM c\n")
    assert builder_pins("tiny") == mine != shared

    with pytest.raises(UsageError, match="nope"):
        containerfile("nope")
    with pytest.raises(UsageError, match="nope") as caught:
        _ = Pins(name="nope", flavour="cpu").folder
    assert "tiny" in caught.value.hint


@pytest.mark.slow
def test_tools_are_compiled_once_with_progress_and_nothing_left(images, tmp_path):
    cache, progress = tmp_path / "cache", RecordingProgress()

    folder = toolset.make_toolset(cache, "toy", progress)

    assert (folder / "tool").read_text() == "compiled"
    assert ("advance", "2", "2", "files") in progress.lines
    assert [p.name for p in folder.parent.iterdir() if p.is_dir()] == [folder.name]
    assert toolset.make_toolset(cache, "toy", progress) == folder


@pytest.fixture
def compiling(monkeypatch):
    """Compile by this Python: an environment of its own, which is tested above, takes seconds."""
    monkeypatch.setattr(toolset, "make_bare_environment", lambda *_: Path(sys.executable))


@pytest.mark.usefixtures("compiling")
def test_tools_that_do_not_compile_leave_nothing_that_looks_ready(images, tmp_path):
    (images / "engines" / "toy" / "compile.py").write_text("raise SystemExit('no compiler')")

    with pytest.raises(EnvironmentFailure, match=r"toy's compile\.py failed"):
        toolset.make_toolset(tmp_path / "cache", "toy", RecordingProgress())
    assert not toolset.toolset_folder(tmp_path / "cache", "toy").exists()


def test_only_pinned_wheels_are_picked(images, tmp_path):
    (images / "builders" / "tiny" / "requirements-cpu.txt").write_text("torch==2.13.0+cpu\n")
    wheels, target = tmp_path / "wheels", tmp_path / "target"
    wheels.mkdir()
    target.mkdir()
    for name in (TORCH, TORCH.replace("13", "12"), "other-1-py3-none-any.whl"):
        (wheels / name).write_text("")

    assert pick_wheels([wheels], Pins(name="tiny", flavour="cpu"), target)
    assert [path.name for path in target.iterdir()] == [TORCH]
    assert not pick_wheels([tmp_path / "in"], Pins(name="tiny", flavour="cpu"), target)


@pytest.mark.slow
def test_folders_of_pips_own_configuration_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", f"{tmp_path} https://wheels.example")

    assert tmp_path in configured_wheels()
    assert all(isinstance(folder, Path) and folder.is_dir() for folder in configured_wheels())


def test_certificates_are_a_secret_of_the_build(tmp_path, monkeypatch):
    for name in ("WEIGHTSMITH_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert docker_images._secrets() == {}

    for name in ("default.pem", "own.pem"):
        (tmp_path / name).write_text("")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "default.pem"))
    assert docker_images._secrets() == {"ca_bundle": tmp_path / "default.pem"}
    monkeypatch.setenv("WEIGHTSMITH_CA_BUNDLE", str(tmp_path / "own.pem"))
    assert docker_images._secrets() == {"ca_bundle": tmp_path / "own.pem"}
    monkeypatch.setenv("WEIGHTSMITH_CA_BUNDLE", str(tmp_path / "absent.pem"))
    with pytest.raises(UsageError, match=r"absent\.pem"):
        docker_images._secrets()


@pytest.mark.slow
def test_an_index_with_a_password_is_not_written_into_the_image(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.example/simple")
    assert docker_images._arguments("cpu", "b")["PIP_INDEX_URL"] == os.environ["PIP_INDEX_URL"]

    monkeypatch.setenv("PIP_INDEX_URL", "https://me:secret@index.example/simple")
    assert "PIP_INDEX_URL" not in docker_images._arguments("cpu", "b")


@pytest.mark.usefixtures("compiling")
def test_an_engine_for_another_machine_is_compiled_apart(images, tmp_path):
    toy = images / "engines" / "toy"
    (toy / "source.json").write_text('{"builders": ["tiny"], "platforms": ["linux/arm64"]}')
    (toy / "compile.py").write_text(
        "import pathlib, sys\n"
        "app = pathlib.Path(sys.argv[sys.argv.index('--out') + 1]) / 'app'\n"
        "app.mkdir(parents=True); (app / 'server').write_text(' '.join(sys.argv[-3:]))\n"
    )
    out = tmp_path / "engine"
    out.mkdir()

    for _ in range(2):
        make_engine_files(tmp_path, "toy", "linux/arm64", out, RecordingProgress())

    assert (out / "server").read_text() == "--arch aarch64 --engine-only"
    assert toolset.toolset_folder(tmp_path, "toy", "aarch64").is_dir()
    assert not toolset.toolset_folder(tmp_path, "toy").exists()


def test_without_index_and_wheel_it_is_known_before_that_nothing_compiles(
    images, tmp_path, monkeypatch
):
    toy, wheels = images / "engines" / "toy", tmp_path / "wheels"
    (toy / "requirements.txt").write_text("a-compiler==1.2 \\\n    --hash=sha256:00\n")
    wheels.mkdir()
    monkeypatch.setenv("WEIGHTSMITH_WHEELS", str(wheels))
    toolset.check_engine_files(tmp_path, "toy", "linux/arm64")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(EnvironmentFailure, match=r"a-compiler 1\.2, which is not here") as error:
        toolset.check_engine_files(tmp_path, "toy", "linux/arm64")
    assert "pip download --no-deps a-compiler==1.2" in error.value.hint

    (wheels / "a_compiler-1.2-py3-none-any.whl").touch()
    toolset.check_engine_files(tmp_path, "toy", "linux/arm64")


def test_what_engines_share_is_part_of_the_pins_of_those_that_use_it(images):
    """The compiler of compiled ones, which builders have, and the packages of assembled ones."""
    engines = images / "engines"
    (images / "builders" / "tiny" / "Containerfile").write_text("")

    def pins_with(name: str, text: str):
        (engines / name).write_text(text)
        return engine_pins("toy"), builder_pins("tiny")

    before, after = pins_with("zig.py", "one"), pins_with("zig.py", "two")
    assert before[0] != after[0]
    assert before[1] != after[1]
    assert pins_with("debs.py", "one") == pins_with("debs.py", "two")
    (engines / "toy" / "assemble.py").write_text("")
    assert pins_with("debs.py", "two")[0] != pins_with("debs.py", "three")[0]


@pytest.fixture
def optional(images):
    """The engine `toy` only makes the builder's jobs faster."""
    (images / "engines" / "toy" / "source.json").write_text('{"speeds_up": ["tiny"]}')
    (images / "builders" / "tiny" / "Containerfile").write_text("")
    return images / "engines" / "toy"


@pytest.mark.usefixtures("compiling")
def test_tools_that_only_speed_up_are_no_part_of_the_pins(optional, tmp_path):
    pins, progress = builder_pins("tiny"), RecordingProgress()
    (optional / "more.c").write_text("")
    assert builder_pins("tiny") == pins

    assert toolset.optional_toolsets(tmp_path, "tiny") == {}
    toolset.try_toolsets(tmp_path, "tiny", progress)
    made = {"toy": toolset.toolset_folder(tmp_path, "toy")}
    assert toolset.optional_toolsets(tmp_path, "tiny") == made
    assert not progress.warnings


@pytest.mark.usefixtures("compiling")
def test_jobs_run_without_tools_that_only_speed_up(optional, tmp_path):
    (optional / "compile.py").write_text("raise SystemExit('no compiler')")
    progress = RecordingProgress()

    for _ in range(2):
        toolset.try_toolsets(tmp_path, "tiny", progress)

    (warning,) = progress.warnings
    assert "jobs of the builder 'tiny' will take longer" in warning
    assert toolset.optional_toolsets(tmp_path, "tiny") == {}

    marker = toolset.failure_marker(toolset.toolset_folder(tmp_path, "toy"))
    assert str(marker) in warning
    marker.unlink()
    toolset.try_toolsets(tmp_path, "tiny", progress)
    assert len(progress.warnings) == 2


def test_tools_are_tried_again_after_an_interrupt(optional, tmp_path, monkeypatch):
    tries = []

    def interrupted(*_):
        tries.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(toolset, "_compile", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            toolset.try_toolsets(tmp_path, "tiny", RecordingProgress())
    assert len(tries) == 2


def test_a_base_that_cannot_be_pulled_hints_at_the_runner_that_needs_none(
    images, tmp_path, monkeypatch
):
    (images / "builders" / "Containerfile").write_text("FROM scratch\n")
    said = "ERROR: failed to solve: registry.invalid/python:3: failed to resolve source metadata"
    failed = process.Completed(argv=("docker",), returncode=1, seconds=1.0, tail=(said,))
    monkeypatch.setattr(docker_images, "_require_buildx", lambda host: None)
    monkeypatch.setattr(docker_images, "persistently", lambda run, progress: run())
    monkeypatch.setattr(process, "run", lambda *words, **rest: failed)
    monkeypatch.setenv("WEIGHTSMITH_BUILDER_BASE", "registry.invalid/python:3")
    with pytest.raises(EnvironmentFailure, match="failed to resolve") as caught:
        docker_images.build_image("tiny", "cpu", "", tmp_path / "cache", RecordingProgress())
    assert "`--runner local`, which needs no image" in caught.value.hint
