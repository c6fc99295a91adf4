"""What transformers says after a prompt with a picture; run with vLLM's packages, not with ours.

Arguments: a model's folder, a picture, and the prompt's token ids as JSON, with the picture's
places in them; "both ways" besides, if Gemma 3's tokens of a picture see those after them, too.
Prints the log-probabilities of all next tokens as JSON, computed in float32.
"""

import inspect
import json
import os
import sys

os.environ.update(HF_HUB_OFFLINE="1")

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText

folder, picture, ids = sys.argv[1], sys.argv[2], torch.tensor([json.loads(sys.argv[3])])
prepared = AutoImageProcessor.from_pretrained(folder)(Image.open(picture), return_tensors="pt")
network = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
seen = (ids == network.config.image_token_id).long()
given = {**prepared, "mm_token_type_ids": seen}
if "both ways" in sys.argv:
    given["token_type_ids"] = seen
taken = inspect.signature(network.forward).parameters
given = {name: value for name, value in given.items() if name in taken}
given["pixel_values"] = given["pixel_values"].float()
with torch.inference_mode():
    logits = network(input_ids=ids, **given).logits[0, -1]
print(json.dumps(logits.log_softmax(-1).tolist()))  # noqa: T201
