"""Calls of the pipelines and of their stages, presets, anchors, moments and recipes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import PIL.Image
import torch
from bad_rows import PROMPT, Row, Shared, short

from diffusers_fvg import Anchor, Moment, SchedulerPreset, SchedulerPresets


NAN, INF = float("nan"), float("inf")
PICTURE = PIL.Image.new("RGB", (64, 64), "red")
HUGE_PICTURE = PIL.Image.new("RGB", (12_000, 12_000), None)  # Pixels that nothing has written take no time.
CAPTION = "a red circle"
LONG = "a red circle " * 1000
WHOLE, MOST, LEAST = "must be a whole number", "must be at most", "must be at least 1"
NO_COUNT = ((True, WHOLE), (1.5, WHOLE), (NAN, WHOLE), ("3", WHOLE), ([3], WHOLE))
NO_NUMBER = ((True, "finite number"), (NAN, "finite number"), (INF, "finite number"), ("5", "finite number"))
TEXTS = (
    (3, "must be a text or a list"),
    (b"red circle", "must be a text or a list"),
    ({"a": 1}, "must be a text or a list"),
    ([CAPTION, 3], "hold strings"),
    ("", "is empty"),
    ([], "non-empty list"),
    ([""], "is empty"),
    (LONG, "13000 characters"),
    ("a red circle \x1b[31m", "control character"),
    ("a red circle \ud800", "half a character"),
)


def called(
    kind: str, pipe: str, values: Iterable[tuple[str, Any, Any]], method: str = "__call__", **base: Any
) -> list[Row]:
    """A row for each `(argument, value, words)`, beside what is right in `base`.

    Words are what the message holds beside the argument's name; a tuple is all of the words itself.
    """
    rows = []
    for name, value, words in values:

        def give(shared: Shared, name: str = name, value: Any = value) -> Any:
            return getattr(getattr(shared, pipe), method)(**{**base, name: value})

        words = words if isinstance(words, tuple) else (name, words)
        rows.append(Row(f"{kind}: {name}={short(value)}", give, words))
    return rows


def done(kind: str, title: str, give: Callable[[Shared], Any], *words: str, error: type = ValueError) -> Row:
    return Row(f"{kind}: {title}", give, words, error)


def no_arguments() -> None:
    pass


# -- the pipelines' call ----------------------------------------------------------------------------------------------

CALL = [
    *(("num_inference_steps", *pair) for pair in ((0, LEAST), (-1, LEAST), *NO_COUNT)),
    *(("num_videos_per_prompt", *pair) for pair in ((0, LEAST), (None, WHOLE), *NO_COUNT)),
    *(("max_sequence_length", *pair) for pair in ((0, LEAST), *NO_COUNT)),
    *(("rewriter_max_new_tokens", *pair) for pair in ((0, LEAST), *NO_COUNT)),
    *(("composer_num_inference_steps", *pair) for pair in ((0, LEAST), *NO_COUNT)),
    *(("composer_num_candidates", *pair) for pair in ((0, LEAST), *NO_COUNT)),
    *(("motion_retries", *pair) for pair in ((-1, LEAST), (None, WHOLE), *NO_COUNT)),
    ("num_inference_steps", 10**9, f"=1000000000` {MOST} 1000"),
    ("num_inference_steps", 2**70, f"{MOST} 1000"),
    ("num_inference_steps", np.int64(10**9), f"{MOST} 1000"),
    ("num_inference_steps", torch.tensor(3), WHOLE),
    ("num_videos_per_prompt", 10**9, f"{MOST} 1000"),
    ("max_sequence_length", 10**9, f"{MOST} 112"),
    ("rewriter_max_new_tokens", 10**9, ("answer of 1000000000 tokens", "lower `max_new_tokens`")),
    ("composer_num_inference_steps", 10**9, f"{MOST} 1000"),
    ("composer_num_candidates", 10**9, f"{MOST} 1000"),
    ("motion_retries", 10**9, f"{MOST} 1000"),
    *(("num_frames", value, WHOLE) for value in (True, 1.5, NAN, "17", [17])),
    ("num_frames", 0, "nearest: 1 and 5"),
    ("num_frames", 18, "nearest: 17 and 21"),
    ("num_frames", 10**9 + 1, f"{MOST} 125"),
    *((side, value, WHOLE) for side in ("height", "width") for value in (True, 64.0, NAN, "64", [64])),
    *((side, value, "nearest: 16 and 32") for side in ("height", "width") for value in (0, -64)),
    *((side, 70, "nearest: 64 and 80") for side in ("height", "width")),
    *((side, 8 * 10**7, f"=80000000` {MOST} 512") for side in ("height", "width")),
    *(("guidance_scale", *pair) for pair in ((-1, "between 0 and 1000"), (1e30, "between 0 and 1000"), *NO_NUMBER)),
    *(("composer_guidance_scale", *pair) for pair in ((-1, "between 0 and"), (1e30, "between 0 and"), *NO_NUMBER)),
    ("guidance_scale_2", 3.0, "`boundary_ratio`; leave it out"),
    ("guidance_scale_2", NAN, "finite number"),
    *(("generator", value, "a seed from 0 to 2**63 - 1") for value in ("42", -1, True, 1.5, 2**64, [None], print)),
    ("generator", [], "list of 0 generators for 1 videos"),
    ("generator", [1, 2], "list of 2 generators for 1 videos"),
    *(("output_type", value, "use one of ('np', 'uint8'") for value in ("mp4", "NP", "", None, 1, ["np"])),
    *(("preset", value, ("preset", "has anchored-15, full-50")) for value in ("none", "", "ANCHORED-15", "../x")),
    *(("preset", value, "must be the name of one") for value in (3, ["full-50"], 1.5)),
    *(("mode", value, "use one of ('factorized', 'direct'") for value in ("none", "", None, 3, ["direct"])),
    *(("anchor_decode", value, "use one of ('raw', 'match'") for value in ("none", "", None, 3, ["raw"])),
    *(("callback_on_step_end", value, "must be a function") for value in (3, "f", [print])),
    ("callback_on_step_end", no_arguments, "called with (pipe, step, timestep, callback_kwargs)"),
    *(("callback_on_stage_step", value, "must be a function") for value in (3, "f")),
    ("callback_on_stage_step", no_arguments, "called with (pipe, stage, step, steps)"),
    *(("callback_on_step_end_tensor_inputs", value, "a list of names") for value in ("latents", 3, {"latents"})),
    *(("callback_on_step_end_tensor_inputs", value, "must be among ['latents'") for value in (["none"], [3], ("x",))),
    *(("return_dict", value, "True or False") for value in (0, None, "no")),
    *(("rewriter_motion", value, "True or False") for value in (1, None, "yes")),
    *(("attention_kwargs", value, "must be a dictionary") for value in (3, "scale", [1])),
    *(("attention_kwargs", {"scale": value}, "finite number") for value in ("x", NAN, True)),
    ("attention_kwargs", {"scale": None}, "-100 to 100"),
    ("attention_kwargs", {"scale": 1e30}, "-100 to 100"),
    ("attention_kwargs", {"none": 1}, "supports only scale"),
    ("attention_kwargs", {3: 4}, "must have texts for keys"),
    *((name, *pair) for name in ("prompt", "first_frame_prompt", "motion_prompt") for pair in TEXTS),
    ("prompt", None, "Pass `prompt` or `prompt_embeds`"),
    ("prompt", "hello world", ("toy", "hello", "--model")),
    ("first_frame_prompt", [CAPTION, CAPTION], "2 texts for 1 prompts"),
    ("motion_prompt", [CAPTION, CAPTION], "2 texts for 1 prompts"),
    *(
        (name, value, words)
        for name in ("negative_prompt", "composer_negative_prompt")
        for value, words in (
            (3, "must be a text or a list"),
            (b"dog", "must be a text or a list"),
            ({"a": 1}, "must be a text or a list"),
            (["a", 3], "must be a text or a list"),
            ([], "0 texts for 1 prompts"),
            (["a", "b"], "2 texts for 1 prompts"),
            (LONG, "13000 characters"),
            ("\x1b[31m", "control character"),
            ("\ud800", "half of a character"),
        )
    ),
]
LATENTS = (1, 16, 5, 8, 8)
TENSORS = [
    ("latents", torch.zeros(1, 4, 1, 1, 1), "this call needs (1, 16, 5, 8, 8)"),
    ("latents", torch.full(LATENTS, NAN), "not finite"),
    ("latents", torch.full(LATENTS, INF, dtype=torch.float16), "not finite"),
    ("latents", torch.zeros(LATENTS, dtype=torch.int32), "floating-point numbers"),
    ("latents", torch.zeros(LATENTS, dtype=torch.bool), "floating-point numbers"),
    ("latents", torch.zeros(LATENTS, device="meta"), "dense tensor with values"),
    ("latents", torch.zeros(LATENTS).to_sparse(), "dense tensor with values"),
    ("latents", np.zeros(LATENTS), "must be a tensor"),
    ("latents", [0.0], "must be a tensor"),
    ("prompt_embeds", torch.zeros(4, 4), "(4, 4)"),
    ("prompt_embeds", torch.zeros(1, 8, 7), "needs (1, tokens, 128)"),
    ("prompt_embeds", torch.zeros(1, 0, 128), "of 1 to 10000 tokens"),
    ("prompt_embeds", torch.zeros(1, 10_001, 128), "of 1 to 10000 tokens"),
    ("prompt_embeds", torch.full((1, 8, 128), NAN), "not finite"),
    ("prompt_embeds", torch.zeros(1, 8, 128, dtype=torch.int64), "floating-point numbers"),
    ("prompt_embeds", [1.0], "must be a tensor"),
]
COMBINED = [
    ({"prompt_embeds": torch.zeros(1, 8, 128)}, ("Only one of `prompt` and `prompt_embeds`", "leave one")),
    (
        {"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 8, 128)},
        ("Only one of `negative_prompt`", "leave one"),
    ),
    ({"negative_prompt_embeds": torch.zeros(1, 8, 7)}, ("negative_prompt_embeds", "(1, 8, 7)", "needs (1, tokens")),
    ({"negative_prompt_embeds": torch.zeros(2, 8, 128)}, ("negative_prompt_embeds", "needs (1, tokens")),
    (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 8, 128)},
        ("`prompt_embeds` cannot be rewritten", "pass `prompt`"),
    ),
    ({"mode": "direct", "image": PICTURE}, ("direct", "`image`", "leave one")),
    ({"mode": "direct", "first_frame_prompt": CAPTION}, ("direct", "`first_frame_prompt`", "leave one")),
    ({"mode": "direct", "rewriter_max_new_tokens": 8}, ("`rewriter_max_new_tokens=8` has no effect", "Leave one")),
    ({"mode": "direct", "composer_guidance_scale": 3.0}, ("`composer_guidance_scale=3.0` has no effect", "Leave one")),
    ({"image": PICTURE, "composer_num_inference_steps": 5}, ("has no effect", "`image`", "Leave one")),
    ({"first_frame_prompt": CAPTION, "rewriter_max_new_tokens": 8}, ("has no effect", "`first_frame_prompt`")),
    ({"first_frame_prompt": CAPTION, "image": PICTURE}, ("Only one of", "`image`")),
    ({"image": PICTURE, "anchors": Anchor(PICTURE)}, ("Only one of", "`anchors`")),
    ({"mode": "direct", "storyboard": [Moment(CAPTION, 0)]}, ("`storyboard`", "change one")),
    ({"mode": "direct", "num_moments": 3}, ("`num_moments=3`", "storyboard")),
    ({"mode": "direct", "anchor_decode": "match"}, ("anchor_decode", "anchor")),
    ({"motion_retries": 2, "output_type": "latent"}, ("`motion_retries=2` has no effect", "Leave one")),
    ({"motion_retries": 2, "latents": torch.zeros(LATENTS)}, ("`motion_retries=2` has no effect", "Leave one")),
    ({"motion_prompt": CAPTION, "rewriter_motion": True}, ("Only one of `motion_prompt` and `rewriter_motion`",)),
    ({"prompt": [PROMPT] * 2, "image": [PICTURE]}, ("`image` has 1 pictures for 2 prompts", "give one or 2")),
    ({"num_videos_per_prompt": 1000, "num_frames": 121, "height": 512, "width": 512}, ("pixels", "use fewer")),
]
ANCHORS = [
    (3, ("`anchors` must be an `Anchor`", "int")),
    ("x", ("`anchors` must hold `Anchor`s", "use `Anchor(image)`")),
    (PICTURE, ("`anchors` must be an `Anchor`", "Image")),
    ([PICTURE], ("`anchors` must hold `Anchor`s", "use `Anchor(image)`")),
    ([], ("holds no anchor", "leave it out")),
    ([None], ("holds no anchor", "leave it out")),
    ([[[Anchor(PICTURE)]]], ("`anchors` must hold `Anchor`s", "list")),
    ({"a": Anchor(PICTURE)}, ("`anchors` must hold `Anchor`s", "str")),
    ([[Anchor(PICTURE)]] * 3, ("`anchors` has 3 lists for 1 prompts", "give one list")),
    ([Anchor(PICTURE), Anchor(PICTURE)], ("frames 0 and 0", "keep one")),
    (Anchor(PICTURE, 17), ("`frame_index=17`", "use -17 to 16")),
    (Anchor(PICTURE, -18), ("`frame_index=-18`", "use -17 to 16")),
    (Anchor(PICTURE, 10**30), ("lies outside", "use -17 to 16")),
    (Anchor(PICTURE, 0, 0.0), ("`strength=0.0`", "(0, 1]")),
    (Anchor(PICTURE, 0, 2), ("`strength=2.0`", "(0, 1]")),
    (Anchor(PICTURE, 0, -1.0), ("`strength=-1.0`", "(0, 1]")),
    (Anchor([PICTURE] * 3), ("run of 3 frames", "nearest: 1 and 5")),
    (Anchor([PICTURE] * 21), ("run of 21 frames", "nearest: 17")),
    (Anchor([]), ("run of 0 frames", "nearest: 1")),
    (Anchor([PICTURE] * 4, 2), ("begins within a latent frame", "nearest `frame_index`: 1 and 5")),
]
STORYBOARDS = [
    (3, ("`storyboard` must be a list of `Moment`s",)),
    ("x", ("`storyboard` must be a list of `Moment`s",)),
    ([], ("`storyboard` must be a list of `Moment`s",)),
    ([{"caption": CAPTION}], ("must hold `Moment`s", "dict")),
    ([[]], ("must hold `Moment`s", "nothing")),
    ([Moment(CAPTION, 0.5)], ("begin with 0", "[0.5]")),
    ([Moment(CAPTION, 0), Moment(CAPTION, 0.01)], ("same latent frame", "fewer moments")),
    ([[Moment(CAPTION, 0)]] * 3, ("3 lists of moments for 1 prompts", "give one or 1")),
    (Moment(CAPTION, 0), ("`storyboard` must be a list of `Moment`s",)),
]
MOMENT_COUNTS = [(0, LEAST), (1, "must be at least 2"), (10**9, MOST), (6, f"{MOST} 5"), *NO_COUNT, (None, WHOLE)]

ROWS = [
    *called("call", "pipe", CALL, prompt=PROMPT),
    *called("call", "pipe", TENSORS[:9], prompt=PROMPT),
    *called("call", "pipe", TENSORS[9:], mode="direct"),
    *called("call", "pipe", [("anchors", *pair) for pair in ANCHORS], prompt=PROMPT),
    *called("call", "pipe", [("storyboard", *pair) for pair in STORYBOARDS], prompt=PROMPT, mode="storyboard"),
    *called("call", "pipe", [("num_moments", *pair) for pair in MOMENT_COUNTS], prompt=PROMPT, mode="storyboard"),
]
ROWS += [
    done(
        "call",
        " ".join(f"{name}={short(value)}" for name, value in given.items()),
        lambda shared, given=given: shared.pipe(**{"prompt": PROMPT} | given),
        *words,
    )
    for given, words in COMBINED
]

# -- the stages one by one --------------------------------------------------------------------------------------------

STAGE_TEXTS = [pair for pair in TEXTS if not isinstance(pair[0], dict)]
for stage, argument, told in (
    ("rewrite", "prompts", "prompts"),
    ("storyboard", "prompts", "prompts"),
    ("describe_motion", "prompts", "prompts"),
    ("compose", "first_frame_prompts", "first_frame_prompts"),
    ("animate", "prompts", "prompt"),
    ("derive", "captions", "captions"),
):
    values = [
        (argument, value, (f"`{told}", words if stage == "animate" or "a text or" not in words else "strings"))
        for value, words in STAGE_TEXTS
    ]
    ROWS += called("stage", "pipe", values, stage, **({"images": PICTURE} if stage == "derive" else {}))
    ROWS = [
        Row(row.name.replace(f"stage: {argument}", f"stage: {stage} {argument}"), row.give, row.words) for row in ROWS
    ]

STAGES = [
    *(("rewrite", {"prompts": CAPTION}, "max_new_tokens", *pair) for pair in ((0, LEAST), *NO_COUNT)),
    ("rewrite", {"prompts": CAPTION}, "max_new_tokens", 10**9, ("lower `max_new_tokens`",)),
    ("storyboard", {"prompts": CAPTION}, "max_new_tokens", 10**9, ("lower `max_new_tokens`",)),
    *(
        ("storyboard", {"prompts": CAPTION}, "num_moments", *pair)
        for pair in ((0, LEAST), (1, "at least 2"), *NO_COUNT)
    ),
    ("describe_motion", {"prompts": CAPTION}, "max_new_tokens", 10**9, ("lower `max_new_tokens`",)),
    ("describe_motion", {"prompts": CAPTION}, "first_frame_prompts", 3, "non-empty list"),
    ("describe_motion", {"prompts": CAPTION}, "first_frame_prompts", ["a", "b"], "2 texts for 1 prompts"),
    *(
        ("compose", {"first_frame_prompts": CAPTION}, name, *pair)
        for name in ("num_inference_steps", "num_candidates")
        for pair in ((0, LEAST), (10**9, f"{MOST} 1000"), *NO_COUNT)
    ),
    *(
        (stage, given, name, *pair)
        for stage, given in (
            ("compose", {"first_frame_prompts": CAPTION}),
            ("derive", {"images": PICTURE, "captions": CAPTION}),
        )
        for name, pair in (
            ("height", (0, "nearest: 16 and 32")),
            ("height", (8 * 10**7, f"{MOST} 512")),
            ("width", (True, WHOLE)),
            ("width", (64.5, WHOLE)),
            ("guidance_scale", (-1, "between 0 and 1000")),
            ("guidance_scale", (NAN, "finite number")),
            ("negative_prompt", (3, "must be a text or a list")),
            ("negative_prompt", (["a", "b"], "2 texts for 1 prompts")),
            ("generator", ("42", "a seed from 0")),
            ("generator", ([None], "a seed from 0")),
            ("generator", ([1, 2], "list of 2 generators for 1 captions")),
        )
    ),
    ("derive", {"captions": CAPTION}, "images", None, ("anchor image must be", "NoneType")),
    ("derive", {"captions": CAPTION}, "images", 3, ("anchor image must be", "int")),
    ("derive", {"captions": CAPTION}, "images", [3], ("anchor image must be", "int")),
    ("derive", {"captions": CAPTION}, "images", [PICTURE] * 2, ("2 images for 1 prompts", "give one")),
    ("derive", {"captions": CAPTION}, "images", HUGE_PICTURE, ("12000 x 12000", "scale it down")),
    *(("decode", {}, "latents", value, "must be a tensor of floats") for value in (None, 3, np.zeros(LATENTS))),
    ("decode", {}, "latents", torch.zeros(3), "of shape (any, 16, any, any, any)"),
    ("decode", {}, "latents", torch.zeros(1, 4, 5, 8, 8), "of shape (any, 16, any, any, any)"),
    ("decode", {}, "latents", torch.full(LATENTS, NAN), "not finite"),
    ("decode", {"latents": torch.zeros(LATENTS)}, "output_type", "mp4", 'use "np", "uint8"'),
    ("decode", {"latents": torch.zeros(LATENTS)}, "output_type", None, 'use "np", "uint8"'),
]
for stage, base, argument, value, words in STAGES:
    (row,) = called("stage", "pipe", [(argument, value, words)], stage, **base)
    ROWS.append(Row(f"stage: {stage} {argument}={short(value)}", row.give, row.words))

# -- the other pipelines ----------------------------------------------------------------------------------------------

EVERY = [
    ("num_inference_steps", 10**9, f"{MOST} 1000"),
    ("num_inference_steps", True, WHOLE),
    ("num_videos_per_prompt", 10**9, f"{MOST} 1000"),
    ("max_sequence_length", 10**9, MOST),
    ("num_frames", 10**9 + 1, MOST),
    ("num_frames", 1.5, WHOLE),
    ("height", 8 * 10**7, MOST),
    ("width", 8 * 10**7, MOST),
    ("height", True, WHOLE),
    ("guidance_scale", NAN, "finite number"),
    ("guidance_scale", 1e30, "between 0 and 1000"),
    ("generator", "42", "a seed from 0"),
    ("output_type", "mp4", "use one of"),
    ("preset", "none", ("Unknown preset 'none'", "this pipeline has")),
    ("preset", ["full-50"], "must be the name of one"),
    ("mode", "none", "use one of"),
    ("callback_on_step_end", no_arguments, "called with"),
    ("callback_on_step_end_tensor_inputs", "latents", "a list of names"),
    ("image", HUGE_PICTURE, ("12000 x 12000", "scale it down")),
    ("image", 3, ("anchor image must be", "int")),
    ("anchors", 3, "must be an `Anchor`"),
    ("composer_num_inference_steps", 10**9, f"{MOST} 1000"),
    ("composer_num_candidates", 5, "needs an `anchor_judge`"),
    ("negative_prompt", LONG, "13000 characters"),
    ("attention_kwargs", {3: 4}, "must have texts for keys"),
]
OWN = {
    "dreamer": [
        ("mode", "storyboard", "first frame only"),
        ("guidance_rescale", NAN, "finite number"),
        ("guidance_rescale", 2, "must lie in [0, 1]"),
        ("guidance_rescale", None, "must lie in [0, 1]"),
        ("fps", 8, "no `fps_conditioning`; leave it out"),
        ("fps", -1, "must be above 0"),
        ("fps", "8", "finite number"),
        ("num_frames", 0, LEAST),
        ("anchors", [Anchor(PICTURE, 3)], ("`frame_index=3`", "use 0")),
        ("anchors", [Anchor(PICTURE, 0, 0.5)], ("`strength=0.5`", "use 1")),
        ("latents", torch.zeros(1), "this call needs"),
    ],
    "cogvideox": [
        ("use_dynamic_cfg", "yes", "True or False"),
        ("use_dynamic_cfg", None, "True or False"),
        ("num_frames", 10, "nearest: 9 and 17"),
        ("height", 128, ("`height=128`", "make the video smaller")),
        ("anchors", [Anchor(PICTURE, 3)], ("frame 3", "add an anchor")),
        ("latents", torch.zeros(1), "this call needs"),
    ],
    "image_to_video": [
        ("animator_kwargs", {"none": 1}, ("no argument none", "leave it out")),
        ("animator_kwargs", 3, "must be a dictionary"),
        ("animator_kwargs", {3: 4}, "must have texts for keys"),
        ("fps", 8.0, "leave it out"),
        ("guidance_scale_2", 3.0, "leave it out"),
        ("anchors", [Anchor(PICTURE, 3)], ("`frame_index=3`", "leave it out")),
        ("anchors", [Anchor(PICTURE, 0, 0.5)], ("`strength=0.5`", "leave it out")),
        ("mode", "storyboard", "does not support"),
    ],
}
SMALL = {"prompt": CAPTION, "height": 32, "width": 32, "max_sequence_length": 16}
BASE = {
    "dreamer": {"prompt": PROMPT},
    "cogvideox": SMALL | {"num_frames": 9},
    "image_to_video": SMALL | {"num_frames": 5},
}
for name, base in BASE.items():
    ROWS += called(name, name, [*EVERY, *OWN[name]], **base)
for name in ("dreamer", "cogvideox"):
    for value in (None, torch.zeros(3), torch.full((1, 2, 2, 2, 2), NAN)):
        ROWS += called(name, name, [("latents", value, "must be a tensor of floats")], "decode")

MODULAR = [
    ("mode", "storyboard", "use one of ('factorized', 'direct')"),
    ("num_inference_steps", 10**9, f"{MOST} 1000"),
    ("num_frames", 1.5, WHOLE),
    ("height", 8 * 10**7, f"{MOST} 512"),
    ("max_sequence_length", 10**9, MOST),
    ("generator", "42", "a seed from 0"),
    ("preset", "none", ("Unknown preset",)),
    ("guidance_scale", NAN, "finite number"),
    ("image", HUGE_PICTURE, ("12000 x 12000", "scale it down")),
    ("anchors", 3, "must be an `Anchor`"),
    ("composer_num_inference_steps", 10**9, f"{MOST} 1000"),
    ("composer_negative_prompt", 3, "must be a text or a list"),
    ("output_type", "mp4", "use one of"),
    ("rewriter_max_new_tokens", True, WHOLE),
    ("first_frame_prompt", 3, "must be a text or a list"),
    ("prompt", 3, "must be a text or a list"),
]
MODEL = {"height": 64, "width": 64, "num_frames": 17, "max_sequence_length": 28}
ROWS += called("modular", "modular", MODULAR, prompt=PROMPT, **MODEL)

# -- presets, anchors, moments, endpoints -----------------------------------------------------------------------------

PRESET = {
    "name": "x",
    "scheduler_class": "UniPCMultistepScheduler",
    "scheduler_config": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    "sigmas": (1.0, 0.5),
    "flow_shift": 1.0,
    "guidance_scale": 5.0,
}
PRESETS = [
    *(("name", value, "must be a str") for value in (3, None)),
    *(("name", value, ("preset is called", "use a plain name")) for value in ("", "..", "a/b", "C:x")),
    *(("scheduler_class", value, "must be a str") for value in (3, None)),
    *(
        ("scheduler_class", value, ("must be a scheduler class of diffusers", repr(value)))
        for value in ("Nope", "DiffusionPipeline")
    ),
    *(("scheduler_config", value, "must be a dict") for value in (3, None)),
    ("scheduler_config", {"nope": 1}, ("Preset 'x'", "UniPCMultistepScheduler", "nope")),
    ("scheduler_config", {"num_train_timesteps": "x"}, ("Preset 'x'", "UniPCMultistepScheduler")),
    ("scheduler_config", {}, ("Preset 'x'", "use_flow_sigmas")),
    *(("sigmas", value, "must descend within (0, 1]") for value in ((), (0.5, 1.0), (1.5, 0.5), (1.0, 0.0))),
    *(("sigmas", value, "finite number") for value in (("a",), (NAN,), (1.0, NAN), (True,), [None])),
    ("sigmas", 3, "list of numbers"),
    *(("flow_shift", value, "finite number") for value in ("x", NAN, True)),
    *(("flow_shift", value, "above 0") for value in (0, -1)),
    *(("guidance_scale", value, "finite number") for value in ("x", NAN, True)),
    *(("guidance_scale", value, "between 0 and 1000") for value in (-1, 1e30)),
    ("guidance_scale", None, "must be a number"),
    *(("guidance_interval", value, "two sigmas in [0, 1]") for value in ((0,), (1, 0), (-1, 5))),
    *(("guidance_interval", value, "finite number") for value in (("a", "b"), (NAN, 1))),
    ("guidance_interval", 3, "list of numbers"),
    *(("guidance_scale_2", value, words) for value, words in (("x", "finite"), (NAN, "finite"), (-1, "between 0"))),
    *((name, 3, "must be a str") for name in ("weights", "source")),
    *(("anchor_window", value, "whole number from 0 on") for value in (-1, True, 1.5, "x")),
    ("num_inference_steps", 3, "must be the number of `sigmas`, 2"),
    ("num_inference_steps", True, WHOLE),
    *(("min_motion", value, "[0, 1]") for value in (-1, 2)),
    *(("min_motion", value, "finite number") for value in (NAN, "x")),
]
for argument, value, words in PRESETS:
    words = words if isinstance(words, tuple) else (argument, words)
    ROWS.append(
        done(
            "preset",
            f"{argument}={short(value)}",
            lambda shared, given={**PRESET, argument: value}: SchedulerPreset(**given).make_scheduler(),
            *words,
        )
    )
GOOD = SchedulerPreset(**PRESET)
ROWS += [
    done(
        "preset",
        f"presets={short(value)}",
        lambda shared, value=value: SchedulerPresets(value),
        "`presets` must map names",
    )
    for value in (3, None, [], {"a": 3}, {"other": GOOD})
]
ROWS += [
    done("anchor", f"frame_index={value!r}", lambda shared, value=value: Anchor(PICTURE, value), "frame_index", WHOLE)
    for value in ("x", 1.5, True, None, NAN)
]
ROWS += [
    done("anchor", f"strength={value!r}", lambda shared, value=value: Anchor(PICTURE, 0, value), "strength", "number")
    for value in ("x", NAN, True, None, [1], INF)
]
ROWS += [
    done("moment", f"time={value!r}", lambda shared, value=value: Moment(CAPTION, value), "`time=", "from 0")
    for value in ("0", NAN, 2, -1, True, None)
]
ROWS += [
    done("moment", f"caption={short(value)}", lambda shared, value=value: Moment(value, 0), "`caption`", words)
    for value, words in (
        ("", "must be a text"),
        (3, "must be a text"),
        (LONG, "13000 characters"),
        ("red \x1b", "control character"),
        ("red \ud800", "half a character"),
    )
]
