"""Random draws for training clips, and the loss on them, as pure functions.

Shapes: B batch, C latent channels, f/h/w latent frames, height and width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..animate.conditioning import AnchorLatents, AppendedAnchors, frame_position, latent_index
from .config import TrainConfig
from .objectives import FLOW_MATCHING, FlowMatching, VPrediction, velocity_loss


@dataclass(frozen=True)
class Draw:
    """Random draws for one forward of a batch.

    Args:
        noise (`torch.Tensor` of shape `(B, C, f, h, w)`): unit Gaussian noise.
        sigmas (`torch.Tensor` of shape `(B,)`): noise level of each clip in (0, 1), that of its noisiest free frame. A free
            frame is one without an anchor.
        anchors (`AnchorLatents`): the anchors and, with independent frame times, every frame below `sigmas`. To the model an
            anchor is a frame whose noise level and time are `(1 - strength)` times those of the clip.
        counted (`torch.Tensor` of shape `(B, f)`): 1 for a frame whose error counts, else 0.
        drop_prompt (`torch.Tensor` of shape `(B,)`): whether the empty prompt replaces the clip's.
    """

    noise: torch.Tensor
    sigmas: torch.Tensor
    anchors: AnchorLatents
    counted: torch.Tensor
    drop_prompt: torch.Tensor


@dataclass(frozen=True)
class Pictures:
    """Single frames of the clips of a batch, each encoded as an image, for appended anchors.

    Args:
        latents (`torch.Tensor` of shape `(B, C, n, h, w)`): normalised latents.
        frames (`torch.Tensor` of shape `(B, n)`): their indices in the decoded clip, from [`appended_frames`].
    """

    latents: torch.Tensor
    frames: torch.Tensor

    def latent_indices(self) -> list[list[int]]:
        return [[latent_index(frame) for frame in row] for row in self.frames.tolist()]


def generator_for(*path: int | str) -> torch.Generator:
    """Returns a CPU generator whose seed depends on the arguments only, so that a run can resume at any step."""
    digest = hashlib.sha256(repr(path).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def drawn_times(
    quantiles: torch.Tensor, config: TrainConfig, time_range: tuple[float, float] = (0.0, 1.0)
) -> torch.Tensor:
    """Maps quantiles to training times: the inverse distribution function of the time density, truncated to `time_range`.

    Before the truncation a time is `shift * u / (1 + (shift - 1) * u)`, with u uniform in (0, 1) or `u = sigmoid(std *
    normal)`. The times of a flow model are its noise levels.

    Args:
        quantiles (`torch.Tensor`, any shape): values in [0, 1]; uniform random ones give random times of that density.
        config (`TrainConfig`): `timestep_density`, `timestep_std`, `flow_shift`.
        time_range (`tuple[float, float]`, *optional*): range of the expert.

    Returns:
        `torch.Tensor` of the same shape, float32, in (0, 1).
    """
    shift, std = config.flow_shift, config.timestep_std
    low, high = torch.tensor(time_range, dtype=torch.float64)
    low, high = (time / (shift - (shift - 1) * time) for time in (low, high))
    # 0 and 1 have no logit. 1 - 2^-24 is the largest float32 below 1.
    quantiles = quantiles.double().clamp(2**-24, 1 - 2**-24)
    if config.timestep_density == "uniform":
        even = low + quantiles * (high - low)
    else:
        low, high = (torch.special.ndtr(torch.logit(u) / std) for u in (low, high))
        even = torch.sigmoid(std * torch.special.ndtri(low + quantiles * (high - low)))
    return (shift * even / (1 + (shift - 1) * even)).float()


def anchor_index(position: str, num_latent_frames: int, generator: torch.Generator, temporal: int = 4) -> int:
    """Draws the index of the latent frame for the anchor; see `TrainConfig.anchor_position`."""
    if position == "first":
        return 0
    if position == "uniform":
        return int(torch.randint(num_latent_frames, (), generator=generator))
    last = (num_latent_frames - 1) * temporal
    frame = (0, last // 2, last)[int(torch.randint(3, (), generator=generator))]
    return latent_index(frame, temporal)


def appended_frames(config: TrainConfig, clip: str, num_frames: int, temporal: int = 4) -> list[int]:
    """Returns the indices of a clip's frames that may become appended anchors: at most one per latent frame, none of the first.

    With `anchor_position="uniform"` the frame of each latent frame is random, but depends on the clip's name only.

    Args:
        config (`TrainConfig`): `anchor_form`, `anchor_position`.
        clip (`str`): name of the clip.
        num_frames (`int`): number of frames of the clip.
        temporal (`int`, *optional*): number of frames per latent frame.
    """
    last = num_frames - 1
    if config.anchor_form == "slot" or config.anchor_position == "first" or not last:
        return []
    if config.anchor_position == "start-middle-last":
        return sorted({last // 2, last})
    offsets = torch.randint(temporal, (last // temporal,), generator=generator_for("pictures", clip))
    return [temporal * index + 1 + int(offset) for index, offset in enumerate(offsets)]


def draw(
    clean_latents: torch.Tensor,
    generators: Sequence[torch.Generator],
    config: TrainConfig,
    time_range: tuple[float, float] = (0.0, 1.0),
    objective: FlowMatching | VPrediction = FLOW_MATCHING,
    pictures: Pictures | None = None,
) -> Draw:
    """Makes all random draws for a batch, with one generator per clip.

    Args:
        clean_latents (`torch.Tensor` of shape `(B, C, f, h, w)`): normalised and padded latents, on the CPU.
        generators (`list[torch.Generator]`): one generator per clip.
        config (`TrainConfig`): anchor and noise options.
        time_range (`tuple[float, float]`, *optional*): times of the trained expert.
        objective (`FlowMatching` or `VPrediction`, *optional*): objective of the model.
        pictures ([`Pictures`], *optional*): images of each clip; one is appended as the anchor if its latent frame is drawn.
    """
    num_frames = clean_latents.shape[2]
    places = [[]] * len(generators) if pictures is None else pictures.latent_indices()
    rows = [
        _draw_clip(clean_latents[0].shape, generator, config, time_range, objective, own)
        for generator, own in zip(generators, places)
    ]
    noise, sigmas, strength, anchored, drop_prompt, picture, share = (torch.stack(column) for column in zip(*rows))
    appended = None if pictures is None else _appended(pictures, picture, share, generators)
    counted = torch.ones(len(rows), num_frames)
    if config.mask_anchor_loss:
        counted = 1 - anchored
    return Draw(noise, sigmas, AnchorLatents(clean_latents, strength, noise, appended), counted, drop_prompt)


def _draw_clip(
    shape: torch.Size,
    generator: torch.Generator,
    config: TrainConfig,
    time_range: tuple[float, float],
    objective: FlowMatching | VPrediction,
    places: list[int],
) -> tuple[torch.Tensor, ...]:
    """Makes the draws for one clip; `places` are the latent indices of its images for appended anchors."""
    # The frames of a patch share one time, so they are anchored together.
    together = objective.frames_per_patch
    num_patches = shape[1] // together
    # All values are drawn, even those that are not used, so that changing one option does not change the other draws.
    anchor_draw, noise_draw, prompt_draw = torch.rand(3, generator=generator)
    index = anchor_index(config.anchor_position, num_patches, generator)
    times = drawn_times(torch.rand(num_patches, generator=generator), config, time_range)
    noise = torch.randn(shape, generator=generator)

    anchored, picture, share = torch.zeros(num_patches), torch.tensor(-1), 1 - noise_draw * config.anchor_noise
    # In a clip of one latent frame the anchor would be the whole clip.
    if num_patches > 1 and anchor_draw < config.anchor_probability:
        if index in places:
            picture = torch.tensor(places.index(index))
        else:
            anchored[index] = 1
    if config.frame_times == "shared":
        times = times[:1].expand(num_patches)
    patch_sigmas = objective.sigmas_at(times)
    sigma = torch.where(anchored > 0, 0, patch_sigmas).max()
    strength = torch.where(anchored > 0, share, 1 - patch_sigmas / sigma).float()
    strength, anchored = strength.repeat_interleave(together), anchored.repeat_interleave(together)
    return noise, sigma, strength, anchored, prompt_draw < config.prompt_dropout, picture, share


def _appended(
    pictures: Pictures, chosen: torch.Tensor, share: torch.Tensor, generators: Sequence[torch.Generator]
) -> AppendedAnchors | None:
    """Returns the chosen image of each clip as an appended anchor (-1 for none), or `None` if no clip has one."""
    has = chosen >= 0
    if not has.any():
        return None
    rows, chosen = torch.arange(len(chosen)), chosen.clamp(min=0)
    latents = pictures.latents[rows, :, chosen][:, :, None] * has[:, None, None, None, None]
    frames = pictures.frames[rows, chosen].tolist()
    positions = torch.tensor([[frame_position(frame)] for frame in frames], dtype=torch.float64)
    noise = torch.stack([torch.randn(latents[0].shape, generator=generator) for generator in generators])
    return AppendedAnchors(latents, (share * has)[:, None].float(), noise, positions.where(has[:, None], -1.0))


def draw_loss(
    model: Callable[..., tuple[torch.Tensor, ...]],
    clean_latents: torch.Tensor,
    drawn: Draw,
    prompt_embeds: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    objective: FlowMatching | VPrediction = FLOW_MATCHING,
    teacher: Callable[[dict[str, torch.Tensor], torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Returns the mean squared error of the predicted velocity over the frames that count.

    `loss = sum_k counted_k |v_k - target_k|^2 / sum_k counted_k`: the divisor leaves out masked frames too, so that an anchor
    does not lower the loss.

    Args:
        model (`Callable`): called as the transformer, with `return_dict=False`; see [`FlowMatching.caller`].
        clean_latents (`torch.Tensor` of shape `(B, C, f, h, w)`): normalised and padded latents.
        drawn ([`Draw`]): draws on the same device.
        prompt_embeds (`torch.Tensor` of shape `(B, L, D)`): text embeddings.
        dtype (`torch.dtype`, *optional*): dtype of the model's inputs.
        objective (`FlowMatching` or `VPrediction`, *optional*): objective of the model.
        teacher (`Callable`, *optional*): `teacher(inputs, prompt_embeds)` returns the target in place of the objective's own.
    """
    inputs, target = objective.model_input(clean_latents, drawn.noise, drawn.sigmas, drawn.anchors)
    inputs["hidden_states"], prompt_embeds = inputs["hidden_states"].to(dtype), prompt_embeds.to(dtype)
    if teacher is not None:
        target = teacher(inputs, prompt_embeds)
    return velocity_loss(model, inputs, prompt_embeds, target, drawn.counted)
