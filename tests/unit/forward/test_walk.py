"""Several models in one walk: what is shared, what is loaded, what is refused."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.forward import views
from weightsmith.forward import walk as module
from weightsmith.forward.libraries import ModelFails, running
from weightsmith.forward.walk import walk
from weightsmith.merging.reference import UnmergedModel, answers

from tests.unit.validating.conftest import edit_tensors, held, make_adapter, make_model, merged

CHAT = [[{"role": "user", "content": "Which port?"}]]
NORM = "model.layers.1.input_layernorm.weight"


class Model:
    """A model that cannot be streamed, unless it says otherwise."""

    def __init__(self, folder: Path, *, streams: bool) -> None:
        self.checkpoint = self.source = folder
        self.streams, self.loaded = streams, 0

    def streamed(self, *_: Any) -> str:
        return "streamed" if self.streams else "broken"

    def whole(self) -> str:
        self.loaded += 1
        return "whole"


def ask(model: str, _: Any) -> str:
    if model == "broken":
        raise ModelFails("the logits are not finite")
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base"))


def test_only_the_model_that_cannot_be_streamed_is_loaded(base: Path) -> None:
    good, bad = Model(base, streams=True), Model(base, streams=False)
    told: list[Exception] = []

    found = walk({"good": good, "bad": bad}, {"good": ask, "bad": ask}, told.append)

    assert found == {"good": "streamed", "bad": "whole"}
    assert (good.loaded, bad.loaded) == (0, 1)
    assert [str(error) for error in told] == ["the logits are not finite"]


def test_a_model_that_does_not_run_in_memory_either_is_refused(base: Path) -> None:
    bad = Model(base, streams=False)

    def fail(model: str, _: Any) -> str:
        raise ModelFails(f"{model} heads do not fit")

    with pytest.raises(InputRefused, match=r"does not run .*: whole heads") as caught:
        walk({"bad": bad}, {"bad": fail})

    assert str(bad.checkpoint) in caught.value.message


def test_memory_that_runs_out_is_not_the_models_fault(base: Path) -> None:
    bad = Model(base, streams=False)

    def fail(model: str, _: Any) -> str:
        if model == "broken":
            raise ModelFails("not finite")
        with running():
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(RuntimeError, match="allocate") as caught:
        walk({"bad": bad}, {"bad": fail})

    assert not isinstance(caught.value, InputRefused)


def test_a_mistake_in_what_a_model_calls_is_ours(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers calls our linear layer, which calls a function that is none."""
    monkeypatch.setattr(views, "multiplied", None)

    with pytest.raises(TypeError, match="not callable"):
        answers({"": UnmergedModel(model=base)}, CHAT, 3)


def test_only_what_weights_in_memory_may_cure_loads_a_model(base: Path) -> None:
    good = Model(base, streams=True)

    def fail(*_: Any) -> str:
        with running():
            return str(dt.date(2026, 13, 1))

    def mistaken(model: Any, _: Any) -> str:  # by us
        return str(model.heads)

    with pytest.raises(InputRefused, match=r"does not run .*: ValueError: month must be"):
        walk({"good": good}, {"good": fail})
    with pytest.raises(AttributeError, match="heads"):
        walk({"good": good}, {"good": mistaken})

    assert not good.loaded


def test_of_one_architecture_all_models_are_loaded(base: Path) -> None:
    both = {"good": Model(base, streams=True), "bad": Model(base, streams=False)}

    assert walk(both, dict.fromkeys(both, ask), alike=True) == {"good": "whole", "bad": "whole"}


def test_a_model_that_does_not_fit_into_memory_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = SimpleNamespace(tensors={"x": SimpleNamespace(shape=(1 << 40,))})
    monkeypatch.setattr(module, "open_checkpoint", lambda _: huge)
    model = Model(tmp_path, streams=False)

    with pytest.raises(EnvironmentFailure, match="4096 GiB of memory"):
        walk({"": model}, {"": ask})

    assert not model.loaded


def test_a_checkpoint_without_one_of_its_tensors_is_refused(tmp_path: Path) -> None:
    """transformers would fill it with random numbers."""
    base = make_model(tmp_path / "base")
    lora = make_adapter(tmp_path / "lora", base, target_modules=["q_proj"])
    out = merged(tmp_path / "out", base, lora)
    edit_tensors(base, lambda tensors: tensors.pop(NORM))

    for subject in (UnmergedModel(model=base), UnmergedModel(model=base, adapters=((lora, 1.0),))):
        with pytest.raises(InputRefused, match=NORM.replace(".", r"\.")) as refused:
            answers({"": subject}, CHAT, 3)
        assert str(base) in refused.value.message
    with pytest.raises(InputRefused, match=NORM.replace(".", r"\.")):
        held(base, out, lora)


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", tie_word_embeddings=True)

    assert answers({"": UnmergedModel(model=base)}, CHAT, 3)[""][0]["finish_reason"]
