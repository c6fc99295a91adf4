"""Traps of TensorRT-LLM: commands/serve.py."""

import pytest
import yaml
from weightsmith.core.errors import UsageError
from weightsmith.serving import trtllm
from weightsmith.serving.devices import GPUS

from tests.fakes.rendering import L40S, rendered


def test_nothing_stands_in_trtllms_file_and_arguments():
    config = rendered("trtllm", **L40S)
    told = yaml.safe_load(config.files["trtllm.yaml"])
    given = {word.removeprefix("--") for word in config.command if word.startswith("--")}

    assert config.command[0] == "/models"
    assert config.command[1:3] == ("--host", "0.0.0.0")
    assert not given & set(told)
    assert told["kv_cache_config"]["free_gpu_memory_fraction"] == 0.9
    assert config.command[-2:] == ("--extra_llm_api_options", trtllm.CONFIG_FILE)
    assert set(told) <= set(trtllm.known_options().kinds)


def test_trtllm_takes_a_part_of_what_is_free_beside_weights():
    plan = rendered("trtllm", **L40S).plan
    free = GPUS["nvidia-l40s"].usable_bytes - plan.weights_bytes_per_gpu - plan.overhead_bytes

    assert plan.kv_cache_bytes == int(free * 0.9)


def test_trtllm_serves_under_its_folders_name():
    assert rendered("trtllm", **L40S).served_name == "models"
    with pytest.raises(UsageError, match="no option for another name"):
        rendered("trtllm", **L40S, served_model_name="mine")
