"""Chats about a prompt, as lists of turns: how they ask, and what becomes of the answer. It is checked, judged, taken, asked
for again, or given up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

from diffusers.utils import logging

from .answers import CutAnswer
from .judge import answers_schema, chat_of, chat_of_all, choice_tokens, questions, read_answers, verdict
from .outcome import RewriteOutcome
from .plan import PlannedCaption
from .prompts import EXAMPLES, INSTRUCTION, choose_examples, format_answer
from .tasks import FIRST_FRAME, RewriterTask


if TYPE_CHECKING:
    from .rewriter import FirstFrameRewriter

logger = logging.get_logger(__name__)

# Turns with a role and a content.
Chat = list[dict[str, str]]

# Answers to one question about a prompt, the first of which is greedy.
ATTEMPTS = 2
RETRY_SEED = 0
# Longest answer of a server to questions about a caption.
JUDGE_TOKENS = 200


def build_messages(
    prompt: str,
    instruction: str = INSTRUCTION,
    examples: Sequence[tuple[str, Any]] = EXAMPLES,
    write: Callable[[Any], str] = format_answer,
) -> Chat:
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


def chat_about(rewriter: FirstFrameRewriter, prompt: str, task: RewriterTask, with_examples: bool) -> Chat:
    """[`FirstFrameRewriter.messages`]"""
    own = rewriter.own_instruction(task)
    instruction = (task.instruction if own is None else own).replace("{num_moments}", str(task.captions))
    examples = rewriter.examples if rewriter.examples is not None else with_examples
    if examples is True or (examples and task.name != FIRST_FRAME.name):
        examples = choose_examples(prompt, task.examples)
    pairs = [(question, answer) for question, answer in examples or ()]
    return build_messages(prompt, instruction, pairs, task.write)


def build_retry(messages: Chat, reason: str) -> Chat:
    """The chat that asks again after an answer that was not valid.

    The bad answer is not in it: small models go on with what they wrote, or discuss it, and lose the prompt.
    """
    *earlier, question = messages
    hint = f"(An earlier answer was not valid: {reason}.)"
    return [*earlier, {"role": "user", "content": f"{question['content']}\n{hint}"}]


def without_system_role(messages: Chat) -> Chat:
    """The same chat for a template that knows no system role: the instruction opens the first user turn."""
    if messages[0]["role"] != "system":
        return messages
    system, first, *rest = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def settle(
    rewriter: FirstFrameRewriter,
    task: RewriterTask,
    prompt: str,
    chat: Chat,
    answer: str,
    limit: int,
    seconds: float,
    should_stop: Callable[[], bool],
) -> RewriteOutcome:
    """What becomes of the first answer to a prompt, which took so many seconds. The later ones have up to `limit` tokens.

    `chat` is how it was asked for. The user's turn may hold more than the prompt.
    """
    began = time.perf_counter() - seconds
    reasons, best, plan, judged, judge_seconds = [], None, None, 0, 0.0
    question = chat[-1]["content"]
    most = ATTEMPTS
    for attempt in count(1):
        made, problem, misses_form = _checked(rewriter, task, prompt, chat, answer)
        if problem is None:
            judging = time.perf_counter()
            number, problem = _judged(rewriter, task, prompt, made)
            judged, judge_seconds = judged + number, judge_seconds + time.perf_counter() - judging
            best = task.result(made) if best is None else best
        if problem is None:
            best, status = task.result(made), "accepted" if attempt == 1 else "repaired"
            plan = made.plan if isinstance(made, PlannedCaption) else None
            break
        reasons.append(problem)
        simpler = task.simpler if made is None else None
        is_simpler = simpler is not None
        if simpler is not None:
            task, most = simpler, attempt + ATTEMPTS
        # Examples show the form. A small model copies their words, so that one that knows it is better off without.
        chat = chat_about(rewriter, question, task, misses_form)
        chat = chat if is_simpler else build_retry(chat, problem)
        if attempt == most or should_stop() or rewriter.excess_tokens(chat, limit) > 0:
            status = "fallback"
            break
        # One by one, each from the same seed: what a prompt gets does not depend on its neighbours.
        seed = None if is_simpler else RETRY_SEED + attempt - 1
        (answer,) = rewriter([chat], limit, seed, should_stop, rewriter.answer_schema(task))
    if status == "fallback" and not should_stop():
        stands_in = "the prompt's start" if best is None else "the answer with the fewest faults"
        logger.warning(f"No valid {task.subject} for {prompt!r} ({reasons[-1]}); {stands_in} is used.")
    made = task.fallback(prompt) if best is None else best
    seconds = time.perf_counter() - began
    return RewriteOutcome(status, made, tuple(reasons), attempt, seconds, judged, judge_seconds, plan)


def _checked(
    rewriter: FirstFrameRewriter, task: RewriterTask, prompt: str, chat: Chat, answer: str
) -> tuple[Any, str | None, bool]:
    """What an answer holds, what is wrong with it by its words, and whether it has another form than the one asked for."""
    try:
        made = task.read(answer)
    except ValueError as error:
        return None, str(error), not isinstance(error, CutAnswer)
    return made, task.problem(prompt, made, rewriter.read_word, [turn["content"] for turn in chat[:-1]]), False


def _judged(rewriter: FirstFrameRewriter, task: RewriterTask, prompt: str, made: Any) -> tuple[int, str | None]:
    """How many questions the model was asked about the first frame, and what is wrong with it by its answers."""
    if not rewriter.judge or task.first_frame is None:
        return 0, None
    caption, plan = task.first_frame(made), made.plan if isinstance(made, PlannedCaption) else None
    asked = questions(prompt, plan)
    if rewriter.endpoint is not None:
        chat, schema = chat_of_all(prompt, caption, asked), answers_schema(len(asked))
        try:
            (answer,) = rewriter([chat], JUDGE_TOKENS, schema=schema)
        except OSError as error:
            # The caption is there, and its words are right.
            logger.warning(f"The caption of {prompt!r} was not judged ({error}).")
            return 0, None
        return len(asked), verdict(asked, read_answers(answer, len(asked)))
    chats = [chat_of(prompt, caption, question) for question in asked]
    if any(rewriter.excess_tokens(chat, 1) > 0 for chat in chats):
        return 0, None
    return len(asked), verdict(asked, rewriter(chats, 1, choices=choice_tokens(rewriter.tokenizer)))
