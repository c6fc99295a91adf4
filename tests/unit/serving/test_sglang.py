"""Traps of SGLang 0.5.23: srt/utils/server_args_config_parser.py."""

import pytest
import yaml
from weightsmith.building.targets import all_targets
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.values import AWQ
from weightsmith.serving import sglang
from weightsmith.serving.devices import GPUS
from weightsmith.serving.engine import ServeOptions
from weightsmith.serving.memory import GIB

from tests.fakes.configs import LLAMA_8B, facts
from tests.fakes.rendering import L40S, rendered


def test_sglang_does_not_get_packed_weights_whose_rows_it_reorders():
    llama4 = {**LLAMA_8B, "architectures": ["Llama4ForConditionalGeneration"]}

    assert rendered("sglang", config=llama4, **L40S)
    for target in ("sglang-fp8", "sglang-nvfp4a16"):
        wishes = {**L40S, "format": all_targets()[target].format}
        with pytest.raises(InputRefused, match="without their scales"):
            rendered(target, config=llama4, **wishes)


def test_sglangs_file_holds_what_it_can_read():
    extra = {
        "enable-mixed-chunk": True,
        "enable-tf32-matmul": False,
        "gc-threshold": [700, 10],
        "max-prefill-tokens": 8192,
    }
    config = rendered("sglang", **L40S, extra=extra)
    told = yaml.safe_load(config.files["sglang.yaml"])

    assert set(told) <= set(sglang.known_options().kinds)
    assert all(sglang.known_options().kinds[key] in {"value", "flag"} for key in told)
    assert not any(
        isinstance(value, list | dict) or value in (None, False) for value in told.values()
    )
    assert config.command[:2] == ("--config", sglang.CONFIG_FILE)
    assert config.command[2:] == ("--no-enable-tf32-matmul", "--gc-threshold", "700", "10")
    assert (told["host"], told["port"], told["enable-metrics"]) == ("0.0.0.0", 30000, True)


def test_sglangs_fraction_leaves_room_for_activations():
    plan = rendered("sglang", **L40S).plan
    whole = GPUS["nvidia-l40s"].usable_bytes

    assert 0.5 < plan.gpu_memory_utilization <= 0.9
    static = plan.weights_bytes_per_gpu + plan.kv_cache_bytes
    assert static == int(whole * plan.gpu_memory_utilization)
    assert whole - static >= plan.overhead_bytes + plan.margin_bytes


def test_sglang_is_probed_patiently_because_health_generates():
    config = rendered("sglang", **L40S)
    deployment = next(yaml.safe_load_all(config.files["kubernetes.yaml"]))
    container = deployment["spec"]["template"]["spec"]["containers"][0]

    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["timeoutSeconds"] >= 20


def test_sglang_computes_awq_in_float16():
    plan = sglang.plan(facts(LLAMA_8B), 6 * GIB, ServeOptions(**L40S, format=AWQ))

    assert plan.settings["dtype"] == "float16"


def test_a_flag_that_sglang_cannot_turn_off_is_refused():
    with pytest.raises(UsageError, match="no way to say that"):
        rendered("sglang", **L40S, extra={"enable-mixed-chunk": False})
