"""Stage 2's second half: a judge says how well each of several pictures shows what its caption says."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import PIL.Image
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as ASKED
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES as EMBEDDING

from ..atomic import naming, replacing_entries
from ..checks import check_number, stop_unless_finite
from ..devices import get_module_execution_device
from ..loading.arguments import call_argument, hub_arguments
from ..loading.component_config import read_config
from ..loading.files import fetch
from ..loading.safety import check_folder, safetensors_only
from ..locks import exclusive
from ..rewrite.chat_endpoint import ChatEndpoint, host_of
from ..rewrite.generation import chat_files
from .questions import YES_OR_NO, questions_about


CONFIG_NAME = "judge_config.json"
JudgeFunction = Callable[[list[PIL.Image.Image], str, Any], Sequence[float]]


@dataclass(frozen=True)
class Judgement:
    """What a judge says of one picture.

    Args:
        score (`float`): the higher the better; what it means is the judge's own.
        answers (`dict[str, float]` or `None`): question -> probability of a yes, of a judge that asks.
    """

    score: float
    answers: dict[str, float] | None = None


@runtime_checkable
class Judge(Protocol):
    """What stage 2 asks of a judge, [`AnchorJudge`] or another component.

    `threshold` is the score from which on a picture is good enough, or `None`: then all candidates are drawn and the best is
    kept.
    """

    threshold: float | None

    def judge(
        self, images: list[PIL.Image.Image], captions: list[str], plans: list[Any] | None = None
    ) -> list[Judgement]:
        """One judgement for each picture, of the caption and the plan beside it."""
        ...


class AnchorJudge(torch.nn.Module):
    """Scores pictures against captions, in one of four ways.

    * A model of transformers that embeds images and texts (CLIP, SigLIP): the cosine similarity of picture and caption.
    * A vision-language chat model of transformers: the probability that it answers a question with yes and not with no, the
      product of all where stage 1's plan gives several (VQAScore, arXiv 2404.01291, without a plan).
    * A [`ChatEndpoint`] with such a model, asked the same questions. Pictures are sent to it.
    * A function `(images, caption, plan) -> scores`.

    As a component of a pipeline it gets the pipeline's dtype, moves with it, is offloaded, and is saved with its weights or
    as the name of a repository. An endpoint and a function are the caller's alone: no file names one, and none is saved.

    Args:
        model (`PreTrainedModel`, *optional*): of one of the two kinds.
        processor (*optional*): of the model.
        endpoint (`ChatEndpoint`, *optional*): in place of a model.
        function (`Callable`, *optional*): in place of a model; called once for all pictures of a caption.
        reference (`dict`, *optional*): where `model` came from: the Hub repository `model` and its `revision`. With it,
            `save_pretrained` writes the reference and no weights; set it to `None` to bundle them.
        threshold (`float`, *optional*): the score from which on a picture is good enough. Left out: 0.5 for questions; none
            for the others, whose scale is not known, so that all candidates are drawn.
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        processor: Any = None,
        *,
        endpoint: ChatEndpoint | None = None,
        function: JudgeFunction | None = None,
        reference: dict[str, str] | None = None,
        threshold: float | None = None,
    ):
        super().__init__()
        if sum(way is not None for way in (model, endpoint, function)) != 1 or (model is None) != (processor is None):
            raise ValueError("A judge needs `model` and `processor`, or `endpoint`, or `function`.")
        check_number("threshold", threshold)
        kind = getattr(getattr(model, "config", None), "model_type", None)
        self.asks = endpoint is not None or kind in ASKED
        if model is not None and not self.asks and kind not in EMBEDDING:
            raise ValueError(
                f"`model` is a {type(model).__name__}, which neither embeds images and texts, as CLIP and SigLIP do, nor answers "
                "questions about images; choose another, or pass a function."
            )
        self.model: Any = model
        self.processor = processor
        self.endpoint, self.function = endpoint, function
        self.reference = reference
        self.threshold = 0.5 if threshold is None and self.asks else threshold
        if model is None:
            # Offloading asks every component for the device of its first parameter.
            self.placement = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    # -- loading and saving -------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        *,
        revision: str | None = None,
        threshold: float | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        quantization_config=None,
    ) -> AnchorJudge:
        """Loads a judge from its folder, or makes one of a model's repository on the Hub.

        Args:
            path (`str` or `os.PathLike`): a folder with a `judge_config.json`, which either names a Hub repository, or has the
                weights beside it in `model/` and `processor/`; or a model of transformers: a folder, or a Hub repository.
            torch_dtype, dtype (`torch.dtype`, *optional*): of the weights; both names mean the same, since diffusers passes
                the first. Left out: as stored.
            revision (`str`, *optional*): of the Hub repository that `path` is; a folder names its own.
            threshold (`float`, *optional*): in place of the folder's.
            token, cache_dir, local_files_only (*optional*): for the Hub, whether `path` or the folder names the repository.
            quantization_config (*optional*): of transformers.

        Raises:
            `ValueError`: a folder without a valid `judge_config.json`, or with one that names an endpoint; weights that are a
                pickle, or a model with code of its own.
            `OSError`: the model is not where it should be.
        """
        if torch_dtype is not None and dtype is not None and torch_dtype != dtype:
            raise ValueError(f"`torch_dtype={torch_dtype}` and `dtype={dtype}` differ; give one of them.")
        folder = Path(path)
        if not folder.is_dir():
            config = {"model": str(path)} | ({} if revision is None else {"revision": revision})
        elif revision is not None:
            raise ValueError(f"`revision={revision!r}` is for a Hub repository, and {str(path)!r} is a folder.")
        else:
            is_model = not (folder / CONFIG_NAME).is_file() and (folder / "config.json").is_file()
            config = {} if is_model else read_judge_config(folder / CONFIG_NAME)
        reference: dict[str, str] = {key: config.pop(key) for key in ("model", "revision") if key in config}
        model_path, processor_path = folder / "model", folder / "processor"
        if folder.is_dir() and is_model:
            model_path = processor_path = folder
        if reference:
            hub = hub_arguments(cache_dir=cache_dir, local_files_only=local_files_only or None, token=token)
            model_path = processor_path = fetch(
                reference["model"], reference.get("revision"), chat_files, "The judge", **hub
            )[0]
        for place in (model_path,) if reference else (folder, model_path, processor_path):
            check_folder(place)
        options = {"dtype": dtype or torch_dtype or "auto", "quantization_config": quantization_config}
        try:
            with safetensors_only(model_path):
                # Without a value transformers would ask at the terminal.
                made = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
                model = model_class(made).from_pretrained(
                    model_path,
                    device_map=call_argument("device_map"),
                    use_safetensors=True,
                    trust_remote_code=False,
                    **options,
                )
                processor = AutoProcessor.from_pretrained(processor_path, trust_remote_code=False)
        except OSError as error:
            raise OSError(f"The judge's model {str(model_path)!r} cannot be loaded: {error}") from error
        settings = config if threshold is None else config | {"threshold": threshold}
        return cls(model, processor, reference=reference or None, **settings)

    def save_pretrained(self, path: str | os.PathLike, safe_serialization: bool = True) -> None:
        """Writes the folder that `from_pretrained` reads: settings, and the weights if the judge has its own.

        Args:
            path (`str` or `os.PathLike`): the folder, made if it is not there.
            safe_serialization (`bool`, *optional*): as in diffusers; weights are safetensors files in any case.

        Raises:
            `ValueError`: the judge has an endpoint or a function, which no file may name.
        """
        if self.model is None:
            raise ValueError("A judge with an endpoint or a function is not saved: make it anew and pass it.")
        config = dict(self.reference or {}) | {"threshold": self.threshold}
        with replacing_entries(path, CONFIG_NAME) as draft, naming(path):
            (draft / CONFIG_NAME).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            if self.reference is None:
                self.model.save_pretrained(draft / "model")
                self.processor.save_pretrained(draft / "processor")

    # -- placement ----------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return self.placement.dtype if self.model is None else self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.placement.device if self.model is None else self.model.device

    # -- the stage ----------------------------------------------------------------------------------------------------

    def judge(
        self, images: list[PIL.Image.Image], captions: list[str], plans: list[Any] | None = None
    ) -> list[Judgement]:
        """Judges each picture by the caption beside it, and by the plan if there is one.

        Args:
            images (`list[PIL.Image.Image]`): RGB pictures.
            captions (`list[str]`): as many; pictures of one caption stand together.
            plans (`list`, *optional*): what stage 1 planned for each caption; `None` among them for none.

        Returns:
            `list[Judgement]`: one for each picture.

        Raises:
            `ValueError`: another number of captions or of plans, or a function that gives something else than a finite score
                for each picture.
        """
        plans = [None] * len(images) if plans is None else plans
        if not len(images) == len(captions) == len(plans):
            raise ValueError(
                f"{len(images)} pictures, {len(captions)} captions and {len(plans)} plans; give one for each."
            )
        if self.function is not None:
            return self._call_function(self.function, images, captions, plans)
        if self.asks:
            return [self._ask_all(*one) for one in zip(images, captions, plans)]
        return [self(self._similarity, *pair) for pair in zip(images, captions)]

    def _call_function(
        self, function: JudgeFunction, images: list, captions: list[str], plans: list
    ) -> list[Judgement]:
        made: list[Judgement] = []
        begin = 0
        while begin < len(images):
            caption, plan = captions[begin], plans[begin]
            end = begin
            while end < len(images) and captions[end] == caption and plans[end] is plan:
                end += 1
            given = function(images[begin:end], caption, plan)
            try:
                scores = [float(score) for score in given]
            except (TypeError, ValueError):
                scores = []
            if len(scores) != end - begin or not all(map(math.isfinite, scores)):
                raise ValueError(
                    f"The judge's function gave {given!r:.200} for {end - begin} pictures of {caption!r}; it must give a finite "
                    "score for each."
                )
            made += [Judgement(score) for score in scores]
            begin = end
        return made

    @torch.no_grad()
    def forward(self, work: Callable, *arguments: Any) -> Any:
        """Runs what needs the model. Offloading moves a component when its `forward` is called, so all use of it is in here."""
        with exclusive(self.model):
            return work(*arguments)

    def _similarity(self, image: PIL.Image.Image, caption: str) -> Judgement:
        """Cosine of the embeddings, in [-1, 1]. Words past the model's last position are not read."""
        positions = self.model.config.text_config.max_position_embeddings
        # SigLIP learnt with texts that are padded to the end; CLIP does not see what comes after a text.
        inputs = self.processor(
            images=image,
            text=[caption],
            padding="max_length",
            truncation=True,
            max_length=positions,
            return_tensors="pt",
        )
        made = self.model(**self._placed(inputs))
        image_embeds, text_embeds = (embeds[0].float() for embeds in (made.image_embeds, made.text_embeds))
        cosine = torch.nn.functional.cosine_similarity(image_embeds, text_embeds, dim=0)
        stop_unless_finite("judge", cosine, self.dtype)
        return Judgement(float(cosine))

    def _placed(self, inputs: Any) -> dict[str, torch.Tensor]:
        device = get_module_execution_device(self.model)
        return {
            name: value.to(device, self.dtype if value.is_floating_point() else None) for name, value in inputs.items()
        }

    def _ask_all(self, image: PIL.Image.Image, caption: str, plan: Any) -> Judgement:
        """All questions about a picture; the score is the product of their answers."""
        asked = self._ask_endpoint
        if self.model is not None:
            asked = partial(self.__call__, self._ask)
        answers = {question: asked(image, question) for question in questions_about(caption, plan)}
        return Judgement(math.prod(answers.values()), answers)

    def _ask(self, image: PIL.Image.Image, question: str) -> float:
        content = [{"type": "image", "image": image}, {"type": "text", "text": YES_OR_NO.format(question=question)}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        logits = self.model(**self._placed(inputs)).logits[0, -1].float()
        stop_unless_finite("judge", logits, self.dtype)
        yes, no = (logits[self._tokens_of(word)].logsumexp(0) for word in ("yes", "no"))
        return float(torch.sigmoid(yes - no))

    def _tokens_of(self, word: str) -> list[int]:
        """The tokens that an answer of one word may begin with."""
        tokenizer = self.processor.tokenizer
        forms = (word, word.capitalize(), f" {word}", f" {word.capitalize()}")
        first = [tokenizer(form, add_special_tokens=False).input_ids[:1] for form in forms]
        found = {ids[0] for ids in first if ids and tokenizer.decode(ids).strip().lower() == word}
        if not found:
            raise ValueError(f"The judge's tokenizer has no token for {word!r}; choose another model.")
        return sorted(found)

    def _ask_endpoint(self, image: PIL.Image.Image, question: str) -> float:
        assert self.endpoint is not None
        return self.endpoint.probability_of_yes(image, YES_OR_NO.format(question=question))


def model_class(config: PreTrainedConfig) -> type[AutoModel] | type[AutoModelForImageTextToText]:
    """What makes a judge's model of its configuration: one that answers where transformers has such, else one that embeds."""
    return AutoModelForImageTextToText if config.model_type in ASKED else AutoModel


def read_judge_config(path: Path) -> dict[str, Any]:
    """Reads a `judge_config.json` and refuses what this version does not know, and an endpoint.

    Raises:
        `ValueError`: as in [`~loading.component_config.read_config`], or the file names an endpoint.
    """
    if not path.is_file():
        raise ValueError(f"{str(path.parent)!r} is no judge: it has no {CONFIG_NAME}.")
    of_endpoint = {"endpoint", "api_key_env"}
    config = read_config(path, {"model", "revision", "threshold", *of_endpoint}, "model", {"revision"})
    if config.keys() & of_endpoint:
        # The file's author would get every picture, and the value of any variable of this machine.
        raise ValueError(
            f"{str(path)!r} names an endpoint at {host_of(config.get('endpoint'))!r}, to which pictures would be sent. Only you can "
            "name one: pass `anchor_judge=AnchorJudge(endpoint=ChatEndpoint(url, model, api_key_env=...))`. "
            "`anchor_judge=None` loads without a judge."
        )
    return config
