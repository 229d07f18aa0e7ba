"""Trains a small Factorized-Dreamer on the shapes world, also with single designs switched on or off.

[`dreamer_image`] trains VAE, CLIP and image UNet. The text encoder of the other shapes model encodes the motion text. Every
variant starts from the same image UNet and is trained on the same clips in the same order. All weights are trained, also those
of the image UNet, because at this size it has seen too few images to stay frozen.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch

from ..animate.anchor import Anchor
from ..schedules.presets import SchedulerPresets, timestep_preset
from .dreamer_image import (
    CLIP_WIDTH,
    FRAME_RATE,
    NUM_FRAMES,
    build_clips,
    clip_tokenizer,
    load_clips,
    train_clip,
    train_decoder,
    train_image,
    train_vae,
    vae_score,
)
from .held_out import held_out_scenes
from .loop import train, training_device
from .prompts import CATEGORIES, motion_caption
from .scorer import score_video
from .train import Part, train_parts
from .train_models import MAX_SEQUENCE_LENGTH, TEXT_ENCODER_CONFIG, count, optimizers
from .world import render


if TYPE_CHECKING:
    from ..dreamer.unet import FactorizedDreamerUNet
    from ..pipelines.pipeline_factorized_dreamer import FactorizedDreamerPipeline

# Shares of clips without any text, without the motion text, and without the image.
PROMPT_DROPOUT, MOTION_DROPOUT, IMAGE_DROPOUT = 0.1, 0.05, 0.1
STEPS, GUIDANCE_SCALE = 10, 1.5
# Guidance scale of a UNet without a first frame, which depends on the text alone.
TEXT_GUIDANCE_SCALE = 5.0
CALL_DEFAULTS = {
    "height": 64,
    "width": 64,
    "num_frames": NUM_FRAMES,
    "frame_rate": FRAME_RATE,
    "max_sequence_length": MAX_SEQUENCE_LENGTH,
}


@dataclass(frozen=True)
class Designs:
    """The designs of the paper that a video UNet has.

    Args:
        t2i_adapter, paca, t5, predict_net (`bool`): whether it has the T2I adapter, PACA, the T5 text and PredictNet.
        shift (`float`): factor s of the noise schedule; 1 leaves the signal-to-noise ratio unchanged.
        power (`int`): interpretation of s, see [`dreamer.schedule`].
        zero_terminal_snr (`bool`): whether the last time is pure noise.
    """

    t2i_adapter: bool = True
    paca: bool = True
    t5: bool = True
    predict_net: bool = True
    shift: float = 0.125
    power: int = 2
    zero_terminal_snr: bool = True

    @property
    def takes_image(self) -> bool:
        """Whether the UNet takes a first frame. Otherwise it is a text-to-video model and reads the whole prompt."""
        return self.t2i_adapter or self.paca

    def schedule(self) -> dict[str, Any]:
        from ..dreamer.schedule import dreamer_schedule

        return dreamer_schedule(self.shift, self.power, self.zero_terminal_snr)

    def presets(self) -> SchedulerPresets:
        source = "chosen on the shapes world's held-out prompts (synthetic)"
        guidance_scale = GUIDANCE_SCALE if self.takes_image else TEXT_GUIDANCE_SCALE
        return SchedulerPresets.of(
            *(
                timestep_preset(name, "CogVideoXDDIMScheduler", self.schedule(), steps, guidance_scale, source=source)
                for name, steps in (("quick-10", STEPS), ("full-50", 50))
            )
        )


_OFF = {"t2i_adapter": False, "paca": False, "t5": False, "predict_net": False}
_STOCK_NOISE = {"shift": 1.0, "zero_terminal_snr": False}
PLAIN = Designs(**_OFF, **_STOCK_NOISE)
# Variants in the order of the report, the most informative ones first.
DESIGNS: dict[str, Designs] = {
    "all": Designs(),
    "plain": PLAIN,
    "no_paca": Designs(paca=False),
    "no_predict_net": Designs(predict_net=False),
    "no_shift": Designs(shift=1.0),
    "s_0.1": Designs(shift=0.1),
    "s_0.15": Designs(shift=0.15),
    "paca_alone": Designs(**_OFF | {"paca": True}, **_STOCK_NOISE),
    "t2i_adapter_alone": Designs(**_OFF | {"t2i_adapter": True}, **_STOCK_NOISE),
    "schedule_alone": Designs(**_OFF),
    "t5_alone": Designs(**_OFF | {"t5": True}, **_STOCK_NOISE),
    "predict_net_alone": Designs(**_OFF | {"predict_net": True}, **_STOCK_NOISE),
    "no_t2i_adapter": Designs(t2i_adapter=False),
    "no_t5": Designs(t5=False),
    "power_1": Designs(power=1),
}


# -- training ---------------------------------------------------------------------------------------------------------


def make_video_unet(folder: Path, designs: Designs) -> FactorizedDreamerUNet:
    """Converts the image UNet to a video UNet with untrained new layers."""
    from diffusers import UNet2DConditionModel

    from ..dreamer.unet import FactorizedDreamerUNet

    torch.manual_seed(2)
    return FactorizedDreamerUNet.from_unet2d(
        UNet2DConditionModel.from_pretrained(folder / "image_unet"),
        num_frames=NUM_FRAMES,
        t2i_adapter="decoupled" if designs.t2i_adapter else None,
        image_embed_dim=CLIP_WIDTH,
        paca="all" if designs.paca else None,
        motion_embed_dim=TEXT_ENCODER_CONFIG["d_model"] if designs.t5 else None,
    )


@torch.no_grad()
def text_tables(folder: Path, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encodes the distinct texts; returns the row of each text, and the rows of CLIP `(R, L, D)` and of the motion encoder
    `(R, L, D')`.

    The last row is that of the empty text.
    """
    from transformers import AutoTokenizer, CLIPTextModel, UMT5EncoderModel

    from ..dreamer.conditions import embed_motion
    from .train_models import tokenize

    rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    unique = [*rows, ""]
    clip = CLIPTextModel.from_pretrained(folder / "image_text_encoder").eval()
    tokens = tokenize(clip_tokenizer(), unique)
    clip_rows = torch.cat([clip(chunk).last_hidden_state for chunk in tokens.split(256)])
    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    chunks = [unique[start : start + 256] for start in range(0, len(unique), 256)]
    motion_rows = torch.cat(
        [embed_motion(encoder, tokenizer, chunk, MAX_SEQUENCE_LENGTH, encoder.device) for chunk in chunks]
    )
    return torch.tensor([rows[text] for text in texts]), clip_rows, motion_rows


def train_video(
    folder: Path,
    name: str,
    designs: Designs,
    steps: int,
    batch_size: int = 8,
    peak: float = 1.5e-3,
    num_clips: int | None = None,
) -> dict[str, int]:
    """Trains a video UNet with `designs` on cached clips; writes `folder/<name>` and, with PredictNet, `folder/<name>_flow`.

    Args:
        folder (`Path`): folder with the image half, and for the results.
        name (`str`): name of the trained part.
        designs ([`Designs`]): designs of the UNet.
        steps, batch_size (`int`): number of training steps and clips per step.
        peak (`float`): highest learning rate.
        num_clips (`int`, *optional*): number of clips to use, the first of the cache; left out, all.
    """
    from diffusers import CogVideoXDDIMScheduler

    from ..dreamer.objective import DreamerTrainee, dreamer_loss
    from ..dreamer.predict_net import PredictNet
    from ..schedules.cogvideox import training_sigmas

    unet = make_video_unet(folder, designs)
    predict_net = PredictNet(unet.config.block_out_channels[0], 32) if designs.predict_net else None
    trainee = DreamerTrainee(unet, predict_net).train()
    tensors, texts = load_clips(folder, num_clips)
    index, clip_rows, motion_rows = text_tables(folder, [row[2 if designs.takes_image else 0] for row in texts])
    empty, device = len(clip_rows) - 1, training_device()
    sigmas = training_sigmas(CogVideoXDDIMScheduler(**designs.schedule())).to(device)

    def loss_of(step: int) -> tuple[str, torch.Tensor]:
        # Clips, times and dropped conditions do not depend on the designs.
        rng = np.random.default_rng((5, step))
        clips = torch.from_numpy(rng.integers(len(texts), size=batch_size))
        times = torch.from_numpy(rng.integers(len(sigmas), size=batch_size)).to(device)
        dropped = [torch.from_numpy(rng.random(batch_size)) for _ in range(3)]
        clean = tensors["latents"][clips].to(device)
        no_text = dropped[0] < PROMPT_DROPOUT
        text = torch.where(no_text, empty, index[clips])
        conditions = {"encoder_hidden_states": clip_rows[text].to(device)}
        if designs.t5:
            motion = torch.where(no_text | (dropped[1] < MOTION_DROPOUT), empty, index[clips])
            conditions["motion_embeds"] = motion_rows[motion].to(device)
        if designs.paca:
            conditions["image_latents"] = clean[:, :, 0]
        if designs.t2i_adapter:
            conditions["image_embeds"] = tensors["image_embeds"][clips].to(device)
        if designs.takes_image:
            conditions["image_mask"] = (dropped[2] >= IMAGE_DROPOUT).float().to(device)
        flow = tensors["flow"][clips].to(device)
        return "clip", dreamer_loss(trainee, clean, torch.randn_like(clean), times, sigmas, conditions, flow)

    modules = {"trainee": trainee}
    train(folder, name, steps, modules, lambda: optimizers([trainee], peak), loss_of, peak, decay=0.995, save_every=50)
    if predict_net is not None:
        predict_net.save_pretrained(folder / f"{name}_flow")
    unet.save_pretrained(folder / name)
    return {"samples": steps * batch_size, **count(unet)}


# -- the pipeline -----------------------------------------------------------------------------------------------------


def build_dreamer(folder: Path, name: str = "video", designs: Designs | None = None) -> FactorizedDreamerPipeline:
    """Builds a pipeline of stage 3 with the video UNet `folder/<name>`, without stages 1 and 2."""
    from diffusers import AutoencoderKL
    from transformers import AutoTokenizer, CLIPTextModel, CLIPVisionModelWithProjection, UMT5EncoderModel

    from ..dreamer.unet import FactorizedDreamerUNet
    from ..pipelines.pipeline_factorized_dreamer import FactorizedDreamerPipeline

    designs = designs or DESIGNS["all"]
    presets = designs.presets()
    vision, motion = folder / "image_encoder", folder / "text_encoder"
    pipe = FactorizedDreamerPipeline(
        tokenizer=clip_tokenizer(),
        text_encoder=CLIPTextModel.from_pretrained(folder / "image_text_encoder"),
        unet=FactorizedDreamerUNet.from_pretrained(folder / name),
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        scheduler=next(iter(presets.values())).make_scheduler(),
        tokenizer_2=AutoTokenizer.from_pretrained(folder / "tokenizer") if designs.t5 else None,
        text_encoder_2=UMT5EncoderModel.from_pretrained(motion) if designs.t5 else None,
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(vision) if designs.t2i_adapter else None,
        rewriter=None,
        composer=None,
        schedulers=presets,
        call_defaults=CALL_DEFAULTS,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assemble_dreamer(folder: Path, output: Path) -> None:
    """Writes a repository of stage 3 in float16. Stages 1 and 2 are in the embedded pipeline's repository."""
    build_dreamer(folder).to(torch.float16).save_pretrained(output)
    # diffusers saves the path from which a part was loaded, which means nothing on other machines.
    for path in Path(output).rglob("*.json"):
        config = json.loads(path.read_text())
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n")


# -- all parts --------------------------------------------------------------------------------------------------------

VIDEO_STEPS = 3000


@torch.no_grad()
def video_score(folder: Path, name: str = "video", designs: Designs | None = None, per_category: int = 6) -> float:
    """Returns the mean `score_video` over held-out scenes of the seven categories, from their true first frames."""
    pipe = build_dreamer(folder, name, designs)
    scenes, scores = held_out_scenes(per_category, seed=1, categories=CATEGORIES), []
    for start in range(0, len(scenes), 16):
        chosen = scenes[start : start + 16]
        frames = [PIL.Image.fromarray(render(scene.objects, NUM_FRAMES)[0]) for scene in chosen]
        videos = pipe.animate(
            [motion_caption(scene) for scene in chosen],
            [[Anchor(frame)] for frame in frames],
            generator=[torch.Generator().manual_seed(start + k) for k in range(len(chosen))],
        )
        for scene, video in zip(chosen, videos):
            scores.append(score_video(np.round(video * 255).astype(np.uint8), scene.category, scene.meta))
    return float(np.mean(scores))


DREAMER_PARTS: dict[str, Part] = {
    "vae": Part(train_vae),
    # Small shapes that nearly touch and overlapping outlines keep the score below 1. All else scores 1.
    "decoder": Part(train_decoder, vae_score, 0.95),
    "clip": Part(train_clip),
    "clips": Part(build_clips),
    "image": Part(train_image),
    "video": Part(lambda folder: train_video(folder, "video", DESIGNS["all"], VIDEO_STEPS), video_score, 0.6),
}


def design_part(name: str, steps: int) -> str:
    """Returns the name of the part in which the variant `name` of `DESIGNS` is trained for `steps` steps."""
    return f"design_{name}_{steps}"


def train_dreamer(
    folder: Path,
    shapes: Path,
    designs: Sequence[str] = (),
    design_steps: int = VIDEO_STEPS,
    vae: Path | None = None,
) -> None:
    """Trains the shapes model of Factorized-Dreamer, writes it to `folder/repository`, then trains `designs` for the report.

    A further call skips finished parts and resumes an interrupted one.

    Args:
        folder (`Path`): folder for checkpoints, logs, weights and `training.json`.
        shapes (`Path`): folder with `text_encoder` and `tokenizer` of the other shapes model: its training folder, or the
            embedded repository.
        designs (`Sequence[str]`, *optional*): names in `DESIGNS`.
        design_steps (`int`, *optional*): training steps of each of them. The model itself is `"all"` with `VIDEO_STEPS`.
        vae (`Path`, *optional*): folder of a VAE to start from. Only its decoder is trained further, to its target score, so
            that its latents stay valid. Left out, a VAE is trained from scratch.

    Raises:
        `ValueError`: a part misses its target score, or a name in `designs` is unknown.
    """
    unknown = [name for name in designs if name not in DESIGNS]
    if unknown:
        raise ValueError(f"`designs` {unknown} are not known; use {', '.join(DESIGNS)}.")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("text_encoder", "tokenizer"):
        if not (folder / name).exists():
            shutil.copytree(shapes / name, folder / name)
    if vae is not None and not (folder / "vae").exists():
        from diffusers import AutoencoderKL

        AutoencoderKL.from_pretrained(vae, torch_dtype=torch.float32).save_pretrained(folder / "vae")
        (folder / "training.json").write_text('{"vae": {}}\n')
    train_parts(folder, DREAMER_PARTS)
    if not (folder / "repository").exists():
        assemble_dreamer(folder, folder / "repository.tmp")
        (folder / "repository.tmp").rename(folder / "repository")
    train_parts(
        folder,
        {
            design_part(name, design_steps): Part(
                lambda folder, name=name: train_video(
                    folder, design_part(name, design_steps), DESIGNS[name], design_steps
                )
            )
            for name in designs
        },
    )
