"""What the tests of several quantizers share."""

from pathlib import Path

import pytest
from weightsmith.quantizers import formats
from weightsmith.quantizers.architectures import EXPERTS, FURTHER_EXPERTS, NAMED, SEEING
from weightsmith.quantizers.quantizer import QuantizeRequest

from tests.fakes.configs import facts
from tests.fakes.decoders import make_dense, make_known, make_sparse
from tests.fakes.seeing import make_seeing


def request(tmp_path, name="q8_0", **options):
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


@pytest.fixture
def out(tmp_path):
    """A folder to write to."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def make_any(folder, architecture, **sizes):
    """Make a small model of any architecture that a packed format can have."""
    if architecture in NAMED | FURTHER_EXPERTS:
        return make_known(folder, architecture)
    if architecture in SEEING:
        return make_seeing(folder, architecture)
    if architecture in EXPERTS:
        return make_sparse(folder, architecture)
    return make_dense(folder, architecture, **sizes)


def model_of(architecture, **more):
    """What config.json says of a model of even dimensions."""
    return facts({
        "architectures": [architecture], "hidden_size": 512, "intermediate_size": 1024,
        "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 100, **more,
    })  # fmt: skip


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
