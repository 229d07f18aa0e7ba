"""Training loss of the video UNet: the velocity of the noised clip and, in the last stage, its optical flow."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..schedules.cogvideox import add_noise, velocity
from .predict_net import PredictNet, flow_loss
from .unet import FactorizedDreamerUNet


# Weight of the flow loss beside the diffusion loss, which starts near 1. The paper gives none; with 0.1 the diffusion loss
# dominates.
FLOW_WEIGHT = 0.1


class DreamerTrainee(nn.Module):
    """Video UNet and, in the last stage, PredictNet as one module, which is trained and can be wrapped for several processes.

    Args:
        unet (`FactorizedDreamerUNet`): the video model.
        predict_net (`PredictNet`, *optional*): predicts the flow from the UNet's features.
    """

    def __init__(self, unet: FactorizedDreamerUNet, predict_net: PredictNet | None = None):
        super().__init__()
        self.unet, self.predict_net = unet, predict_net

    def forward(self, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns velocity `(B, C, F, h, w)` and flow `(B, 2, F - 1, h, w)`, `None` without a PredictNet; takes the UNet's
        arguments."""
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
    """Returns the mean squared error of the velocity, plus `flow_weight` times [`flow_loss`] if the trainee has a PredictNet.

    The error is over all frames: the first one is noised like the others.

    Args:
        trainee ([`DreamerTrainee`]): the models, maybe wrapped for several processes.
        clean_latents, noise (`torch.Tensor` of shape `(B, C, F, h, w)`): scaled latents and unit Gaussian noise.
        times (`torch.Tensor` of shape `(B,)`): indices into `sigmas`.
        sigmas (`torch.Tensor` of shape `(T,)`): noise level of every time, from [`training_sigmas`].
        conditions (`dict`): further arguments of the UNet.
        flow (`torch.Tensor` of shape `(B, 2, F - 1, h, w)`, *optional*): target of the PredictNet, in latent pixels.
        flow_weight (`float`): weight of the flow loss.
    """
    sigma = sigmas[times].view(-1, 1, 1, 1, 1)
    noisy = add_noise(clean_latents, noise, sigma)
    prediction, predicted_flow = trainee(sample=noisy, timestep=times, **conditions)
    loss = torch.nn.functional.mse_loss(prediction.float(), velocity(clean_latents, noise, sigma))
    if predicted_flow is None:
        return loss
    return loss + flow_weight * flow_loss(predicted_flow.float(), flow)
