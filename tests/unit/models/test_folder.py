"""Folders: what belongs to a model, and what must not be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from weightsmith.api.commands.render import open_model
from weightsmith.core.errors import InputRefused
from weightsmith.models.folder import check_adapter_folder, check_model_folder, scan


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")


def refusal(function: Any, root: Path) -> InputRefused:
    with pytest.raises(InputRefused) as caught:
        function(root)
    assert caught.value.exit_code == 3
    return caught.value


MODEL = ("config.json", "model.safetensors", "tokenizer.json")


def test_keeps_what_belongs_to_a_model(tmp_path):
    touch(tmp_path, *MODEL, "LICENSE", "sub/notes.txt", "chat_template.jinja")
    touch(tmp_path, ".git/config", ".cache/x", "sub/.hidden", "checkpoint-50/config.json")
    touch(tmp_path, "modeling_x.py", "consolidated.00.pth", "model.gguf", "training_args.bin")
    touch(tmp_path, "original/model.safetensors", "original/config.json", "metal/model.safetensors")
    touch(tmp_path, "optimizer.pt", "rng_state.pth", "pytorch_model.bin", "runs/events", "x.so")
    (tmp_path / "vocab.json").symlink_to("tokenizer.json")

    more = ["LICENSE", "sub/notes.txt", "chat_template.jinja", "vocab.json"]
    assert scan(tmp_path) == sorted([*MODEL, *more])
    assert check_model_folder(tmp_path) == scan(tmp_path)


def test_links_within_the_hub_cache_are_followed(tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for number, name in enumerate(MODEL):
        touch(tmp_path, f"models--org--name/blobs/{number}")
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    (tmp_path / "alias").symlink_to(snapshot)

    assert check_model_folder(snapshot) == sorted(MODEL)
    assert scan(tmp_path / "alias") == sorted(MODEL)

    touch(tmp_path, "models--org--name2/blobs/9")  # another model of the cache
    (snapshot / "LICENSE").symlink_to("../../../models--org--name2/blobs/9")

    assert "outside the folder" in refusal(scan, snapshot).message


@pytest.mark.parametrize("target", ["/etc/passwd", "../outside", "gone", "loop", "sub"])
def test_other_links_are_refused(target, tmp_path):
    root = tmp_path / "model"
    touch(root, *MODEL, "sub/file")
    touch(tmp_path, "outside")
    (root / "loop").symlink_to(target)

    assert str(root / "loop") in refusal(scan, root).message


def test_pipes_and_sockets_are_refused(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")

    assert "not a regular file" in refusal(scan, tmp_path).message


@pytest.mark.parametrize("name", [b"a\nb", b"a\x1b[2J", b"caf\xe9", b"a\\b", "a\u202eb".encode()])
def test_hostile_names_are_refused(name, tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_text("x")

    message = refusal(scan, tmp_path).message
    assert "invalid name" in message
    assert message.isprintable()


def test_a_folder_is_refused_whose_path_is_no_text(tmp_path):
    """A job is told the paths of its inputs, so it would be refused after the downloads."""
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")) / "model"
    touch(root, *MODEL)

    message = refusal(scan, root).message
    assert "not valid UTF-8" in message
    assert message.isprintable()


@pytest.mark.parametrize("names", [("README.md", "readme.md"), ("é", "e\u0301"), ("A/x", "a/x")])
def test_names_that_collide_elsewhere_are_refused(names, tmp_path):
    touch(tmp_path, *names)

    assert "differ only in case" in refusal(scan, tmp_path).message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "m.pt"])
def test_pickles_alone_are_refused_with_a_way_out(name, tmp_path):
    touch(tmp_path, "config.json", name)

    error = refusal(check_model_folder, tmp_path)
    assert name in error.message
    assert "can run code" in error.message
    assert "save_file" in error.hint


@pytest.mark.slow
def test_the_conversion_in_the_hint_works(tmp_path):
    import torch
    from weightsmith.models.safetensors import read_header

    touch(tmp_path, "adapter_config.json")
    torch.save({"a.lora_A.weight": torch.ones(2, 3)}, tmp_path / "adapter_model.bin")
    hint = refusal(check_adapter_folder, tmp_path).hint
    code = hint.split('"')[1]

    names = ("adapter_model.bin", "adapter_model.safetensors")
    subprocess.run([sys.executable, "-c", code, *names], cwd=tmp_path, check=True)

    assert check_adapter_folder(tmp_path) == ["adapter_config.json", "adapter_model.safetensors"]
    assert read_header(tmp_path / "adapter_model.safetensors").tensors[0].shape == (2, 3)


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "generation_config.json", "preprocessor_config.json",
        "processor_config.json", "tokenizer_config.json", "video_preprocessor_config.json",
    ],
)  # fmt: skip
def test_code_of_its_own_is_refused(name, tmp_path):
    touch(tmp_path, *MODEL)
    (tmp_path / name).write_text(json.dumps({"auto_map": {"AutoModel": "modeling_x.X"}}))

    error = refusal(check_model_folder, tmp_path)

    assert name in error.message
    assert "auto_map" in error.message


@pytest.mark.parametrize("check", [check_model_folder, check_adapter_folder])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("chat_template.jinja", "{{ ''.__class__.__mro__ }}"),
        ("additional_chat_templates/tools.jinja", r"{{ ''['\x5f\x5fclass\x5f\x5f'] }}"),
        ("chat_template.json", {"chat_template": "{{ messages|attr('__init__') }}"}),
        ("tokenizer_config.json", {"chat_template": [{"name": "a", "template": "{{ a.__b__ }}"}]}),
        ("tokenizer_config.json", {"chat_template": r"{{ a['\u005f\u005fb'] }}"}),
    ],
)
def test_a_template_that_reaches_into_python_is_refused(check, name, text, tmp_path):
    """SGLang rendered such templates without a sandbox (CVE-2026-5760)."""
    touch(tmp_path, *MODEL, "adapter_config.json", "adapter_model.safetensors", name)
    (tmp_path / name).write_text(text if isinstance(text, str) else json.dumps(text))

    error = refusal(check, tmp_path)

    assert name in error.message
    assert "chat template" in error.message


def test_a_template_with_underscores_of_its_own_is_read(tmp_path):
    touch(tmp_path, *MODEL)
    (tmp_path / "chat_template.jinja").write_text("{% set _ns = x__y %}__ {{ loop_ }}")

    assert "chat_template.jinja" in check_model_folder(tmp_path)


@pytest.mark.parametrize(
    ("function", "names", "said"),
    [
        (check_model_folder, ("model.safetensors",), "has no config.json"),
        (check_model_folder, ("config.json",), "has no weights"),
        (check_adapter_folder, ("adapter_model.safetensors",), "has no adapter_config.json"),
        (check_adapter_folder, ("adapter_config.json",), "has no weights"),
    ],
)
def test_incomplete_folders_are_refused(function, names, said, tmp_path):
    touch(tmp_path, *names)

    assert said in refusal(function, tmp_path).message


_KOHYA = {"lora_te_text_model_q_proj.lora_down.weight": np.ones((2, 4), np.float32)}


@pytest.mark.parametrize(
    ("files", "config", "what", "hint"),
    [
        (["0000100_adapters.safetensors"], {"fine_tune_type": "lora"}, "mlx-lm", "mlx_lm.fuse"),
        (["lit_model.pth.lora", "model_config.yaml"], None, "LitGPT", "litgpt merge_lora"),
        (["support.nemo"], None, "NeMo 1", "convert_nemo_to_canonical.py"),
        (["weights/adapter_metadata.json"], None, "NeMo 2", "export_lora"),
        (["lora.safetensors", "params.json"], None, "mistral-finetune", "utils.merge_lora"),
        (["pytorch_lora_weights.safetensors"], None, "diffusers", "fuse_lora"),
        (["my_style.safetensors"], None, "Kohya's format", "fuse_lora"),
        (
            ["pytorch_adapter.bin"],
            {"config": {"architecture": "lora"}, "model_type": "bert"},
            "AdapterHub",
            "merge_adapter",
        ),
        (["adapter_model-00001-of-00002.safetensors"], {"peft_type": "LORA"}, "several", "join"),
        (["__0_0.distcp"], None, "FSDP", "FULL_STATE_DICT"),
        (["global_step9/zero_pp_rank_0_model_states.pt"], None, "DeepSpeed", "gather"),
    ],
)
def test_an_adapter_of_another_tool_is_named_as_such(files, config, what, hint, tmp_path):
    for name in files:
        touch((tmp_path / name).parent, (tmp_path / name).name)
        if name == "my_style.safetensors":
            save_file(_KOHYA, tmp_path / name)
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))

    refused = refusal(check_adapter_folder, tmp_path)

    assert what in refused.message
    assert hint in refused.hint


def test_adapters_in_folders_of_their_own_are_named(tmp_path):
    for name in ("style", "tone"):
        touch(tmp_path / name, "adapter_config.json", "adapter_model.safetensors")

    hint = refusal(check_adapter_folder, tmp_path).hint
    assert hint.endswith(f": {tmp_path / 'style'} or {tmp_path / 'tone'}")


def test_the_last_checkpoint_of_a_training_is_named(tmp_path):
    """What transformers' Trainer leaves in its output folder, if the result was not saved there."""
    (tmp_path / "runs").mkdir()
    for name in ("checkpoint-9", "checkpoint-40"):
        touch(tmp_path / name, "adapter_config.json", "adapter_model.safetensors")
    touch(tmp_path / "checkpoint-100", "config.json", "model.safetensors")

    assert refusal(check_adapter_folder, tmp_path).hint.endswith(f": {tmp_path / 'checkpoint-40'}")
    assert refusal(check_model_folder, tmp_path).hint.endswith(f": {tmp_path / 'checkpoint-100'}")


def test_shards_may_have_any_name(tmp_path):
    """The index names them, and transformers reads what it names."""
    touch(tmp_path, "config.json", "model.safetensors.index.json", "part one.safetensors")

    assert "part one.safetensors" in check_model_folder(tmp_path)


def test_config_must_be_json_in_a_folder(tmp_path):
    touch(tmp_path, *MODEL)
    (tmp_path / "config.json").write_text("{")

    assert "holds no valid JSON" in refusal(check_model_folder, tmp_path).message
    assert "is not a folder" in refusal(scan, tmp_path / "config.json").message


@pytest.mark.parametrize("read", [check_model_folder, open_model])
def test_a_source_of_recipes_is_no_folder(read):
    """`Path` takes the second slash from it."""
    with pytest.raises(InputRefused, match="hf://org/name is not a folder") as caught:
        read(Path("hf://org/name"))
    assert "download it first" in caught.value.hint
