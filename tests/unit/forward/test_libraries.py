import subprocess
import sys

import pytest

from tests.paths import ROOT

TINY = ROOT / "examples" / "tiny" / "base"

SCRIPT = """
import sys
from weightsmith.forward.libraries import import_for_good, load_torch_and_transformers
if "beside" in sys.argv:
    load_torch_and_transformers()
    assert "torch" not in sys.modules
import_for_good("peft")
left_out = {"torch._dynamo", "torch.distributed.tensor"} & sys.modules.keys()
assert not left_out, left_out

import torch
from pathlib import Path
from transformers import MistralConfig, MistralForCausalLM
from weightsmith.forward.network import skeleton
skeleton(Path(sys.argv[1]))
from transformers.masking_utils import TransformGetItemToIndex
small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=8)
heads = dict(num_attention_heads=2, num_key_value_heads=1)
model = MistralForCausalLM(MistralConfig(**small, **heads, sliding_window=4))
model.generate(torch.tensor([[1, 2, 3, 4, 5, 6]]), max_new_tokens=2, do_sample=False)
left_out = {"torch._dynamo", "torch.distributed.tensor"} & sys.modules.keys()
assert not left_out, left_out

with TransformGetItemToIndex():
    pass
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex as own
assert isinstance(TransformGetItemToIndex(), own)
import torch._dynamo
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
assert torch.distributed.is_available()
"""


@pytest.mark.full  # the compiler takes ten seconds to import
@pytest.mark.parametrize("words", [["beside"], []])
def test_the_compiler_is_imported_only_by_who_uses_it(words):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, TINY, *words], check=False, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr


@pytest.mark.full  # the script above imports it too, and uses it
def test_a_library_that_needs_the_compiler_gets_it(tmp_path):
    (tmp_path / "compiling.py").write_text("from torch._dynamo.utils import counters")
    script = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from weightsmith.forward.libraries import import_for_good
import_for_good("compiling")
assert hasattr(sys.modules["torch._dynamo"].utils, "counters")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
