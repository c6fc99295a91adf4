"""Chat templates of families that call tools, written by their published formats.

Each is as short as the format allows: what a template says around a call, and how it words one. The
real ones have the same marks and the same calls, and many more branches.
"""

from __future__ import annotations

from dataclasses import dataclass

_SAID = "{% for m in messages %}<ROLE:{{ m.role }}>{{ m.content or '' }}"
_CALLS = "{% for c in m.tool_calls or [] %}{% set f = c.function %}"


@dataclass(frozen=True, kw_only=True)
class Family:
    """A template, and what reads what it renders."""

    template: str
    vllm: str
    sglang: str = ""
    thoughts: str = ""
    """vLLM's parser for them."""
    model_type: str = "llama"
    marks: tuple[str, ...] = ()
    """Texts that are one token each for its tokenizer."""


def _words(
    call: str, *, tools: str = "{{ tools | tojson }}", around: tuple[str, str] = ("", ""),
    between: str = "", thoughts: str = "",
) -> str:  # fmt: skip
    """Return a template that renders each call as `call`, with `f` the function."""
    begin, end = around
    return (
        f"{{% if tools %}}<ROLE:tools>{tools}{{% endif %}}{_SAID}"
        f"{{% if m.tool_calls %}}{begin}{{% endif %}}"
        f"{_CALLS}{call}{{% if not loop.last %}}{between}{{% endif %}}{{% endfor %}}"
        f"{{% if m.tool_calls %}}{end}{{% endif %}}"
        "{% endfor %}{% if add_generation_prompt %}<ROLE:assistant>{% endif %}"
        f"{{# {thoughts} #}}"
    )


_JSON = '{"name": {{ f.name | tojson }}, "arguments": {{ f.arguments | tojson }}}'
_VALUE = "{{ v if v is string else v | tojson }}"
FAMILIES = {
    "hermes": Family(
        template=_words(f"<tool_call>\n{_JSON}\n</tool_call>", between="\n"),
        vllm="hermes",
        sglang="qwen25",
        marks=("<tool_call>", "</tool_call>"),
    ),
    "qwen3": Family(
        template=_words(
            f"<tool_call>\n{_JSON}\n</tool_call>", between="\n",
            thoughts="<think> </think> enable_thinking",
        ),
        vllm="hermes", sglang="qwen25", thoughts="qwen3", model_type="qwen3",
        marks=("<tool_call>", "</tool_call>", "<think>", "</think>"),
    ),
    "qwen3-coder": Family(
        template=_words(
            "<tool_call>\n<function={{ f.name }}>\n{% for k, v in f.arguments.items() %}"
            f"<parameter={{{{ k }}}}>\n{_VALUE}\n</parameter>\n{{% endfor %}}</function>\n"
            "</tool_call>", between="\n",
        ),
        vllm="qwen3_coder", sglang="qwen3_coder", model_type="qwen3_moe",
        marks=("<tool_call>", "</tool_call>"),
    ),
    "llama3": Family(
        template=_words(
            '{"name": {{ f.name | tojson }}, "parameters": {{ f.arguments | tojson }}}<|eot_id|>'
        ),
        vllm="llama3_json", sglang="llama3",
        marks=("<|python_tag|>", "<|eot_id|>"),
    ),
    "mistral": Family(
        template=_words(
            _JSON, around=("[TOOL_CALLS][", "]"), between=", ",
            tools="[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]",
        ),
        vllm="mistral", model_type="mistral",
        marks=("[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    ),
    "mistral-small": Family(
        template=_words(
            _JSON, around=("[TOOL_CALLS] [", "]"), between=", ",
            tools="[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]",
        ),
        vllm="mistral", sglang="mistral", model_type="mistral",
        marks=("[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    ),
    "glm-4.5": Family(
        template=_words(
            "\n<tool_call>{{ f.name }}\n{% for k, v in f.arguments.items() %}"
            f"<arg_key>{{{{ k }}}}</arg_key>\n<arg_value>{_VALUE}</arg_value>\n{{% endfor %}}"
            "</tool_call>",
            tools="[gMASK]<sop>\n{{ tools | tojson }}<tool_call>{function-name}\n<arg_key>",
            thoughts="<think></think>",
        ),
        vllm="glm45", sglang="glm45", thoughts="glm45", model_type="glm4_moe",
        marks=("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>",
               "</arg_value>", "<think>", "</think>"),
    ),
    "glm-4.7": Family(
        template=_words(
            "<tool_call>{{ f.name }}{% for k, v in f.arguments.items() %}"
            f"<arg_key>{{{{ k }}}}</arg_key><arg_value>{_VALUE}</arg_value>{{% endfor %}}"
            "</tool_call>",
            tools="[gMASK]<sop>\n{{ tools | tojson }}<tool_call>{function-name}<arg_key>",
            thoughts="<think></think>",
        ),
        vllm="glm47", sglang="glm47", thoughts="glm45", model_type="glm4_moe",
        marks=("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>",
               "</arg_value>", "<think>", "</think>"),
    ),
    "deepseek-v3": Family(
        template=_words(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ f.name }}\n```json\n"
            "{{ f.arguments | tojson }}\n```<｜tool▁call▁end｜>",
            around=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"), between="\n",
        ),
        vllm="deepseek_v3", sglang="deepseekv3", model_type="deepseek_v3",
        marks=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
               "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
    ),
    "deepseek-v3.1": Family(
        template=_words(
            "<｜tool▁call▁begin｜>{{ f.name }}<｜tool▁sep｜>{{ f.arguments | tojson }}"
            "<｜tool▁call▁end｜>",
            around=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
            thoughts="thinking <｜User｜> <think> </think>",
        ),
        vllm="deepseek_v31", sglang="deepseekv31", thoughts="deepseek_v3",
        model_type="deepseek_v3",
        marks=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
               "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<think>", "</think>"),
    ),
    "deepseek-r1": Family(
        template=_words(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ f.name }}\n```json\n"
            "{{ f.arguments | tojson }}\n```<｜tool▁call▁end｜>",
            around=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"), between="\n",
            thoughts="<｜User｜> <｜Assistant｜><think> </think>",
        ),
        vllm="deepseek_v3", sglang="deepseekv3", thoughts="deepseek_r1", model_type="qwen2",
        marks=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
               "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<think>", "</think>"),
    ),
    "granite-3": Family(
        template=_words(
            _JSON, around=("<|tool_call|>[", "]"), between=", ",
            thoughts="<|start_of_role|>",
        ),
        vllm="granite", model_type="granite",
        marks=("<|tool_call|>", "<|start_of_role|>"),
    ),
    "granite-4": Family(
        template=_words(
            f"<tool_call>\n{_JSON}\n</tool_call>", between="\n", thoughts="<|start_of_role|>"
        ),
        vllm="granite4", sglang="hermes", model_type="granitemoehybrid",
        marks=("<tool_call>", "</tool_call>", "<|start_of_role|>"),
    ),
    "gpt-oss": Family(
        template=_words(
            "<|start|>assistant to=functions.{{ f.name }}<|channel|>commentary json<|message|>"
            "{{ f.arguments | tojson }}<|call|>"
        ),
        vllm="openai", sglang="gpt-oss", thoughts="openai_gptoss", model_type="gpt_oss",
    ),
    "gemma-4": Family(
        template=(
            '{% macro word(v, keys) %}{% if v is string %}<|"|>{{ v }}<|"|>'
            "{% elif v is mapping %}{{ '{' }}{% for k, x in v.items() %}{{ k }}:"
            "{{ word(x) }}{% if not loop.last %},{% endif %}{% endfor %}{{ '}' }}"
            "{% elif v is boolean or v is none or v is number %}{{ v | tojson }}"
            "{% else %}[{% for x in v %}{{ word(x) }}{% if not loop.last %},{% endif %}"
            "{% endfor %}]{% endif %}{% endmacro %}"
            + _words(
                "<|tool_call>call:{{ f.name }}{{ word(f.arguments) }}<tool_call|>",
                thoughts="<|channel>thought <channel|>",
            )
        ),
        vllm="gemma4", sglang="gemma4", thoughts="gemma4", model_type="gemma4",
        marks=("<|tool_call>", "<tool_call|>", "<|channel>", "<channel|>", '<|"|>'),
    ),
    "kimi-k2": Family(
        template=_words(
            "<|tool_call_begin|>functions.{{ f.name }}:{{ loop.index0 }}"
            "<|tool_call_argument_begin|>{{ f.arguments | tojson }}<|tool_call_end|>",
            around=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
            thoughts="<|im_middle|> <think> </think>",
        ),
        vllm="kimi_k2", sglang="kimi_k2", thoughts="kimi_k2", model_type="kimi_k2",
        marks=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>",
               "<|tool_call_begin|>", "<|tool_call_end|>", "<|tool_call_argument_begin|>",
               "<think>", "</think>"),
    ),
    "minimax-m2": Family(
        template=_words(
            '<invoke name="{{ f.name }}">\n{% for k, v in f.arguments.items() %}'
            f'<parameter name="{{{{ k }}}}">{_VALUE}</parameter>\n{{% endfor %}}</invoke>\n',
            around=("<minimax:tool_call>\n", "</minimax:tool_call>"),
            thoughts="<think> </think>",
        ),
        vllm="minimax_m2", sglang="minimax-m2", thoughts="minimax_m2", model_type="minimax_m2",
        marks=("<minimax:tool_call>", "</minimax:tool_call>", "<think>", "</think>"),
    ),
}  # fmt: skip
PLAIN = _SAID + "{% endfor %}"
"""A template without tools."""
