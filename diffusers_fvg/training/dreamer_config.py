"""Config of a stage of Factorized-Dreamer's training: a frozen dataclass that is read from TOML. Importing this is fast."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import ClassVar, Literal

from .config import DataSource, TomlConfig, _require


@dataclass(frozen=True)
class DreamerConfig(TomlConfig):
    """Config of one stage of training the video UNet of Factorized-Dreamer (arXiv 2408.10119).

    The paper has three stages: low resolution, high resolution, and high resolution with PredictNet. It gives no other
    values, so the defaults come from related models (ConsistI2V, arXiv 2402.04324; DynamiCrafter, arXiv 2310.12190; Emu
    Video, arXiv 2311.10709) or are our choice.

    Args:
        system (`str`): `"factorized-dreamer"`, which distinguishes this file from that of a [`TrainConfig`].
        model (`str`): folder or Hub repository of a Stable Diffusion 1.x or 2.x pipeline in diffusers' layout.
        data, cache_dir, output_dir, buckets, frame_rate, revision, video_column, caption_column, clips_per_video,
            max_rejected_share: as in [`TrainConfig`]. Captions describe the motion. The paper uses 16 frames.

        video_unet (`str`, *optional*): `output_dir/unet` of the stage before; left out, the stage starts from the image UNet.
            A PredictNet beside it is trained further, too.
        motion_encoder (`str`, *optional*): folder or repository of a T5 encoder with its tokenizer; empty for none.
        image_encoder (`str`, *optional*): folder or repository of a CLIP vision model with projection, for `t2i_adapter`.
        t2i_adapter, paca (`str`, *optional*): designs of [`~dreamer.unet.FactorizedDreamerUNet`]; `"none"` switches one off.
        max_sequence_length (`int`, *optional*): number of T5 tokens, as at sampling. CLIP has 77.
        flow_teacher (`str`, *optional*): target of PredictNet. `"dis"` computes and caches the clips' optical flow by OpenCV;
            `"none"` is for stages without PredictNet. Stages that share a cache must share this value.
        flow_weight (`float`, *optional*): weight of PredictNet's loss beside the diffusion loss. 0 trains without PredictNet;
            a value above 0 is the paper's last stage.

        shift, power, zero_terminal_snr (*optional*): noise schedule, see [`dreamer.schedule`].
        train_spatial (`bool`, *optional*): whether to train the image UNet's own weights, too. Off as in Emu Video: the image
            model stays unchanged, and its LoRAs fit.
        prompt_dropout (`float`, *optional*): share of samples with the empty text in both text encoders, for guidance.
            DynamiCrafter: 0.1 in all.
        motion_dropout (`float`, *optional*): share of samples with the empty text in T5 only, so that the model does not rely
            on one encoder.
        image_dropout (`float`, *optional*): share of samples without the first frame, in adapter and PACA together. `mode=
            "direct"` samples without it. DynamiCrafter: 0.1 in all.

        steps, batch_size, gradient_accumulation_steps, learning_rate, learning_rate_schedule, warmup_steps, weight_decay,
            max_grad_norm, ema_decay, mixed_precision, gradient_checkpointing, optimizer, seed, checkpoint_every,
            keep_checkpoints, tracker, process_group_timeout: as in [`TrainConfig`]. ConsistI2V: 200,000 steps at learning
            rate 5e-5; DynamiCrafter: 100,000 at 1e-5.

    Raises:
        `ValueError`: an option is out of range or contradicts another; the message names it and the fix.
    """

    system: Literal["factorized-dreamer"]
    model: str
    data: str | tuple[DataSource, ...]
    cache_dir: str
    output_dir: str
    buckets: tuple[tuple[int, int, int], ...]
    frame_rate: float

    revision: str = ""
    video_column: str = "file_name"
    caption_column: str = "text"
    clips_per_video: int = 1
    max_rejected_share: float = 0.02

    video_unet: str = ""
    motion_encoder: str = ""
    image_encoder: str = ""
    t2i_adapter: Literal["decoupled", "concat", "none"] = "decoupled"
    paca: Literal["all", "up", "none"] = "all"
    max_sequence_length: int = 77
    flow_teacher: Literal["none", "dis"] = "none"
    flow_weight: float = 0.0

    shift: float = 0.125
    power: int = 2
    zero_terminal_snr: bool = True
    train_spatial: bool = False
    prompt_dropout: float = 0.1
    motion_dropout: float = 0.05
    image_dropout: float = 0.1

    steps: int = 20_000
    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    learning_rate: float = 5e-5
    learning_rate_schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 500
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999

    mixed_precision: Literal["no", "bf16"] = "bf16"
    gradient_checkpointing: bool = True
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    seed: int = 42
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    process_group_timeout: float = 7200.0

    # Attributes that the trainer reads from every config, constant here.
    experts: ClassVar[tuple[str, ...]] = ("unet",)
    negative_prompt: ClassVar[str] = ""
    validation_every: ClassVar[int] = 0
    lora_every: ClassVar[int] = 0
    block_offload: ClassVar[bool] = False

    def validate(self) -> None:
        """Checks ranges, and options against each other.

        Raises:
            `ValueError`: the message names the option and the fix.
        """
        self.check_ranges(
            above_zero=("shift",), not_negative=("flow_weight",), shares=("motion_dropout", "image_dropout")
        )
        _require(self.power in (1, 2), "power", self, "must be 1 or 2")
        _require(self.buckets, "buckets", self, "needs at least one [num_frames, height, width]")
        _require(len(set(self.buckets)) == len(self.buckets), "buckets", self, "must name each size once")
        for bucket in self.all_buckets:
            _require(
                min(bucket) >= 1 and bucket[0] > 1,
                "buckets",
                self,
                f"holds {list(bucket)}: a clip has at least 2 frames of 1 x 1",
            )

        has_adapter = self.t2i_adapter != "none"
        _require(
            bool(self.image_encoder) == has_adapter,
            "image_encoder",
            self,
            'must be set if t2i_adapter is not "none", and empty otherwise',
        )
        if not self.motion_encoder:
            _require(
                self.motion_dropout == 0, "motion_dropout", self, "has no effect without motion_encoder: set it to 0"
            )
        if not has_adapter and self.paca == "none":
            _require(
                self.image_dropout == 0, "image_dropout", self, "has no effect without adapter and PACA: set it to 0"
            )
        if self.flow_weight:
            _require(self.flow_teacher != "none", "flow_teacher", self, 'must not be "none" if flow_weight is above 0')
        if self.flow_teacher == "dis":
            found = importlib.util.find_spec("cv2") is not None
            _require(found, "flow_teacher", self, "needs `pip install opencv-python-headless`")
        self.check_packages()

    @property
    def num_frames(self) -> int:
        """Number of frames of the longest clip."""
        return max(bucket[0] for bucket in self.all_buckets)
