"""Comparing files: what differs from the base in its spelling only is no finding."""

import json
import shutil

import pytest
from weightsmith.validating.structure import compare_files

from tests.paths import ROOT

BASE = ROOT / "examples" / "tiny" / "base"


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        (10000, 10000.0, True),  # as transformers writes it again
        (float("nan"), float("nan"), True),
        (10000, 10000.5, False),
        (float("nan"), 1.0, False),
    ],
)
def test_a_number_of_config_json(tmp_path, before, after, same):
    for name, value in (("base", before), ("merged", after)):
        shutil.copytree(BASE, tmp_path / name)
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": value}))

    found = compare_files(tmp_path / "base", (), tmp_path / "merged")

    assert any("rope_theta" in each.message for each in found) != same


def test_a_layer_with_a_heads_name_is_not_compared_with_the_embedding(tmp_path):
    """Vision towers have layers called `attention.output`."""
    import torch
    from safetensors.torch import save_file

    words, other = torch.ones(8, 4), torch.zeros(4, 4)
    name = "vision_model.encoder.layer.0.attention.output.weight"
    config = {"model_type": "kosmos-2.5", "tie_word_embeddings": True}
    for folder in (tmp_path / "base", tmp_path / "merged"):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {"text_model.model.embed_tokens.weight": words, name: other}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    assert compare_files(tmp_path / "base", (), tmp_path / "merged") == []

    save_file(tensors | {name: torch.zeros(8, 4)}, folder / "model.safetensors", {"format": "pt"})
    messages = [found.message for found in compare_files(tmp_path / "base", (), folder)]
    assert any("ties the head" in message for message in messages)


@pytest.mark.parametrize("spoiled", ["", "values", "labels", "task"])
def test_a_head_that_an_adapter_brings_is_the_adapters(tmp_path, spoiled):
    import torch
    from safetensors.torch import save_file

    base, merged, adapter = (tmp_path / name for name in ("base", "merged", "adapter"))
    words, head = {"embeddings.weight": torch.ones(8, 4)}, torch.rand(3, 4)
    labels = {str(n): f"LABEL_{n}" for n in range(2 if spoiled == "labels" else 3)}
    config = {"model_type": "bert", "architectures": ["BertModel"]}
    task = {"task_type": "CAUSAL_LM" if spoiled == "task" else "SEQ_CLS"}
    for folder, more in ((base, {}), (merged, {"id2label": labels}), (adapter, {})):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | more))
    (adapter / "adapter_config.json").write_text(json.dumps(task))
    key = "base_model.model.classifier.weight"
    save_file({key: head}, adapter / "adapter_model.safetensors", {"format": "pt"})
    save_file(words, base / "model.safetensors", {"format": "pt"})
    found = head + 1 if spoiled == "values" else head
    whole = words | {"classifier.weight": found}
    save_file(whole, merged / "model.safetensors", {"format": "pt"})

    messages = [one.message for one in compare_files(base, (adapter,), merged)]

    expected = {
        "": [],
        "values": ["classifier.weight is not the adapter's"],
        "labels": ["config.json names 2 labels, and the head has 3"],
    }
    if spoiled == "task":
        assert "tensor classifier.weight is not in the base" in messages
    else:
        assert messages == expected[spoiled]
