"""What a model is asked to predict of an anchored clip, and the loss: pure functions of tensors.

Shapes: B batch, C latent channels, f/h/w latent frames, height and width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..animate import anchor_cogvideox
from ..animate.conditioning import AnchorLatents, anchored_model_input
from ..schedules import cogvideox as schedules_cogvideox
from ..schedules.flow import add_noise, velocity


class FlowMatching:
    """Wan's: noise mixed in a straight line, time 1000 times the noise level, a time for every latent frame."""

    num_train_timesteps = 1000
    frames_per_patch = 1

    def padded(self, latents: torch.Tensor) -> torch.Tensor:
        """Clean latents as the model takes them: as they are."""
        return latents

    def sigmas_at(self, times: torch.Tensor) -> torch.Tensor:
        """Noise levels of times in (0, 1), 1 the time of pure noise."""
        return times

    def model_input(
        self, clean_latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor, anchors: AnchorLatents
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """What the model is called with beside the text, and what is to be predicted, of the shape of `clean_latents`."""
        noisy_latents = add_noise(clean_latents, noise, sigmas.view(-1, 1, 1, 1, 1))
        inputs = anchored_model_input(noisy_latents, sigmas, sigmas * self.num_train_timesteps, anchors)
        return inputs, velocity(clean_latents, noise)

    def caller(self, model: Callable, transformer: torch.nn.Module) -> Callable:
        """`model` as a function of what [`model_input`] gives, `encoder_hidden_states` and `return_dict`.

        `transformer` is what `model` wraps, or `model` itself.
        """
        return model


FLOW_MATCHING = FlowMatching()


class VPrediction:
    """CogVideoX's, with the methods of [`FlowMatching`]: variance-preserving noise from a table, velocity along that arc
    ([`schedules.cogvideox`]); a time for every patch of latent frames.

    Args:
        sigmas (`torch.Tensor` of shape `(T,)`): from [`schedules.cogvideox.training_sigmas`].
        frames_per_patch (`int`): of the model, `patch_size_t`.
    """

    def __init__(self, sigmas: torch.Tensor, frames_per_patch: int):
        self.sigmas, self.frames_per_patch = sigmas, frames_per_patch

    def padded(self, latents: torch.Tensor) -> torch.Tensor:
        return anchor_cogvideox.pad_to_patches(latents, self.frames_per_patch)

    def sigmas_at(self, times: torch.Tensor) -> torch.Tensor:
        return schedules_cogvideox.uniform_sigmas(times, self.sigmas)

    def model_input(
        self, clean_latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor, anchors: AnchorLatents
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        table = self.sigmas.to(sigmas.device)
        noisy_latents = schedules_cogvideox.add_noise(clean_latents, noise, sigmas.view(-1, 1, 1, 1, 1))
        timestep = schedules_cogvideox.times_of(sigmas, table)
        hidden_states, timestep = anchor_cogvideox.anchored_model_input(
            noisy_latents, sigmas, timestep, anchors, table
        )
        # Unlike the straight line's, this velocity depends on the noise level, and each frame has its own.
        frame_sigmas = (1 - anchors.strength.double()) * sigmas[:, None]
        target = schedules_cogvideox.velocity(clean_latents, noise, frame_sigmas[:, None, :, None, None])
        return {"hidden_states": hidden_states, "timestep": timestep}, target

    def caller(self, model: Callable, transformer: torch.nn.Module) -> Callable:
        return anchor_cogvideox.channels_first(model, transformer.rotary_embedding)


def sample_sigmas(
    batch_size: int, flow_shift: float = 1.0, generator: torch.Generator | None = None, std: float = 1.0
) -> torch.Tensor:
    """Logit-normal noise levels (arXiv 2403.03206, section 3.1), shifted as in `shifted_sigmas`. Shape `(B,)`, in (0, 1)."""
    # Takes seconds to import.
    from diffusers.training_utils import compute_density_for_timestep_sampling

    even = compute_density_for_timestep_sampling("logit_normal", batch_size, 0.0, std, generator=generator)
    return flow_shift * even / (1 + (flow_shift - 1) * even)


def velocity_loss(
    model: Callable[..., tuple[torch.Tensor, ...]],
    inputs: dict[str, torch.Tensor],
    prompt_embeds: torch.Tensor,
    target: torch.Tensor,
    counted: torch.Tensor,
) -> torch.Tensor:
    """Mean squared error of the predicted velocity over the frames that count.

    `loss = sum_k counted_k |v_k - target_k|^2 / sum_k counted_k`: what is masked is divided out too.

    Args:
        model (`Callable`): called as the transformer, with `return_dict=False`.
        inputs (`dict[str, torch.Tensor]`): from [`anchored_model_input`].
        prompt_embeds (`torch.Tensor` of shape `(B, L, D)`): text embeddings.
        target (`torch.Tensor` of shape `(B, C, f, h, w)`): `noise - clean`.
        counted (`torch.Tensor` of shape `(B, f)`): 1 where a frame counts, else 0.
    """
    prediction = model(**inputs, encoder_hidden_states=prompt_embeds, return_dict=False)[0]
    error = (prediction.float() - target).square().mean(dim=(1, 3, 4))
    return (error * counted).sum() / counted.sum()


def anchored_flow_loss(
    model: Callable[..., tuple[torch.Tensor, ...]],
    clean_latents: torch.Tensor,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    prompt_embeds: torch.Tensor,
    anchors: AnchorLatents | None = None,
    num_train_timesteps: int = 1000,
) -> torch.Tensor:
    """Mean squared error of the predicted velocity over the frames that are not anchored.

    `loss = sum_k free_k |v_k - (noise_k - clean_k)|^2 / sum_k free_k`: a fully anchored frame is an input, not something
    to predict, and the sum is divided by what is left, so that an anchor does not lower the loss.

    Args:
        model (`Callable`): called as the transformer, with `return_dict=False`.
        clean_latents, noise (`torch.Tensor` of shape `(B, C, f, h, w)`): normalised latents and unit Gaussian noise.
        sigmas (`torch.Tensor` of shape `(B,)`): noise levels in (0, 1).
        prompt_embeds (`torch.Tensor` of shape `(B, L, D)`): text embeddings.
        anchors (`AnchorLatents`, *optional*): `None` is plain text-to-video.
    """
    noisy_latents = add_noise(clean_latents, noise, sigmas.view(-1, 1, 1, 1, 1))
    inputs = anchored_model_input(noisy_latents, sigmas, sigmas * num_train_timesteps, anchors)
    free = (
        noise.new_ones(noise.shape[0], noise.shape[2]) if anchors is None else (anchors.strength == 0).to(noise.dtype)
    )
    return velocity_loss(model, inputs, prompt_embeds, velocity(clean_latents, noise), free)
