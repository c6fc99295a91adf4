"""Thin images of builds in memory, as containers whose program is run here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
from safetensors.numpy import load_file
from weightsmith.core.jobs import QuantizeJob
from weightsmith.models.safetensors import build_header
from weightsmith.quantizers.rounded import quantize
from weightsmith.quantizers.schemes import SCHEMES

from tests.fakes.memory import Memory

THIN = "outputs=[image, thin]"
SAY = "import os; print('served', sorted(os.listdir(os.environ['SERVED'])))"


def files(memory: Memory, tag: str) -> Mapping[str, bytes]:
    return memory.engine.held(f"{memory.repository}:1.0.0-{tag}").files()


@dataclass
class Container:
    """The files of a thin image in a folder, whose program takes that folder for its root."""

    root: Path
    python: Sequence[str] = (sys.executable, "-I", "-B")

    @classmethod
    def of(cls, image: Mapping[str, bytes], root: Path) -> Container:
        for name, data in image.items():
            path = root / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        made = cls(root)
        text = made.manifest.read_text()
        for folder in ("/models", "/adapters", "/etc/weightsmith"):
            text = text.replace(f'"{folder}', f'"{root}{folder}')
        made.manifest.write_text(text)
        made.volume.mkdir()
        return made

    @property
    def manifest(self) -> Path:
        return self.root / "etc/weightsmith/thin.json"

    @property
    def volume(self) -> Path:
        return self.root / "volume"

    @property
    def served(self) -> Path:
        return self.root / "model"

    def command(self, *words: str, before: str = "") -> list[str]:
        """Start as the image does, with this folder's paths; `before` is run before that."""
        program = (
            "import sys; from pathlib import Path\n"
            f"sys.path.insert(0, {str(self.root / 'opt/weightsmith')!r})\n"
            f"sys.argv[0] = {str(self.root / 'opt/weightsmith')!r}\n"
            "from weightsmith.worker import start\n"
            "import weightsmith.core.thin as thin\n"
            f"thin.PLACES, thin.SERVED = ({str(self.volume)!r},), {str(self.served)!r}\n"
            f"{before}\n"
            f"raise SystemExit(start.main(sys.argv[1:], Path({str(self.manifest)!r})))"
        )
        return [*self.python, "-c", program, *words]

    def start(
        self, words: Sequence[str] = (sys.executable, "-c", SAY), before: str = "", **more: str
    ) -> subprocess.CompletedProcess[str]:
        env = {"PATH": os.environ["PATH"], "SERVED": str(self.served), **more}
        command = self.command(*words, before=before)
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    def model(self) -> dict[str, bytes]:
        """The files that are served."""
        return {
            path.relative_to(self.served).as_posix(): path.read_bytes()
            for path in self.served.rglob("*")
            if path.name != ".weightsmith.json"
        }

    def left(self) -> list[str]:
        return sorted(path.name for path in self.volume.iterdir())


def model_of(image: Mapping[str, bytes]) -> dict[str, bytes]:
    return {n.removeprefix("/models/"): d for n, d in image.items() if n.startswith("/models/")}


def as_tensors(files: Mapping[str, bytes]) -> dict[str, object]:
    """The small files, and each tensor's type, shape and bytes: a fat image's weights are cut."""
    found: dict[str, object] = {}
    for name, data in files.items():
        if not name.endswith(".safetensors"):
            found |= {} if name.endswith(".index.json") else {name: data}
            continue
        start = 8 + int.from_bytes(data[:8], "little")
        table = json.loads(data[8:start])
        table.pop("__metadata__", None)
        for tensor, about in table.items():
            first, end = about["data_offsets"]
            place = data[start + first : start + end]
            found[tensor] = (about["dtype"], about["shape"], place)
    return found


def use_bfloat16(memory: Memory) -> None:
    """Write the base in bfloat16, in two shards."""
    base = memory.home / "base"
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        places |= dict.fromkeys(part, file)
        header = build_header([(n, "BF16", tensors[n].shape) for n in part], {"format": "pt"})
        data = [tensors[n].astype(ml_dtypes.bfloat16).tobytes() for n in part]
        (base / file).write_bytes(header + b"".join(data))
    index = {"metadata": {}, "weight_map": places}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def round_really(memory: Memory) -> None:
    """Let jobs make rounded weights as builders do."""

    def rounded(job: QuantizeJob, _report: object) -> Mapping[str, Any]:
        keep = job.options.get("keep", ())
        quantize(SCHEMES[job.format], job.model.path, job.output, keep)
        return {"warnings": [], "bits_per_weight": 8.0}

    memory.runner.stages = {**memory.runner.stages, "quantize": rounded}
