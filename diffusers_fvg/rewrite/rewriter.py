"""Stage 1: a language model writes the caption of a video's first frame, a storyboard or a motion caption from the prompt."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers.utils import logging
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..atomic import naming, replacing_entries
from ..checks import check_at_least_one, check_texts
from ..devices import get_module_execution_device
from ..locks import exclusive
from .chat_endpoint import ChatEndpoint
from .chats import Chat, chat_about, settle, without_system_role
from .generation import answers_to, has_system_role, schema_processors
from .outcome import RewriteOutcome
from .rewriter_files import CONFIG_NAME, load_rewriter
from .storyboard import Moment
from .tasks import FIRST_FRAME, MOTION, PLANNED_FRAME, TASK_NAMES, RewriterTask, motion_question, storyboard_task


logger = logging.get_logger(__name__)

# Prompts that are answered in one batch. The KV cache of a 7B model for 8 chats with the examples is about half a gigabyte.
BATCH_SIZE = 8


class FirstFrameRewriter(torch.nn.Module):
    """A chat model that turns the prompt of a video into the prompt of its first frame, a storyboard or a motion caption.

    The model plans the scene and writes the caption. The caption is checked against the prompt (`caption_problem`), and the
    model answers yes-or-no questions about it ([`judge`]). If an answer loses an object, a colour or a count, or tells what
    happens later, the model is asked again and told the reason. If no answer is valid, the best one or the prompt's words
    about its start are used, with a warning. Decoding is greedy: equal prompts give equal captions, alone or in a batch.

    A rewriter has either a transformers causal language model (`model` and `tokenizer`) or an `endpoint`. Only the caller can
    name an endpoint: it is neither loaded from a file nor saved. As a component of a pipeline the rewriter takes the
    pipeline's dtype and device and can be offloaded, because the model runs within `forward` only.

    Args:
        model (`PreTrainedModel`, *optional*): causal language model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): tokenizer of the model, with a chat template.
        endpoint (`ChatEndpoint`, *optional*): server that replaces the model.
        reference (`dict`, *optional*): source of `model`: its Hub repository under `"model"`, and `"revision"` and
            `"gguf_file"` if they are needed. With it, `save_pretrained` writes the reference and no weights; set it to `None`
            to save the weights.
        instruction (`str` or `dict`, *optional*): system turn of the question for a first frame, or a dict with those of
            `"first_frame"`, `"storyboard"` (where `{num_moments}` is replaced by the number) and `"motion"`. Left out, those
            of `tasks.py` are used; `""` is for a model that is trained for this question alone.
        examples (`bool` or list of `[prompt, caption]`, *optional*): earlier turns of the chat. `True` selects the examples of
            `tasks.py` that share no word with the prompt; a list gives your own for first frames. Left out, the first
            question has none, and a question after an answer of the wrong form has those of `True`.
        answer_format (`str`, *optional*): form of the answer for a first frame: `"plan"`, an object with the plan and the
            caption under `first_frame`, or `"json"`, the caption alone, for a model that is trained for it.
        judge (`bool`, *optional*): whether to ask the model about the first frames that it wrote, also those of storyboards.
            Left out: `True` with `answer_format="plan"`.
        max_new_tokens (`int`, *optional*): most tokens of a caption, unless a call gives another number. A plan may have 256
            more.

    Raises:
        `ValueError`: neither or both of model and endpoint are given, the tokenizer has no chat template or a broken one, or
            another argument has a value that is not listed here.
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        endpoint: ChatEndpoint | None = None,
        reference: dict[str, str] | None = None,
        instruction: str | Mapping[str, str] | None = None,
        examples: bool | Sequence[Sequence[str]] | None = None,
        answer_format: str = "plan",
        judge: bool | None = None,
        max_new_tokens: int = 256,
    ):
        super().__init__()
        if (endpoint is None) == (model is None) or (model is None) != (tokenizer is None):
            raise ValueError("A rewriter needs either `model` and `tokenizer`, or `endpoint`.")
        if answer_format not in ("plan", "json"):
            raise ValueError(f"`answer_format={answer_format!r}` is not known; use 'plan' or 'json'.")
        if not isinstance(examples, bool | None) and not all(
            len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in examples
        ):
            raise ValueError(f"`examples` must be true, false or a list of [prompt, caption], but is {examples!r}.")
        if isinstance(instruction, Mapping) and not instruction.keys() <= set(TASK_NAMES):
            raise ValueError(f"`instruction` has keys {sorted(instruction)}, but may have {sorted(TASK_NAMES)}.")
        check_at_least_one("max_new_tokens", max_new_tokens)
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.endpoint = endpoint
        self.reference = reference
        self.instruction = instruction
        self.examples = examples
        self.answer_format = answer_format
        self.judge = answer_format == "plan" if judge is None else judge
        self.max_new_tokens = max_new_tokens
        if model is None:
            # Offloading reads the device of every component's first parameter.
            self.placement = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        else:
            assert tokenizer is not None
            if tokenizer.chat_template is None:
                raise ValueError(f"{tokenizer.name_or_path!r} has no chat template; choose an instruct or chat model.")
            self._has_system_role = has_system_role(tokenizer)
        # Compiled grammars of JSON schemas, cached because compilation is slow.
        self._grammars: dict[str, Any] = {}

    # -- loading and saving -------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> FirstFrameRewriter:
        """Loads a rewriter from its folder or from a chat model.

        Args:
            path (`str` or `os.PathLike`): a rewriter's folder, whose `rewriter_config.json` names a Hub repository or has the
                weights beside it in `model/` and `tokenizer/`; or a transformers chat model: a folder, a GGUF file, a folder
                with one, or a Hub repository.
            torch_dtype, dtype (`torch.dtype`, *optional*): dtype of the weights. Both names mean the same; diffusers passes
                `torch_dtype`. Left out, the weights keep their dtype.
            options: `revision` and `gguf_file` (`str`) of a chat model; a rewriter's folder names its own. `token`,
                `cache_dir` and `local_files_only` for the Hub. `quantization_config` of transformers. `trust_remote_code`
                (`bool`): whether to run code from the model's repository. A pipeline that loads its rewriter never runs such
                code; load the rewriter yourself and pass it.

        Raises:
            `ValueError`: the folder has no valid `rewriter_config.json`, or one that names an endpoint; the weights are
                pickles; or the model has its own code and `trust_remote_code` is not set.
            `OSError`: the model is not found.
        """
        if torch_dtype is not None and dtype is not None and torch_dtype != dtype:
            raise ValueError(f"`torch_dtype={torch_dtype}` and `dtype={dtype}` differ; give one of them.")
        model, tokenizer, settings = load_rewriter(path, dtype or torch_dtype, **options)
        return cls(model, tokenizer, **settings)

    def save_pretrained(self, path: str | os.PathLike, safe_serialization: bool = True) -> None:
        """Saves the settings, and the weights unless the rewriter has a `reference`; `from_pretrained` reads the folder.

        The weights are in subfolders: if a component's own folder holds weights, diffusers downloads only these and
        `config.json` from it.

        Args:
            path (`str` or `os.PathLike`): the folder, created if it does not exist.
            safe_serialization (`bool`, *optional*): accepted as in diffusers; weights are always saved as safetensors.

        Raises:
            `ValueError`: the rewriter has an endpoint, which is never saved.
        """
        if self.endpoint is not None:
            raise ValueError(
                "A rewriter with an endpoint is not saved: create it again and pass it where it is needed."
            )
        if not safe_serialization:
            logger.warning("The rewriter is saved as safetensors: transformers writes no other format.")
        config: dict[str, Any] = dict(self.reference or {})
        if self.instruction is not None:
            config["instruction"] = self.instruction if isinstance(self.instruction, str) else dict(self.instruction)
        if self.examples is not None:
            config["examples"] = self.examples if isinstance(self.examples, bool) else [*map(list, self.examples)]
        config |= {"answer_format": self.answer_format, "judge": self.judge, "max_new_tokens": self.max_new_tokens}
        with replacing_entries(path, CONFIG_NAME) as draft, naming(path):
            (draft / CONFIG_NAME).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            if self.model is not None and self.reference is None:
                self.model.save_pretrained(draft / "model")
                self.tokenizer.save_pretrained(draft / "tokenizer")

    # -- placement ----------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return self.placement.dtype if self.model is None else self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.placement.device if self.model is None else self.model.device

    # -- the stage ----------------------------------------------------------------------------------------------------

    def rewrite(
        self,
        prompts: list[str],
        max_new_tokens: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[str]:
        """Writes a caption of the first frame for each prompt.

        Args:
            prompts (`list[str]`): what should happen in the videos.
            max_new_tokens (`int`, *optional*): most tokens of an answer; left out, the rewriter's `max_new_tokens`, and 256
                more for a plan.
            on_progress (`Callable`, *optional*): called as `on_progress(done, total)` with numbers of prompts.
            should_stop (`Callable`, *optional*): asked before every token. Once it returns `True`, each remaining prompt's
                words about its start become its caption.

        Returns:
            `list[str]`: one caption per prompt.

        Raises:
            `ValueError`: a prompt is empty, or does not fit into the model's context together with the answer.
            `OSError`: the endpoint failed for all prompts.
        """
        outcomes = self.rewrite_outcomes(prompts, max_new_tokens, on_progress, should_stop)
        return [outcome.made for outcome in outcomes]

    def rewrite_outcomes(
        self,
        prompts: list[str],
        max_new_tokens: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[RewriteOutcome]:
        """Writes captions as [`rewrite`] does, and returns for each a [`RewriteOutcome`] that tells how it came about."""
        return self._ask(self._first_frame(), prompts, max_new_tokens, on_progress, should_stop)

    def _first_frame(self) -> RewriterTask:
        return PLANNED_FRAME if self.answer_format == "plan" else FIRST_FRAME

    def storyboard(
        self,
        prompts: list[str],
        num_moments: int = 2,
        max_new_tokens: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[list[Moment]]:
        """Writes captions of the first frame and of later moments for each prompt.

        Answers are checked and asked for again as in [`rewrite`]. If none is valid, the prompt's words about its start are
        the only moment.

        Args:
            prompts (`list[str]`): what should happen in the videos.
            num_moments (`int`): most moments, at least 2. There are fewer if the prompt does not settle what is seen later,
                or if no visible change happens.
            max_new_tokens (`int`, *optional*): most tokens of an answer; left out, `num_moments` times the rewriter's
                `max_new_tokens`.
            on_progress, should_stop (*optional*): as in [`rewrite`].

        Returns:
            `list[list[Moment]]`: the moments of each prompt in the order of time, the first at time 0.

        Raises:
            `ValueError`: as in [`rewrite`], or `num_moments` is below 2.
        """
        check_at_least_one("num_moments", num_moments)
        if num_moments is None or num_moments < 2:
            raise ValueError(f"`num_moments={num_moments}` must be at least 2: `rewrite` writes the first frame.")
        outcomes = self._ask(storyboard_task(num_moments), prompts, max_new_tokens, on_progress, should_stop)
        return [[replace(outcome.made[0], rewrite=outcome), *outcome.made[1:]] for outcome in outcomes]

    def describe_motion(
        self,
        prompts: list[str],
        max_new_tokens: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        captions: list[str] | None = None,
    ) -> list[str]:
        """Writes a short caption of the motion after the first frame for each prompt, for an image-to-video model.

        Answers are checked and asked for again as in [`rewrite`]. If none is valid, the prompt itself is returned.

        Args:
            prompts, max_new_tokens, on_progress, should_stop: as in [`rewrite`].
            captions (`list[str]`, *optional*): captions of the first frames, one per prompt. The motion captions name things
                with their words. They are ignored if the rewriter has its own `instruction` for `"motion"`.

        Returns:
            `list[str]`: one motion caption per prompt.

        Raises:
            `ValueError`: as in [`rewrite`], or `captions` and `prompts` differ in number.
        """
        questions = None
        if captions is not None and self.own_instruction(MOTION) is None:
            if len(captions) != len(prompts):
                raise ValueError(
                    f"`captions` has {len(captions)} texts for {len(prompts)} prompts; give one for each."
                )
            questions = [motion_question(*pair) for pair in zip(prompts, captions)]
        outcomes = self._ask(MOTION, prompts, max_new_tokens, on_progress, should_stop, questions)
        return [outcome.made for outcome in outcomes]

    # -- questions and answers ----------------------------------------------------------------------------------------

    def messages(self, prompt: str, task: RewriterTask | None = None, with_examples: bool = False) -> Chat:
        """Builds the chat that this rewriter answers for a prompt; a rewriter is trained on the same chats.

        Args:
            prompt (`str`): what should happen in the video.
            task (`RewriterTask`, *optional*): kind of question; left out, that for a first frame.
            with_examples (`bool`): whether to use the task's examples if the rewriter's `examples` are left out.
        """
        return chat_about(self, prompt, task or self._first_frame(), with_examples)

    def own_instruction(self, task: RewriterTask) -> str | None:
        """Returns the rewriter's own instruction for a task, or `None` if the task's is used."""
        own = {FIRST_FRAME.name: self.instruction} if isinstance(self.instruction, str) else self.instruction or {}
        return own.get(task.name)

    def _ask(
        self,
        task: RewriterTask,
        prompts: list[str],
        max_new_tokens: int | None,
        on_progress: Callable[[int, int], None] | None,
        should_stop: Callable[[], bool] | None,
        questions: list[str] | None = None,
    ) -> list[RewriteOutcome]:
        """Asks a task about each prompt; `questions` are the user's turns of the chats, if they differ from the prompts."""
        check_texts("prompts", prompts)
        check_at_least_one("max_new_tokens", max_new_tokens)
        limit = max_new_tokens or self.max_new_tokens * task.captions + task.extra_tokens
        should_stop = should_stop or (lambda: False)
        made = [RewriteOutcome("fallback", task.fallback(prompt), ("it was stopped",)) for prompt in prompts]
        # Locked: a fast tokenizer stores padding and truncation of its last call.
        with exclusive(self.model, self.tokenizer):
            asked = [(prompt, self.messages(text, task)) for prompt, text in zip(prompts, questions or prompts)]
            for prompt, chat in asked:
                excess = self.excess_tokens(chat, limit)
                if excess > 0:
                    raise ValueError(
                        f"The prompt {prompt[:60]!r} with the instruction and an answer of {limit} tokens exceeds the context "
                        f"of the rewriter by {excess} tokens; shorten the prompt or lower `max_new_tokens`."
                    )
            find = self._local_outcomes if self.endpoint is None else self._remote_outcomes
            for index, outcome in enumerate(find(task, asked, limit, should_stop)):
                if should_stop():
                    break
                made[index] = outcome
                if on_progress is not None:
                    on_progress(index + 1, len(prompts))
        return made

    def _local_outcomes(
        self, task: RewriterTask, asked: list[tuple[str, Chat]], limit: int, should_stop: Callable[[], bool]
    ) -> Iterator[RewriteOutcome]:
        for begin in range(0, len(asked), BATCH_SIZE):
            batch = asked[begin : begin + BATCH_SIZE]
            began = time.perf_counter()
            answers = self(
                [chat for _, chat in batch], limit, should_stop=should_stop, schema=self.answer_schema(task)
            )
            share = (time.perf_counter() - began) / len(batch)
            for pair, answer in zip(batch, answers):
                if should_stop():
                    return
                yield settle(self, task, *pair, answer, limit, share, should_stop)

    def _remote_outcomes(
        self, task: RewriterTask, asked: list[tuple[str, Chat]], limit: int, should_stop: Callable[[], bool]
    ) -> Iterator[RewriteOutcome]:
        """Asks the endpoint about several prompts at once. A failure for one prompt leaves the others' captions intact."""
        errors: list[OSError] = []
        answered: list[str] = []
        assert self.endpoint is not None
        max_concurrent = self.endpoint.max_concurrent

        def outcome_of(pair: tuple[str, Chat]) -> RewriteOutcome:
            prompt, chat = pair
            began = time.perf_counter()
            stands_in = partial(RewriteOutcome, "fallback", task.fallback(prompt))
            if should_stop() or (len(errors) >= max_concurrent and not answered):
                return stands_in(("it was not asked for",))
            try:
                (answer,) = self([chat], limit, None, should_stop, self.answer_schema(task))
                answered.append(prompt)
                return settle(self, task, *pair, answer, limit, time.perf_counter() - began, should_stop)
            except OSError as error:
                errors.append(error)
                logger.warning(f"No {task.subject} for {prompt!r} ({error}); the prompt's start is used.")
                return stands_in((str(error),), 1, time.perf_counter() - began)

        with ThreadPoolExecutor(max_concurrent) as pool:
            yield from pool.map(outcome_of, asked)
        if errors and not answered:
            raise errors[0]

    # -- the model ----------------------------------------------------------------------------------------------------

    def chat_text(self, messages: Chat) -> str:
        """Renders a chat with the chat template, as the text that the model continues with its answer."""
        messages = messages if self._has_system_role else without_system_role(messages)
        # Templates of reasoning models read `enable_thinking`; others ignore it.
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )

    def forward(
        self,
        chats: list[Chat],
        max_new_tokens: int,
        seed: int | None = None,
        should_stop: Callable[[], bool] | None = None,
        schema: dict[str, Any] | None = None,
        choices: tuple[list[int], list[int]] | None = None,
    ) -> list[str] | list[float]:
        """Answers chats. All use of the model is in here, because offloading moves a component when its `forward` is called.

        Args:
            chats (`list[list[dict[str, str]]]`): turns with a `role` and a `content`.
            max_new_tokens (`int`): most tokens of an answer.
            seed (`int`, *optional*): seed to sample with, independent of the global random state; left out, decoding is
                greedy.
            should_stop (`Callable`, *optional*): asked before every token; all answers end once it returns `True`.
            schema (`dict`, *optional*): JSON schema of the answers, if the runtime can enforce it.
            choices (`tuple`, *optional*): two lists of token ids to compare as the next token.

        Returns:
            `list[str]`: the answers, unchecked; or with `choices`, `list[float]`: per chat the probability of the first list
                relative to both.
        """
        if self.endpoint is not None:
            stopped = should_stop or (lambda: False)
            return ["" if stopped() else self.endpoint.answer(chat, max_new_tokens, seed, schema) for chat in chats]
        device = get_module_execution_device(self)
        texts = [self.chat_text(chat) for chat in chats]
        grammar = schema_processors(self.model, self.tokenizer, schema, self._grammars)
        return answers_to(
            self.model, self.tokenizer, texts, device, max_new_tokens, seed, should_stop, grammar, choices
        )

    def answer_schema(self, task: RewriterTask) -> dict[str, Any] | None:
        """Returns the JSON schema of a task, or `None` if the rewriter's own instruction may ask for another form."""
        return task.schema if self.own_instruction(task) is None else None

    def read_word(self, word: str) -> str:
        """Returns a word after encoding and decoding; some tokenizers map it to another word of their vocabulary."""
        return word if self.tokenizer is None else self.tokenizer.decode(self._token_ids(word))

    def _token_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def excess_tokens(self, chat: Chat, max_new_tokens: int) -> int:
        """Returns by how many tokens a chat and its answer exceed the model's context; 0 for an endpoint, which reports it."""
        context = None if self.model is None else getattr(self.model.config, "max_position_embeddings", None)
        return 0 if context is None else len(self._token_ids(self.chat_text(chat))) + max_new_tokens - context
