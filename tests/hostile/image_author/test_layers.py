"""Layers that unfold, and headers before headers."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from weightsmith.api.commands.verify import _read_layer
from weightsmith.core.errors import InputRefused
from weightsmith.oci.layers import Layer
from weightsmith.oci.streams import entries
from weightsmith.oci.unpack import unpack

from tests.fakes.images import entry, foreign_image, tar_of


def tar_with(*headers: bytes) -> bytes:
    """Return a tar of headers and content as given, which no writer would write."""
    return b"".join(headers) + bytes(1024)


def pax(kind: bytes = tarfile.XHDTYPE, **facts: str) -> bytes:
    """Return an extended header that says these things of the next entry."""
    return tarfile.TarInfo._create_pax_generic_header(facts, kind, "utf-8")  # type: ignore[attr-defined]


def layers_of(data: bytes, packed: bool = False) -> Layer:
    return foreign_image(data, packed=packed).layers[0]


HEADERS = {
    "2,000 extended headers": pax(comment="x") * 2000 + entry("a").tobuf(),
    "2,000 long names": (entry("././@LongLink", tarfile.GNUTYPE_LONGNAME).tobuf()) * 2000,
    "2,000 global headers": pax(tarfile.XGLTYPE, comment="x") * 2000,
    "a size below nothing": pax(size="-1024") + entry("a").tobuf(),
    "an old sparse file of 4 TiB": entry("a", tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT),
    "a sparse file of 4 TiB": pax(
        **{"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,0"}
        | {"GNU.sparse.size": str(4 << 40), "GNU.sparse.numblocks": "1"}
    )
    + entry("a").tobuf(),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_unfold_are_refused(tmp_path: Path, case: str) -> None:
    """Half a kilobyte is a file of terabytes, or a thousand headers stand before one file."""
    layer = tar_with(HEADERS[case])
    with pytest.raises(InputRefused):
        unpack(foreign_image(layer, packed=False), tmp_path / "work" / "root")
    with pytest.raises(InputRefused):
        list(entries(layers_of(layer)))
    fault, _ = _read_layer(layers_of(layer), "x", look_inside=True)
    assert fault, "verify finds it, too"


@pytest.mark.slow
def test_a_layer_that_unfolds_into_gigabytes_is_refused(tmp_path: Path) -> None:
    """300 kB of gzip hold 300 MB of zeros: refused, and what was written is deleted."""
    layer = tar_of((entry("zeros"), bytes(300 << 20)))
    image = foreign_image(layer)
    with pytest.raises(InputRefused, match=str(image.layers[0].size)):
        unpack(image, tmp_path / "work" / "root")
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("again", ["models/a", "./models/a", "models/x/../a"])
def test_weights_that_are_there_twice_do_not_verify(again: str) -> None:
    """The layer has a file that is right, and after it another that an engine would read."""
    layer = tar_of((entry("models/a"), b"right"), (entry(again), b"other"))
    fault, _ = _read_layer(layers_of(layer), "x", look_inside=True)
    assert "models/a" in fault
