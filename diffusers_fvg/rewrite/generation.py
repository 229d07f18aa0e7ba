"""Generation with a chat model of transformers: its files, its chat template, and its logits processors."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..checks import stop_unless_finite
from ..loading.files import component_files
from .answers import is_thinking, marks_thinking
from .chat_endpoint import RETRY_TEMPERATURE, RETRY_TOP_P


RETRY_TOP_K = 50


def chat_files(names: list[str], gguf_file: str | None = None) -> list[str]:
    """Selects a repository's files that its chat model and tokenizer need.

    Raises:
        `ValueError`: the repository has no file `gguf_file`.
    """
    if gguf_file is not None and gguf_file not in names:
        raise ValueError(f"no {gguf_file!r}; there are {sorted(name for name in names if name.endswith('.gguf'))}")
    weights = [gguf_file] if gguf_file is not None else component_files(names)
    return sorted({*weights, *component_files(names, weights=False)})


def has_system_role(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether the chat template renders a system turn; some templates raise an error for it, some leave it out.

    Raises:
        `ValueError`: the template is broken: it raises an error for every chat.
    """
    chat = [{"role": "system", "content": "probe"}, {"role": "user", "content": "question"}]
    try:
        return "probe" in tokenizer.apply_chat_template(chat, tokenize=False)
    except _BROKEN:
        _check_template(tokenizer, chat[1:])
        return False


# Jinja raises a `TypeError` for a template that includes another file.
_BROKEN = (TemplateError, TypeError)


def _check_template(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]]) -> None:
    try:
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except _BROKEN as error:
        place = Path(tokenizer.name_or_path, "chat_template.jinja")
        file = place if place.is_file() else place.with_name("tokenizer_config.json")
        raise ValueError(
            f"The chat template in {str(file)!r} is broken ({error}): correct it, or use another chat model."
        ) from error


def generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, with_logits: bool = False
) -> GenerationConfig:
    """Returns a config for greedy decoding up to any token that ends a turn; `with_logits` also returns the logits."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    # The model's config may name the base model's end of text only, while the chat template ends turns with another token.
    ends = sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None})
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=with_logits,
        output_logits=with_logits,
        do_sample=False,
        num_beams=1,
        # Chat models often set a repetition penalty, but a caption should repeat the prompt's words.
        repetition_penalty=1.0,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0],
    )


def token_processors(seed: int | None) -> list[LogitsProcessor]:
    """Returns processors of every token's scores: a check for finite values, and with a seed, sampling."""
    processors: list[LogitsProcessor] = [StopUnlessFinite()]
    if seed is not None:
        processors += [
            TemperatureLogitsWarper(RETRY_TEMPERATURE),
            TopKLogitsWarper(RETRY_TOP_K),
            TopPLogitsWarper(RETRY_TOP_P),
            SeededDraw(seed),
        ]
    return processors


def schema_processors(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, schema: dict[str, Any] | None, grammars: dict[str, Any]
) -> list[LogitsProcessor]:
    """Returns a processor that rules out tokens which violate a JSON schema, or none if xgrammar is not installed.

    Compiled grammars are cached in `grammars`.
    """
    if schema is None or importlib.util.find_spec("xgrammar") is None:
        return []
    import xgrammar
    from xgrammar.contrib.hf import LogitsProcessor as GrammarProcessor

    text = json.dumps(schema)
    if text not in grammars:
        tokens = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=model.config.vocab_size)
        grammars[text] = xgrammar.GrammarCompiler(tokens).compile_json_schema(text, any_whitespace=False)
    # A processor follows the state of one generation, so each call gets a new one.
    return [GrammarProcessor(grammars[text])]


def answers_to(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    device: torch.device,
    max_new_tokens: int,
    seed: int | None = None,
    should_stop: Callable[[], bool] | None = None,
    grammar: list[LogitsProcessor] | None = None,
    choices: tuple[list[int], list[int]] | None = None,
) -> list[str] | list[float]:
    """Generates the answers to chats, or with `choices` returns the probabilities of [`choice_shares`].

    Args:
        model, tokenizer: model and tokenizer of transformers.
        texts (`list[str]`): chats as rendered by the chat template.
        device (`torch.device`): device of the model.
        max_new_tokens (`int`): most tokens of an answer; 1 is enough with `choices`.
        seed (`int`, *optional*): seed to sample with; left out, decoding is greedy.
        should_stop (`Callable`, *optional*): asked before every token; all answers end once it returns `True`.
        grammar (`list[LogitsProcessor]`, *optional*): output of [`schema_processors`].
        choices (`tuple`, *optional*): two lists of token ids.
    """
    rows = [torch.tensor(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    # Padding is on the left, so that every answer begins in the same column. It is masked, so its token id does not matter.
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left")
    output = model.generate(
        input_ids=input_ids.to(device),
        attention_mask=mask.to(device),
        generation_config=generation_config(model, tokenizer, max_new_tokens, choices is not None),
        logits_processor=[*(grammar or ()), *token_processors(seed)],
        stopping_criteria=[StopWhen(should_stop)] if should_stop is not None else None,
    )
    if choices is not None:
        return choice_shares(output.logits[0], *choices)
    answers = decode_answers(tokenizer, output[:, input_ids.shape[1] :])
    # A template may end with the begin mark of thinking, which is then missing in the answer.
    return [f"<think>{answer}" if is_thinking(text) else answer for text, answer in zip(texts, answers)]


def decode_answers(tokenizer: PreTrainedTokenizerBase, ids: torch.LongTensor) -> list[str]:
    """Decodes answers without special tokens, but keeps them if they mark the model's thinking."""
    skip = not marks_thinking(tokenizer.all_special_tokens)
    return tokenizer.batch_decode(ids, skip_special_tokens=skip)


def choice_shares(logits: torch.FloatTensor, first: list[int], second: list[int]) -> list[float]:
    """Returns P(first) / (P(first) + P(second)) for two lists of token ids and each row of logits `(B, V)`."""
    chances = logits.float().log_softmax(-1)
    difference = chances[:, first].logsumexp(-1) - chances[:, second].logsumexp(-1)
    return difference.sigmoid().tolist()


class StopWhen(StoppingCriteria):
    def __init__(self, should_stop: Callable[[], bool]):
        self.should_stop = should_stop

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        return torch.full((input_ids.shape[0],), self.should_stop(), dtype=torch.bool, device=input_ids.device)


class StopUnlessFinite(LogitsProcessor):
    def __init__(self):
        self.token = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.token += 1
        # Minus infinity is allowed: a model may rule out tokens with it.
        stop_unless_finite("rewrite", scores.clamp(min=torch.finfo(scores.dtype).min), step=f"token {self.token}")
        return scores


class SeededDraw(LogitsProcessor):
    """Samples a token by greedy decoding: adds Gumbel noise to the log probabilities, whose maximum is then a sample.

    `generate` itself samples from torch's global random state. This class has its own generator, so that threads do not
    influence each other.
    """

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        noise = -torch.empty(scores.shape).exponential_(generator=self.generator).log()
        return scores + noise.to(scores.device)
