"""The pins of the llama.cpp build agree, and its source is fetched only as pinned and safely."""

import hashlib
import io
import json
import random
import re
import tarfile
from pathlib import Path

import pytest
from weightsmith.core.platforms import machine_of

from tests.paths import ROOT, loaded

ENGINES = ROOT / "images" / "engines"
ENGINE = ENGINES / "llamacpp"
BUILDER = ROOT / "images/builders/gguf"
NAME = "llama_cpp_python-0.3.36"
TREE = f"{NAME}/vendor/llama.cpp"


fetch, compile_, drain = (loaded(ENGINE / f"{name}.py") for name in ("fetch", "compile", "drain"))


def pins(engine: str = "llamacpp") -> dict:
    return json.loads((ENGINES / engine / "source.json").read_text())


def member(name: str, data: bytes = b"x", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def archive(folder: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    path = folder / f"{NAME}.tar.gz"
    with tarfile.open(path, "w:gz") as out:
        for info, data in members:
            out.addfile(info, io.BytesIO(data))
    return path


def pin_for(path: Path):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return fetch.Pin("llama-cpp-python", "0.3.36", digest, "vendor/llama.cpp")


def unpacked(path: Path, out: Path) -> Path:
    fetch.fetch(pin_for(path), out, [str(path)], required=True, index="unused")
    return out


# Pins


def test_requirements_pin_the_versions_of_source_json():
    text = (ENGINE / "requirements.txt").read_text()
    assert dict(re.findall(r"^([a-z]+)==(\S+)", text, re.MULTILINE)) == pins()["compiler"]


def test_builder_requirements_leave_torch_to_the_flavour():
    text = (BUILDER / "requirements.txt").read_text()
    assert not re.findall(r"^(?:torch|triton|nvidia-\S+)==", text, re.MULTILINE)


def test_builder_requirements_are_those_asked_for():
    asked, given = (
        set(re.findall(r"^([a-z0-9-]+==\S+)", (BUILDER / name).read_text(), re.MULTILINE))
        for name in ("requirements.in", "requirements.txt")
    )
    assert asked
    assert asked <= given


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_launcher_knows_exactly_the_variants_that_are_built(arch):
    launcher = (ENGINE / "launcher.c").read_text()
    known = re.findall(r'^    \{"([^"]+)", runs_', launcher, re.MULTILINE)
    mine = [name for name in known if name.startswith("x86") == (arch == "x86_64")]
    assert mine == list(reversed(pins()["variants"][arch]))


def test_there_is_an_engine_for_each_platform_that_is_promised():
    machines = [machine_of(platform) for platform in pins()["platforms"]]
    assert machines == list(pins()["variants"])


# Fetching


def test_only_the_wanted_folder_is_unpacked(tmp_path):
    path = archive(tmp_path, member(f"{TREE}/ggml/a.c", b"int a;"), member(f"{NAME}/setup.py"),
                   member(f"{TREE}/run.sh", mode=0o755))  # fmt: skip
    out = unpacked(path, tmp_path / "out")
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*")) == ["ggml", "ggml/a.c", "run.sh"]
    assert (out / "ggml/a.c").read_bytes() == b"int a;"
    assert (out / "run.sh").stat().st_mode & 0o777 == 0o755


def test_wrong_digest_is_refused(tmp_path, capsys, monkeypatch):
    assert fetch.read_pin(ENGINE / "source.json").filename == f"{NAME}.tar.gz"
    archive(tmp_path, member(f"{TREE}/ggml/a.c"))
    code = fetch.main(["--out", str(tmp_path / "out"), "--find-links", str(tmp_path)])
    assert code == 3
    assert "pinned is" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("evil", "said"),
    [
        (member(f"{TREE}/../../../evil"), "unsafe path"),
        (member("/evil"), "unsafe path"),
        (member(f"{TREE}/a/../../b"), "unsafe path"),
        (member(f"{TREE}/pipe", b"", type=tarfile.FIFOTYPE), "special file"),
    ],
)
def test_paths_that_leave_the_folder_and_special_files_are_refused(tmp_path, evil, said):
    path = archive(tmp_path, member(f"{TREE}/ok"), evil)
    with pytest.raises(fetch.RefusedError, match=said):
        unpacked(path, tmp_path / "out")
    assert [path] == sorted(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_left_out_and_nothing_is_written_through_them(tmp_path, kind):
    outside = tmp_path / "outside"
    outside.mkdir()
    link = member(f"{TREE}/dir", b"", type=kind, linkname=str(outside))
    other = member(f"{TREE}/link", b"", type=kind, linkname="/etc/passwd")
    out = unpacked(archive(tmp_path, link, other, member(f"{TREE}/dir/file")), tmp_path / "out")
    assert not list(outside.iterdir())
    assert [path.name for path in out.iterdir()] == ["dir"]
    assert (out / "dir/file").is_file()


def test_an_archive_cut_short_is_refused(tmp_path):
    path = archive(tmp_path, member(f"{TREE}/ok", random.Random(1).randbytes(99_999)))
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(fetch.RefusedError, match="not a readable archive"):
        unpacked(path, tmp_path / "out")


def test_an_existing_folder_is_left_alone(tmp_path):
    path = archive(tmp_path, member(f"{TREE}/ok"))
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(fetch.RefusedError, match="exists"):
        unpacked(path, out)


def test_a_place_without_the_file_says_how_to_get_it(tmp_path, capsys):
    code = fetch.main(["--out", str(tmp_path / "out"), "--find-links", str(tmp_path)])
    assert code == 5
    assert "pip download" in capsys.readouterr().err


def test_an_unreachable_index_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    code = fetch.main(["--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert code == 5
    assert said.count("\n") == 1
    assert "PIP_INDEX_URL" in said
    assert "secret" not in said


def test_the_index_is_asked_for_json_and_relative_addresses_are_resolved(tmp_path, monkeypatch):
    path = archive(tmp_path, member(f"{TREE}/ok"))
    pin = pin_for(path)
    page = json.dumps({"files": [{"filename": pin.filename, "url": "../../files/it.tar.gz"}]})
    served = {
        "https://index.example/simple/llama-cpp-python/": page.encode(),
        "https://index.example/files/it.tar.gz": path.read_bytes(),
    }

    class Answer(io.BytesIO):
        url = ""

        def geturl(self) -> str:
            return self.url

    def get(url: str, accept: str = "*/*") -> Answer:
        assert url.endswith(".gz") or accept == "application/vnd.pypi.simple.v1+json"
        answer = Answer(served[url])
        answer.url = url
        return answer

    monkeypatch.setattr(fetch, "get", get)
    out = tmp_path / "out"
    fetch.fetch(pin, out, [], required=False, index="https://index.example/simple")
    assert (out / "ok").is_file()


# Compiling


def test_a_folder_that_is_no_llama_cpp_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="3"):
        compile_.main(["--source", str(tmp_path), "--out", str(tmp_path / "o"), "--arch", "x86_64"])
    assert "fetch.py" in capsys.readouterr().err


def test_another_compiler_than_the_pinned_one_is_refused(capsys):
    with pytest.raises(SystemExit, match="3"):
        compile_.find_compiler({"ziglang": "0.0.0"})
    assert "ziglang 0.0.0 is needed" in capsys.readouterr().err


def test_no_host_path_reaches_the_compiler_unmapped(tmp_path):
    compiler = compile_.Compiler(tmp_path / "zig", tmp_path / "cmake", tmp_path / "ninja")
    job = compile_.Job(Path("/s"), tmp_path, "x86_64", pins()["variants"]["x86_64"], "c" * 40,
                       compiler, 1)  # fmt: skip
    settings = compile_.cmake_settings(job, dict.fromkeys(["cc", "c++", "ar", "ranlib"], tmp_path))
    assert "-ffile-prefix-map=/s=llama.cpp" in settings["CMAKE_CXX_FLAGS"]
    assert "-mcpu=x86_64_v2" in settings["CMAKE_CXX_FLAGS"]
    assert settings["GGML_NATIVE"] == "OFF"
    assert settings["GIT_EXE"] == settings["GIT_EXECUTABLE"] == "OFF"
    assert settings["WEIGHTSMITH_VARIANTS"].startswith("x86-64-v3=-mcpu=x86_64_v3;")


# Changes


def test_only_texts_that_are_there_once_are_changed(tmp_path):
    for name, edits in drain.EDITS.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True)
        path.write_text("".join(f"// {n}\n{old}" for n, (old, _) in enumerate(edits)))
    drain.write_edited(tmp_path / "tree", tmp_path / "edited")
    for name, edits in drain.EDITS.items():
        text = (tmp_path / "edited" / name).read_text()
        assert text == "".join(f"// {n}\n{new}" for n, (_, new) in enumerate(edits))


@pytest.mark.parametrize("times", [0, 2])
def test_another_source_than_the_changes_are_for_is_refused(tmp_path, times):
    ((old, _),) = drain.EDITS[drain.HTTP]
    for name, edits in drain.EDITS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("".join(old for old, _ in edits))
    (tmp_path / drain.HTTP).write_text(old * times)
    with pytest.raises(ValueError, match=f"httplib.cpp has {times} times: auto is_shutting_down"):
        drain.write_edited(tmp_path, tmp_path / "edited")


def test_kernels_are_of_the_same_commit():
    assert pins("kernels")["llama_cpp"]["commit"] == pins("llamacpp")["llama_cpp"]["commit"]


@pytest.mark.parametrize("name", ["kernels", "healthcheck"])
def test_all_are_compiled_by_one_compiler(name):
    ours, tools = pins(name), pins("llamacpp")
    assert ours["compiler"]["ziglang"] == tools["compiler"]["ziglang"]
    required = (ENGINES / name / "requirements.txt").read_text().splitlines()[1:]
    assert set(required) <= set(
        (ENGINES / "llamacpp" / "requirements.txt").read_text().splitlines()
    )
    assert f"ziglang=={ours['compiler']['ziglang']} \\" in required
