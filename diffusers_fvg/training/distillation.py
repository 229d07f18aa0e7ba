"""Guidance distillation: a LoRA learns in one forward what the base and a finished anchor LoRA predict in two.

Teacher and student are two adapters on one copy of the base. Guidance distillation is Meng et al., arXiv 2210.03142,
stage one; here at a fixed scale, which the student needs no input for.
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
    """The anchor LoRA `config.teacher_lora` as a frozen second adapter, and what base and adapter predict with guidance.

    It predicts through the window of attention that its LoRA was trained with, whatever the student's is.

    Args:
        config (`TrainConfig`): with `distill_guidance` and `teacher_lora`.
        expert (`str`): `"transformer"` or `"transformer_2"`.

    Raises:
        `ValueError`: no LoRA in the folder, none of this expert, one that has guidance in it already, that was trained with
            anchors of another form, or that does not fit into the student's `rank` and `targets`.
    """

    def __init__(self, config: TrainConfig, expert: str):
        self.config, self.expert = config, expert
        self.guidance_scale = config.distill_guidance[config.experts.index(expert)]
        lora = AnchorLora.from_pretrained(config.teacher_lora)
        self.state = {key: tensor for key, tensor in lora.state_dict.items() if key.startswith(expert + ".")}
        if not self.state:
            raise ValueError(f"`teacher_lora={config.teacher_lora!r}` has no weights for the expert {expert!r}.")
        if "guidance_scale" in lora.metadata:
            scale = lora.metadata["guidance_scale"]
            raise ValueError(
                f"`teacher_lora={config.teacher_lora!r}` has a guidance of {scale} in it; distil the LoRA that it was made from."
            )
        if lora.form != config.anchor_form:
            raise ValueError(
                f"`anchor_form={config.anchor_form!r}`, and `teacher_lora={config.teacher_lora!r}` was trained with "
                f"{lora.form!r}: set it to that."
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
                f"`rank={config.rank}` is below that of `teacher_lora`, which the new LoRA starts from; set it to "
                f"{max(ranks.values())} or more."
            )
        left_out = [name for name in ranks if not any(name.endswith("." + target) for target in config.targets)]
        if left_out:
            raise ValueError(
                f"`targets={list(config.targets)}` leave out {left_out[0]}, which `teacher_lora` has weights for; add it."
            )

    @functools.cached_property
    def digest(self) -> str:
        """Of the weights: a run is continued with the teacher that it began with."""
        digest = hashlib.sha256()
        for key in sorted(self.state):
            digest.update(key.encode() + self.state[key].contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def load_into(self, transformer: torch.nn.Module) -> None:
        """Adds the adapter `"teacher"`."""
        experts = [transformer if name == self.expert else None for name in EXPERTS]
        load_lora(experts, self.state, TEACHER_NAME, strict=True, metadata=self.metadata)

    def start(self, transformer: torch.nn.Module) -> None:
        """Gives the adapter `"anchor"` the teacher's weights to start from."""
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
        """`uncond + scale * (cond - uncond)`, as the pipeline computes it, in float32.

        Args:
            model (`Callable`): called as the transformer, with `return_dict=False`.
            transformer (`torch.nn.Module`): what `model` wraps.
            negative_embeds, prompt_embeds (`torch.Tensor` of shape `(B, L, D)`): text embeddings.
            inputs (`dict[str, torch.Tensor]`): from [`FlowMatching.model_input`].
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
    """Runs with one adapter in place of those that are active.

    PEFT's own `set_adapter` also changes which parameters require a gradient. DDP and FSDP have looked at that when they
    wrapped the model.
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
