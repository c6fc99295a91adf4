"""Which GGUF files are the model, and which is its projector."""

import pytest
from weightsmith.checkpoints.gguf_names import gguf_models, projector_of


@pytest.mark.parametrize(
    ("models", "projector", "others"),
    [
        (["bot.gguf"], "", ["config.json", "LICENSE"]),
        (["bot.gguf"], "mmproj-bot.gguf", ["LICENSE"]),
        (["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"], "mmproj-a.gguf", []),
        (["adapters/a.gguf", "bot.gguf"], "mmproj-bot.gguf", []),
        (["bot-Q4_K_M.gguf"], "mmproj-model-f16.gguf", []),  # as published elsewhere
        (["mmproj-bot.gguf"], "", []),  # a model of that name
        (["mmproj-bot.gguf"], "mmproj-mmproj-bot.gguf", []),
        (["bot.gguf", "mmproj-1.gguf", "mmproj-2.gguf"], "", []),
        ([], "", ["model.safetensors"]),
    ],
)
def test_a_projector_is_named_after_its_model(models, projector, others):
    names = [*([projector] if projector else []), *reversed(models), *others]

    assert projector_of(names) == projector
    assert gguf_models(names) == sorted(models)
