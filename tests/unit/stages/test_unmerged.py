import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from weightsmith.building.targets import all_targets
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.ports import Silent
from weightsmith.core.values import (
    LORA,
    SAFETENSORS,
    AdapterSnapshot,
    Artifact,
    Sources,
    Tree,
)
from weightsmith.outside.store import FileStore
from weightsmith.quantizers.gguf_lora import FILE
from weightsmith.serving.engine import ServeOptions
from weightsmith.stages.render import render
from weightsmith.stages.unmerged import unmerged, unmerged_gguf
from weightsmith.steps.served_adapters import base_weight_bytes, served_adapters

from tests.fakes.configs import facts
from tests.fakes.tiny import snapshot_of
from tests.paths import ROOT

TINY = ROOT / "examples" / "tiny"


def changed(folder: Path, **changes: Any) -> Sources:
    """The base with a copy of the first adapter, whose configuration is another one."""
    shutil.copytree(TINY / "adapters" / "a", folder, dirs_exist_ok=True)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return sources(AdapterSnapshot(snapshot=snapshot_of(folder)))


def sources(*adapters: AdapterSnapshot) -> Sources:
    return Sources(base=snapshot_of(TINY / "base"), adapters=adapters)


def beside_base(made: Sources) -> Artifact:
    return unmerged(made, Artifact(format=SAFETENSORS, tree=made.base.tree), LORA)


A = AdapterSnapshot(snapshot=snapshot_of(TINY / "adapters" / "a"))
B = AdapterSnapshot(snapshot=snapshot_of(TINY / "adapters" / "b"), version="v2")


def rendered(made: Sources, target: str = "vllm-lora", **wishes):
    gguf = target.startswith("llamacpp")
    return render(
        target=all_targets()[target],
        name="capitals",
        version="1",
        model=facts(json.loads((TINY / "base" / "config.json").read_text())),
        model_file="capitals.gguf" if gguf else "",
        weight_bytes=beside_base(made).tree.size,
        options=ServeOptions(adapters=served_adapters(made, gguf=gguf), **wishes),
        image="",
        made_from=(),
    )


def test_base_and_adapters_lie_side_by_side_and_nothing_is_copied():
    artifact = beside_base(sources(A, B))
    tree = artifact.tree

    paths = {entry.path for entry in tree.files}
    assert {"config.json", "model.safetensors"} <= paths
    assert {"adapters/a/adapter_config.json", "adapters/b-v2/adapter_model.safetensors"} <= paths
    assert tree.path("adapters/a/adapter_model.safetensors").parent == TINY / "adapters" / "a"
    for entry in tree.files:
        data = tree.path(entry.path).read_bytes()
        assert entry.digest.hex == hashlib.sha256(data).hexdigest()
    base = (TINY / "base" / "model.safetensors").stat().st_size
    assert base_weight_bytes(artifact) == base


def test_an_adapters_size_is_what_its_engine_loads(tmp_path):
    """llama.cpp, which has them in float32, said `LoRA buffer size = 0.69 MiB` of 56 tensors."""
    changed(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    made = sources(AdapterSnapshot(snapshot=snapshot_of(tmp_path)))

    (gguf,), (vllm,) = served_adapters(made, gguf=True), served_adapters(made)
    assert (gguf.matrices, gguf.weight_bytes) == (28, 720_896)
    assert (vllm.matrices, vllm.weight_bytes) == (28, 720_896 // 2)


def test_the_experts_of_a_layer_are_one_matrix(tmp_path):
    """llama.cpp's converter stacks them."""
    changed(tmp_path)
    modules = [
        f"layers.0.mlp.experts.{n}.{part}_proj" for n in range(64) for part in ("up", "down")
    ]
    tensors = {
        f"base_model.model.model.{module}.lora_{factor}.weight": torch.zeros(8, 8)
        for module in modules
        for factor in "AB"
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")

    (one,) = served_adapters(sources(AdapterSnapshot(snapshot=snapshot_of(tmp_path))), gguf=True)
    assert (one.matrices, one.weight_bytes) == (2, 256 * 64 * 4)


def test_a_single_adapter_is_served_under_the_models_name_and_several_under_their_own():
    config = rendered(sources(A), gpu="nvidia-l4")
    told = yaml.safe_load(config.files["vllm.yaml"])

    assert config.served_name == "capitals"
    assert told["served-model-name"] == "capitals-base"
    assert told["lora-modules"] == ["capitals=/models/adapters/a"]
    assert (told["enable-lora"], told["max-loras"], told["max-lora-rank"]) == (True, 1, 8)

    told = yaml.safe_load(rendered(sources(A, B), gpu="nvidia-l4").files["vllm.yaml"])

    assert told["served-model-name"] == "capitals"
    assert told["lora-modules"] == ["a=/models/adapters/a", "b-v2=/models/adapters/b-v2"]
    assert told["max-loras"] == 2


def test_adapters_take_memory_of_their_own():
    one, two = (rendered(sources(*found), gpu="nvidia-l4").plan for found in ((A,), (A, B)))
    config = json.loads((TINY / "base" / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]

    # Inputs and outputs of seven linear layers, of rank 8 and two bytes each.
    of_a_layer = 8 * 2 * (4 * hidden + 2 * heads + 2 * kv + 3 * (hidden + inner))
    each = config["num_hidden_layers"] * of_a_layer
    assert two.overhead_bytes - one.overhead_bytes == each


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "replaces parts"),
        ({"modules_to_save": ["lm_head"]}, "replaces parts"),
        ({"target_modules": ["embed_tokens"]}, "embeddings"),
        ({"r": 0}, "not a valid rank"),
        ({"r": None}, "not a valid rank"),
        ({"use_dora": 1}, "use_dora"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "replaces parts"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"init_lora_weights": "pissa"}, "also changes the base weights"),
        ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
    ],
)
def test_what_engines_do_not_add_at_run_time_is_refused(tmp_path, change, says):
    with pytest.raises(InputRefused, match=says):
        served_adapters(changed(tmp_path, **change))


@pytest.mark.parametrize(
    "name",
    [
        "q_proj.lora_magnitude_vector",
        "q_proj.lora_B.bias",
        "q_proj.bias",
        "q_proj.lora_A.default.weight",
        "embed_tokens.lora_embedding_A",
        "lm_head.lora_A.weight",
        "lm_head.modules_to_save.weight",
    ],
)
def test_weights_that_engines_do_not_apply_are_refused_without_their_setting(tmp_path, name):
    changed(tmp_path, target_modules=".*")
    path = tmp_path / "adapter_model.safetensors"
    more = {f"base_model.model.{name}": torch.zeros(8, 8)}
    save_file(load_file(path) | more, path)
    with pytest.raises(InputRefused, match=f"do not apply base_model.model.{name}"):
        served_adapters(sources(AdapterSnapshot(snapshot=snapshot_of(tmp_path))))

    save_file({}, path)
    with pytest.raises(InputRefused, match="has no tensors"):
        served_adapters(sources(AdapterSnapshot(snapshot=snapshot_of(tmp_path))))


def test_the_largest_rank_counts_and_has_a_limit(tmp_path):
    made = changed(tmp_path, r=65)
    assert served_adapters(made)[0].rank == 65
    assert rendered(made, gpu="nvidia-l4").plan.settings["max-lora-rank"] == 128

    with pytest.raises(UsageError, match="rank 1024"):
        rendered(changed(tmp_path, r=1024), gpu="nvidia-l4")


def test_llamacpp_adds_one_adapter_always_and_of_several_none():
    def command(*adapters):
        return rendered(sources(*adapters), "llamacpp-lora", host_memory_bytes=1 << 33).command

    assert command(A) == ("--lora", "/models/adapters/a.gguf")
    both = "/models/adapters/a.gguf,/models/adapters/b-v2.gguf"
    assert command(A, B) == ("--lora", both, "--lora-init-without-apply")


def test_vllm_scales_each_layer_as_peft_and_llamacpp_by_its_rank_alone(tmp_path):
    ranks, alphas = {"rank_pattern": {"q_proj": 16}}, {"alpha_pattern": {"q_proj": 4}}
    made = changed(tmp_path, use_rslora=True, **ranks, **alphas)
    assert served_adapters(made)[0].rank == 16

    assert served_adapters(changed(tmp_path, **ranks), gguf=True)[0].rank == 16
    for other in (alphas, {"use_rslora": True}):
        with pytest.raises(InputRefused, match=next(iter(other))):
            served_adapters(changed(tmp_path, **other), gguf=True)


def test_a_hubs_adapter_has_the_address_that_kserve_takes():
    def uri(pin):
        pinned = replace(A.snapshot, pin=pin)
        return served_adapters(sources(AdapterSnapshot(snapshot=pinned)))[0].uri

    assert uri("hf://acme/legal@" + "a" * 40) == "hf://acme/legal:" + "a" * 40
    assert uri("hf://gpt2@" + "a" * 40) == ""  # KServe wants an owner
    assert uri("sha256:" + "a" * 64) == ""


def test_weights_and_double_names_are_refused():
    with pytest.raises(UsageError, match="weight"):
        served_adapters(sources(AdapterSnapshot(snapshot=A.snapshot, weight=0.5)))
    with pytest.raises(UsageError, match=r"\ba\b"):
        served_adapters(sources(A, A))
    with pytest.raises(UsageError, match="no adapter"):
        served_adapters(sources())


class Converter:
    """Converts adapters, and is killed at the end as long as it is told so."""

    killed = True

    def prepare(self, *_: Any) -> None:
        pass

    def run(self, job: Any, _: Any) -> dict[str, Any]:
        for folder in job.folders:
            (job.output / folder).mkdir(exist_ok=True)
            (job.output / folder / FILE).write_bytes(b"GGUF")
        if self.killed:
            raise KeyboardInterrupt
        return {"tensors": dict.fromkeys(job.folders, 2)}


def test_what_a_killed_run_converted_for_another_recipe_is_not_stored(tmp_path):
    runner = Converter()
    tools: Any = SimpleNamespace(
        runner=runner, progress=Silent(), store=FileStore(tmp_path / "store"), clock=lambda: 0.0
    )
    tree = Tree(root=tmp_path, files=())
    base = Artifact(format=LORA, tree=tree)
    with pytest.raises(KeyboardInterrupt):
        unmerged_gguf(sources(A, B), base, LORA, tools)
    left = {path.parent.name for path in tmp_path.rglob(FILE)}
    assert len(left) == 2
    runner.killed = False

    for one in (A, B):  # the folder is that of one of them
        unmerged_gguf(sources(one), base, LORA, tools)

    stored = [path.relative_to(tmp_path) for path in tmp_path.rglob(FILE)]
    assert sorted(path.parent.name for path in stored) == ["data", "data"], stored
