"""Dry run of a stage of Factorized-Dreamer's training: reports what it would do."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel

from ..dreamer.predict_net import PredictNet
from ..dreamer.unet import FactorizedDreamerUNet
from .data import model_folder
from .dreamer import StableDiffusion, designs, noise_levels
from .dreamer_config import DreamerConfig
from .dry_run import GIB, data_part, histogram, measured_time, planned, steps_part
from .estimate import OPTIMIZER_BYTES
from .metadata import read_examples


def dreamer_dry_run(config: DreamerConfig) -> str:
    """Returns a text about a stage: buckets with counts, rejected files, latents, steps, parameters, memory and noise levels.

    No weight is loaded, and nothing is encoded or written. Only the configs of the encoders are read.

    Args:
        config ([`DreamerConfig`]): config of the stage.

    Raises:
        `ValueError`: the captions are not valid, a bucket does not fit the VAE, or the image UNet belongs to another family.
    """
    folder = model_folder(config, weights=False)
    factor = StableDiffusion.check_buckets(config, folder)
    clips, rejected = planned(config, read_examples(config))

    def latents(bucket: tuple[int, int, int]) -> int:
        return math.prod(bucket) // factor**2

    parts = [
        data_part(config, latents, "latents", clips, rejected),
        steps_part(config, clips),
        _model_part(config, _empty_unet(config, folder)),
        histogram("Noise levels, 1 is pure noise (share of the draws):", noise_levels(config)),
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def _empty_unet(config: DreamerConfig, folder: Path) -> FactorizedDreamerUNet:
    image_config = UNet2DConditionModel.load_config(folder / "unet")
    switches = designs(config, config.motion_encoder, config.image_encoder)
    with init_empty_weights():
        return FactorizedDreamerUNet.from_config(image_config, **switches)


def _model_part(config: DreamerConfig, unet: FactorizedDreamerUNet) -> list[str]:
    """Returns lines about the parameters by kind and the memory that they take."""
    video, counts = dict(unet.video_parameters()), Counter()
    for name, parameter in unet.named_parameters():
        counts["of the image UNet" if name not in video else "added for the video"] += parameter.numel()
    if config.flow_weight:
        with init_empty_weights():
            predict_net = PredictNet(unet.config.block_out_channels[0])
        counts["of PredictNet"] = sum(parameter.numel() for parameter in predict_net.parameters())
    frozen = 0 if config.train_spatial else counts["of the image UNet"]
    trained = sum(counts.values()) - frozen
    number = 2 if config.mixed_precision == "bf16" else 4
    copies = number if config.mixed_precision == "bf16" else 0
    memory = {
        "frozen": number * frozen,
        # Weight, gradient and average in float32, and the bfloat16 copy of mixed precision.
        "trained": trained * (8 + (4 if config.ema_decay else 0) + copies),
        "optimizer": int(OPTIMIZER_BYTES[config.optimizer] * trained),
    }
    lines = [f"Parameters: {trained:,} are trained, {frozen:,} are frozen"]
    lines += [f"  {count:13,} {kind}" for kind, count in counts.items()]
    total = sum(memory.values()) / GIB
    lines.append(f"Memory, computed: {total:.2f} GiB, without activations")
    lines += [f"  {name:14} {size / GIB:8.2f} GiB" for name, size in memory.items()]
    return lines + measured_time(config)
