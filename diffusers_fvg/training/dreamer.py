"""Trains a stage of Factorized-Dreamer's video UNet. Data, cache, batches, checkpoints and processes are those of the anchor
trainer; model and loss are different.

Shapes: B batch, C latent channels, F frames, H/W pixels, h/w latent height and width, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL, CogVideoXDDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer, CLIPTextModel, CLIPVisionModelWithProjection, T5EncoderModel

from ..checks import check_size
from ..dreamer.conditions import embed_images, embed_motion, encode_pixels
from ..dreamer.flow import dis_flow, latent_flow
from ..dreamer.objective import DreamerTrainee, dreamer_loss
from ..dreamer.predict_net import PredictNet
from ..dreamer.schedule import dreamer_schedule
from ..dreamer.unet import FactorizedDreamerUNet
from ..schedules.cogvideox import training_sigmas
from .batches import Clips, Prefetcher, _read
from .data import _text_dtype, build_cache, model_folder, without_padding
from .draws import generator_for
from .dreamer_config import DreamerConfig
from .families import Family
from .files import naming
from .loop import Run
from .metadata import read_examples
from .processes import make_accelerator, on_main_process
from .stopping import only_run_in


def main_train_dreamer(path: str | Path) -> Path:
    """Trains a video UNet from a TOML file: fills the cache and trains the stage. A further call resumes an interrupted run.

    Args:
        path (`str` or `Path`): path of the config, see [`DreamerConfig`].

    Returns:
        `Path`: folder of the video UNet in float32, `output_dir/unet`. PredictNet is beside it in `predict_net`.

    Raises:
        `ValueError`, `OSError`, `FloatingPointError`, `SystemExit`: as in [`training.trainer.train`].
    """
    config = DreamerConfig.load(path)
    accelerator = make_accelerator(config)
    folder = model_folder(config)
    family = StableDiffusion(config, folder)
    trainee = make_trainee(config, folder, family)
    output = Path(config.output_dir)
    with only_run_in(output, accelerator):
        clips = build_cache(config, read_examples(config), folder, family, text_encoding)
        # Frees the image encoder, which is no longer needed.
        del family
        weights = DreamerRun(config, DreamerClips(clips), "unet", trainee, (0.0, 1.0), accelerator, None, None).train()

        def write() -> None:
            trainee.load_state_dict(weights, strict=False)
            # Frozen weights may be in bfloat16. All are saved in float32, for the next stage.
            with naming(output):
                trainee.float().cpu().unet.save_pretrained(output / "unet")
                if trainee.predict_net is not None:
                    trainee.predict_net.save_pretrained(output / "predict_net")

        on_main_process(accelerator, write)
    accelerator.end_training()
    return output / "unet"


def component_folder(name: str) -> Path:
    """Returns a folder, or downloads the files of a Hub repository that a transformers encoder needs."""
    if Path(name).is_dir():
        return Path(name)
    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x, with the encoders that its video UNet needs besides CLIP's text encoder.

    Raises:
        `ValueError`: height or width of a bucket is not a multiple of the VAE's scale factor.
    """

    vae = AutoencoderKL

    def __init__(self, config: DreamerConfig, folder: Path):
        self.config = config
        self.cache_settings = (*Family.cache_settings, "flow_teacher")
        self.motion_folder = component_folder(config.motion_encoder) if config.motion_encoder else None
        self.image_folder = component_folder(config.image_encoder) if config.image_encoder else None
        self._image_encoder: CLIPVisionModelWithProjection | None = None
        self.check_buckets(config, folder)

    @staticmethod
    def check_buckets(config: DreamerConfig, folder: Path) -> int:
        """Checks the buckets and returns the VAE's scale factor, in pixels per latent.

        Raises:
            `ValueError`: height or width of a bucket is not a multiple of the scale factor.
        """
        factor = 2 ** (len(AutoencoderKL.load_config(folder / "vae")["block_out_channels"]) - 1)
        for _, height, width in config.all_buckets:
            check_size("height", height, factor)
            check_size("width", width, factor)
        return factor

    def encoders(self, folder: Path) -> dict[str, Path]:
        more = {"motion_encoder": self.motion_folder, "image_encoder": self.image_folder}
        return super().encoders(folder) | {name: path for name, path in more.items() if path is not None}

    @torch.no_grad()
    def cached(self, vae: AutoencoderKL, pixels: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """Encodes clips `(B, 3, F, H, W)`: returns for each the latents `(C, F, h, w)` and, if the config needs them, the CLIP
        embedding `(D,)` of the first frame and the flow `(2, F - 1, h, w)`."""
        clips = []
        for clip in pixels.transpose(1, 2):
            latents = encode_pixels(vae, clip.to(vae.device)).transpose(0, 1).cpu()
            tensors = {"latents": latents}
            if self.image_folder is not None:
                tensors["image_embeds"] = embed_images(self.image_encoder, clip[:1].to(vae.device))[0].cpu()
            if self.config.flow_teacher == "dis":
                frames = ((clip.movedim(1, -1) + 1) * 127.5).round().byte().numpy()
                tensors["flow"] = latent_flow(dis_flow(frames), *latents.shape[-2:])
            clips.append(tensors)
        return clips

    @property
    def image_encoder(self) -> CLIPVisionModelWithProjection:
        if self._image_encoder is None:
            encoder = CLIPVisionModelWithProjection.from_pretrained(self.image_folder)
            self._image_encoder = encoder.to(PartialState().device)
        return self._image_encoder


def text_encoding(
    config: DreamerConfig, folder: Path, family: StableDiffusion
) -> Callable[[str], tuple[dict[str, torch.Tensor], int]]:
    """Returns a function that encodes a text to tensors and its number of tokens.

    The tensors are CLIP's `embeds` `(L, D)` and, with a motion encoder, T5's `motion` without padding. The number is T5's if
    there is a motion encoder.
    """
    dtype, device = _text_dtype(config), PartialState().device
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype).to(device)
    pipeline = StableDiffusionPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=text_encoder,
        vae=None,
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    motion_encoder = motion_tokenizer = None
    if family.motion_folder is not None:
        motion_encoder = T5EncoderModel.from_pretrained(family.motion_folder, dtype=dtype).to(device)
        motion_tokenizer = AutoTokenizer.from_pretrained(family.motion_folder)

    def encode(text: str) -> tuple[dict[str, torch.Tensor], int]:
        tensors = {"embeds": pipeline.encode_prompt(text, device, 1, False)[0][0]}
        if motion_encoder is not None:
            tokens = embed_motion(motion_encoder, motion_tokenizer, [text], config.max_sequence_length, device)
            tensors["motion"] = without_padding(tokens[0])
        return tensors, len((motion_tokenizer or pipeline.tokenizer)(text).input_ids)

    return encode


class DreamerClips(Clips):
    """Cached clips with all inputs of the video UNet."""

    def __init__(self, clips: Clips):
        names = ("latents", "texts", "shapes", "empty_text", "max_sequence_length", "rejected", "repeats")
        super().__init__(**{name: getattr(clips, name) for name in names})

    def load(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Loads the tensors of clips: `latents` `(B, C, F, h, w)`; `embeds` and `motion`, `(B + 1, L, D)`, with those of the
        empty text last; `image_embeds` `(B, D)`; `flow` `(B, 2, F - 1, h, w)`. All but the first two only if cached."""
        clips = [_read(self.latents[index]) for index in indices]
        batch = {name: torch.stack([clip[name] for clip in clips]) for name in clips[0]}
        texts = [_read(path) for path in [*(self.texts[index] for index in indices), self.empty_text]]
        batch["embeds"] = torch.stack([text["embeds"] for text in texts])
        if "motion" in texts[0]:
            width = texts[0]["motion"].shape[1]
            batch["motion"] = texts[0]["motion"].new_zeros(len(texts), self.max_sequence_length, width)
            for row, text in zip(batch["motion"], texts):
                row[: len(text["motion"])] = text["motion"]
        return batch


def designs(
    config: DreamerConfig, motion_encoder: str | Path | None, image_encoder: str | Path | None
) -> dict[str, Any]:
    """Returns the arguments of [`~dreamer.unet.FactorizedDreamerUNet`] for a stage; reads widths from the encoders' configs."""
    switches = {
        "num_frames": config.num_frames,
        "t2i_adapter": None if config.t2i_adapter == "none" else config.t2i_adapter,
        "paca": None if config.paca == "none" else config.paca,
        "motion_embed_dim": None,
    }
    if motion_encoder:
        switches["motion_embed_dim"] = AutoConfig.from_pretrained(motion_encoder).d_model
    if image_encoder:
        vision = CLIPVisionModelWithProjection.config_class.from_pretrained(image_encoder)
        switches["image_embed_dim"] = vision.projection_dim
    return switches


def noise_levels(config: DreamerConfig) -> torch.Tensor:
    """Returns the noise level of each training time, `(T,)`. All times are drawn with equal probability."""
    scheduler = CogVideoXDDIMScheduler(**dreamer_schedule(config.shift, config.power, config.zero_terminal_snr))
    return training_sigmas(scheduler)


def make_trainee(config: DreamerConfig, folder: Path, family: StableDiffusion) -> DreamerTrainee:
    """Returns the models at the start of the stage: those of the stage before, or the image UNet with new layers.

    Raises:
        `ValueError`: the stage before had other designs.
    """
    switches = designs(config, family.motion_folder, family.image_folder)
    # New weights are initialized from the seed; the global random state stays as it is.
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        if config.video_unet:
            unet = FactorizedDreamerUNet.from_pretrained(config.video_unet)
            differing = {
                name: (unet.config[name], value) for name, value in switches.items() if unet.config[name] != value
            }
            if differing:
                changes = ", ".join(f"{name} {before} to {now}" for name, (before, now) in differing.items())
                raise ValueError(
                    f"`video_unet={config.video_unet!r}` has other designs (changed: {changes}); set the options as they were."
                )
        else:
            unet2d = UNet2DConditionModel.from_pretrained(folder / "unet")
            unet = FactorizedDreamerUNet.from_unet2d(unet2d, **switches)
        if not config.flow_weight:
            return DreamerTrainee(unet)
        before = Path(config.video_unet).parent / "predict_net"
        if config.video_unet and before.is_dir():
            return DreamerTrainee(unet, PredictNet.from_pretrained(before))
        return DreamerTrainee(unet, PredictNet(unet.config.block_out_channels[0]))


class DreamerRun(Run):
    """Training run of a stage."""

    def _make_trainable(self, trainee: DreamerTrainee) -> None:
        config, unet = self.config, trainee.unet
        self.teacher, self.origins = None, {}
        trainee.requires_grad_(False)
        for _, parameter in unet.named_parameters() if config.train_spatial else unet.video_parameters():
            parameter.requires_grad_(True)
        if trainee.predict_net is not None:
            trainee.predict_net.requires_grad_(True)
        if config.mixed_precision == "bf16":
            for parameter in trainee.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self.sigmas = noise_levels(config).to(self.accelerator.device)

    def _caller(self) -> Callable:
        return self.model

    def _batch(self, batches: Prefetcher, number: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Returns cached tensors and random draws of forward `number`, on the device."""
        batch = batches.load(number)
        batch_size, shape = len(batch["latents"]), batch["latents"].shape[1:]
        first = self.accelerator.process_index * batch_size
        generators = [
            generator_for("clip", self.config.seed, self.expert, number, first + place) for place in range(batch_size)
        ]
        # All values are drawn, even those that are not used, so that changing one option does not change the other draws.
        draws = {
            "times": torch.stack([torch.randint(len(self.sigmas), (), generator=g) for g in generators]),
            "dropped": torch.stack([torch.rand(3, generator=g) for g in generators]),
            "noise": torch.stack([torch.randn(shape, generator=g) for g in generators]),
        }
        device = self.accelerator.device
        return tuple({name: tensor.to(device) for name, tensor in group.items()} for group in (batch, draws))

    def _loss(self, batch: dict[str, torch.Tensor], draws: dict[str, torch.Tensor]) -> torch.Tensor:
        return dreamer_loss(
            self.forward,
            batch["latents"],
            draws["noise"],
            draws["times"],
            self.sigmas,
            self._conditions(batch, draws["dropped"]),
            batch.get("flow"),
            self.config.flow_weight,
        )

    def _conditions(self, batch: dict[str, torch.Tensor], dropped: torch.Tensor) -> dict[str, Any]:
        """Returns the UNet's conditions; dropped texts are replaced by the empty text, dropped images are masked."""
        config = self.config
        no_text = dropped[:, 0] < config.prompt_dropout

        def replaced(name: str, without: torch.Tensor) -> torch.Tensor:
            return torch.where(without[:, None, None], batch[name][-1:], batch[name][:-1])

        conditions = {"encoder_hidden_states": replaced("embeds", no_text)}
        if config.motion_encoder:
            conditions["motion_embeds"] = replaced("motion", no_text | (dropped[:, 1] < config.motion_dropout))
        if config.paca != "none":
            conditions["image_latents"] = batch["latents"][:, :, 0]
        if config.t2i_adapter != "none":
            conditions["image_embeds"] = batch["image_embeds"]
        if config.paca != "none" or config.t2i_adapter != "none":
            conditions["image_mask"] = (dropped[:, 2] >= config.image_dropout).float()
        return conditions
