"""Chat messages as plain text, where no model's template is at hand: traces, and services that take messages only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def plain_chat(messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True) -> str:
    """`role: content`, a blank line between messages."""
    lines = "".join(f"{message['role']}: {message['content']}\n\n" for message in messages)
    return lines + ("assistant: " if add_generation_prompt else "")
