"""The anchored flow-matching objective: pure functions of tensors.

Shapes: B batch, C latent channels, f/h/w latent frames, height and width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..anchor import AnchorLatents, anchored_model_input
from ..schedules import add_noise, velocity


def sample_sigmas(
    batch_size: int, flow_shift: float = 1.0, generator: torch.Generator | None = None, std: float = 1.0
) -> torch.Tensor:
    """Logit-normal noise levels (arXiv 2403.03206, section 3.1), shifted as in `shifted_sigmas`. Shape `(B,)`, in (0, 1)."""
    even = torch.sigmoid(std * torch.randn(batch_size, generator=generator))
    return flow_shift * even / (1 + (flow_shift - 1) * even)


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
    hidden_states, timestep = anchored_model_input(noisy_latents, sigmas, sigmas * num_train_timesteps, anchors)
    prediction = model(
        hidden_states=hidden_states, timestep=timestep, encoder_hidden_states=prompt_embeds, return_dict=False
    )[0]
    error = (prediction.float() - velocity(clean_latents, noise)).square().mean(dim=(1, 3, 4))
    free = torch.ones_like(error) if anchors is None else (anchors.strength == 0).to(error.dtype)
    return (error * free).sum() / free.sum()
