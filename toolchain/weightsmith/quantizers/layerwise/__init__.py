"""AWQ and GPTQ one decoder layer at a time, in torch: what `walked.py` runs in its builder."""
