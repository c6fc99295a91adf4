"""A file of a base or an adapter is damaged: every reader refuses it by name, with exit code 3.

Nobody need attack: a download that broke off, or an editor, does this too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.merging.engine import MergeRequest, merge
from weightsmith.merging.reference import UnmergedModel, answers
from weightsmith.models.facts import read_facts
from weightsmith.quantizers.quality.texts import as_lines, readings
from weightsmith.validating.validate import ValidationRequest, validate

from tests.paths import TINY

QUESTION = ({"role": "user", "content": "Hello"},)
ROWS = [{"messages": list(QUESTION)}]
CONFIG, GENERATION = "base/config.json", "base/generation_config.json"
TOKENIZER, SETTINGS = "base/tokenizer.json", "base/tokenizer_config.json"
ADAPTER = "adapter/adapter_config.json"


def adapters(folder: Path) -> tuple[tuple[Path, float], ...]:
    return ((folder / "adapter", 1.0),)


def plan(folder: Path) -> None:
    facts = read_facts(folder / "base")
    assert facts.shape.layers


def merged(folder: Path) -> Path:
    out = folder / "merged"
    merge(MergeRequest(base=folder / "base", adapters=adapters(folder), out=out), lambda *_: None)
    return out


def ask(folder: Path) -> None:
    base, adapter = (
        UnmergedModel(model=folder / "base", adapters=a) for a in ((), adapters(folder))
    )
    answers({"base": base, "adapter": adapter}, [QUESTION], 2)


def compare(folder: Path) -> None:
    out = shutil.copytree(folder / "sound", folder / "merged")
    request = ValidationRequest(
        base=folder / "base",
        adapters=adapters(folder),
        merged=out,
        items=(QUESTION,),
        scope="all",
        mixture=None,
        drafts=(),
    )
    validate(request, lambda *_: None)


def render(folder: Path) -> None:
    as_lines(folder / "base", ROWS)


def read(folder: Path) -> None:
    readings(folder / "base", ROWS)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    shutil.copytree(TINY / "base", folder / "base")
    shutil.copytree(TINY / "adapters" / "a", folder / "adapter")
    merged(folder).rename(folder / "sound")
    return folder


def damaged(folder: Path, name: str, change: Any) -> None:
    """Cut a file in half, replace it with bytes, or change some of its values."""
    path = folder / name
    data = path.read_bytes()
    if change is None:
        path.write_bytes(data[: len(data) // 2])
    elif isinstance(change, bytes):
        path.write_bytes(change)
    else:
        value = json.loads(data) | change
        path.write_text(json.dumps({k: v for k, v in value.items() if v != "absent"}), "utf-8")


CASES: list[tuple[Callable[[Path], object], str, Any]] = [
    *((reader, CONFIG, None) for reader in (plan, merged, ask, compare)),
    *((reader, CONFIG, b"[1]") for reader in (plan, merged, ask, compare)),
    *((reader, ADAPTER, None) for reader in (merged, ask, compare)),
    *((reader, TOKENIZER, None) for reader in (ask, compare, render, read)),
    *((reader, SETTINGS, None) for reader in (ask, compare, render, read)),
    (render, SETTINGS, b"[]"),
    (render, SETTINGS, {"added_tokens_decoder": []}),
    (ask, GENERATION, None),
    (ask, GENERATION, {"eos_token_id": "x"}),
    (plan, CONFIG, {"num_hidden_layers": "many"}),
    (ask, CONFIG, {"model_type": "absent"}),
    (compare, CONFIG, {"model_type": "absent"}),
    (ask, CONFIG, {"model_type": "a model of tomorrow"}),
    (ask, CONFIG, {"num_key_value_heads": -1}),
    (ask, CONFIG, {"rope_theta": []}),
    (ask, CONFIG, {"head_dim": "absent"}),
    (merged, ADAPTER, {"layer_replication": 1.5}),
    (merged, ADAPTER, {"modules_to_save": -1}),
    (merged, ADAPTER, {"bias": "x"}),
    (ask, ADAPTER, {"arrow_config": -1}),
    (compare, ADAPTER, {"arrow_config": -1}),
    (ask, ADAPTER, {"peft_type": "absent"}),
    (compare, ADAPTER, {"layers_to_transform": -1}),
    (compare, ADAPTER, {"lora_bias": True}),
]


@pytest.mark.slow
@pytest.mark.grid(4)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("reader", "name", "change"),
    CASES,
    ids=[f"{reader.__name__} {name} {str(change)[:40]}" for reader, name, change in CASES],
)
def test_a_damaged_file_is_refused_by_name(sound, tmp_path, reader, name, change):
    folder = Path(shutil.copytree(sound, tmp_path / "case"))
    damaged(folder, name, change)

    with pytest.raises(InputRefused) as refused:
        reader(folder)

    # Where two files disagree, the message may name the other one.
    assert str(folder) in refused.value.message or Path(name).name in refused.value.message
    assert refused.value.hint
    assert refused.value.exit_code == 3
