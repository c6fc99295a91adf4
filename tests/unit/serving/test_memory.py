import pytest
from weightsmith.core.errors import UsageError
from weightsmith.serving.memory import human, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("512M", 512 * 10**6),
        ("512Mi", 512 * 2**20),
        (" 1.5 GiB ", 3 * 2**29),
        ("1024", 1024),
        ("2tib", 2 * 2**40),
    ],
)
def test_parses_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-1GB", "1e9", "24 PB", "GiB", "1,5GB", "9" * 400])
def test_refuses_what_is_no_size(text):
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


def test_sizes_for_people():
    assert [human(n) for n in (12, 2048, 3 * 2**29)] == ["12 B", "2.0 KiB", "1.5 GiB"]
