"""How the libraries that run models are imported: offline, and once for all.

Imports run with garbage collection off, and are left out of later collections: they took 2 of 29
CPU seconds. Up to 192 MiB of freed memory stay with the process, because one layer of all questions
frees more than the 64 MiB that a merge keeps, and the kernel cleared the same pages for each layer
again.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

from weightsmith.core.errors import InputRefused, WeightsmithError, ran_out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COMPILER = "torch._dynamo"
_ORDER = f"{_COMPILER}._trace_wrapped_higher_order_op"
_MODELS = (
    *("torch", "transformers.modeling_utils", "transformers.generation.utils"),
    "transformers.models.auto",
)
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def stay_offline() -> None:
    """Keep libraries off the network, regardless of the environment."""
    os.environ.update(OFFLINE)


def import_for_good(*names: str) -> None:
    """Import libraries in a process that ends with its job; they are never searched for garbage.

    Such searches took 2 of the 29 CPU seconds of the example's reference answers.
    """
    gc.disable()
    try:
        import_models(*names)
        gc.freeze()
    finally:
        gc.enable()


def import_models(*names: str) -> None:
    """Import what runs models, and other libraries."""
    stay_offline()
    import_lightly(*_MODELS, *names)


def load_torch_and_transformers() -> None:
    """Import transformers, which needs no torch yet, while a thread loads torch's library.

    That is a fifth of torch's import, and does not hold up Python.
    """
    stay_offline()
    found = find_spec("torch")
    folder = Path(found.origin).parent / "lib" if found and found.origin else Path()

    def load() -> None:
        # Torch loads those of CUDA in an order of its own. What cannot be loaded, it says itself.
        if not (folder / "libtorch_cuda.so").exists():
            with suppress(OSError):
                ctypes.CDLL(str(folder / "libtorch_cpu.so"))

    thread = threading.Thread(target=load)
    thread.start()
    try:
        importlib.import_module("transformers")
    finally:
        thread.join()


def import_lightly(*names: str) -> None:
    """Import modules of transformers, or what imports it, without torch's compiler if possible."""
    # What else is installed may need the compiler; then it is imported after all.
    with suppress(ImportError, AttributeError, TypeError), _without_compiler():
        list(map(importlib.import_module, names))
    for name in names:
        importlib.import_module(name)


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Let transformers leave out torch's compiler and distributed tensors while it is imported.

    They are a third of what is imported, and nothing here is compiled or spread over machines. The
    compiler's decorators return their function; whoever needs the compiler later imports it then.
    """
    if find_spec("torchao"):  # transformers imports it, and it needs the compiler
        yield
        return
    distributed: Any = importlib.import_module("torch.distributed")
    compiler: Any = ModuleType(_COMPILER)
    order: Any = ModuleType(_ORDER)
    compiler.__path__, compiler.__getattr__ = [], lambda _: _undecorated
    # The context for masks that are computed by vmap.
    order.TransformGetItemToIndex = lambda: importlib.import_module(
        _ORDER
    ).TransformGetItemToIndex()
    own = distributed.is_available
    present = _COMPILER in sys.modules
    if not present:
        sys.modules |= {_COMPILER: compiler, _ORDER: order}
    distributed.is_available = lambda: False
    try:
        yield
    finally:
        distributed.is_available = own
        if not present:
            del sys.modules[_COMPILER], sys.modules[_ORDER]


def _undecorated(function: Any = None, *_: object, **__: object) -> Any:
    return function if function is not None else _undecorated


def load_tokenizer(root: Path, **options: Any) -> PreTrainedTokenizerBase:
    """Return a folder's tokenizer, from local files only; raises InputRefused if that fails."""
    stay_offline()
    from transformers import AutoTokenizer

    with reading_tokenizer(root):
        return AutoTokenizer.from_pretrained(
            root, local_files_only=True, trust_remote_code=False, **options
        )


def reading_tokenizer(root: Path) -> AbstractContextManager[None]:
    """Raise InputRefused if a library cannot read the folder's tokenizer in the block."""
    hint = "check that its files are complete and belong to the same model"
    return reading(f"the tokenizer of {root}", hint)


@contextmanager
def reading(what: str, hint: str) -> Iterator[None]:
    """Raise InputRefused if a library cannot load an input in the block, whatever it raises.

    Libraries raise errors of many types for a damaged file. Only their calls belong in the block.
    """
    try:
        yield
    except Exception as error:  # the tokenizers library raises plain ones
        if isinstance(error, WeightsmithError) or ran_out_of_memory(error):
            raise
        raise unreadable(what, error, hint) from error


class ModelFails(Exception):
    """What runs a model failed, or a model's values cannot be right; the cause is its own error."""

    @property
    def without_weights(self) -> bool:
        """Whether the reason may be that its weights are in files: it may run with them in memory.

        Architectures that use a weight without calling its module raise errors of these types.
        """
        kinds = (type(None), RuntimeError, AttributeError, KeyError, TypeError)
        return isinstance(self.__cause__, kinds)


@contextmanager
def running() -> Iterator[None]:
    """Raise ModelFails if transformers, PEFT or torch fail as they build or run a model.

    They call our code too: an error that begins there is ours, and is raised as it is. So is one of
    the machine. Only their calls belong in the block.
    """
    try:
        yield
    except Exception as error:
        told = isinstance(error, WeightsmithError | ModelFails | OSError)
        if told or ran_out_of_memory(error) or _is_ours(error):
            raise
        text = " ".join(str(error).split())[:200]
        raise ModelFails(f"{type(error).__name__}: {text}") from error


def _is_ours(error: Exception) -> bool:
    if isinstance(error, RuntimeError):  # of torch's own functions, which are in no traceback
        return False
    last: TracebackType | None = error.__traceback__
    name = ""
    while last is not None:
        frame, last = last.tb_frame, last.tb_next
        if frame.f_code.co_name != "__getattr__":  # torch's, of an attribute that nothing has
            name = frame.f_globals.get("__name__", "")
    return name.partition(".")[0] == "weightsmith"


def unreadable(what: str, error: Exception, hint: str) -> InputRefused:
    """Return the refusal of an input that a library cannot load."""
    why = " ".join(str(error).split())[:200] or type(error).__name__
    return InputRefused(f"{what} cannot be loaded: {why}", hint=hint)
