"""What a model card says of a model whose files say less."""

import json

import pytest
from weightsmith.models.model_card import card_denies_chat, front_matter

RERANKER = "---\nlicense: apache-2.0\npipeline_tag: text-ranking\n---\n# Qwen3-Reranker-0.6B\n"
MODULES = [{"type": "sentence_transformers.models.Transformer", "path": ""}]


def model(folder, card=RERANKER, architecture="Qwen3ForCausalLM", **files):
    files = {"config": {"architectures": [architecture]}, **files}
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "README.md").write_text(card)
    return folder


def test_a_reranker_that_nothing_but_its_card_names_is_told(tmp_path):
    made = model(tmp_path)
    said = card_denies_chat(made, made)

    assert said.startswith("its model card says text-ranking, but")
    assert "take a revision with that file" in said


@pytest.mark.parametrize(
    "changes",
    [
        {"card": RERANKER.replace("text-ranking", "text-generation")},
        {"card": RERANKER.replace("text-ranking", "[1]")},
        {"card": "# no front matter"},
        {"card": "---\n: [\n---\n"},
        {"architecture": "Qwen3ForSequenceClassification"},
        {"modules": MODULES},
        {"modules": "damaged"},
    ],
)
def test_nothing_is_said_where_the_files_agree_or_say_nothing(tmp_path, changes):
    made = model(tmp_path, **changes)
    assert card_denies_chat(made, made) == ""


def test_a_folder_without_a_card_says_nothing(tmp_path):
    assert front_matter(tmp_path) == {}
