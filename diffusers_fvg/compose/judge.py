"""Judges for stage 2: a judge scores how well an image shows what its caption says."""

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
    """The result of a judge for one image.

    Args:
        score (`float`): higher is better; the scale depends on the judge.
        answers (`dict[str, float]` or `None`): question -> probability of "yes", if the judge asks questions.
    """

    score: float
    answers: dict[str, float] | None = None


@runtime_checkable
class Judge(Protocol):
    """The interface of a judge, which [`AnchorJudge`] and other components implement.

    `threshold` is the lowest score at which drawing stops, or `None`: then all candidates are drawn and the best is kept.
    """

    threshold: float | None

    def judge(
        self, images: list[PIL.Image.Image], captions: list[str], plans: list[Any] | None = None
    ) -> list[Judgement]:
        """Returns one judgement for each image, with the caption and the plan at the same index."""
        ...


class AnchorJudge(torch.nn.Module):
    """Scores images against captions, in one of four ways.

    * A transformers model that embeds images and texts (CLIP, SigLIP): the score is the cosine similarity of image and
      caption, in [-1, 1].
    * A vision-language chat model of transformers: the score is the probability, in [0, 1], that it answers a question with
      "yes" rather than "no" (VQAScore, arXiv 2404.01291). If stage 1 made a plan, the model is asked several questions, and
      the score is the product of their probabilities.
    * A [`ChatEndpoint`] with such a model, which is asked the same questions. Images are sent to it.
    * A function `(images, caption, plan) -> scores`.

    In a pipeline, the judge gets the pipeline's dtype, moves with it, is offloaded, and is saved with its weights or as the
    name of a repository. Endpoints and functions are never saved, and are only used if the caller passes them.

    Args:
        model (`PreTrainedModel`, *optional*): a model of one of the two kinds.
        processor (*optional*): processor of the model.
        endpoint (`ChatEndpoint`, *optional*): used instead of a model.
        function (`Callable`, *optional*): used instead of a model; called once for all images of a caption.
        reference (`dict`, *optional*): the Hub repository of `model`, as `model`, and its `revision`. With it,
            `save_pretrained` writes the reference and no weights; set it to `None` to save the weights.
        threshold (`float`, *optional*): the lowest score at which drawing stops. When left out, 0.5 for judges that ask
            questions; the scores of other judges have no known scale, so they have no threshold and all candidates are drawn.

    Raises:
        `ValueError`: not exactly one of `model`, `endpoint` and `function` is given, `processor` is missing, `threshold` is
            not a finite number, or the model is of another kind.
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
            raise ValueError("A judge needs exactly one of: `model` with `processor`, `endpoint`, or `function`.")
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
            # Offloading reads the device of every component from its first parameter.
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
        """Loads a judge from its folder, or from a model's folder or Hub repository.

        Args:
            path (`str` or `os.PathLike`): a folder with `judge_config.json`, which either names a Hub repository or stands
                beside the weights in `model/` and `processor/`; or the folder or Hub repository of a transformers model.
            torch_dtype, dtype (`torch.dtype`, *optional*): dtype of the weights; the stored dtype when left out. The two
                names are equivalent; diffusers passes the first.
            revision (`str`, *optional*): revision of the Hub repository `path`; not for a folder, whose config names it.
            threshold (`float`, *optional*): replaces the threshold in `judge_config.json`.
            token, cache_dir, local_files_only (*optional*): Hub arguments, for `path` and for the repository that a folder
                names.
            quantization_config (*optional*): quantization config of transformers.

        Raises:
            `ValueError`: the folder has no valid `judge_config.json` or one that names an endpoint, the weights are a
                pickle, the model needs remote code, the two dtypes differ, or `revision` is given for a folder.
            `OSError`: the model does not exist or cannot be loaded.
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
                # Without a value, transformers would ask in the terminal.
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
        """Saves the config file, and the weights unless the judge has a `reference`, for `from_pretrained`.

        Args:
            path (`str` or `os.PathLike`): the folder, created if it is missing.
            safe_serialization (`bool`, *optional*): accepted as in diffusers; weights are always safetensors files.

        Raises:
            `ValueError`: the judge has an endpoint or a function, which are not saved.
        """
        if self.model is None:
            raise ValueError("A judge with an endpoint or a function is not saved: create it again and pass it.")
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
        """Judges each image by its caption, and by its plan if there is one.

        Args:
            images (`list[PIL.Image.Image]`): RGB images.
            captions (`list[str]`): one for each image; images of the same caption must be consecutive.
            plans (`list`, *optional*): plan of stage 1 for each image, or `None`.

        Returns:
            `list[Judgement]`: one for each image.

        Raises:
            `ValueError`: the lists differ in length, or the function does not return a finite score for each image.
            `FloatingPointError`: the output of the model is not finite.
        """
        plans = [None] * len(images) if plans is None else plans
        if not len(images) == len(captions) == len(plans):
            raise ValueError(
                f"There are {len(images)} images, {len(captions)} captions and {len(plans)} plans; give one for each image."
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
                    f"The judge's function returned {given!r:.200} for {end - begin} images of {caption!r}; it must return a "
                    "finite score for each."
                )
            made += [Judgement(score) for score in scores]
            begin = end
        return made

    @torch.no_grad()
    def forward(self, work: Callable, *arguments: Any) -> Any:
        """Calls `work`. Offloading moves a component when its `forward` is called, so the model runs only in here."""
        with exclusive(self.model):
            return work(*arguments)

    def _similarity(self, image: PIL.Image.Image, caption: str) -> Judgement:
        """Returns the cosine similarity of the embeddings, in [-1, 1]. Captions are truncated to the model's positions."""
        positions = self.model.config.text_config.max_position_embeddings
        # SigLIP was trained with texts padded to full length; CLIP ignores padding.
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
        """Asks all questions about an image; the score is the product of the answers' probabilities."""
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
        """Returns the tokens that a one-word answer may begin with."""
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
    """Returns the auto class for a judge's model: image-text-to-text if transformers has it for this config, else embedding."""
    return AutoModelForImageTextToText if config.model_type in ASKED else AutoModel


def read_judge_config(path: Path) -> dict[str, Any]:
    """Reads a `judge_config.json` and refuses unknown keys and endpoints.

    Raises:
        `ValueError`: as in [`~loading.component_config.read_config`], or the file names an endpoint.
    """
    if not path.is_file():
        raise ValueError(f"{str(path.parent)!r} is not a judge: it has no {CONFIG_NAME}.")
    of_endpoint = {"endpoint", "api_key_env"}
    config = read_config(path, {"model", "revision", "threshold", *of_endpoint}, "model", {"revision"})
    if config.keys() & of_endpoint:
        # The author of the file would receive every image, and the value of any environment variable.
        raise ValueError(
            f"{str(path)!r} names an endpoint at {host_of(config.get('endpoint'))!r}, to which images would be sent. A file "
            "must not name one: pass `anchor_judge=AnchorJudge(endpoint=ChatEndpoint(url, model, api_key_env=...))`. "
            "`anchor_judge=None` loads the pipeline without a judge."
        )
    return config
