"""What is drawn at random for a training clip, and the loss of it: pure functions.

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
    """A batch of clips made ready for one forward.

    Args:
        noise (`torch.Tensor` of shape `(B, C, f, h, w)`): unit Gaussian.
        sigmas (`torch.Tensor` of shape `(B,)`): the clip's noise level in (0, 1): that of its noisiest free frame.
        anchors (`AnchorLatents`): the given frames and, with independent frame times, every frame below `sigmas`: noise
            level and time of a frame are `(1 - strength)` of the clip's, which is all that an anchor is to the model.
        counted (`torch.Tensor` of shape `(B, f)`): 1 for a frame whose error counts.
        drop_prompt (`torch.Tensor` of shape `(B,)`): whether the empty prompt stands in.
    """

    noise: torch.Tensor
    sigmas: torch.Tensor
    anchors: AnchorLatents
    counted: torch.Tensor
    drop_prompt: torch.Tensor


@dataclass(frozen=True)
class Pictures:
    """Single frames of the clips of a batch, each encoded alone, as an appended anchor is.

    Args:
        latents (`torch.Tensor` of shape `(B, C, n, h, w)`): normalised.
        frames (`torch.Tensor` of shape `(B, n)`): their pixel frames, from [`appended_frames`].
    """

    latents: torch.Tensor
    frames: torch.Tensor

    def latent_indices(self) -> list[list[int]]:
        return [[latent_index(frame) for frame in row] for row in self.frames.tolist()]


def generator_for(*path: int | str) -> torch.Generator:
    """A generator on the CPU whose seed depends on the arguments alone, so that a run can continue at any step."""
    digest = hashlib.sha256(repr(path).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def drawn_times(
    quantiles: torch.Tensor, config: TrainConfig, time_range: tuple[float, float] = (0.0, 1.0)
) -> torch.Tensor:
    """Quantiles of the density of times, cut to `time_range` and renormalised there. Of a flow model they are noise levels.

    Before the cut a time is `shift * u / (1 + (shift - 1) * u)` with u uniform in (0, 1), or `u = sigmoid(std * normal)`.

    Args:
        quantiles (`torch.Tensor`, any shape): in [0, 1]; uniform ones give times of that density.
        config (`TrainConfig`): `timestep_density`, `timestep_std`, `flow_shift`.
        time_range (`tuple[float, float]`, *optional*): the expert's range.

    Returns:
        `torch.Tensor` of the same shape, float32, in (0, 1).
    """
    shift, std = config.flow_shift, config.timestep_std
    low, high = torch.tensor(time_range, dtype=torch.float64)
    low, high = (time / (shift - (shift - 1) * time) for time in (low, high))
    # The ends themselves have no logit. 2^-24 is where float32 stops telling a time from 1.
    quantiles = quantiles.double().clamp(2**-24, 1 - 2**-24)
    if config.timestep_density == "uniform":
        even = low + quantiles * (high - low)
    else:
        low, high = (torch.special.ndtr(torch.logit(u) / std) for u in (low, high))
        even = torch.sigmoid(std * torch.special.ndtri(low + quantiles * (high - low)))
    return (shift * even / (1 + (shift - 1) * even)).float()


def anchor_index(position: str, num_latent_frames: int, generator: torch.Generator, temporal: int = 4) -> int:
    """Draws the latent frame that is given: see `TrainConfig.anchor_position`."""
    if position == "first":
        return 0
    if position == "uniform":
        return int(torch.randint(num_latent_frames, (), generator=generator))
    last = (num_latent_frames - 1) * temporal
    frame = (0, last // 2, last)[int(torch.randint(3, (), generator=generator))]
    return latent_index(frame, temporal)


def appended_frames(config: TrainConfig, clip: str, num_frames: int, temporal: int = 4) -> list[int]:
    """Pixel frames of a clip whose pictures may be appended: at most one of each latent frame, none of the first.

    With `anchor_position="uniform"` chance, by the clip's name alone, chooses the frame of each latent frame.

    Args:
        config (`TrainConfig`): `anchor_form`, `anchor_position`.
        clip (`str`): its name.
        num_frames (`int`): of the clip.
        temporal (`int`, *optional*): frames of a latent frame.
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
    """Draws everything for a batch, each clip from a generator of its own.

    Args:
        clean_latents (`torch.Tensor` of shape `(B, C, f, h, w)`): normalised and padded, on the CPU.
        generators (`list[torch.Generator]`): one per clip.
        config (`TrainConfig`): anchor and noise options.
        time_range (`tuple[float, float]`, *optional*): times of the expert that is trained.
        objective (`FlowMatching` or `VPrediction`, *optional*): of the model.
        pictures ([`Pictures`], *optional*): of each clip, which are appended where their latent frame is drawn.
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
    """What of a clip is drawn; `places`: latent indices of its pictures, which are appended where one is drawn."""
    # The frames of a patch have one time: they are anchored together.
    together = objective.frames_per_patch
    num_patches = shape[1] // together
    # All are drawn whether they are used or not: changing one option leaves the other draws as they were.
    anchor_draw, noise_draw, prompt_draw = torch.rand(3, generator=generator)
    index = anchor_index(config.anchor_position, num_patches, generator)
    times = drawn_times(torch.rand(num_patches, generator=generator), config, time_range)
    noise = torch.randn(shape, generator=generator)

    anchored, picture, share = torch.zeros(num_patches), torch.tensor(-1), 1 - noise_draw * config.anchor_noise
    # Of a picture the anchor would be all there is.
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
    """The chosen picture of each clip, none where that is -1; `None` if all clips have none."""
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
    """Mean squared error of the predicted velocity over the frames that count.

    `loss = sum_k counted_k |v_k - target_k|^2 / sum_k counted_k`: what is masked is divided out too, so that an anchor does
    not lower the loss.

    Args:
        model (`Callable`): called as the transformer, with `return_dict=False`; see [`FlowMatching.caller`].
        clean_latents (`torch.Tensor` of shape `(B, C, f, h, w)`): normalised and padded.
        drawn ([`Draw`]): on the same device.
        prompt_embeds (`torch.Tensor` of shape `(B, L, D)`): text embeddings.
        dtype (`torch.dtype`, *optional*): of the model's weights.
        objective (`FlowMatching` or `VPrediction`, *optional*): of the model.
        teacher (`Callable`, *optional*): `teacher(inputs, prompt_embeds)` gives the target in place of the objective's own.
    """
    inputs, target = objective.model_input(clean_latents, drawn.noise, drawn.sigmas, drawn.anchors)
    inputs["hidden_states"], prompt_embeds = inputs["hidden_states"].to(dtype), prompt_embeds.to(dtype)
    if teacher is not None:
        target = teacher(inputs, prompt_embeds)
    return velocity_loss(model, inputs, prompt_embeds, target, drawn.counted)
