"""What vLLM says of a model's inputs; run with vLLM's packages, not with ours.

Reads lines with a "model", its folder, and one of three questions; answers each with a line "TOLD "
and JSON, or the error:
- "texts", and "tokens" if each token is labelled: probabilities by a text's head, or its tokens';
- "pictures", by path: the likeliest next tokens after a question about each, and the prompt's ids;
- "ids": the log-probability of each of these tokens but the first.
Each model has a process of its own, forked after the imports.
"""

import base64
import json
import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", TORCH_COMPILE_DISABLE="1",
                  VLLM_ENABLE_V1_MULTIPROCESSING="0",
                  VLLM_CPU_INT4_W4A8="0")  # fmt: skip
# The last as images have it: else vLLM rounds the inputs of 4-bit weights on CPUs with AMX.

from pathlib import Path

from vllm import LLM, SamplingParams


def started(model: str, **more) -> LLM:
    small = {"max_num_seqs": 2, "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}
    return LLM(model, **{**small, **more})


def of_texts(model: str, texts: list[str], tokens: bool) -> list[list[float]]:
    engine = started(
        model, runner="pooling", dtype="float32", max_model_len=60,
        pooler_config={"task": "token_classify"} if tokens else None,
    )  # fmt: skip
    if tokens:
        found = engine.encode(texts, pooling_task="token_classify", use_tqdm=False)
        return [one.outputs.data.float().tolist() for one in found]
    return [one.outputs.probs for one in engine.classify(texts, use_tqdm=False)]


def of_pictures(model: str, pictures: list[str]) -> list:
    engine = started(
        model, dtype="bfloat16", max_model_len=256, mm_processor_cache_gb=0, block_size=32
    )
    return [of_picture(engine, picture) for picture in pictures]


def of_picture(engine: LLM, picture: str) -> tuple[dict[int, float], list[int]]:
    data = base64.b64encode(Path(picture).read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": "Which colour is this?"},
    ]
    asked = SamplingParams(max_tokens=1, temperature=0, logprobs=5)
    (said,) = engine.chat([{"role": "user", "content": content}], asked, use_tqdm=False)
    (row,) = said.outputs[0].logprobs
    return {token: value.logprob for token, value in row.items()}, said.prompt_token_ids


def of_ids(model: str, ids: list[int]) -> list[float]:
    engine = started(
        model, dtype="bfloat16", max_model_len=512, kv_cache_memory_bytes=256 << 20, block_size=32
    )
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    (said,) = engine.generate({"prompt_token_ids": ids}, asked, use_tqdm=False)
    rows = zip(said.prompt_logprobs[1:], ids[1:], strict=True)
    return [row[token].logprob for row, token in rows]


ASK = {"texts": of_texts, "pictures": of_pictures, "ids": of_ids}

for line in sys.stdin:
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    try:
        asked = json.loads(line)
        ask = next(known for key, known in ASK.items() if key in asked)
        result = ask(**asked)
    except Exception as error:  # noqa: BLE001  # whatever stops it is the answer
        result = f"{type(error).__name__}: {error}"
    print(f"\nTOLD {json.dumps(result)}", flush=True)  # noqa: T201
    os._exit(0)
