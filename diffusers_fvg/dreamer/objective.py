"""What the video UNet learns: the velocity of the noised clip and, in the last stage, its optical flow."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..schedules.cogvideox import add_noise, velocity
from .predict_net import PredictNet, flow_loss
from .unet import FactorizedDreamerUNet


# Beside the loss of the diffusion, which begins near 1. The paper does not say; a tenth leaves the diffusion in charge.
FLOW_WEIGHT = 0.1


class DreamerTrainee(nn.Module):
    """Video UNet and, in the last stage, PredictNet as one module: what is trained, and wrapped for several processes.

    Args:
        unet (`FactorizedDreamerUNet`).
        predict_net (`PredictNet`, *optional*): reads the UNet's features.
    """

    def __init__(self, unet: FactorizedDreamerUNet, predict_net: PredictNet | None = None):
        super().__init__()
        self.unet, self.predict_net = unet, predict_net

    def forward(self, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Velocity `(B, C, F, h, w)` and flow `(B, 2, F - 1, h, w)` for arguments of the UNet."""
        if self.predict_net is None:
            return self.unet(**inputs, return_dict=False)[0], None
        prediction, features = self.unet(**inputs, return_features=True, return_dict=False)
        return prediction, self.predict_net(features)


def dreamer_loss(
    trainee: nn.Module,
    clean_latents: torch.Tensor,
    noise: torch.Tensor,
    times: torch.Tensor,
    sigmas: torch.Tensor,
    conditions: dict[str, torch.Tensor],
    flow: torch.Tensor | None = None,
    flow_weight: float = FLOW_WEIGHT,
) -> torch.Tensor:
    """Mean squared error of the velocity over all frames, the first one too: no frame is an input here. Where the trainee has
    a PredictNet, plus `flow_weight` times [`flow_loss`].

    Args:
        trainee ([`DreamerTrainee`]).
        clean_latents, noise (`torch.Tensor` of shape `(B, C, F, h, w)`): scaled latents and unit Gaussian noise.
        times (`torch.Tensor` of shape `(B,)`): indices into `sigmas`.
        sigmas (`torch.Tensor` of shape `(T,)`): noise level of every time, of [`training_sigmas`].
        conditions (`dict`): further arguments of the UNet.
        flow (`torch.Tensor` of shape `(B, 2, F - 1, h, w)`, *optional*): of the teacher, in pixels of the latent.
        flow_weight (`float`, *optional*).
    """
    sigma = sigmas[times].view(-1, 1, 1, 1, 1)
    noisy = add_noise(clean_latents, noise, sigma)
    prediction, predicted_flow = trainee(sample=noisy, timestep=times, **conditions)
    loss = torch.nn.functional.mse_loss(prediction.float(), velocity(clean_latents, noise, sigma))
    if predicted_flow is None:
        return loss
    return loss + flow_weight * flow_loss(predicted_flow.float(), flow)
