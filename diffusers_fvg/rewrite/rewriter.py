"""Stage 1: a language model describes the first frame of the video that a prompt asks for, its moments or its motion."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..checks import check_at_least_one, check_texts
from ..devices import get_module_execution_device
from ..loading.arguments import call_argument, hub_arguments
from ..loading.component_config import read_config
from ..loading.files import fetch
from ..loading.safety import check_folder, safetensors_only
from ..locks import exclusive
from .chat_endpoint import ChatEndpoint, host_of
from .generation import StopWhen, chat_files, generation_config, has_system_role, token_processors
from .prompts import EXAMPLES, INSTRUCTION, format_answer
from .storyboard import Moment
from .tasks import FIRST_FRAME, MOTION, TASK_NAMES, RewriterTask, storyboard_task


logger = logging.get_logger(__name__)

CONFIG_NAME = "rewriter_config.json"
# Prompts that are answered in one batch. A 7B model's cache of 8 chats with our examples is about half a gigabyte.
BATCH_SIZE = 8
RETRY_SEED = 0


class FirstFrameRewriter(torch.nn.Module):
    """A chat model that turns the prompt of a video into the prompt of its first frame, a storyboard or a motion caption.

    The answer is checked against the prompt. One that loses an object, a colour or a count, or that tells what happens
    later, is asked for once more with the reason; after that the prompt itself stands in, with a warning. Greedy decoding:
    equal prompts give equal captions, alone or in a batch.

    It is either a transformers causal language model (`model` and `tokenizer`) or an `endpoint`, which is named by the
    caller alone: no file names one, and none is saved. As a component of a pipeline it gets the pipeline's dtype, moves with
    it and can be offloaded: a model runs within `forward` only.

    Args:
        model (`PreTrainedModel`, *optional*): a causal language model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): its tokenizer, with a chat template.
        endpoint (`ChatEndpoint`, *optional*): a server to ask in place of a model.
        reference (`dict`, *optional*): where `model` came from: the Hub repository `model`, and `revision` and `gguf_file`
            if they matter. With it, `save_pretrained` writes the reference and no weights; set it to `None` to bundle them.
        instruction (`str` or `dict`, *optional*): the system turn of the question for a first frame, or that of several
            kinds of question: `"first_frame"`, `"storyboard"` (where `{num_moments}` stands for the number) and `"motion"`.
            Left out: those of `tasks.py`. A model that is trained for nothing else needs none: `""`.
        examples (`bool` or list of `[prompt, caption]`, *optional*): earlier turns of the chat; `True` for those of
            `tasks.py`, a list for first frames of your own.
        answer_format (`str`, *optional*): `"json"`, an object with the caption under `first_frame`, `moments` or `motion`.
        max_new_tokens (`int`, *optional*): longest caption when a call does not say.
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        endpoint: ChatEndpoint | None = None,
        reference: dict[str, str] | None = None,
        instruction: str | Mapping[str, str] | None = None,
        examples: bool | Sequence[Sequence[str]] = True,
        answer_format: str = "json",
        max_new_tokens: int = 256,
    ):
        super().__init__()
        if (endpoint is None) == (model is None) or (model is None) != (tokenizer is None):
            raise ValueError("A rewriter needs either `model` and `tokenizer`, or `endpoint`.")
        if answer_format != "json":
            raise ValueError(f"`answer_format={answer_format!r}` is not known; use 'json'.")
        if not isinstance(examples, bool) and not all(
            len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in examples
        ):
            raise ValueError(f"`examples` must be true, false or a list of [prompt, caption], but is {examples!r}.")
        if isinstance(instruction, Mapping) and not instruction.keys() <= set(TASK_NAMES):
            raise ValueError(f"`instruction` has keys {sorted(instruction)}, but may have {sorted(TASK_NAMES)}.")
        check_at_least_one("max_new_tokens", max_new_tokens)
        self.model = model
        self.tokenizer = tokenizer
        self.endpoint = endpoint
        self.reference = reference
        self.instruction = instruction
        self.examples = examples
        self.answer_format = answer_format
        self.max_new_tokens = max_new_tokens
        if model is None:
            # Offloading asks every component for the device of its first parameter.
            self.placement = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        else:
            if tokenizer.chat_template is None:
                raise ValueError(f"{tokenizer.name_or_path!r} has no chat template; choose an instruct or chat model.")
            self._has_system_role = has_system_role(tokenizer)

    # -- loading and saving -------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        *,
        revision: str | None = None,
        gguf_file: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        quantization_config=None,
        trust_remote_code: bool = False,
    ) -> FirstFrameRewriter:
        """Loads a rewriter from its folder, or makes one of a chat model's repository on the Hub.

        Args:
            path (`str` or `os.PathLike`): a folder with a `rewriter_config.json`, which either names a Hub repository, or
                has the weights beside it in `model/` and `tokenizer/`; or a transformers chat model: a folder, or a Hub
                repository.
            torch_dtype, dtype (`torch.dtype`, *optional*): of the weights; both names mean the same, since diffusers passes
                the first. Left out: as stored.
            revision, gguf_file (`str`, *optional*): of the Hub repository that `path` is; a folder names its own.
            token, cache_dir, local_files_only (*optional*): for the Hub, whether `path` or the folder names the repository.
            quantization_config (*optional*): of transformers.
            trust_remote_code (`bool`): run the code that a model brings with it. A pipeline that loads its rewriter never
                does; pass it the rewriter.

        Raises:
            `ValueError`: a folder without a valid `rewriter_config.json`, or with one that names an endpoint; weights that
                are a pickle, or a model with code of its own that is not trusted.
            `OSError`: the model is not where it should be.
        """
        if torch_dtype is not None and dtype is not None and torch_dtype != dtype:
            raise ValueError(f"`torch_dtype={torch_dtype}` and `dtype={dtype}` differ; give one of them.")
        folder = Path(path)
        if folder.is_dir():
            if revision is not None or gguf_file is not None:
                raise ValueError(
                    f"`revision` and `gguf_file` are for a Hub repository, and {str(path)!r} is a folder."
                )
            is_chat_model = not (folder / CONFIG_NAME).is_file() and (folder / "config.json").is_file()
            config = {} if is_chat_model else read_rewriter_config(folder / CONFIG_NAME)
        else:
            config = {"model": str(path), "revision": revision, "gguf_file": gguf_file}
        reference = {key: config.pop(key, None) for key in ("model", "revision", "gguf_file")}
        reference = {key: value for key, value in reference.items() if value is not None}
        source = {"gguf_file": reference["gguf_file"]} if "gguf_file" in reference else {}
        model_path, tokenizer_path = folder / "model", folder / "tokenizer"
        if folder.is_dir() and is_chat_model:
            model_path = tokenizer_path = folder
        if reference:
            hub = hub_arguments(cache_dir=cache_dir, local_files_only=local_files_only or None, token=token)
            model_path = tokenizer_path = fetch(
                reference["model"], reference.get("revision"), partial(chat_files, **source), "The rewriter", **hub
            )[0]
        for place in (model_path,) if reference else (folder, model_path, tokenizer_path):
            check_folder(place)
        try:
            with safetensors_only(model_path):
                model = AutoModelForCausalLM.from_pretrained(
                    model_path,
                    dtype=dtype or torch_dtype or "auto",
                    quantization_config=quantization_config,
                    device_map=call_argument("device_map"),
                    use_safetensors=True,
                    trust_remote_code=trust_remote_code,
                    **source,
                )
                # Without a value transformers would ask at the terminal.
                tokenizer = AutoTokenizer.from_pretrained(
                    tokenizer_path, trust_remote_code=trust_remote_code, **source
                )
        except OSError as error:
            # transformers does not always say what it was looking for, and a user of the pipeline never named it.
            raise OSError(f"The rewriter's model {str(model_path)!r} cannot be loaded: {error}") from error
        return cls(model, tokenizer, reference=reference or None, **config)

    def save_pretrained(self, path: str | os.PathLike, safe_serialization: bool = True) -> None:
        """Writes the folder that `from_pretrained` reads: settings, and the weights if the rewriter has its own.

        Weights lie one folder deeper: diffusers' download leaves everything but weights and `config.json` out of a
        component's folder that holds weights itself.

        Args:
            path (`str` or `os.PathLike`): the folder, made if it is not there.
            safe_serialization (`bool`, *optional*): as in diffusers; weights are safetensors files in any case.

        Raises:
            `ValueError`: the rewriter has an endpoint, which no file may name.
        """
        if self.endpoint is not None:
            raise ValueError("A rewriter with an endpoint is not saved: make it anew and pass it where it is needed.")
        if not safe_serialization:
            logger.warning("The rewriter is saved as safetensors: transformers writes no other format.")
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        config = dict(self.reference or {})
        if self.instruction is not None:
            config["instruction"] = self.instruction if isinstance(self.instruction, str) else dict(self.instruction)
        examples = self.examples if isinstance(self.examples, bool) else [list(pair) for pair in self.examples]
        config |= {"examples": examples, "answer_format": self.answer_format, "max_new_tokens": self.max_new_tokens}
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if self.model is not None and self.reference is None:
            self.model.save_pretrained(folder / "model")
            self.tokenizer.save_pretrained(folder / "tokenizer")

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
            max_new_tokens (`int`, *optional*): longest answer in tokens; the rewriter's own when left out.
            on_progress (`Callable`, *optional*): `on_progress(done, total)` with numbers of prompts.
            should_stop (`Callable`, *optional*): asked before every token. Once it returns `True`, the prompts that have no
                caption yet stand in for theirs.

        Returns:
            `list[str]`: one caption per prompt.

        Raises:
            `ValueError`: empty prompts, or one that does not fit into the model's context together with the answer.
        """
        return self._ask(FIRST_FRAME, prompts, max_new_tokens, on_progress, should_stop)

    def storyboard(
        self,
        prompts: list[str],
        num_moments: int = 2,
        max_new_tokens: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[list[Moment]]:
        """Writes captions of the first frame and of later moments for each prompt.

        Checked, asked again and given up as in [`rewrite`]; what stands in is the prompt as the only moment.

        Args:
            prompts (`list[str]`): what should happen in the videos.
            num_moments (`int`): the most moments, at least 2. There are fewer where the prompt does not settle what is seen
                later, or where nothing changes that a picture shows.
            max_new_tokens (`int`, *optional*): longest answer in tokens; left out, the rewriter's own for each moment.
            on_progress, should_stop (*optional*): as in [`rewrite`].

        Returns:
            `list[list[Moment]]`: the moments of each prompt in the order of time, the first at time 0.

        Raises:
            `ValueError`: as in [`rewrite`], or fewer than two moments.
        """
        check_at_least_one("num_moments", num_moments)
        if num_moments is None or num_moments < 2:
            raise ValueError(
                f"`num_moments={num_moments}` must be at least 2; `rewrite` writes the first frame alone."
            )
        return self._ask(storyboard_task(num_moments), prompts, max_new_tokens, on_progress, should_stop)

    def describe_motion(
        self,
        prompts: list[str],
        max_new_tokens: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[str]:
        """Writes a short caption of what happens after the first frame for each prompt, for an image-to-video model.

        Checked, asked again and given up as in [`rewrite`], whose arguments these are too.

        Returns:
            `list[str]`: one caption per prompt.
        """
        return self._ask(MOTION, prompts, max_new_tokens, on_progress, should_stop)

    def messages(self, prompt: str, task: RewriterTask = FIRST_FRAME) -> list[dict[str, str]]:
        """The chat that this rewriter answers for a prompt; a special-purpose model is trained on the same."""
        own = {FIRST_FRAME.name: self.instruction} if isinstance(self.instruction, str) else self.instruction or {}
        instruction = own.get(task.name, task.instruction).replace("{num_moments}", str(task.captions))
        examples = task.examples if self.examples else ()
        if not isinstance(self.examples, bool) and task is FIRST_FRAME:
            examples = self.examples
        return build_messages(prompt, instruction, examples, task.write)

    def _ask(
        self,
        task: RewriterTask,
        prompts: list[str],
        max_new_tokens: int | None,
        on_progress: Callable[[int, int], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> list[Any]:
        """One answer of a task per prompt."""
        # A fast tokenizer keeps padding and truncation of its last call.
        with exclusive(self.model, self.tokenizer):
            return self._answer(task, prompts, max_new_tokens, on_progress, should_stop)

    def _answer(
        self,
        task: RewriterTask,
        prompts: list[str],
        max_new_tokens: int | None,
        on_progress: Callable[[int, int], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> list[Any]:
        check_texts("prompts", prompts)
        check_at_least_one("max_new_tokens", max_new_tokens)
        limit = max_new_tokens or self.max_new_tokens * task.captions
        chats = [self.messages(prompt, task) for prompt in prompts]
        for prompt, chat in zip(prompts, chats):
            excess = self._excess_tokens(chat, limit)
            if excess > 0:
                raise ValueError(
                    f"The prompt {prompt[:60]!r} with instruction and an answer of {limit} tokens exceeds the context of "
                    f"the rewriter by {excess} tokens; shorten it or lower `max_new_tokens`."
                )
        should_stop = should_stop or (lambda: False)
        made = [task.fallback(prompt) for prompt in prompts]
        for begin in range(0, len(prompts), BATCH_SIZE):
            answers = self(chats[begin : begin + BATCH_SIZE], limit, should_stop=should_stop)
            for index, answer in enumerate(answers, start=begin):
                if should_stop():
                    return made
                made[index] = self._checked(task, prompts[index], chats[index], answer, limit, should_stop)
                if on_progress is not None:
                    on_progress(index + 1, len(prompts))
        return made

    def chat_text(self, messages: list[dict[str, str]]) -> str:
        """A chat as the text that the model continues with its answer."""
        messages = messages if self._has_system_role else without_system_role(messages)
        # Templates of reasoning models know the variable, others take no notice.
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )

    def forward(
        self,
        chats: list[list[dict[str, str]]],
        max_new_tokens: int,
        seed: int | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[str]:
        """Answers chats. Offloading moves a component when its `forward` is called, so all use of the model is in here.

        Args:
            chats (`list[list[dict[str, str]]]`): turns with a `role` and a `content`.
            max_new_tokens (`int`): longest answer in tokens.
            seed (`int`, *optional*): sample with this seed, apart from the global random state; greedy without it.
            should_stop (`Callable`, *optional*): ends all answers where they are once it returns `True`.

        Returns:
            `list[str]`: the answers as the model gave them.
        """
        if self.endpoint is not None:
            stopped = should_stop or (lambda: False)
            return ["" if stopped() else self.endpoint.answer(chat, max_new_tokens, seed) for chat in chats]
        device = get_module_execution_device(self)
        rows = [torch.tensor(self._token_ids(self.chat_text(chat))) for chat in chats]
        # On the left, so that every answer begins in the same column. The padding is masked: its id does not matter.
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left")
        output = self.model.generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            generation_config=generation_config(self.model, self.tokenizer, max_new_tokens),
            logits_processor=token_processors(seed),
            stopping_criteria=[StopWhen(should_stop)] if should_stop is not None else None,
        )
        return self.tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)

    def _checked(
        self,
        task: RewriterTask,
        prompt: str,
        chat: list[dict[str, str]],
        answer: str,
        limit: int,
        should_stop: Callable[[], bool],
    ) -> Any:
        """What an answer holds, or a second answer if the first is not valid, or what stands in."""
        made, reason = self._judge(task, prompt, answer)
        if reason is None:
            return made
        retry = build_retry(chat, reason)
        if self._excess_tokens(retry, limit) <= 0:
            # One by one, each from the same seed: what a prompt gets does not depend on its neighbours.
            (answer,) = self([retry], limit, seed=RETRY_SEED, should_stop=should_stop)
            if should_stop():
                return task.fallback(prompt)
            made, reason = self._judge(task, prompt, answer)
        if reason is None:
            return made
        logger.warning(f"No valid {task.subject} for {prompt!r} ({reason}); the prompt itself is used.")
        return task.fallback(prompt)

    def _judge(self, task: RewriterTask, prompt: str, answer: str) -> tuple[Any, str | None]:
        """What an answer holds and what is wrong with it."""
        try:
            made = task.read(answer)
        except ValueError as error:
            return None, str(error)
        return made, task.problem(prompt, made, self._read)

    def _read(self, word: str) -> str:
        """A word as the model's tokenizer has it; one that maps words to its own vocabulary returns others."""
        return word if self.tokenizer is None else self.tokenizer.decode(self._token_ids(word))

    def _token_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _excess_tokens(self, chat: list[dict[str, str]], max_new_tokens: int) -> int:
        """By how many tokens a chat and its answer exceed the context; an endpoint is left to say so itself."""
        context = None if self.model is None else getattr(self.model.config, "max_position_embeddings", None)
        return 0 if context is None else len(self._token_ids(self.chat_text(chat))) + max_new_tokens - context


def read_rewriter_config(path: Path) -> dict[str, Any]:
    """Reads a `rewriter_config.json` and refuses what this version does not know, and an endpoint.

    Raises:
        `ValueError`: as in [`~loading.component_config.read_config`], or the file names an endpoint.
    """
    if not path.is_file():
        raise ValueError(f"{str(path.parent)!r} is no rewriter: it has no {CONFIG_NAME}.")
    of_endpoint = {"endpoint", "api_key_env"}
    settings = {"instruction", "examples", "answer_format", "max_new_tokens"}
    known = {"model", "revision", "gguf_file", *settings, *of_endpoint}
    config = read_config(path, known, "model", {"revision", "gguf_file"})
    if config.keys() & of_endpoint:
        # The file's author would get every prompt, and the value of any variable of this machine.
        raise ValueError(
            f"{str(path)!r} names an endpoint at {host_of(config.get('endpoint'))!r}, to which prompts would be sent. Only you "
            "can name one: pass `rewriter=FirstFrameRewriter(endpoint=ChatEndpoint(url, model, api_key_env=...))`, or to `fvg` "
            "`--rewriter URL`. `rewriter=None` loads without a rewriter."
        )
    return config


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
