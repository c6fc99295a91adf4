"""What vLLM says of a prompt's tokens; run with vLLM's packages, not with ours.

Reads lines {"model": folder, "ids": token ids}; answers each with a line "TOLD " and JSON: the
log-probability of each token but the first, or the error. Each model has a process of its own,
forked after the imports.
"""

import json
import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", TORCH_COMPILE_DISABLE="1",
                  VLLM_ENABLE_V1_MULTIPROCESSING="0")  # fmt: skip

from vllm import LLM, SamplingParams


def told(model: str, ids: list[int]) -> list[float]:
    engine = LLM(
        model, dtype="bfloat16", max_model_len=512, max_num_seqs=2, enforce_eager=True,
        kv_cache_memory_bytes=256 << 20, block_size=32,
    )  # fmt: skip
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    (said,) = engine.generate({"prompt_token_ids": ids}, asked, use_tqdm=False)
    rows = zip(said.prompt_logprobs[1:], ids[1:], strict=True)
    return [row[token].logprob for row, token in rows]


for line in sys.stdin:
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    try:
        result = told(**json.loads(line))
    except Exception as error:  # noqa: BLE001  # whatever stops it is the answer
        result = f"{type(error).__name__}: {error}"
    print(f"\nTOLD {json.dumps(result)}", flush=True)  # noqa: T201
    os._exit(0)
