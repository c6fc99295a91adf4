import pytest
from weightsmith.core.errors import UsageError
from weightsmith.quantizers import formats
from weightsmith.serving import engines
from weightsmith.serving.targets import find, targets


def test_engines_are_found_by_listing_the_folder():
    assert "llamacpp" in engines()
    assert all(name == engine.name for name, engine in engines().items())


def test_every_engine_meets_every_format_it_loads():
    known = targets(formats().values())

    assert {"llamacpp-f16", "llamacpp-q8_0", "llamacpp-q5_k_m", "llamacpp-q4_k_m"} <= set(known)
    assert all(target.format.kind in target.engine.accepts for target in known.values())


def test_an_engine_without_safetensors_has_no_bare_target():
    assert "llamacpp" not in targets(formats().values())


def test_an_unknown_target_gets_near_misses_and_the_list():
    known = targets(formats().values())

    with pytest.raises(UsageError) as caught:
        find("llamacpp-q4km", known)

    assert "llamacpp-q4_k_m" in caught.value.hint
    assert "llamacpp-f16" in caught.value.hint
    assert caught.value.exit_code == 2
