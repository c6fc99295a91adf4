"""Names for what comes from torch, transformers and PEFT, for annotations alone."""

from __future__ import annotations

from typing import TypeAlias

from peft import PeftModel
from torch import Tensor as Tensor
from torch.nn import Module as Module
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Model: TypeAlias = PreTrainedModel | PeftModel
"""A network of transformers, with adapters or without."""
Tokenizer: TypeAlias = PreTrainedTokenizerBase
