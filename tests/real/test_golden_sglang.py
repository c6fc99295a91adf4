"""SGLang's own argument parser on every golden config, and its options against the recorded list.

Needs SGLang's code, not what it depends on: a folder that WEIGHTSMITH_SGLANG names, made by
`pip install --no-deps --target FOLDER sglang==0.5.23 msgspec`.
"""

import ast
import fnmatch
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from safetensors.numpy import save_file
from tqdm import tqdm
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.values import Digest, FileEntry, Tree
from weightsmith.models.reshard import reshard
from weightsmith.oci.image import ImageConfig, assemble
from weightsmith.oci.unpack import unpack
from weightsmith.oci.weights import weight_layers
from weightsmith.serving import sglang

from tests.golden.cases import MACHINES, MODELS, PACKED, RENDERS, TARGETS, rendered

FOLDER = os.environ.get("WEIGHTSMITH_SGLANG", "")
PROBE = Path(__file__).with_name("sglang_probe.py")
DEPRECATED = {"disable-cuda-graph", "enable-dp-attention", "monokernel-backend"}
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not FOLDER, reason="no SGLang: set WEIGHTSMITH_SGLANG to its folder"),
]


def cases():
    """(name, model, target, wishes) of every SGLang config."""
    for name, case in RENDERS.items():
        if case[1].startswith("sglang"):
            yield name, *case
    for which in MODELS:
        for target in PACKED.get(which, (*TARGETS, "sglang-awq")):
            for machine, (gpu, count) in MACHINES.items():
                if target.startswith("sglang"):
                    wishes = {"gpu": gpu, "gpu_count": count}
                    yield f"{which} {target} {machine}", which, target, wishes
    switches = {"enable-tf32-matmul": False, "gc-threshold": [700, 10], "enable-mixed-chunk": True}
    yield "extra", "llama-3-8b", "sglang", {"gpu": "nvidia-l40s", "extra": switches}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """(the options, {case: (plan, what it read)})."""
    root, plans, lines = tmp_path_factory.mktemp("sglang"), {}, []
    for name, which, target, wishes in cases():
        try:
            config = rendered(which, target, wishes)
        except (UsageError, InputRefused):
            continue
        path = root / f"{len(lines)}.yaml"
        path.write_text(config.files["sglang.yaml"])
        lines.append(json.dumps(["--config", str(path), *config.command[2:]]))
        plans[name] = config.plan
    done = subprocess.run(
        [sys.executable, PROBE],
        input="\n".join(lines),
        env={**os.environ, "PYTHONPATH": FOLDER},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    rows = [json.loads(row[5:]) for row in done.stdout.splitlines() if row.startswith("TOLD ")]
    assert len(rows) == len(lines) + 1, done.stderr[-3000:]
    return rows[0], {n: (p, row) for (n, p), row in zip(plans.items(), rows[1:], strict=True)}


def test_the_recorded_options_are_its_own(told):
    theirs = {name: kind for name, kind in told[0].items() if name not in DEPRECATED | {"help"}}

    assert theirs == dict(sglang.known_options().kinds)
    assert set(told[0]) >= DEPRECATED
    assert set(sglang.known_options().refused) >= DEPRECATED


def test_it_reads_every_golden_config_as_planned(told):
    assert len(told[1]) > 30
    for name, (plan, read) in told[1].items():
        assert "error" not in read, (name, read)
        settings = {key.replace("-", "_"): value for key, value in plan.settings.items()}
        assert {key: read[key] for key in settings} == settings, name
        assert read["context_length"] == plan.max_model_len
        assert read["max_running_requests"] == plan.max_num_seqs
        assert read["tp_size"] == plan.tensor_parallel_size
        assert (read["host"], read["port"], read["model_path"]) == ("0.0.0.0", 30000, "/models")


def test_its_loader_reads_the_files_of_an_image(tmp_path):
    """Its two functions that choose and read files, which need none of its dependencies."""
    model, files = tmp_path / "model", []
    model.mkdir()
    draw = np.random.default_rng(0)
    wanted = {
        f"model.layers.{layer}.{kind}.weight": draw.random((256, 256), np.float32)
        for layer in range(4)
        for kind in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    }
    save_file(wanted, model / "model.safetensors")
    for path in model.iterdir():
        digest = Digest.of(path.read_bytes())
        files.append(FileEntry(path=path.name, size=path.stat().st_size, digest=digest))
    tree = Tree(root=model, files=tuple(files))
    split = reshard(tree, lambda _: 600_000, lambda _, make: make(), strict=False)
    layers = weight_layers(split.tree, contents=split.contents, epoch=0)
    unpack(assemble(layers, config=ImageConfig(), epoch=0), tmp_path / "root")

    names = ("filter_duplicate_safetensors_files", "safetensors_weights_iterator")
    source = Path(FOLDER) / "sglang" / "srt" / "model_loader" / "weight_utils.py"
    module = ast.parse("from __future__ import annotations\n" + source.read_text())
    module.body = [
        one
        for one in module.body
        if isinstance(one, ast.ImportFrom | ast.FunctionDef)
        and getattr(one, "name", "") in (*names, "")
        and getattr(one, "module", "__future__") == "__future__"
    ]
    theirs = {"os": os, "json": json, "fnmatch": fnmatch, "torch": torch, "tqdm": tqdm}
    theirs |= {"safetensors": safetensors, "BAR_FORMAT": None}
    exec(compile(module, str(source), "exec"), theirs)
    choose, read = (theirs[name] for name in names)

    folder = tmp_path / "root" / "models"
    there = [str(path) for path in folder.glob("*.safetensors")]
    chosen = choose(there, str(folder), "model.safetensors.index.json")
    found = dict(read(chosen))
    assert len(chosen) == len(there) > 5
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name].numpy(), wanted[name]) for name in wanted)
