"""vLLM on a CPU with a draft model: it accepts what is drafted, and greedy text stays."""

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from weightsmith.core.values import JsonValue
from weightsmith.serving.speculation import Speculation
from weightsmith.serving.vllm import ENGINE

from tests import vllm_parts
from tests.fakes.configs import facts
from tests.fakes.drafting import deepened
from tests.fakes.rendering import rendered
from tests.fakes.started import free_port, started
from tests.paths import TINY

pytestmark = [
    pytest.mark.real,
    pytest.mark.vllm,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the engine's packages are for it"),
]


def test_greedy_text_is_the_same_and_drafts_are_accepted(tmp_path: Path) -> None:
    draft, model = TINY / "base", tmp_path / "model"
    deepened(draft, model)
    config = json.loads((draft / "config.json").read_text())
    weights = (draft / "model.safetensors").stat().st_size
    speculation = Speculation(
        method="draft", tokens=3, draft=facts(config), weight_bytes=weights, path=str(draft)
    )
    made = rendered(
        "vllm", config=json.loads((model / "config.json").read_text()), weights=2 * weights,
        speculation=speculation, dtype="float32", max_model_len=512, max_num_seqs=2,
        host_memory_bytes=4 << 30,
    )  # fmt: skip
    settings = yaml.safe_load(made.files["vllm.yaml"]) | {"model": str(model)}
    without = {key: value for key, value in settings.items() if key != "speculative-config"}

    with served(settings, made.env, tmp_path / "with") as client:
        texts, (tried, drafted, accepted) = asked(client), counted(client)
    with served(without, made.env, tmp_path / "bare") as client:
        plain = asked(client)

    assert texts == plain
    assert tried > 0
    assert accepted > 0.8 * drafted > 0


@contextmanager
def served(
    settings: Mapping[str, JsonValue], env: Mapping[str, str], folder: Path
) -> Iterator[httpx.Client]:
    folder.mkdir()
    port = free_port()
    told = {**settings, "host": "127.0.0.1", "port": port, "served-model-name": "m"}
    (folder / "vllm.yaml").write_text(yaml.safe_dump(told))
    own = {
        "PATH": os.environ["PATH"], "HOME": str(folder), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(vllm_parts.packages()), "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    argv = [sys.executable, "-S", "-m", "vllm.entrypoints.cli.main", "serve"]
    with started([*argv, "--config", folder / "vllm.yaml"], {**env, **own}, port,
                 folder / "log") as client:  # fmt: skip
        yield client


def asked(client: httpx.Client) -> list[str]:
    found = []
    for line in (TINY / "eval-a.jsonl").read_text().splitlines()[:6]:
        message: dict[str, Any] = {"role": "user", "content": json.loads(line)["prompt"]}
        body = {"model": "m", "messages": [message], "temperature": 0, "max_tokens": 24}
        answer = client.post("/v1/chat/completions", json=body).json()
        found.append(answer["choices"][0]["message"]["content"])
    return found


def counted(client: httpx.Client) -> list[float]:
    """Drafts, drafted tokens and accepted ones, by the server's own counters."""
    text = client.get("/metrics").text
    lines = (rf"^{name}{{.*}} (\S+)$" for name in ENGINE.draft_counters)
    return [sum(map(float, re.findall(line, text, re.MULTILINE))) for line in lines]
