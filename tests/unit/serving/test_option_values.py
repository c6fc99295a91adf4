"""What values of the server's options may hold, in one's own recipe and in an image's."""

import json
import re

import pytest
from weightsmith.core.errors import UsageError
from weightsmith.serving import llamacpp_options, sglang, tgi, trtllm, vllm
from weightsmith.serving.options import STATED, not_to_be_stated, plain_name

LISTS = {"vllm": vllm.known_options(), "sglang": sglang.known_options(),
         "trtllm": trtllm.known_options()}  # fmt: skip
CHECKS = {
    **{engine: options.checked for engine, options in LISTS.items()},
    "llamacpp": llamacpp_options.extra_options,
}
CPU, TGI = vllm.known_options(cpu=True), tgi.known_options()
FURTHER = {**CHECKS, "vllm-cpu": CPU.checked, "tgi": TGI.checked}
REACHES_OUT = re.compile(
    r"(^|-)(path|dir|folder|file|files|url|urls|host|port|addr|address|endpoint|endpoints|uds|"
    r"socket|plugin|plugins|cls|class|middleware|module|processors|hooks|connector|transfer|remote|"
    r"loader|download|token|key|keyfile|certfile|certs|model|repo|hf|code|tokenizer|lora|loras|"
    r"command|tools|server|sidecar|origins|headers|credentials|dump|trace|traces|otlp|storage|"
    r"offload-dir|log-requests|log-outputs|prompts|template|grammar-file|schema)(-|$)"
)
"""Words in the names of options that name files, addresses, modules, programs or other models."""
HARMLESS = {
    "chat-template-kwargs",
    "default-chat-template-kwargs",
    "enable-server-load-tracking",
    "exclude-tools-when-tool-choice-none",
    "hf-overrides",  # of its keys, only those of the context's length
    "language-model-only",
    "long-prefill-token-threshold",
    "skip-server-warmup",
}


def test_an_image_states_only_options_that_exist():
    known = {*llamacpp_options.ENVIRONMENT, *llamacpp_options.COMMAND_LINE}
    known = known.union(*(options.kinds for options in (*LISTS.values(), TGI)))
    assert set(STATED) <= set(map(plain_name, known))


def test_no_option_that_reaches_out_is_an_images_to_state():
    odd = {name for name in STATED if REACHES_OUT.search(name)}
    assert odd <= HARMLESS, odd - HARMLESS


@pytest.mark.parametrize(
    "extra",
    [
        {"log-prompts-dir": "/var/log"},
        {"media-path": "/"},
        {"middleware": ["evil.Middleware"]},
        {"worker-cls": "evil.Worker"},
        {"tool_parser_plugin": "/models/x.py"},
        {"kv-transfer-config": {"kv_connector_module_path": "evil"}},
        {"load-format": "pt"},
        {"otlp-traces-endpoint": "http://evil.example"},
        {"speculative-config": {"method": "eagle", "model": "evil/x"}},
        {"speculative-config": '{"model": "evil/x", "trust_remote_code": true}'},
        {"speculative-config": [{"model": "evil/x"}]},
        {"hf-overrides": {"rope_parameters": {"x": "../../etc/passwd"}}},
        {"hf-overrides": {"auto_map": {"AutoModel": "evil--x.Y"}}},
        {"structured-outputs-config": {"reasoning_parser_plugin": "x"}},
        {"generation-config": "evil"},
        {"default-chat-template-kwargs": {"chat_template": "{{ evil }}"}},
        {"default-chat-template-kwargs": {"a/b": 1}},
        {"tool-call-parser": "/models/parser.py"},
        {"tool-call-parser": "evil.module"},
        {"reasoning-parser": "http://evil"},
        {"reasoning-parser": "--trust-remote-code"},
        {"cudagraph-capture-sizes": ["--trust-remote-code"]},
        {"samplers": "top_k\nevil"},
        {"an-option-of-the-future": 1},
        {"LLAMA_ARG_MODEL_URL": "http://evil"},
    ],
)
def test_what_an_image_may_not_state(extra):
    places = not_to_be_stated(extra)
    assert places
    assert {place.partition(".")[0] for place in places} == set(extra)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"tool-call-parser": "hermes", "enable_auto_tool_choice": True, "--seed": 7},
        {"batch-size": 512, "cache-type-k": "q8_0", "flash-attn": "on", "samplers": "top_k;min_p"},
        {"speculative-config": {"method": "ngram", "num_speculative_tokens": 3}},
        {"limit-mm-per-prompt": {"image": 2, "video": 0}},
        {"hf-overrides": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}},
        {"cudagraph-capture-sizes": [1, 2, 4]},
        {"load-format": "safetensors", "generation-config": "vllm"},
        {"override-generation-config": {"temperature": 0.6, "top_p": None}},
    ],
)
def test_what_an_image_may_state(extra):
    assert not_to_be_stated(extra) == []


OPTIONS = {"vllm": "speculative-config", "sglang": "default-chat-template-kwargs",
           "trtllm": "speculative_config", "llamacpp": "chat-template-kwargs"}  # fmt: skip


@pytest.mark.parametrize("engine", CHECKS)
@pytest.mark.parametrize("key", ["trust_remote_code", "trust-remote-code", "trustRemoteCode"])
@pytest.mark.parametrize("value", [True, "true", 1])
def test_code_of_a_checkpoint_at_any_depth(engine, key, value):
    inner = {"a": [{"model": "evil/x", key: value}]}
    for given in (inner, json.dumps(inner)):
        with pytest.raises(UsageError, match="runs no code") as caught:
            CHECKS[engine]({OPTIONS[engine]: given})
        assert key in caught.value.message


@pytest.mark.parametrize("engine", CHECKS)
@pytest.mark.parametrize(
    "inner",
    [
        {"password": "s3cret"},
        {"redis": {"auth_token": "s3cret"}},
        {"nodes": [{"awsSecretAccessKey": "s3cret"}]},
        {"HF_TOKEN": "s3cret"},
        {"api_key": "s3cret"},
        {"url": "redis://me:s3cret@cache:6379"},
        {"urls": ["https://s3cret@cache"]},
    ],
)
def test_no_secret_at_any_depth(engine, inner):
    for given in (inner, json.dumps(inner)):
        with pytest.raises(UsageError, match="secret, which everybody can read") as caught:
            CHECKS[engine]({OPTIONS[engine]: given})
        assert "s3cret" not in caught.value.message + caught.value.hint


@pytest.mark.parametrize("engine", CHECKS)
def test_values_that_only_look_alike_pass(engine):
    given = {
        "trust_remote_code": False,
        "max_tokens": 5,
        "eos_token": "</s>",
        "use_auth_token": False,
        "template": "{% if not json %}",
        "name": "ssh://git@host",
    }
    assert CHECKS[engine]({OPTIONS[engine]: given})


@pytest.mark.parametrize("value", [["x", "--trust-remote-code"], "-O3", "--config=/x"])
def test_no_value_is_another_option(value):
    """The engines' parsers take words that begin with dashes for options, even from a file."""
    with pytest.raises(UsageError, match="another option"):
        vllm.known_options().checked({"middleware": value})
    assert vllm.known_options().checked({"stream-interval": -1}) == {"stream-interval": -1}


@pytest.mark.parametrize(
    ("engine", "extra", "hint"),
    [
        ("vllm", {"tool-call-parser": "hermess"}, "did you mean hermes"),
        ("vllm", {"tool-call-parser": True}, "hermes"),
        ("vllm", {"tool-call-parser": ["hermes"]}, "hermes"),
        ("vllm", {"reasoning-parser": "deepseek"}, "did you mean deepseek"),
        ("vllm", {"enable-auto-tool-choice": True}, "set serve.extra.tool-call-parser too: "),
        ("vllm", {"enable-log-outputs": True}, "set serve.extra.enable-log-requests too"),
        ("vllm", {"seed": "seven"}, "number"),
        ("vllm", {"seed": True}, "number"),
        ("vllm", {"max-logprobs": [5]}, "number"),
        ("vllm", {"seed": "2020-01-01"}, "number"),
        ("vllm", {"scheduling-policy": "fifo"}, "fcfs"),
        ("vllm", {"chat-template-content-format": "parts"}, "openai"),
        ("vllm-cpu", {"tool-call-parser": "step5"}, "step3"),  # later than the build for CPUs
        ("sglang", {"tool-call-parser": "hermess"}, "hermes"),
        ("sglang", {"reasoning-parser": "qwen"}, "qwen3"),
        ("sglang", {"schedule-policy": "first"}, "fcfs"),
        ("sglang", {"page-size": "big"}, "number"),
        ("tgi", {"rope-scaling": "yarn"}, "linear"),
        ("llamacpp", {"reasoning-format": "deepseeks"}, "did you mean deepseek"),
        ("llamacpp", {"flash-attn": "maybe"}, "auto, off, on"),
        ("llamacpp", {"top-k": "many"}, "number"),
        ("llamacpp", {"LLAMA_ARG_TOP_K": "many"}, "number"),
    ],
)
def test_a_value_that_the_engine_does_not_know(engine, extra, hint):
    with pytest.raises(UsageError, match=r"serve\.extra") as caught:
        FURTHER[engine](extra)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("engine", "extra"),
    [
        ("vllm", {"tool-call-parser": "hermes", "enable-auto-tool-choice": True}),
        ("vllm", {"tool_call_parser": "granite_20b_fc", "seed": "7", "watermark": 0.01}),
        ("vllm", {"tool-call-parser": "step5"}),
        ("vllm", {"tool-call-parser": "mine", "tool-parser-plugin": "/models/mine.py"}),
        ("vllm", {"enable-auto-tool-choice": False, "log-level": "info"}),
        ("vllm", {"kv-cache-metrics-sample": "1e-2", "max-log-len": -1}),
        ("sglang", {"tool-call-parser": "auto", "reasoning-parser": "deepseek-r1"}),
        ("sglang", {"log-requests-level": 2, "schedule-conservativeness": 0.3}),
        ("llamacpp", {"flash-attn": True, "reasoning": "off", "threads": -1, "temp": ".5"}),
        ("llamacpp", {"flash-attn": "enabled", "pooling": "mean"}),
    ],
)
def test_a_value_that_it_knows(engine, extra):
    assert FURTHER[engine](extra)
