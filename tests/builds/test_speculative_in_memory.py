"""Builds in memory whose image drafts tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file
from weightsmith.api.commands.verify import verify_image
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.ports import Silent
from weightsmith.fleets.ordering import ordered

from tests.fakes.fleet import GOOD, MemoryFleet, by_tools, run, write_fleet
from tests.fakes.memory import Memory, new_signer
from tests.fakes.predicting import add_predicting
from tests.fakes.tiny import write_model

TARGET = "llamacpp-q4_k_m"


def test_an_image_drafts_what_stands_there_already(memory: Memory) -> None:
    memory.build("serve.speculative.method=ngram", "serve.speculative.tokens=5")

    image = memory.engine.held(f"{memory.repository}:1.0.0-{TARGET}")
    assert "LLAMA_ARG_SPEC_TYPE=ngram-simple" in image.config["Env"]
    assert image.config["Cmd"][-1] == "5"
    checks = {check["name"]: check["seen"] for check in memory.record()["checks"]}
    assert checks["drafts"] == "the server counts no drafts"  # as the fake one


def test_a_base_that_lost_its_further_layers_is_refused(memory: Memory) -> None:
    """transformers keeps the number in config.json, and drops the tensors."""
    memory.use_vllm()
    base = memory.home / "base"
    added = add_predicting(base, "numbered")
    settings = ("serve.speculative.method=mtp", "serve.speculative.tokens=1")

    built = memory.build(*settings)["vllm"]
    assert built.scores["image"].score == 1
    image = memory.engine.held(f"{memory.repository}:1.0.0-vllm")
    assert (
        b'speculative-config: "{\\"method\\": \\"mtp\\"'
        in image.files()["/etc/weightsmith/vllm.yaml"]
    )
    assert added

    import safetensors.torch as st

    file = base / "model.safetensors"
    kept = {k: v for k, v in st.load_file(file).items() if k not in added}
    st.save_file(kept, file, {"format": "pt"})
    assert json.loads((base / "config.json").read_text())["num_nextn_predict_layers"] == 1
    with pytest.raises(InputRefused, match="no tensors of layers for further tokens"):
        memory.build(*settings)


WORDS = {f"w{number}": number for number in range(32)}


def tokenizer(folder: Path, words: dict[str, int]) -> None:
    splits = {"type": "ByteLevel", "add_prefix_space": False}
    model = {"type": "BPE", "vocab": words}
    data = {"model": model, "pre_tokenizer": splits, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(data))


@pytest.fixture
def drafted(memory: Memory) -> Memory:
    """A base, and a draft of half its size beside it."""
    draft = write_model(memory.home / "draft")
    file = draft / "model.safetensors"
    save_file({k: v.astype("float16") for k, v in load_file(file).items()}, file)
    for folder in (memory.home / "base", draft):
        tokenizer(folder, WORDS)
    (draft / "README.md").write_text("---\nlicense: mit\n---\n")
    return memory


DRAFT = ("serve.speculative.method=draft", "serve.speculative.draft=./draft")


def test_a_draft_is_a_layer_of_its_own(drafted: Memory) -> None:
    plain = drafted.build()[TARGET]
    built = drafted.build(*DRAFT, "version=2.0.0")[TARGET]
    image = drafted.engine.held(f"{drafted.repository}:2.0.0-{TARGET}")
    without = drafted.engine.held(f"{drafted.repository}:1.0.0-{TARGET}")
    files = image.files()

    assert "/models/draft/draft.gguf" in files
    added = set(image.diff_ids) - set(without.diff_ids)
    assert len(added) == 2  # the draft's, and that of the settings
    env = dict(one.partition("=")[::2] for one in image.config["Env"])
    assert env["LLAMA_ARG_SPEC_TYPE"] == "draft-simple"
    assert env["LLAMA_ARG_SPEC_DRAFT_MODEL"] == "/models/draft/draft.gguf"
    assert env["LLAMA_ARG_SPEC_DRAFT_N_MAX"] == "3"
    assert plain.scores["image"].score == built.scores["image"].score == 1


def test_what_drafts_is_named_wherever_the_base_is(drafted: Memory) -> None:
    drafted.build(*DRAFT)
    record = json.loads((drafted.results() / "build.json").read_text())
    assert record["draft"]["source"].endswith("draft")
    assert record["draft"]["license"] == "mit"
    image = drafted.engine.held(f"{drafted.repository}:1.0.0-{TARGET}")
    assert image.config["Labels"]["dev.weightsmith.draft.digest"] == record["draft"]["digest"]
    lock = json.loads((drafted.home / "recipe.lock").read_text())
    assert record["draft"]["digest"] in {row["digest"] for row in lock["sources"].values()}


def test_its_chain_holds_from_the_image_to_its_sources(drafted: Memory) -> None:
    drafted.signer = new_signer()
    drafted.build(*DRAFT, push=True)
    key = drafted.folder / "key.pub"
    key.write_bytes(drafted.signer.public)
    place = f"{drafted.repository}:1.0.0-{TARGET}"

    checks = {one.name: one.ok for one in verify_image(place, key, drafted.client, Silent()).checks}

    assert {"draft", "label draft", "merge", "label base"} <= checks.keys()
    assert False not in checks.values()
    shared = drafted.record()["sharing"]
    drafted.build()
    assert shared == drafted.record()["sharing"]


def test_nodes_that_share_only_the_cache_get_it(drafted: Memory) -> None:
    here = by_tools(drafted.tools)
    drafted.write_recipe(serve={"speculative": {"method": "draft", "draft": "./draft"}})

    def elsewhere(text: str) -> str:
        request = json.loads(text)
        assert str(drafted.home) not in json.dumps(request["recipe"])
        return here(json.dumps({**request, "dist": "/nowhere", "token": "none"}))

    path = write_fleet(drafted, adapters=["./a"], targets=[TARGET])
    engine = MemoryFleet(elsewhere, remote=True)
    rows, _ = run(drafted, path, engine, outputs={"push": True})

    assert [row.verdict for row in rows.cells] == [GOOD], rows.cells[0].error
    assert drafted.home / "draft" in ordered(path).sources


MIX = "llamacpp-mix"


def test_a_mix_leaves_room_for_it(drafted: Memory) -> None:
    def planned(memory: int) -> dict[str, Any]:
        gpu = ("quantize.fit=gpu", f"serve.gpu_memory={memory}B")
        plan: dict[str, Any] = drafted.forecast(*gpu, *DRAFT, targets=[MIX])["serving"][MIX]
        return plan

    large = planned(2 << 30)
    small = (drafted.home / "draft/model.safetensors").stat().st_size * 8.5 / 16
    room = int(large["overhead_bytes"] + large["kv_bytes_total"] + small) + 200_000
    plan = planned(-(-room * 20 // 19))  # a twentieth is held back

    assert plan["fits"]
    assert 0.9 < (plan["weight_bytes"] - small) / 200_000 < 1


def test_its_weights_and_cache_are_planned(drafted: Memory) -> None:
    drafted.build()
    drafted.build(*DRAFT, "version=2.0.0")
    plans = [
        json.loads((drafted.dist / "tiny" / version / TARGET / "plan.json").read_text())
        for version in ("1.0.0", "2.0.0")
    ]
    without, with_ = plans
    foreseen = drafted.forecast(*DRAFT)["serving"][TARGET]["settings"]
    assert foreseen["spec-draft-model"] == with_["settings"]["spec-draft-model"]
    assert with_["kv_bytes_total"] == 2 * without["kv_bytes_total"]  # it has the same shape
    assert with_["weight_bytes"] > without["weight_bytes"]
    assert with_["overhead_bytes"] > without["overhead_bytes"]


def test_a_draft_is_made_once_for_all_recipes(drafted: Memory) -> None:
    drafted.build(*DRAFT)
    made = drafted.jobs().count("quantize")
    drafted.build(*DRAFT, "version=2.0.0", "name=other")
    assert made == 2
    assert drafted.jobs().count("quantize") <= 1


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (WORDS | {"w3": 4, "w4": 3}, r"'w3' is 3 in the model and 4 in the draft, and 1 others"),
        (WORDS | {"more": 32}, r"'more' is missing in the model and 32 in the draft"),
    ],
)
def test_another_vocabulary_is_refused_in_the_plan(
    drafted: Memory, words: dict[str, int], why: str
) -> None:
    tokenizer(drafted.home / "draft", words)
    with pytest.raises(InputRefused, match=why):
        drafted.forecast(*DRAFT)


def test_a_draft_that_is_not_smaller_is_refused(drafted: Memory) -> None:
    with pytest.raises(InputRefused, match="longer than the model itself"):
        drafted.forecast("serve.speculative.method=draft", "serve.speculative.draft=./base")


def test_a_model_is_no_eagle_head(drafted: Memory) -> None:
    drafted.use_vllm()
    with pytest.raises(InputRefused, match="which method eagle3 does not draft with"):
        drafted.forecast("serve.speculative.method=eagle3", DRAFT[1])


def test_vllm_drafts_from_a_folder(drafted: Memory) -> None:
    drafted.use_vllm()
    drafted.build(*DRAFT)
    image = drafted.engine.held(f"{drafted.repository}:1.0.0-vllm")
    files = image.files()
    assert "/models/draft/config.json" in files
    assert b"/models/draft" in files["/etc/weightsmith/vllm.yaml"]
    assert b"draft_model" in files["/etc/weightsmith/vllm.yaml"]


@pytest.mark.parametrize(
    "settings",
    [
        ("serve.speculative.method=draft",),
        ("serve.speculative.method=ngram", DRAFT[1]),
        ("serve.speculative.method=ngram", "serve.speculative.tokens=0"),
        ("serve.speculative.method=ngram", "serve.speculative.tokens=17"),
        ("serve.speculative.method=magic",),
    ],
)
def test_a_recipe_that_says_something_else_is_wrong(
    memory: Memory, settings: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError, match=r"speculative"):
        memory.request(*settings)
