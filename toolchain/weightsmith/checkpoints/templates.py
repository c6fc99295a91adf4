"""Chat templates: programs that a model's author wrote, run by transformers in Jinja's sandbox.

The sandbox keeps them from files and from Python; nothing there limits time and memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weightsmith import time_limits
from weightsmith.errors import InputRefused
from weightsmith.time_limits import TooLong, cpu_limit, doing


def render_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, answer: bool, hint: str = ""
) -> str:
    """Return what the tokenizer's chat template makes of messages; `answer` opens the model's turn.

    Raises InputRefused where it refuses them or takes too much time or memory.
    """
    named = f"the chat template of {tokenizer.name_or_path}"
    try:
        with doing(f"rendering {named}"), cpu_limit(time_limits.FOREIGN_SECONDS):
            return str(
                tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    add_generation_prompt=answer,
                    tokenize=False,
                )
            )
    except TooLong:
        raise InputRefused(
            f"{named} takes more than {time_limits.FOREIGN_SECONDS:g} s of CPU time for one "
            "conversation",
            hint="look for loops inside loops in it, or give the model another chat_template.jinja",
        ) from None
    except MemoryError:
        raise InputRefused(
            f"{named} takes more memory for one conversation than the whole job may have",
            hint="look for texts that it doubles, or give the model another chat_template.jinja",
        ) from None
    except Exception as error:  # noqa: BLE001 - templates raise what they like
        raise InputRefused(
            f"{named} refuses a conversation: {error}",
            hint=hint or "write the conversations as the model expects them",
        ) from None
