"""PredictNet: reads motion out of the video UNet's features while it trains, and is dropped afterwards.

The paper names it and its purpose, consistent motion. Ours are its input (the last block's features, which every layer
shapes), its layers and the loss, whose weight beside that of the diffusion is the trainer's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class PredictNet(ModelMixin, ConfigMixin):
    """Optical flow from each frame to the next, of the features of both.

    Args:
        in_channels (`int`): of the features: the UNet's `block_out_channels[0]`.
        hidden_channels (`int`): inside.
    """

    @register_to_config
    def __init__(self, in_channels: int = 320, hidden_channels: int = 128):
        super().__init__()
        self.conv_in = nn.Conv3d(2 * in_channels, hidden_channels, 1)
        self.conv = nn.Conv3d(hidden_channels, hidden_channels, 3, padding=1)
        self.conv_out = nn.Conv3d(hidden_channels, 2, 3, padding=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features (`torch.Tensor` of shape `(B, C, F, h, w)`): of [`FactorizedDreamerUNet`]`(..., return_features=True)`.

        Returns:
            `torch.Tensor` of shape `(B, 2, F - 1, h, w)`: x and y of the flow, in pixels of the latent.
        """
        hidden_states = self.conv_in(torch.cat([features[:, :, :-1], features[:, :, 1:]], dim=1))
        hidden_states = self.conv(F.silu(hidden_states))
        return self.conv_out(F.silu(hidden_states))


def flow_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Huber loss of flows `(B, 2, F - 1, h, w)`: squared up to one pixel of the latent, then linear, for a teacher's outliers.

    All times count alike: features of a noisy clip must hold its motion too, since that is when motion is decided. A loss that
    is linear throughout is at its least at no flow wherever most of a clip stands still, and stays there.
    """
    return F.huber_loss(predicted, target)


def end_point_error(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean distance of flows `(B, 2, F - 1, h, w)`, in their pixels: what reports call the flow error."""
    return (predicted - target).square().sum(1).sqrt().mean()
