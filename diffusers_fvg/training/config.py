"""Config of a training run: a frozen dataclass that is read from TOML. Importing this module is fast."""

from __future__ import annotations

import importlib.util
import tomllib
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from ..publishing.toml import toml_value


# Query, key, value and output of both attentions, and the feed-forward: the layers that Pusa and DiffSynth-Studio train on Wan.
WAN_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

# Option, value and the package that it needs, which is not a dependency of this package.
PACKAGES = (
    ("tracker", "tensorboard", "tensorboard"),
    ("tracker", "wandb", "wandb"),
    ("quantize", "nf4", "bitsandbytes"),
    ("optimizer", "adamw-8bit", "bitsandbytes"),
)

# Upper limits. A larger value is a typing error, which is reported before weights are loaded. No layer of the known models is
# as wide as the highest rank.
MOST = {
    "frame_rate": 1000,
    "clips_per_video": 10_000,
    "max_sequence_length": 10_000,
    "rank": 8192,
    "alpha": 1_000_000,
    "steps": 10_000_000,
    "batch_size": 8192,
    "gradient_accumulation_steps": 8192,
    "learning_rate": 1,
    "weight_decay": 10,
    "flow_shift": 1000,
    "timestep_std": 1000,
    "process_group_timeout": 10_000_000,
    "seed": 2**63 - 1,
}


@dataclass(frozen=True)
class DataSource:
    """One of several folders or datasets to train on, `[[data]]` in TOML.

    Args:
        path (`str`): folder or dataset, as in `TrainConfig.data`.
        repeats (`float`, *optional*): how often an epoch contains each of its clips; with 0.5, each epoch takes half of them
            in turn. A folder of 100 clips with 3 has the same weight as one of 300 clips with 1.
        caption_prefix, caption_suffix (`str`, *optional*): texts before and after each of its captions, added verbatim.
        buckets (`tuple` of `(num_frames, height, width)`, *optional*): replace the config's buckets for this source.
    """

    path: str
    repeats: float = 1.0
    caption_prefix: str = ""
    caption_suffix: str = ""
    buckets: tuple[tuple[int, int, int], ...] = ()


class TomlConfig:
    """Base of frozen dataclasses read from TOML: converts values to the fields' types and checks them by `validate`."""

    # Options of every run.
    model: str
    data: str | tuple[DataSource, ...]
    cache_dir: str
    output_dir: str
    buckets: tuple[tuple[int, int, int], ...]
    frame_rate: float
    revision: str
    video_column: str
    caption_column: str
    clips_per_video: int
    max_rejected_share: float
    max_sequence_length: int
    steps: int
    batch_size: int
    warmup_steps: int
    seed: int
    learning_rate_schedule: Literal["constant", "cosine"]
    keep_checkpoints: int
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def validate(self) -> None:
        """Raises a `ValueError` for values that are out of range or contradict each other. Subclasses define it."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        kinds = typing.get_type_hints(type(self))
        for name in (field.name for field in fields(self)):
            object.__setattr__(self, name, _converted(name, getattr(self, name), kinds[name]))
        self.validate()

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a TOML file.

        Raises:
            `ValueError`: the file is no TOML, a key is unknown or missing, or a value has another type or is out of range.
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # Also bad encodings, huge numbers and deep nesting.
            raise ValueError(f"{path} is not valid TOML: {str(error)[:200]}.") from error
        names = [field.name for field in fields(cls)]
        unknown = [name for name in values if name not in names]
        if unknown:
            raise ValueError(f"{path} has unknown keys {unknown}; known ones are {', '.join(names)}.")
        missing = [field.name for field in fields(cls) if field.default is MISSING and field.name not in values]
        if missing:
            raise ValueError(f"{path} lacks the keys {missing}.")
        return cls(**values)

    def check_ranges(
        self,
        at_least_one: Sequence[str] = (),
        above_zero: Sequence[str] = (),
        not_negative: Sequence[str] = (),
        shares: Sequence[str] = (),
    ) -> None:
        """Checks the ranges of the options that every run has, and of the options named in the arguments.

        Raises:
            `ValueError`: an option is out of range; the message names it and the fix.
        """
        for name in ("model", "cache_dir", "output_dir", "video_column", "caption_column"):
            _require(getattr(self, name).strip(), name, self, "must not be empty")
        _require(self.sources, "data", self, "must not be empty")
        for source in self.sources:
            _require(source.path.strip(), "data", self, "must name a folder or a dataset")
            _require(
                0 < source.repeats < float("inf"),
                "data",
                self,
                f"has repeats={source.repeats}, and it must be above 0",
            )
        counts = "clips_per_video max_sequence_length steps batch_size gradient_accumulation_steps checkpoint_every"
        for name in (*counts.split(), "keep_checkpoints", *at_least_one):
            _require(getattr(self, name) >= 1, name, self, "must be at least 1")
        for name in ("frame_rate", "learning_rate", "max_grad_norm", "process_group_timeout", *above_zero):
            _require(0 < getattr(self, name) < float("inf"), name, self, "must be above 0")
        for name in ("warmup_steps", "weight_decay", "seed", *not_negative):
            _require(getattr(self, name) >= 0, name, self, "must not be negative")
        for name, most in MOST.items():
            _require(getattr(self, name, 0) <= most, name, self, f"must be at most {most}")
        for name in ("max_rejected_share", "prompt_dropout", "ema_decay", *shares):
            _require(0 <= getattr(self, name) < 1, name, self, "must lie in [0, 1)")
        _require(self.warmup_steps < self.steps, "warmup_steps", self, f"must be below steps={self.steps}")

    def check_packages(self) -> None:
        """Checks that the packages in `PACKAGES` which the options need are installed.

        Raises:
            `ValueError`: a package is missing; the message names the option and the package.
        """
        for name, value, package in PACKAGES:
            if getattr(self, name, None) == value:
                found = importlib.util.find_spec(package) is not None
                without = next(field.default for field in fields(self) if field.name == name)
                _require(found, name, self, f"needs `pip install {package}`, or {name}={toml_value(without)}")

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """The sources in `data`, one or several."""
        return (DataSource(self.data),) if isinstance(self.data, str) else self.data

    @property
    def all_buckets(self) -> tuple[tuple[int, int, int], ...]:
        """The buckets of the config and of its sources, without duplicates."""
        return tuple(dict.fromkeys([*self.buckets, *(bucket for source in self.sources for bucket in source.buckets)]))

    def to_toml(self) -> str:
        """Returns all values as TOML, including defaults but without `None`, which TOML does not have."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return "".join(f"{name} = {toml_value(value)}\n" for name, value in values.items())


@dataclass(frozen=True)
class TrainConfig(TomlConfig):
    """Config of anchor-grounding training (Factorized Video Generation, arXiv 2512.16371), with sources for the values of each
    option. Pusa is arXiv 2507.16116; "first author" is the public VideoX-Fun fork of the FVG paper's first author.

    Args:
        model (`str`): folder or Hub repository of a Wan or CogVideoX text-to-video pipeline in diffusers' layout.
        data (`str` or `tuple` of [`DataSource`]): folder with `metadata.jsonl` or `metadata.csv`, or with a `.txt` beside each
            video; or the name of a Hugging Face dataset. Several sources with their own options are tables `[[data]]`.
        cache_dir (`str`): folder for latents and text embeddings. It belongs to one set of encoders, buckets and frame
            rate; another set needs another folder.
        output_dir (`str`): folder for weights, checkpoints, log and the resolved config.
        buckets (`tuple` of `(num_frames, height, width)`): sizes to train at. Of the buckets that are not longer than a video,
            it gets the nearest in aspect ratio, then the longest; it is scaled and centre-cropped, never stretched.
            Buckets of one frame are for images, which are trained on without an anchor.
        frame_rate (`float`): frames per second of the model: 24 for Wan2.2-TI2V-5B, 16 for the other Wan models and
            CogVideoX 1.5. Frames of faster videos are dropped; slower videos (below 9/10 of the rate) are rejected, since
            they would repeat frames.

        revision (`str`, *optional*): revision of the model's repository.
        video_column, caption_column (`str`, *optional*): names of columns in the metadata; `file_name` is the convention of
            Hugging Face folders.
        clips_per_video (`int`, *optional*): most clips that are cut from a video, without overlap and evenly spread
            from its first frame to its last; a single clip is the beginning. All have the caption of the video.
        max_rejected_share (`float`, *optional*): share of videos in [0, 1) that may be missing, damaged or too short
            before the run stops. The log names each of them in any case.
        max_sequence_length (`int`, *optional*): number of text tokens, as at sampling; 512 for Wan, 224 for CogVideoX 1.5.

        experts (`tuple[str, ...]`, *optional*): `"transformer"`, `"transformer_2"` or both. Wan2.2-A14B has two, each with
            its own range of noise levels, and gets one LoRA for each (first author, Pusa). They are trained one after the
            other, so that only one is in memory.
        rank, alpha (`int`, `float`, *optional*): rank and alpha of the LoRA; its scale is `alpha / rank`. First author:
            128/64 (5B), 16/8 (1.3B), 256/128 (14B) used at weight 0.55. Pusa: 512/512 used at 1.4; larger ranks were better
            and small ones slower to plateau. LTX-2, DiffSynth-Studio: 32.
        initial_lora (`str`, *optional*): file, folder or Hub repository of a LoRA of any known format that the new one starts
            from. Its rank must be at most `rank`, its layers among `targets`. Left out, the new LoRA starts at zero.
        targets (`tuple[str, ...]`, *optional*): last parts of the names of trained modules. Pusa finds that self-attention
            learns the anchor.

        distill_guidance (`tuple[float, ...]`, *optional*): guidance scale, above 1, for each of `experts`; empty is off.
            The LoRA learns the guided prediction of the base with `teacher_lora`,
            `uncond + scale * (cond - uncond)`, and is used with `guidance_scale=1`: one forward per step instead of two
            (guidance distillation, arXiv 2210.03142, at a fixed scale).
        teacher_lora (`str`, *optional*): folder of the finished anchor LoRA to distill: `output_dir` of its run,
            or `anchor_lora` of a repository. The new LoRA starts from it; its rank must be at most `rank`.
        negative_prompt (`str`, *optional*): negative prompt of the teacher's unconditional forward, as at sampling.
        anchor_window (`int`, *optional*): each latent frame attends to the anchors and to the frames at most this many latent
            frames away, as at sampling with that window. Left out, it attends to all frames.

        anchor_position (`str`, *optional*): latent frame that the anchor is at. `"first"` is what sampling nearly always uses;
            `"start-middle-last"` draws one of three (first author); `"uniform"` draws any ("a randomly chosen position",
            caption of the paper's Figure 2).
        anchor_form (`str`, *optional*): how the model gets an anchor after frame 0. `"slot"`: as the clip's own latent frame
            at this place (the paper). `"appended"`: as a further latent frame after the clip's, with the time position of its
            exact frame (LTX-2); the cache then holds the images that `"start-middle-last"` or `"uniform"` draws from, one for
            each latent frame with `"uniform"`. Sampling takes the form from the LoRA.
        anchor_probability (`float`, *optional*): share of samples with an anchor; the others are text-to-video. Paper: 1.
            LTX-2: 0.5, so that text-to-video is not forgotten. That matters only if the LoRA stays on without an
            anchor (this package's pipeline switches it off).
        anchor_noise (`float`, *optional*): in [0, 1). Each anchor gets a share of the clip's noise and time drawn from
            `[0, anchor_noise]`: `Anchor(strength=1 - share)`. Pusa advises 0.2 for Wan2.2, SkyReels-V2 0.02 to 0.05.
        mask_anchor_loss (`bool`, *optional*): whether to leave anchored frames out of the loss and divide by the number of the
            others. A clean frame does not hold the noise to predict; DiffSynth-Studio, ai-toolkit and LTX mask it. The first
            author's code does not; `false` is for comparison.
        frame_times (`str`, *optional*): `"shared"`: all frames without an anchor have one noise level, as at sampling (the
            paper). `"independent"`: one each. With Pusa's budget (batch 8, 900 steps, rank 512, learning rate 1e-5)
            independent scored 87.7 and shared, loss mask unknown, 73.3 on VBench-I2V.
        timestep_density (`str`, *optional*): `"logit-normal"` (best in arXiv 2403.03206, section 3.1) or `"uniform"`.
        timestep_std (`float`, *optional*): standard deviation of the normal of `"logit-normal"`.
        flow_shift (`float`, *optional*): shifts times to higher noise as at sampling: 5 for Wan2.2-TI2V-5B, 3 for Wan2.1 at
            480p, 12 for A14B. An expert draws from the part of the density in its own range. CogVideoX is not a flow model
            and is trained at all times with equal probability: `"uniform"` and 1.
        prompt_dropout (`float`, *optional*): share of samples with the empty prompt, in [0, 1), for classifier-free
            guidance (arXiv 2207.12598: 0.1 to 0.2). Must be 0 with `distill_guidance`, whose LoRA is used without guidance.

        steps (`int`, *optional*): optimizer steps for each expert. Pusa: best at 900 with batch 8; LTX-2: 2000.
        batch_size (`int`, *optional*): clips per process and forward.
        gradient_accumulation_steps (`int`, *optional*): forwards per optimizer step.
        learning_rate (`float`, *optional*): peak learning rate. First author, LTX-2, DiffSynth-Studio: 1e-4; Pusa at rank
            512: 1e-5.
        learning_rate_schedule (`str`, *optional*): `"constant"` after the warm-up, or `"cosine"` decay to 0 at `steps`.
        warmup_steps (`int`, *optional*): steps of linear warm-up from 0.
        weight_decay (`float`, *optional*): weight decay of AdamW; first author 0.03.
        max_grad_norm (`float`, *optional*): norm that the gradient is clipped to; first author 0.05.
        ema_decay (`float`, *optional*): decay, in [0, 1), of the exponential moving average that is saved and validated; 0
            saves the weights themselves. It starts from `(1 + step) / (10 + step)`.

        mixed_precision (`str`, *optional*): `"bf16"`: base model in bfloat16, LoRA and optimizer in float32. `"no"`:
            everything in float32. float16 is not offered: Wan's activations exceed its range.
        gradient_checkpointing (`bool`, *optional*): keeps one activation per block and computes the others again.
        activation_offload (`bool`, *optional*): keeps that activation in CPU memory.
        block_offload (`bool`, *optional*): keeps the base's blocks in CPU memory and copies each to the device when it runs,
            twice per step: 57 GB for A14B in bfloat16, about 3 seconds over PCIe 4.0.
        quantize (`str`, *optional*): how the frozen base is stored. `"fp8"`: the blocks in float8_e4m3fn, 1 byte per weight,
            by diffusers' layerwise casting. `"nf4"`: 4 bits by bitsandbytes, as in QLoRA (arXiv 2305.14314), which finds
            them as good as 16. Arithmetic stays in `mixed_precision`, and the LoRA fits the base in any precision.
        optimizer (`str`, *optional*): `"adamw"`, or `"adamw-8bit"` of bitsandbytes, whose two moments take 2 bytes per weight
            instead of 8 (arXiv 2110.02861).
        seed (`int`, *optional*): seed of all random draws. A draw depends on seed, expert, step and place in the batch only.
        checkpoint_every, keep_checkpoints (`int`, *optional*): optimizer steps between checkpoints, and number of the newest
            ones that are kept. There is always one at the end.
        lora_every (`int`, *optional*): steps between copies of the LoRA in `output_dir/loras/<expert>_step_<step>`, for
            comparison; 0 is never.
        validation_every (`int`, *optional*): steps between calls of the trainer's `validate`; 0 is never. `fvg train` makes a
            video of each of `validation_prompts`.
        validation_prompts, validation_anchors (`tuple[str, ...]`, *optional*): prompts, and for each an image or a video
            whose first frame is the anchor, or `""` for none; empty for no anchors. Choose some that are not trained on.
        validation_frame_indices (`tuple[int, ...]`, *optional*): frame index of each anchor, 0 for the first frame and -1 for
            the last; left out, 0. Anchors have the form of `anchor_form`.
        tracker (`str`, *optional*): `"none"`, `"tensorboard"` or `"wandb"` (Weights & Biases; `WANDB_MODE=offline` keeps it
            on this computer). `log_<expert>.jsonl` is written in any case.
        process_group_timeout (`float`, *optional*): seconds that processes wait for each other before the run fails. They
            wait during validation and while captions are encoded.

    Raises:
        `ValueError`: an option is out of range or contradicts another; the message names it and the fix.
    """

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
    max_sequence_length: int = 512

    experts: tuple[str, ...] = ("transformer",)
    rank: int = 128
    alpha: float = 64.0
    targets: tuple[str, ...] = WAN_TARGETS
    initial_lora: str = ""

    distill_guidance: tuple[float, ...] = ()
    teacher_lora: str = ""
    negative_prompt: str = ""
    anchor_window: int | None = None

    anchor_position: Literal["first", "start-middle-last", "uniform"] = "uniform"
    anchor_form: Literal["slot", "appended"] = "slot"
    anchor_probability: float = 1.0
    anchor_noise: float = 0.0
    mask_anchor_loss: bool = True
    frame_times: Literal["shared", "independent"] = "shared"
    timestep_density: Literal["logit-normal", "uniform"] = "logit-normal"
    timestep_std: float = 1.0
    flow_shift: float = 5.0
    prompt_dropout: float = 0.1

    steps: int = 2000
    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    learning_rate_schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 50
    weight_decay: float = 0.03
    max_grad_norm: float = 1.0
    ema_decay: float = 0.99

    mixed_precision: Literal["no", "bf16"] = "bf16"
    gradient_checkpointing: bool = True
    activation_offload: bool = False
    block_offload: bool = False
    quantize: Literal["none", "fp8", "nf4"] = "none"
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    seed: int = 42
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    lora_every: int = 0
    validation_every: int = 0
    validation_prompts: tuple[str, ...] = ()
    validation_anchors: tuple[str, ...] = ()
    validation_frame_indices: tuple[int, ...] = ()
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    process_group_timeout: float = 7200.0

    def validate(self) -> None:
        """Checks ranges, and options against each other.

        Raises:
            `ValueError`: the message names the option and the fix.
        """
        self.check_ranges(
            at_least_one=("rank",),
            above_zero=("alpha", "timestep_std", "flow_shift"),
            not_negative=("validation_every", "lora_every"),
            shares=("anchor_noise",),
        )
        _require(0 <= self.anchor_probability <= 1, "anchor_probability", self, "must lie in [0, 1]")

        _require(self.buckets, "buckets", self, "needs at least one [num_frames, height, width]")
        for bucket in self.all_buckets:
            _require(min(bucket) >= 1, "buckets", self, f"holds {list(bucket)}: each number must be at least 1")
        # In a clip of one latent frame the anchor would be the whole clip.
        motion = any(bucket[0] > 1 for bucket in self.all_buckets)
        _require(motion, "buckets", self, "needs a bucket of more than one frame")
        for name in ("buckets", "experts", "targets"):
            values = getattr(self, name)
            _require(values and len(set(values)) == len(values), name, self, "needs at least one value, each once")
        known = {"transformer", "transformer_2"}
        _require(set(self.experts) <= known, "experts", self, f"may hold {sorted(known)}")

        if self.anchor_probability == 0:
            independent = self.frame_times == "independent"
            _require(
                independent, "anchor_probability", self, 'trains no anchor: raise it or set frame_times="independent"'
            )
            _require(
                self.anchor_noise == 0, "anchor_noise", self, "has no effect with anchor_probability=0: remove it"
            )
        if self.timestep_density == "uniform":
            _require(self.timestep_std == 1, "timestep_std", self, 'has no effect with "uniform": remove it')
        self._validate_distillation()
        if self.anchor_window is not None:
            _require(self.anchor_window >= 0, "anchor_window", self, "must not be negative")
            # To the model, each frame with its own time is an anchor, to which every frame attends.
            _require(self.frame_times == "shared", "anchor_window", self, 'needs frame_times="shared"')
        prompts, anchors = len(self.validation_prompts), len(self.validation_anchors)
        wanted = f'needs one for each of {prompts} validation_prompts, "" for none, or none at all'
        _require(anchors in (0, prompts), "validation_anchors", self, wanted)
        counted = len(self.validation_frame_indices) in (0, anchors)
        _require(
            counted, "validation_frame_indices", self, f"needs one for each of {anchors} validation_anchors, or none"
        )
        if not self.validation_every:
            _require(not prompts, "validation_prompts", self, "has no effect with validation_every=0: remove it")
        self._validate_memory()

    def _validate_memory(self) -> None:
        for name in ("activation_offload", "block_offload"):
            needed = self.gradient_checkpointing or not getattr(self, name)
            _require(needed, name, self, "needs gradient_checkpointing=true, without which all stays on the device")
        fp8, nf4 = self.quantize == "fp8", self.quantize == "nf4"
        _require(
            self.gradient_checkpointing or not fp8,
            "quantize",
            self,
            "needs gradient_checkpointing=true, without which the backward keeps a dequantized copy of every weight",
        )
        _require(
            not (nf4 and self.block_offload),
            "quantize",
            self,
            'needs block_offload=false, as bitsandbytes keeps the weights on the device for the backward: use "fp8" to offload blocks',
        )
        self.check_packages()

    def _validate_distillation(self) -> None:
        if not self.distill_guidance:
            for name in ("teacher_lora", "negative_prompt"):
                _require(not getattr(self, name), name, self, "has no effect without distill_guidance: remove it")
            return
        wanted = f"needs one scale for each of experts={list(self.experts)}"
        _require(len(self.distill_guidance) == len(self.experts), "distill_guidance", self, wanted)
        in_range = all(1 < scale < float("inf") for scale in self.distill_guidance)
        _require(in_range, "distill_guidance", self, "must be above 1; 1 disables guidance")
        _require(self.teacher_lora, "teacher_lora", self, "must name the anchor LoRA that is distilled")
        _require(not self.initial_lora, "initial_lora", self, "has no effect with distill_guidance: remove it")
        _require(self.prompt_dropout == 0, "prompt_dropout", self, "must be 0 with distill_guidance")


def _require(condition: Any, name: str, config: TomlConfig, complaint: str) -> None:
    if not condition:
        raise ValueError(f"`{name}={getattr(config, name)!r}` {complaint}.")


def _converted(name: str, value: Any, kind: Any) -> Any:
    """Converts `value` to `kind`, the type of a field: integers to floats, lists to tuples, tables to dataclasses."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if type(None) in arguments:
            # `int | None` is an option that may be left out.
            return None if value is None else _converted(name, value, arguments[0])
        # `str | tuple[...]` is one value, or several with their own options.
        return _converted(name, value, arguments[isinstance(value, (list, tuple))])
    if isinstance(kind, type) and is_dataclass(kind):
        return value if isinstance(value, kind) else _nested(name, value, kind)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"`{name}={value!r}` must be one of {', '.join(map(repr, arguments))}.")
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        if arguments[-1] is ...:
            return tuple(_converted(name, item, arguments[0]) for item in value)
        if len(value) == len(arguments):
            return tuple(_converted(name, item, wanted) for item, wanted in zip(value, arguments))
    # A bool is an int to Python, but `rank = true` is a mistake.
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        # Integers may exceed the range of float.
        return float(value) if not abs(value) >= 2**1000 else float("inf")
    elif type(value) is kind:
        return value
    raise ValueError(f"`{name}={value!r}` must be of type {_type_name(kind)}.")


def _nested(name: str, value: Any, kind: type) -> Any:
    """Converts a table of TOML to a dataclass."""
    kinds = typing.get_type_hints(kind)
    if not isinstance(value, dict) or not {"path"} <= value.keys() <= kinds.keys():
        raise ValueError(
            f"`{name}` holds {value!r}; it must be a table with `path` and, if wanted, {', '.join(kinds)}."
        )
    return kind(**{key: _converted(f"{name}.{key}", item, kinds[key]) for key, item in value.items()})


def _type_name(kind: Any) -> str:
    return str(kind) if isinstance(kind, types.GenericAlias) else kind.__name__
