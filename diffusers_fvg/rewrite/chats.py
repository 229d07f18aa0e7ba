"""Chats as lists of turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .prompts import EXAMPLES, INSTRUCTION, format_answer


def build_messages(
    prompt: str,
    instruction: str = INSTRUCTION,
    examples: Sequence[tuple[str, Any]] = EXAMPLES,
    write: Callable[[Any], str] = format_answer,
) -> list[dict[str, str]]:
    """The chat that asks about a prompt, for sampling and for training a rewriter alike.

    Args:
        prompt (`str`): what should happen in the video.
        instruction (`str`, *optional*): the system turn; left out of the chat where it is empty.
        examples (sequence of `(prompt, answer)`, *optional*): earlier turns.
        write (`Callable`, *optional*): an answer of the examples as text.

    Returns:
        `list[dict[str, str]]`: turns with a `role` and a `content`, the last one the user's.
    """
    messages = [{"role": "system", "content": instruction}] if instruction else []
    for question, answer in examples:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": write(answer)}]
    return [*messages, {"role": "user", "content": prompt}]


def build_retry(messages: list[dict[str, str]], reason: str) -> list[dict[str, str]]:
    """The chat that asks again after an answer that was not valid.

    The bad answer is not in it: small models go on with what they wrote, or discuss it, and lose the prompt.
    """
    *earlier, question = messages
    hint = f"(An earlier answer was not valid: {reason}.)"
    return [*earlier, {"role": "user", "content": f"{question['content']}\n{hint}"}]


def without_system_role(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same chat for a template that knows no system role: the instruction opens the first user turn."""
    if messages[0]["role"] != "system":
        return messages
    system, first, *rest = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *rest]
