"""Training objectives for anchored clips: model inputs, targets and losses.

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
    """Objective of Wan: linear interpolation to noise, a time of 1000 times the noise level, and one time per latent frame."""

    num_train_timesteps = 1000
    frames_per_patch = 1

    def padded(self, latents: torch.Tensor) -> torch.Tensor:
        """Pads clean latents to whole patches; this model needs no padding."""
        return latents

    def sigmas_at(self, times: torch.Tensor) -> torch.Tensor:
        """Returns the noise levels of times in (0, 1), where 1 is the time of pure noise."""
        return times

    def model_input(
        self, clean_latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor, anchors: AnchorLatents
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Returns the model's arguments besides the text, and the target, which has the shape of `clean_latents`."""
        noisy_latents = add_noise(clean_latents, noise, sigmas.view(-1, 1, 1, 1, 1))
        inputs = anchored_model_input(noisy_latents, sigmas, sigmas * self.num_train_timesteps, anchors)
        return inputs, velocity(clean_latents, noise)

    def caller(self, model: Callable, transformer: torch.nn.Module) -> Callable:
        """Adapts `model` to the arguments of [`model_input`], `encoder_hidden_states` and `return_dict`.

        `transformer` is the module that `model` wraps, or `model` itself.
        """
        return model


FLOW_MATCHING = FlowMatching()


class VPrediction:
    """Objective of CogVideoX, with the methods of [`FlowMatching`]: variance-preserving noise with tabulated levels, velocity
    prediction ([`schedules.cogvideox`]), and one time per patch of latent frames.

    Args:
        sigmas (`torch.Tensor` of shape `(T,)`): output of [`schedules.cogvideox.training_sigmas`].
        frames_per_patch (`int`): `patch_size_t` of the model.
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
        # Unlike that of flow matching, this velocity depends on the noise level, which may differ between frames.
        frame_sigmas = (1 - anchors.strength.double()) * sigmas[:, None]
        target = schedules_cogvideox.velocity(clean_latents, noise, frame_sigmas[:, None, :, None, None])
        return {"hidden_states": hidden_states, "timestep": timestep}, target

    def caller(self, model: Callable, transformer: torch.nn.Module) -> Callable:
        return anchor_cogvideox.channels_first(model, transformer.rotary_embedding)


def sample_sigmas(
    batch_size: int, flow_shift: float = 1.0, generator: torch.Generator | None = None, std: float = 1.0
) -> torch.Tensor:
    """Draws logit-normal noise levels `(B,)` in (0, 1) (arXiv 2403.03206, section 3.1), shifted as in `shifted_sigmas`."""
    # Imported here because this import takes seconds.
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
    """Returns the mean squared error of the predicted velocity over the frames that count.

    `loss = sum_k counted_k |v_k - target_k|^2 / sum_k counted_k`: the divisor leaves out masked frames too.

    Args:
        model (`Callable`): called as the transformer, with `return_dict=False`.
        inputs (`dict[str, torch.Tensor]`): model arguments from [`FlowMatching.model_input`].
        prompt_embeds (`torch.Tensor` of shape `(B, L, D)`): text embeddings.
        target (`torch.Tensor` of shape `(B, C, f, h, w)`): velocity to predict; for flow matching `noise - clean`.
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
    """Returns the mean squared error of the predicted velocity over the frames that are not anchored.

    `loss = sum_k free_k |v_k - (noise_k - clean_k)|^2 / sum_k free_k`: an anchored frame is an input and nothing to predict.
    The divisor leaves anchored frames out too, so that an anchor does not lower the loss.

    Args:
        model (`Callable`): called as the transformer, with `return_dict=False`.
        clean_latents, noise (`torch.Tensor` of shape `(B, C, f, h, w)`): normalised latents and unit Gaussian noise.
        sigmas (`torch.Tensor` of shape `(B,)`): noise levels in (0, 1).
        prompt_embeds (`torch.Tensor` of shape `(B, L, D)`): text embeddings.
        anchors (`AnchorLatents`, *optional*): anchors of the clips; `None` is plain text-to-video.
        num_train_timesteps (`int`, *optional*): factor from a noise level to the model's timestep.
    """
    noisy_latents = add_noise(clean_latents, noise, sigmas.view(-1, 1, 1, 1, 1))
    inputs = anchored_model_input(noisy_latents, sigmas, sigmas * num_train_timesteps, anchors)
    free = (
        noise.new_ones(noise.shape[0], noise.shape[2]) if anchors is None else (anchors.strength == 0).to(noise.dtype)
    )
    return velocity_loss(model, inputs, prompt_embeds, velocity(clean_latents, noise), free)
