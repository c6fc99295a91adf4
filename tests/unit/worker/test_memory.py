"""Memory that runs out is an error of its own, whoever notices it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from weightsmith.core.errors import ran_out_of_memory
from weightsmith.quantizers.quantizer import BuilderCommand
from weightsmith.worker.steps import run_steps


def test_torch_says_it_with_an_error_of_its_own() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)

    assert ran_out_of_memory(caught.value)
    assert ran_out_of_memory(MemoryError())
    assert not ran_out_of_memory(RuntimeError("the logits are not finite"))


@pytest.mark.parametrize(
    "code",
    [
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import sys; sys.exit(\"terminate called after throwing 'std::bad_alloc'\")",
        "b'x' * (1 << 62)",
    ],
)
def test_a_program_that_lacked_memory_is_not_an_input_that_cannot_be_read(
    tmp_path: Path, code: str
) -> None:
    argv = (sys.executable, "-c", code)
    step = BuilderCommand(title="converting", argv=argv, env={}, reads="the model")

    with pytest.raises(MemoryError, match="converting"):
        run_steps((step,), tmp_path, lambda *_: None)
