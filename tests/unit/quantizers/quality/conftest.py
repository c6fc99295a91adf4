"""The texts that judgements in these tests say they were made on."""

from weightsmith.core.values import Digest
from weightsmith.quantizers.quality.result import TextsUsed

TEXTS = TextsUsed(
    source="texts.jsonl",
    texts=3,
    held_out=1,
    general=0,
    digest=Digest("sha256:" + "a" * 64),
    held_out_digest=Digest("sha256:" + "b" * 64),
)
