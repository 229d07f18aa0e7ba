"""PredictNet: predicts optical flow from the video UNet's features during training, and is dropped afterwards.

The paper (arXiv 2408.10119) gives only its name and its purpose, consistent motion. Our choices are its input (the features of
the last block, which depend on every layer), its layers and its loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class PredictNet(ModelMixin, ConfigMixin):
    """Predicts the optical flow from each frame to the next from the features of both frames.

    Args:
        in_channels (`int`): channels of the features, the UNet's `block_out_channels[0]`.
        hidden_channels (`int`): channels between the convolutions.
    """

    @register_to_config
    def __init__(self, in_channels: int = 320, hidden_channels: int = 128):
        super().__init__()
        self.conv_in = nn.Conv3d(2 * in_channels, hidden_channels, 1)
        self.conv = nn.Conv3d(hidden_channels, hidden_channels, 3, padding=1)
        self.conv_out = nn.Conv3d(hidden_channels, 2, 3, padding=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Predicts the flow of each pair of successive frames.

        Args:
            features (`torch.Tensor` of shape `(B, C, F, h, w)`): output of
                [`FactorizedDreamerUNet`]`(..., return_features=True)`.

        Returns:
            `torch.Tensor` of shape `(B, 2, F - 1, h, w)`: x and y of the flow, in latent pixels.
        """
        hidden_states = self.conv_in(torch.cat([features[:, :, :-1], features[:, :, 1:]], dim=1))
        hidden_states = self.conv(F.silu(hidden_states))
        return self.conv_out(F.silu(hidden_states))


def flow_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Returns the Huber loss of flows `(B, 2, F - 1, h, w)`: quadratic up to one latent pixel, then linear, to limit outliers.

    All times have the same weight: motion is decided at high noise, so features of a noisy clip must hold it too. An L1 loss
    would not do: where most of a clip stands still, its minimum is zero flow everywhere.
    """
    return F.huber_loss(predicted, target)


def end_point_error(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Returns the mean distance of flows `(B, 2, F - 1, h, w)` in their pixels, which reports call the flow error."""
    return (predicted - target).square().sum(1).sqrt().mean()
