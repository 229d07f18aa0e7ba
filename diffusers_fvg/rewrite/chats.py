"""Builds the chats that ask a model about a prompt, checks and judges the answers, and asks again after an invalid one."""

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

# Most answers to one question about a prompt; the first is greedy.
ATTEMPTS = 2
RETRY_SEED = 0
# Most tokens of a server's answer to the judge's questions about a caption.
JUDGE_TOKENS = 200


def build_messages(
    prompt: str,
    instruction: str = INSTRUCTION,
    examples: Sequence[tuple[str, Any]] = EXAMPLES,
    write: Callable[[Any], str] = format_answer,
) -> Chat:
    """Builds the chat that asks about a prompt, for sampling and for training a rewriter.

    Args:
        prompt (`str`): what should happen in the video.
        instruction (`str`, *optional*): the system turn; an empty one is left out of the chat.
        examples (sequence of `(prompt, answer)`, *optional*): earlier turns.
        write (`Callable`, *optional*): formats an example's answer as text.

    Returns:
        `list[dict[str, str]]`: turns with a `role` and a `content`, the last one the user's.
    """
    messages = [{"role": "system", "content": instruction}] if instruction else []
    for question, answer in examples:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": write(answer)}]
    return [*messages, {"role": "user", "content": prompt}]


def chat_about(rewriter: FirstFrameRewriter, prompt: str, task: RewriterTask, with_examples: bool) -> Chat:
    """Builds the chat of [`FirstFrameRewriter.messages`]."""
    own = rewriter.own_instruction(task)
    instruction = (task.instruction if own is None else own).replace("{num_moments}", str(task.captions))
    examples = rewriter.examples if rewriter.examples is not None else with_examples
    if examples is True or (examples and task.name != FIRST_FRAME.name):
        examples = choose_examples(prompt, task.examples)
    pairs = [(question, answer) for question, answer in examples or ()]
    return build_messages(prompt, instruction, pairs, task.write)


def build_retry(messages: Chat, reason: str) -> Chat:
    """Builds the chat that asks again after an invalid answer.

    It leaves that answer out: small models would continue or discuss it and lose the prompt.
    """
    *earlier, question = messages
    hint = f"(An earlier answer was not valid: {reason}.)"
    return [*earlier, {"role": "user", "content": f"{question['content']}\n{hint}"}]


def without_system_role(messages: Chat) -> Chat:
    """Moves the system turn into the first user turn, for chat templates without a system role."""
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
    """Checks the first answer to a prompt, and asks again until an answer is valid or the attempts are used up.

    Args:
        rewriter (`FirstFrameRewriter`): the rewriter that is asked.
        task (`RewriterTask`): the kind of question.
        prompt (`str`): what should happen in the video.
        chat (`list[dict[str, str]]`): the chat that the answer belongs to. Its last turn may hold more than the prompt.
        answer (`str`): the first answer.
        limit (`int`): most tokens of each later answer.
        seconds (`float`): time that the first answer took.
        should_stop (`Callable`): ends the attempts once it returns `True`.
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
        # Examples show the form, but small models copy their words. So they are shown only after an answer of another form.
        chat = chat_about(rewriter, question, task, misses_form)
        chat = chat if is_simpler else build_retry(chat, problem)
        if attempt == most or should_stop() or rewriter.excess_tokens(chat, limit) > 0:
            status = "fallback"
            break
        # Each prompt is asked alone and with the same seed, so its result does not depend on the rest of the batch.
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
    """Returns the parsed answer, what the word checks find wrong with it, and whether it has another form than asked for."""
    try:
        made = task.read(answer)
    except ValueError as error:
        return None, str(error), not isinstance(error, CutAnswer)
    return made, task.problem(prompt, made, rewriter.read_word, [turn["content"] for turn in chat[:-1]]), False


def _judged(rewriter: FirstFrameRewriter, task: RewriterTask, prompt: str, made: Any) -> tuple[int, str | None]:
    """Asks the model about the first frame; returns the number of questions and what is wrong by its answers."""
    if not rewriter.judge or task.first_frame is None:
        return 0, None
    caption, plan = task.first_frame(made), made.plan if isinstance(made, PlannedCaption) else None
    asked = questions(prompt, plan)
    if rewriter.endpoint is not None:
        chat, schema = chat_of_all(prompt, caption, asked), answers_schema(len(asked))
        try:
            (answer,) = rewriter([chat], JUDGE_TOKENS, schema=schema)
        except OSError as error:
            # The caption has passed the word checks and stays usable.
            logger.warning(f"The caption of {prompt!r} was not judged ({error}).")
            return 0, None
        return len(asked), verdict(asked, read_answers(answer, len(asked)))
    chats = [chat_of(prompt, caption, question) for question in asked]
    if any(rewriter.excess_tokens(chat, 1) > 0 for chat in chats):
        return 0, None
    return len(asked), verdict(asked, rewriter(chats, 1, choices=choice_tokens(rewriter.tokenizer)))
