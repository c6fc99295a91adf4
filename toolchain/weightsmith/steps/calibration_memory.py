"""How much memory a walk over calibration text takes."""

from __future__ import annotations

from weightsmith.core.errors import InputRefused
from weightsmith.evaluating.walks import LETTERS
from weightsmith.forward.memory import BATCH_TOKENS, START, UNKNOWN, token_bytes
from weightsmith.models.facts import ModelFacts
from weightsmith.quantizers.calibration import Texts
from weightsmith.quantizers.running import BLOCK

_COPIES = 3
"""Of a layer in float32 that is calibrated: itself, as it was, and a group of its matrices."""
_SQUARES = 12
"""Float32 numbers per pair of inputs while errors are compensated: two Gram matrices, and five in
float64 (`quantizers/layerwise/quantizing.py`)."""


def calibration_memory(model: ModelFacts, size: int, texts: Texts, *, compensated: bool) -> int:
    """Return the peak in bytes of a walk over calibration text, one decoder layer at a time.

    The sum of libraries, the states of all text, the layer in float32, and one batch's activations
    or what it takes to compensate errors, if that is more. `size` is the checkpoint's, in bytes.
    """
    try:
        shape, experts = model.shape, model.matrices.expert_width
    except InputRefused:
        return UNKNOWN
    tokens = texts.letters // LETTERS + BATCH_TOKENS
    states = shape.hidden + BLOCK + 2 * shape.head_dim  # with a mask, and rotary factors
    if compensated:
        states += shape.hidden  # in front of the layer, which runs more than once
    if compensated and experts:  # their inputs are kept until the layer has run
        states += 2 * shape.hidden + 4 * experts
    batch = token_bytes(
        layers=0, cached=0, hidden=shape.hidden, intermediate=max(shape.intermediate, experts)
    )
    table = 2 * shape.vocab * shape.hidden  # of embeddings, which no layer has
    layer = 2 * max(0, size - table) // max(1, model.layers)
    widest = max(shape.hidden, shape.intermediate, experts)
    copies, squares = (_COPIES, 4 * _SQUARES * widest**2) if compensated else (1, 0)
    return START + 4 * tokens * states + copies * layer + max(BATCH_TOKENS * batch, squares)
