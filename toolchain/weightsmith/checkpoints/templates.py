"""Render chat templates, which are untrusted programs, with transformers in Jinja's sandbox.

The sandbox prevents access to files and Python, but does not limit time and memory.
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
    """Render messages by the tokenizer's chat template; `answer` adds the generation prompt.

    Raises InputRefused if the template raises an error or takes too much time or memory.
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
            f"{named} exceeded {time_limits.FOREIGN_SECONDS:g} s of CPU time for one conversation",
            hint="look for nested loops in it, or give the model another chat_template.jinja",
        ) from None
    except MemoryError:
        raise InputRefused(
            f"{named} exceeded the job's memory for one conversation",
            hint="look for strings that grow in it, or give the model another chat_template.jinja",
        ) from None
    except Exception as error:  # noqa: BLE001 - templates can raise anything
        raise InputRefused(
            f"{named} refused a conversation: {error}",
            hint=hint or "write the conversations in the form that the template expects",
        ) from None
