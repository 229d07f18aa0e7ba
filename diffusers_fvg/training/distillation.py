"""Guidance distillation: a LoRA learns to predict in one forward what the base with a finished anchor LoRA predicts in two.

Teacher and student are two adapters on one copy of the base. The method is stage one of Meng et al., arXiv 2210.03142, at a
fixed scale, so that the student needs no input for the scale.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from ..lora.anchor_lora import AnchorLora
from ..lora.loader import EXPERTS, load_lora
from .config import TrainConfig
from .initial import copy_adapter


TEACHER_NAME = "teacher"


class GuidedTeacher:
    """Teacher: the anchor LoRA `config.teacher_lora` as a frozen second adapter, and its guided predictions.

    The teacher predicts with the attention window that its LoRA was trained with, whatever window the student has.

    Args:
        config (`TrainConfig`): config with `distill_guidance` and `teacher_lora`.
        expert (`str`): `"transformer"` or `"transformer_2"`.

    Raises:
        `ValueError`: the folder has no LoRA or none for this expert, or the LoRA is already distilled, was trained with
            another `anchor_form`, or does not fit into the student's `rank` and `targets`.
    """

    def __init__(self, config: TrainConfig, expert: str):
        self.config, self.expert = config, expert
        self.guidance_scale = config.distill_guidance[config.experts.index(expert)]
        lora = AnchorLora.from_pretrained(config.teacher_lora)
        self.state = {key: tensor for key, tensor in lora.state_dict.items() if key.startswith(expert + ".")}
        if not self.state:
            raise ValueError(
                f"`teacher_lora={config.teacher_lora!r}` has no weights for the expert {expert!r}; leave it out of `experts`."
            )
        if "guidance_scale" in lora.metadata:
            scale = lora.metadata["guidance_scale"]
            raise ValueError(
                f"`teacher_lora={config.teacher_lora!r}` has a guidance of {scale} in it; distil the LoRA that it was made from."
            )
        if lora.form != config.anchor_form:
            raise ValueError(
                f"`anchor_form={config.anchor_form!r}`, and `teacher_lora={config.teacher_lora!r}` was trained with "
                f"{lora.form!r}: set `anchor_form` to that."
            )
        self._check_fit()
        self.metadata = lora.metadata
        window = lora.metadata.get("anchor_window")
        self.window = None if window is None else int(window)

    def _check_fit(self) -> None:
        config = self.config
        ranks = {key.split(".lora_A.")[0]: len(down) for key, down in self.state.items() if ".lora_A." in key}
        if max(ranks.values()) > config.rank:
            raise ValueError(
                f"`rank={config.rank}` is below that of `teacher_lora`, which the new LoRA starts from; set `rank` to "
                f"{max(ranks.values())} or more."
            )
        left_out = [name for name in ranks if not any(name.endswith("." + target) for target in config.targets)]
        if left_out:
            raise ValueError(
                f"`targets={list(config.targets)}` leave out {left_out[0]}, which `teacher_lora` has weights for; add it."
            )

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the weights, so that a run is resumed only with the teacher that it began with."""
        digest = hashlib.sha256()
        for key in sorted(self.state):
            digest.update(key.encode() + self.state[key].contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def load_into(self, transformer: torch.nn.Module) -> None:
        """Adds the adapter `"teacher"`."""
        experts = [transformer if name == self.expert else None for name in EXPERTS]
        load_lora(experts, self.state, TEACHER_NAME, strict=True, metadata=self.metadata)

    def start(self, transformer: torch.nn.Module) -> None:
        """Initializes the adapter `"anchor"` with the teacher's weights."""
        copy_adapter(transformer, TEACHER_NAME)

    @torch.no_grad()
    def predict(
        self,
        model: Callable[..., tuple[torch.Tensor, ...]],
        transformer: torch.nn.Module,
        negative_embeds: torch.Tensor,
        inputs: dict[str, torch.Tensor],
        prompt_embeds: torch.Tensor,
    ) -> torch.Tensor:
        """Returns the guided prediction `uncond + scale * (cond - uncond)` in float32, as the pipeline computes it.

        Args:
            model (`Callable`): called as the transformer, with `return_dict=False`.
            transformer (`torch.nn.Module`): the transformer that `model` wraps.
            negative_embeds, prompt_embeds (`torch.Tensor` of shape `(B, L, D)`): text embeddings.
            inputs (`dict[str, torch.Tensor]`): output of [`FlowMatching.model_input`].
        """
        dtype = inputs["hidden_states"].dtype
        with _only(transformer, TEACHER_NAME), self._own_window(transformer):
            uncond, cond = (
                model(encoder_hidden_states=embeds.to(dtype), return_dict=False, **inputs)[0].float()
                for embeds in (negative_embeds, prompt_embeds)
            )
        return uncond + self.guidance_scale * (cond - uncond)

    @contextlib.contextmanager
    def _own_window(self, transformer: torch.nn.Module) -> Iterator[None]:
        if self.window == self.config.anchor_window:
            yield
            return
        transformer.set_anchor_window(self.window)
        try:
            yield
        finally:
            transformer.set_anchor_window(self.config.anchor_window)


def _layers(transformer: torch.nn.Module) -> list[BaseTunerLayer]:
    return [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]


@contextlib.contextmanager
def _only(transformer: torch.nn.Module, adapter_name: str) -> Iterator[None]:
    """Context manager in which only the given adapter is active.

    PEFT's own `set_adapter` also changes which parameters require a gradient. DDP and FSDP read that once, when they wrap the
    model.
    """
    layers = _layers(transformer)
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [adapter_name]
    try:
        yield
    finally:
        for layer, names in zip(layers, before):
            layer._active_adapter = names
