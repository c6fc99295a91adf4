"""Which GGUF files are the model, and which is its projector."""

import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.models.folder import scan
from weightsmith.models.gguf_names import files_with, gguf_models, projector_of


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


@pytest.mark.parametrize("name", ["bot-00002-of-00002.gguf", "mmproj-bot.gguf"])
def test_a_file_beside_the_model_may_not_be_a_link_out_of_the_folder(tmp_path, name):
    folder, secret = tmp_path / "model", tmp_path / "secret"
    folder.mkdir()
    secret.write_text("not for an image")
    for own in ("bot-00001-of-00002.gguf", "bot-00002-of-00002.gguf"):
        (folder / own).write_bytes(b"GGUF")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)

    with pytest.raises(InputRefused, match=f"{name} is a link to a file outside the folder"):
        files_with(folder / "bot-00001-of-00002.gguf")


def test_links_inside_a_hubs_cache_are_followed(tmp_path):
    """Repositories of GGUF files often have a folder for each type."""
    home = tmp_path / "models--org--bot"
    folder = home / "snapshots" / "abc" / "Q4_K_M"
    folder.mkdir(parents=True)
    (home / "blobs").mkdir()
    names = ("bot-00001-of-00002.gguf", "bot-00002-of-00002.gguf", "mmproj-bot.gguf")
    for name in names:
        (home / "blobs" / name).write_bytes(b"GGUF")
        (folder / name).symlink_to(home / "blobs" / name)

    assert files_with(folder / names[0]) == names
    assert scan(folder, gguf=True) == [*names]
