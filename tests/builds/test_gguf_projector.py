"""Models that see, as GGUF: beside the file lies a projector, as llama.cpp's converter makes it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from weightsmith.oci.layout import read_layout

from tests.fakes.ggufs import beside, program, same
from tests.fakes.seeing import make_projected
from tests.fakes.started import weightsmith
from tests.paths import ROOT

SEEING = [
    "Gemma3ForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
]
GUESSED = ("basename", "finetune", "organization", "version", "size_label")
pytestmark = [pytest.mark.builders, pytest.mark.filterwarnings("ignore::FutureWarning")]


def converted(model: Path, folder: Path, name: str, **about: object) -> Path:
    """Let llama.cpp's converter write the projector, without any code of ours."""
    folder.mkdir()
    metadata, out = folder / "metadata", folder / f"mmproj-{name}.gguf"
    guessed = {f"general.{key}": None for key in GUESSED}
    told = {f"general.{key}": value for key, value in about.items()}
    metadata.write_text(json.dumps({**guessed, **told}))
    script = program("").parent / "convert" / "convert_hf_to_gguf.py"
    command = [sys.executable, script, model, "--mmproj", "--outtype", "f16", "--outfile", out]
    command += ["--model-name", name, "--metadata", metadata]
    subprocess.run(command, check=True, capture_output=True)
    return out


@pytest.mark.grid(3)
@pytest.mark.parametrize("architecture", [*SEEING[:2], SEEING[3]])
def test_it_has_the_converters_bytes_beside_each_format(tmp_path, architecture):
    model = make_projected(tmp_path / "model", architecture)
    ours = beside(model, tmp_path / "ours", "q4_0", "f16", projector="f16")
    theirs = converted(model, tmp_path / "theirs", "demo")

    for files in ours.values():
        assert [path.name for path in files] == ["demo.gguf", "mmproj-demo.gguf"]
        assert same(files[1:], [theirs])


def make_adapter(base: Path, folder: Path) -> Path:
    """Write an adapter that changes what the model reads, and what it sees."""
    network = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(network, LoraConfig(r=4, target_modules=r".*\.(q_proj|qkv)"))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    tuned.save_pretrained(folder)
    return folder


def merged_by_peft(base: Path, adapter: Path, folder: Path) -> Path:
    """Let PEFT merge in float64; each tensor then gets its name and type in the base."""
    shutil.copytree(base, folder)
    network = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float64)
    before = {name: data.clone() for name, data in network.state_dict().items()}
    after = PeftModel.from_pretrained(network, adapter).merge_and_unload().state_dict()
    changed = {name for name, data in after.items() if not torch.equal(data, before[name])}
    assert any("vis" in name for name in changed)
    assert any(f"{part}_model" in name for name in changed for part in ("language", "text"))
    tensors = load_file(base / "model.safetensors")
    for name in changed:
        same_values = [key for key, data in tensors.items() if data.shape == before[name].shape
                       and torch.equal(data.double(), before[name])]  # fmt: skip
        (key,) = same_values
        tensors[key] = after[name].to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.full  # test_picture_builds.py asks of pictures
@pytest.mark.parametrize("architecture", [SEEING[0], *SEEING[2:]])
def test_a_build_serves_pictures_with_the_merged_tower(tmp_path, architecture):
    """The started server gets a picture, and the adapter's changes are in what it sees with."""
    base = make_projected(tmp_path / "base", architecture)
    adapter = make_adapter(base, tmp_path / "adapter")
    recipe = {
        "name": "eyes", "version": "1.0.0", "base": {"source": "./base"},
        "adapters": [{"source": "./adapter"}], "targets": ["llamacpp-q8_0"],
        "serve": {"max_model_len": 512, "max_num_seqs": 2, "memory": "2GB"},
        "image": {"repository": "localhost/eyes"},
        "quality": {"gate": False}, "validate": {"enabled": False},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    weightsmith("build", "--recipe", tmp_path / "recipe.yaml", "--runner", "local",
                "--dist", tmp_path / "dist", "--layout", tmp_path / "image",
                store=tmp_path / "store")  # fmt: skip

    record = json.loads((tmp_path / "dist/eyes/1.0.0/llamacpp-q8_0/build.json").read_text())
    seen = {check["name"]: check["seen"] for check in record["checks"]}
    assert seen["picture"] == "answered"
    assert seen["SIGTERM"].endswith("and a request was answered")
    assert record["image"]["takes_pictures"]
    names = [file["path"] for file in record["artifact"]["files"]]
    assert names == ["eyes.gguf", "mmproj-eyes.gguf"]
    image = read_layout(tmp_path / "image")
    assert "LLAMA_ARG_MMPROJ=/models/mmproj-eyes.gguf" in image.config["Env"]
    (layer,) = [one for one in image.layers if one.file.endswith("mmproj-eyes.gguf")]
    packed = b"".join(layer.open())

    merged = merged_by_peft(base, adapter, tmp_path / "merged")
    theirs = converted(merged, tmp_path / "theirs", "eyes",
                       base_models=[{"name": "base"}])  # fmt: skip
    plain = converted(base, tmp_path / "plain", "eyes", base_models=[{"name": "base"}])
    assert theirs.read_bytes() in packed
    changed = [
        a.name for a, b in zip(tensors_of(theirs), tensors_of(plain), strict=True)
        if a.data.tobytes() != b.data.tobytes()
    ]  # fmt: skip
    assert changed
    assert plain.read_bytes() not in packed


def tensors_of(path: Path) -> list:
    return GGUFReader(path).tensors


@pytest.mark.full
def test_a_file_and_its_projector_are_written_and_baked_side_by_side(tmp_path):
    model = make_projected(tmp_path / "model", SEEING[0])
    store, out = tmp_path / "store", tmp_path / "eyes.gguf"
    words = ("quantize", "--model", model, "--format", "q8_0", "--out", out, "--no-gate",
             "--runner", "local")  # fmt: skip
    made = weightsmith(*words, store=store)
    projector = tmp_path / "mmproj-eyes.gguf"

    assert made["files"] == [str(out), str(projector)]
    assert projector.is_file()
    assert made["details"]["projector"]["file"] == projector.name
    assert not [text for text in made["details"]["warnings"] if "images" in text]
    weightsmith("bake", "--model", out, "--target", "llamacpp-q8_0", "--kind", "ollama",
                "--layout", tmp_path / "ollama", store=store)  # fmt: skip
    kinds = [layer.media_type.rpartition(".")[2]
             for layer in read_layout(tmp_path / "ollama").layers]  # fmt: skip
    assert kinds[:2] == ["model", "projector"]
    weightsmith("bake", "--model", out, "--target", "llamacpp-q8_0", "--kind", "modelpack",
                "--layout", tmp_path / "pack", store=store)  # fmt: skip
    pack = read_layout(tmp_path / "pack")
    assert [layer.file for layer in pack.layers] == ["eyes.gguf", "mmproj-eyes.gguf"]
    assert pack.settings["config"]["capabilities"]["inputTypes"] == ["text", "image"]

    projector.touch()
    out.unlink()
    done = subprocess.run(
        [sys.executable, "-m", "weightsmith.cli.program", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"{projector} exists already" in done.stderr
    assert not out.exists()
