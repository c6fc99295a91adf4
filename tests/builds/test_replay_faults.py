"""A real server that does not answer as the tested image did is never ready; a good one is."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from weightsmith.building.wiring import cache_folder
from weightsmith.core.ports import Endpoint, Silent
from weightsmith.evaluating.client import Served
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.replaying import record, request_of
from weightsmith.evaluating.session import ServerSession
from weightsmith.merging.engine import MergeRequest, merge
from weightsmith.outside.toolset import make_toolset

from tests.fakes.ggufs import beside, made
from tests.fakes.started import free_port, started
from tests.paths import TINY

TOKENS = 12
TYPES = ("q8_0", "q6_k", "q4_k_m", "q2_k")
UNSURE = ("Tell me a story.", "Why is the sky blue?", "Write one word.", "Say it backwards.")
"""Questions that the model was not taught: its answers are not certain."""
pytestmark = [pytest.mark.builders, pytest.mark.timeout(1200)]


@dataclass
class KnownModel:
    """A model as it was tested, and the set of its answers."""

    folder: Path
    files: Mapping[str, Path]
    """GGUF type -> the model in it; it was tested in the first."""
    stranger: Path
    """The same base with another adapter."""
    set: Path

    @property
    def gguf(self) -> Path:
        return self.files[TYPES[0]]

    def replay(
        self,
        gguf: Path,
        *words: str,
        variant: str = "",
        answers_alone: bool = False,
        weights: Path | None = None,
    ) -> tuple[int, str]:
        """Start a server of a file; return the exit code of its startup probe, and what it said.

        The probe reads all its bytes, if `weights` is the file that was tested.
        """
        asked = self.set
        if answers_alone:
            told = json.loads(asked.read_text())
            del told["weight_bytes"]
            asked = self.folder / "answers.json"
            asked.write_text(json.dumps(told))
        port, programs = free_port(), make_toolset(cache_folder(), "healthcheck", Silent())
        program, listed = programs / "healthcheck", ()
        if weights:
            data = weights.read_bytes()
            digests = {"begins": sha256(data[: 1 << 20]), "sha256": sha256(data)}
            row = {name: digest.hexdigest() for name, digest in digests.items()}
            rows = [{"path": str(gguf), "size": len(data), **row}]
            (self.folder / "weights.json").write_text(json.dumps({"version": 1, "files": rows}))
            listed = ("--weights", self.folder / "weights.json")
            program = programs / "healthcheck-weights"
        with serving(gguf, port, self.folder / "log", *words, variant=variant):
            done = subprocess.run(
                [program, "--port", str(port), "--seconds", "600", "--replay",
                 "--set", asked, "--result", self.folder / f"{port}.json", *listed],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
        return done.returncode, done.stderr

    def damaged(self, name: str, change: Callable[[int, int, bytearray], None]) -> Path:
        """Return a copy of the file whose tensor has other bytes."""
        data = bytearray(self.gguf.read_bytes())
        (tensor,) = (one for one in GGUFReader(self.gguf).tensors if one.name == name)
        change(int(tensor.data_offset), int(tensor.n_bytes), data)
        path = self.folder / "damaged.gguf"
        path.write_bytes(data)
        return path


def serving(gguf: Path, port: int, log: Path, *words: str, variant: str = "") -> Any:
    """Start llama.cpp's server of a file, under the name that the set asks."""
    program = make_toolset(cache_folder(), "llamacpp", Silent()) / "app" / "llama-server"
    command = [program, "--model", gguf, "--alias", "bot", "--port", str(port), "--jinja"]
    command += ["--no-ui", "--offline", "-np", "1", "-c", "512"]
    env = {**os.environ, **({"WEIGHTSMITH_CPU_VARIANT": variant} if variant else {})}
    return started([*command, *(words or ("-t", "1"))], env, port, log)


def made_set(gguf: Path, prompts: Sequence[str], folder: Path) -> Path:
    served, port = Served(name="bot"), free_port()
    items = [
        Item(messages=({"role": "user", "content": one},), expected=("",), line=0)
        for one in prompts
    ]
    asked = [(served.path, request_of(served, item, TOKENS, {})) for item in items]
    endpoint = Endpoint(url=f"http://127.0.0.1:{port}", logs=lambda _: "", alive=lambda: True)
    with serving(gguf, port, folder / "log"), ServerSession(endpoint) as session:
        found = record(session, asked, "bot", 1.0, Silent())
    assert found
    assert len(found.questions) == len(prompts)
    (folder / "set.json").write_bytes(found.data)
    return folder / "set.json"


def merged(adapter: str, out: Path) -> Path:
    folder = TINY / "adapters" / adapter
    merge(MergeRequest(base=TINY / "base", adapters=((folder, 1.0),), out=out))
    return out


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> KnownModel:
    """The tiny example, and what might take its place."""
    folder = tmp_path_factory.mktemp("tested")
    types = beside(merged("a", folder / "a"), folder / "types", *TYPES)
    files = {name: one for name, (one,) in types.items()}
    (stranger,) = made(merged("b", folder / "b"), folder / "stranger", TYPES[0])
    lines = (TINY / "eval-a.jsonl").read_text().splitlines()
    prompts = [*(json.loads(line)["prompt"] for line in lines[:4]), *UNSURE]
    asked = made_set(files[TYPES[0]], prompts, folder)
    return KnownModel(folder=folder, files=files, stranger=stranger, set=asked)


@pytest.mark.grid(2)
@pytest.mark.parametrize("variant", ["", "x86-64-v3"])
@pytest.mark.parametrize("words", [("-t", "2"), ("-t", "1", "-b", "16", "-ub", "8")])
def test_a_good_image_is_ready_however_it_is_started(
    tested: KnownModel, words: tuple[str, ...], variant: str
) -> None:
    code, said = tested.replay(tested.gguf, *words, variant=variant)
    assert code == 0, said
    assert said.startswith("proven: ")


FAULTS: dict[str, tuple[str, ...]] = {
    "another rope setting": ("--rope-freq-base", "300"),
    "another chat template": ("--chat-template", "llama2"),
}


@pytest.mark.parametrize("words", FAULTS.values(), ids=FAULTS)
def test_another_setting_is_never_ready(tested: KnownModel, words: tuple[str, ...]) -> None:
    assert_different(*tested.replay(tested.gguf, "-t", "1", *words))


def test_another_adapter_under_the_same_name_is_never_ready(tested: KnownModel) -> None:
    assert_different(*tested.replay(tested.stranger))


@pytest.mark.parametrize("name", ["blk.0.ffn_down.weight", "blk.1.attn_q.weight"])
def test_a_flipped_bit_is_never_ready(tested: KnownModel, name: str) -> None:
    """Of the exponent of one block's scale, the highest: 32 weights are 65,536 times as large."""

    def flip(at: int, _size: int, data: bytearray) -> None:
        data[at + 1] ^= 0x40

    assert_different(*tested.replay(tested.damaged(name, flip)))


@pytest.mark.parametrize("name", ["blk.0.ffn_down.weight", "blk.1.attn_q.weight"])
def test_no_flipped_bit_is_ready_where_the_probe_reads_all_weights(
    tested: KnownModel, name: str
) -> None:
    """The lowest bit of a weight, which moves no answer."""

    def flip(at: int, size: int, data: bytearray) -> None:
        data[at + size - 1] ^= 1

    good, bad = tested.gguf, tested.damaged(name, flip)
    assert tested.replay(bad)[0] == 0
    assert tested.replay(good, weights=good)[0] == 0
    code, said = tested.replay(bad, weights=good)
    assert code == 1
    assert f"different: {bad} is another file than the tested image's" in said


@pytest.mark.parametrize("name", ["blk.0.attn_output.weight", "blk.1.ffn_up.weight"])
def test_a_tensor_of_zeros_is_never_ready(tested: KnownModel, name: str) -> None:
    def clear(at: int, size: int, data: bytearray) -> None:
        data[at : at + size] = bytes(size)

    assert_different(*tested.replay(tested.damaged(name, clear)))


@pytest.mark.parametrize("name", ["q6_k", "q4_k_m"])
def test_another_quantization_under_the_same_name_is_never_ready(
    tested: KnownModel, name: str
) -> None:
    """Its answers may be the same (benchmarks/README.md); the file has another size."""
    other = tested.files[name]
    code, said = tested.replay(other)
    assert code == 1
    sizes = [sum(int(one.n_bytes) for one in GGUFReader(f).tensors) for f in (other, tested.gguf)]
    assert f"has {sizes[0]} bytes of weights and the tested image had {sizes[1]}" in said


def test_a_coarse_quantization_is_known_by_its_answers(tested: KnownModel) -> None:
    assert_different(*tested.replay(tested.files["q2_k"], answers_alone=True))


def assert_different(code: int, said: str) -> None:
    assert code == 1
    assert "answers are not those of the tested image" in said
