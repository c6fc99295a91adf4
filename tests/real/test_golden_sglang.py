"""SGLang's own argument parser on every golden config, and its options against the recorded list.

Needs SGLang's code, not what it depends on: a folder that WEIGHTSMITH_SGLANG names, made by
`pip install --no-deps --target FOLDER sglang==0.5.23 msgspec`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from weightsmith.core.errors import InputRefused, UsageError
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
