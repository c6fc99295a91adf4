"""Whole merges of tiny real architectures, and the files beside the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.merging import engine
from weightsmith.merging.engine import MergeRequest, merge
from weightsmith.validating.probes import expected_tokenizer

from tests.paths import ROOT
from tests.unit.merging.oracle import merged, run, unmerged


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_weighted_adapters_are_one_sum(make_model: Any, make_adapter: Any) -> None:
    base = make_model()
    adapters = [
        (make_adapter(base, "one"), 0.7),
        (make_adapter(base, "two", seed=2, r=8, target_modules=["q_proj", "up_proj"]), -0.3),
    ]

    run(base, adapters, base.parent / "out", method="linear")

    got, wanted = merged(base.parent / "out", "llama"), unmerged(base, "llama", adapters)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_what_is_written_is_told_and_untouched_tensors_keep_bytes_names_types_and_order(
    make_model: Any, make_adapter: Any
) -> None:
    base = make_model(dtype=torch.bfloat16, shard="20KB")
    adapter, out = make_adapter(base, target_modules=["q_proj"]), base.parent / "out"

    result = run(base, adapter, out)

    before, after = tensors(base), tensors(out)
    assert result["tensors"] == {"merged": 2, "copied": len(before) - 2, "replaced": 0}
    for shard in result["shards"]:
        name = shard["file"]
        with safe_open(base / name, "pt") as old, safe_open(out / name, "pt") as new:
            assert new.metadata() == {"format": "pt"}
            assert old.offset_keys() == new.offset_keys()
    for name, tensor in before.items():
        same = torch.equal(tensor.view(torch.int16), after[name].view(torch.int16))
        assert tensor.dtype == after[name].dtype
        assert same == ("q_proj" not in name), name
    assert sorted(entry["path"] for entry in result["files"]) == names_in(out)
    for entry in result["files"]:
        data = (out / entry["path"]).read_bytes()
        assert (entry["size"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert (out / entry["path"]).stat().st_mode & 0o777 == 0o644
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(out).values())


@pytest.mark.parametrize("workers", [1, 3])
def test_bytes_do_not_depend_on_workers_or_blocks(
    workers: int, make_model: Any, make_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model(dtype=torch.bfloat16)
    adapter = make_adapter(base)
    first = run(base, adapter, base.parent / "one", workers=2)
    monkeypatch.setattr(engine, "BLOCK", 100)
    monkeypatch.setattr(engine, "PIECE", 40)

    second = run(base, adapter, base.parent / "two", workers=workers)

    assert first["files"] == second["files"]


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_casting_rounds_once_and_says_so_in_the_config(
    dtype: str, make_model: Any, make_adapter: Any
) -> None:
    base = make_model(dtype=torch.float32)
    adapter = make_adapter(base, target_modules=["q_proj"])

    run(base, adapter, base.parent / "out", dtype=dtype)

    wanted = getattr(torch, dtype)
    before, after = tensors(base), tensors(base.parent / "out")
    config = json.loads((base.parent / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == dtype
    for name, tensor in after.items():
        assert tensor.dtype == wanted
        if "q_proj" not in name:
            assert torch.equal(tensor, before[name].to(wanted))


def test_an_untrained_adapter_is_reported(
    make_model: Any, make_adapter: Any, rename: Callable[..., None]
) -> None:
    base = make_model()
    adapter = make_adapter(base)
    path = adapter / "adapter_model.safetensors"
    save_file({n: t * ("lora_A" in n) for n, t in load_file(path).items()}, path)

    result = run(base, adapter, base.parent / "out")

    assert "for 14 tensors" in result["findings"][0]
    assert all(torch.equal(t, tensors(base.parent / "out")[n]) for n, t in tensors(base).items())


def test_a_killed_merge_goes_on_at_the_unfinished_shard(
    make_model: Any, make_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model(shard="20KB", dtype=torch.bfloat16)
    adapter, out = make_adapter(base), base.parent / "out"
    file = adapter / "adapter_model.safetensors"
    # What is told of the factors that are zero, and of decisions, is told of finished shards too.
    tensors = load_file(file)
    kept = {n: t * (".0." not in n) if "lora_B" in n else t for n, t in tensors.items()}
    save_file(kept, file)
    whole = run(base, adapter, base.parent / "whole")
    write, written = engine.ShardMaker.write, []

    def stop_at_third(maker: Any, shard: Any, path: Path, progress: Any) -> Any:
        written.append(path.name)
        if len(written) == 3:
            (out / f".{path.name}.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        return write(maker, shard, path, progress)

    monkeypatch.setattr(engine.ShardMaker, "write", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        run(base, adapter, out)
    (out / written[0]).write_bytes(b"damaged meanwhile")
    resumed = run(base, adapter, out)

    assert whole["files"] == resumed["files"]
    assert whole["findings"] == resumed["findings"] != []
    assert whole["repairs"] == resumed["repairs"] != {"float64": 0, "exact": 0}
    assert written[1] not in written[3:]
    assert written[0] in written[3:]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_adapters_that_diverged_are_refused(
    value: float, make_model: Any, make_adapter: Any
) -> None:
    base = make_model()
    adapter = make_adapter(base)
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    key = next(name for name in weights if "lora_A" in name)
    weights[key][0, 0] = value
    save_file(weights, path)

    with pytest.raises(InputRefused, match=f"{key} has NaN") as caught:
        run(base, adapter, base.parent / "out")

    assert caught.value.exit_code == 3
    assert not list((base.parent / "out").glob("*.safetensors"))


def test_companions_follow_the_rules(
    make_model: Any, make_adapter: Any, edit: Callable[..., None]
) -> None:
    base = make_model()
    adapter = make_adapter(base, target_modules=["q_proj"])
    for name in ("consolidated.00.pth", "pytorch_model.bin", "x.gguf", "optimizer.pt", "run.py"):
        (base / name).write_bytes(b"x")
    (base / "LICENSE").write_text("free")
    (base / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"</s>": 2}}}))
    (base / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "</s>", "chat_template": "BASE"})
    )
    (adapter / "tokenizer.json").write_text(
        json.dumps({"added_tokens": [{"id": 7, "content": "<|im_end|>"}]})
    )
    (adapter / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))

    result = run(base, adapter, base.parent / "out")

    out = base.parent / "out"
    assert names_in(out) == [
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (out / "chat_template.jinja").read_text() == "BASE"
    assert (out / "tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 7]
    assert any("from [2] to [2, 7]" in finding for finding in result["findings"])


def test_no_adapter_copies_the_base_and_progress_counts_to_the_end(make_model: Any) -> None:
    base = make_model()
    seen: list[tuple[int, int]] = []

    merge(
        MergeRequest(base=base, adapters=(), out=base.parent / "out"),
        lambda done, total: seen.append((done, total)),
    )

    before, after = tensors(base), tensors(base.parent / "out")
    assert all(torch.equal(after.pop(name), tensor) for name, tensor in before.items())
    assert not after
    assert seen[-1][0] == seen[-1][1] == sum(t.nbytes for t in before.values())
    assert seen == sorted(seen)


def test_what_is_no_start_is_cleared_in_the_callers_own_folder_alone(
    make_model: Any, make_adapter: Any
) -> None:
    """Killed between the journal's end and the folder's renaming, a merge must begin again."""
    base = make_model()
    adapter, out = make_adapter(base), base.parent / "out"
    whole = run(base, adapter, out)

    with pytest.raises(UsageError, match=r"is not empty .* not belong to this merge"):
        run(base, adapter, out)
    with pytest.raises(UsageError, match="inside the input"):
        run(base, [], base / "out")
    again = run(base, adapter, out, own_out=True)

    assert whole["files"] == again["files"]


def test_an_adapters_generation_config_wins_with_the_ends_of_both(
    make_model: Any, make_adapter: Any
) -> None:
    base = make_model(eos_token_id=2)
    adapter = make_adapter(base, target_modules=["q_proj"])
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9], "top_k": 5}))
    (adapter / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 7, "temperature": 0.3})
    )

    run(base, adapter, base.parent / "out")

    told = json.loads((base.parent / "out" / "generation_config.json").read_text())
    assert told["temperature"] == 0.3
    assert "top_k" not in told
    assert set(told["eos_token_id"]) == {2, 7, 9}


TOKENIZER = ROOT / "examples" / "tiny" / "base" / "tokenizer.json"
TOOLS = {"default": "DEFAULT", "tool_use": "TOOLS"}
LISTED = {"chat_template": [{"name": name, "template": text} for name, text in TOOLS.items()]}
FILES = {
    "chat_template.jinja": "DEFAULT",
    "additional_chat_templates/tool_use.jinja": "TOOLS",
}
OTHER = {"chat_template.jinja": "OLD", "additional_chat_templates/rag.jinja": "OLD"}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("of_base", "of_adapter"),
    [
        ({"tokenizer_config.json": json.dumps(LISTED)}, {}),
        ({"tokenizer_config.json": json.dumps(LISTED)}, {"tokenizer_config.json": "{}"}),
        (FILES, {"tokenizer_config.json": "{}"}),
        (OTHER, {"tokenizer_config.json": json.dumps(LISTED)}),
        (OTHER, {"tokenizer_config.json": "{}"} | FILES),
        (OTHER, FILES),
    ],
    ids=["base", "tokenizer-alone", "files-of-base", "adapter", "files-of-adapter", "files-alone"],
)
def test_named_templates_stay_together(
    of_base: dict[str, str], of_adapter: dict[str, str], make_model: Any, make_adapter: Any
) -> None:
    """The judge is the loader of transformers; the validation expects the same."""
    from transformers import AutoTokenizer

    base = make_model()
    adapter = make_adapter(base)
    tokenizer = {"tokenizer.json": TOKENIZER.read_text()}
    write(base, tokenizer | {"tokenizer_config.json": "{}"} | of_base)
    write(adapter, (tokenizer if "tokenizer_config.json" in of_adapter else {}) | of_adapter)

    out = base.parent / "out"
    run(base, adapter, out)

    assert AutoTokenizer.from_pretrained(out).chat_template == TOOLS
    assert expected_tokenizer(base, [adapter]).chat_template == TOOLS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"eos_token": "</s>", "added_tokens_decoder": [1]}),
        ("tokenizer_config.json", {"eos_token": "</s>", "added_tokens_decoder": {"x": [], "y": 1}}),
        (
            "tokenizer_config.json",
            {"eos_token": "</s>", "added_tokens_decoder": {"two": {"content": "</s>"}}},
        ),
        ("tokenizer.json", {"added_tokens": None, "model": None}),
        ("tokenizer.json", {"added_tokens": ["x", {"content": "</s>", "id": "2"}], "model": []}),
    ],
)
def test_a_tokenizer_of_odd_values_is_copied(
    name: str, content: Any, make_model: Any, make_adapter: Any
) -> None:
    """Only its end token is asked for; whether it works is the validation's business."""
    base = make_model(eos_token_id=1)
    write(base, {"tokenizer.json": "{}", "tokenizer_config.json": '{"eos_token": "</s>"}'})
    write(base, {name: json.dumps(content)})

    run(base, make_adapter(base), base.parent / "out")

    assert json.loads((base.parent / "out" / name).read_text()) == content
