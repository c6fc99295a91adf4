import pytest
from weightsmith.core.errors import UsageError
from weightsmith.quantizers import formats, of_format, quantizers


def test_quantizers_are_found_by_listing_the_folder():
    assert "gguf" in quantizers()
    assert all(name == quantizer.name for name, quantizer in quantizers().items())


def test_every_format_has_one_maker():
    names = [format_.name for q in quantizers().values() for format_ in q.formats]

    assert len(names) == len(set(names)) == len(formats())
    assert of_format("q4_k_m").name == "gguf"


def test_an_unknown_format_gets_near_misses_and_the_list():
    with pytest.raises(UsageError, match="unknown format") as caught:
        of_format("Q4_KM")

    assert "q4_k_m" in caught.value.hint
    assert "f16" in caught.value.hint
