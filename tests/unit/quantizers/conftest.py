"""What the tests of several quantizers share."""

from pathlib import Path

from weightsmith.quantizers import formats
from weightsmith.quantizers.quantizer import QuantizeRequest


def request(tmp_path: Path, name: str = "q8_0", **options) -> QuantizeRequest:
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "out").mkdir(exist_ok=True)
    return QuantizeRequest(
        model=tmp_path / "model",
        format=formats()[name],
        output=tmp_path / "out",
        name="demo",
        tools=Path("/opt/llamacpp"),
        python="/usr/bin/python3",
        options=options,
    )
