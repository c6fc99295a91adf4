"""A model that sees is for text alone only if its tower cannot be read and that is allowed."""

import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.quantizers import convert


@pytest.fixture
def written(tmp_path):
    """Run a converter that ends with an error; return what is left of the projector."""

    def write(error: str, allow_text_only: bool = True) -> list[str]:
        converter = tmp_path / "convert.py"
        converter.write_text(
            "import pathlib, sys\n"
            "pathlib.Path(sys.argv[sys.argv.index('--outfile') + 1]).write_text('half')\n"
            f"raise {error}\n"
        )
        place = tmp_path / "mmproj-demo.gguf"
        convert._write_projector(converter, tmp_path, [], [place], allow_text_only=allow_text_only)
        return [path.name for path in tmp_path.glob("*.gguf")]

    return write


@pytest.mark.parametrize("error", ["ValueError('no such tower')", "SystemExit(1)"])
def test_without_a_way_to_convert_it_there_is_no_projector(written, error, tmp_path):
    assert written(error) == []
    with pytest.raises(InputRefused, match="cannot convert the vision tower") as caught:
        written(error, allow_text_only=False)
    assert "quantize.allow_text_only" in caught.value.hint
    assert list(tmp_path.glob("*.gguf")) == []


@pytest.mark.parametrize(
    "error",
    [
        "RuntimeError('[enforce fail] DefaultCPUAllocator: can\\'t allocate memory')",
        "MemoryError()",
        "OSError(28, 'No space left on device')",
    ],
)
def test_a_lack_of_memory_or_disk_is_no_such_reason(written, error):
    """Else a file without a projector would be stored, and found again on a larger machine."""
    with pytest.raises((RuntimeError, MemoryError, OSError)):
        written(error)


def test_a_stored_projector_is_not_written_again(written, tmp_path):
    """All formats of a pass share one; a killed run may have stored only some of them."""
    stored = tmp_path / "stored"
    stored.write_text("whole")
    (tmp_path / "mmproj-demo.gguf").hardlink_to(stored)

    written("ValueError('no such tower')")

    assert stored.read_text() == "whole"


def test_a_model_without_a_tokenizer_is_refused_by_name(tmp_path):
    """transformers' own error has several lines, and none of them says what is missing."""
    converter = tmp_path / "convert.py"
    converter.write_text("raise ValueError('Couldn\\'t instantiate:\\n(1) a file\\n(2) another')\n")
    (tmp_path / "tokenizer_config.json").write_text("{}")

    with pytest.raises(InputRefused, match=f"{tmp_path} has no tokenizer"):
        convert._convert_text(converter, tmp_path, [])


def test_a_failure_beside_a_tokenizer_is_the_converters_own(tmp_path):
    converter = tmp_path / "convert.py"
    converter.write_text("raise ValueError('no such architecture')\n")
    (tmp_path / "tokenizer.json").write_text("{}")

    with pytest.raises(ValueError, match="no such architecture"):
        convert._convert_text(converter, tmp_path, [])
