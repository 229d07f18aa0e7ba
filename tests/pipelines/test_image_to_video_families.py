"""Every family of image-to-video pipelines in stage 3, cell by cell: it works as its stock pipeline does, or is refused.

Expected frames are those of the stock pipeline's own call, on weights of its own made alike.
"""

import inspect
from collections.abc import Callable
from functools import cache

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.cosmos import pipeline_cosmos2_5_predict, pipeline_cosmos2_video2world
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from tiny_animators import ANIMATORS, HUNYUAN_TEMPLATE, SafetyChecker, tiny_animator
from tiny_composers import flux

from diffusers_fvg import Anchor, AnchorAnimator, FactorizedImageToVideoPipeline, Moment
from diffusers_fvg.compose.composer import AnchorComposer


PROMPTS = ["a red circle moves right", "a blue square stays still"]
STEPS = 2
# Frames of the videos, where 5 are too many or too few for the family.
LENGTHS = dict.fromkeys(("cogvideox15_i2v", "ltx_i2v", "ltx_condition", "ltx2_i2v", "ltx2_condition"), 9)
LENGTHS["kandinsky5_i2v"] = 17
SIZES = dict.fromkeys(("ltx2_i2v", "ltx2_condition"), (64, 64))
# What the stock call is given for a first picture and one at another frame.
FIRST_AND_LAST = {
    "wan21_flf2v": lambda first, last, frame: {"image": first, "last_image": last},
    "wan22_i2v": lambda first, last, frame: {"image": first, "last_image": last},
    "skyreels_v2_df": lambda first, last, frame: {"image": first, "last_image": last},
    "ltx_condition": lambda first, last, frame: {
        "conditions": [LTXVideoCondition(image=first), LTXVideoCondition(image=last, frame_index=frame)]
    },
    "wan_vace": lambda first, last, frame: vace_clip({0: first, frame: last}),
    # Frames 1 to 8 are the second latent.
    "ltx2_condition": lambda first, last, frame: {
        "conditions": [ltx2_condition(first), ltx2_condition(last, index=1)]
    },
}
ANY_FRAME = {"ltx_condition", "ltx2_condition", "wan_vace"}
NEEDS_LAST = {"wan21_flf2v"}
NO_CALLBACK = {"hunyuan_video15_i2v"}
# Their pipelines cannot be interrupted: the video under way is left out.
NO_INTERRUPT = {"stable_video_diffusion"}
NO_PROMPT = {"stable_video_diffusion"}
DIRECT = {
    "wan22_ti2v",
    "ltx_i2v",
    "ltx_condition",
    "kandinsky6_ti2va",
    "motif_video_i2v",
    "sana_video_i2v",
    "skyreels_v2_df",
    "cosmos25_predict",
    "ltx2_i2v",
    "ltx2_condition",
    "wan_vace",
}
# Arguments of every call, the stock pipeline's and ours: the tiny text model has a template of its own.
CALL_DEFAULTS = {"hunyuan_video_i2v": {"prompt_template": HUNYUAN_TEMPLATE}}
# What the stock call is given beside: what the family does by itself.
FIXED = {"sana_video_i2v": {"use_resolution_binning": False}}


def picture(seed: int, size: tuple[int, int]) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def ltx2_condition(picture: PIL.Image.Image, index: int = 0):
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

    return LTX2VideoCondition(picture, index=index)


def vace_clip(pictures: dict[int, PIL.Image.Image]) -> dict[str, list[PIL.Image.Image]]:
    """What diffusers' documentation of Wan-VACE gives: grey frames to be made, white in the mask, and black for those given."""
    grey, white, black = (np.full((32, 32, 3), level, dtype=np.uint8) for level in (128, 255, 0))
    video = [pictures.get(frame, PIL.Image.fromarray(grey)) for frame in range(5)]
    return {"video": video, "mask": [PIL.Image.fromarray(black if frame in pictures else white) for frame in range(5)]}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def ours(family: str) -> FactorizedImageToVideoPipeline:
    pipe = FactorizedImageToVideoPipeline(animator=animator(family))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def stock(family: str) -> DiffusionPipeline:
    return tiny_animator(family)


def animator(family: str) -> AnchorAnimator:
    return AnchorAnimator(tiny_animator(family), CALL_DEFAULTS.get(family))


@pytest.fixture(autouse=True)
def without_torchvision(monkeypatch):
    """Cosmos' pipelines load their safety checker from a package, and resize with another; see `tiny_animators.py`."""
    for module in (pipeline_cosmos2_video2world, pipeline_cosmos2_5_predict):
        monkeypatch.setattr(module, "CosmosSafetyChecker", SafetyChecker)
    monkeypatch.setattr("diffusers_fvg.animate.family.is_installed", lambda package: True)


class Column:
    """One family: its own call, and ours with the same values."""

    def __init__(self, family: str):
        self.family, self.pipe = family, ours(family)
        self.size, self.length = SIZES.get(family, (32, 32)), LENGTHS.get(family, 5)
        self.call = {"height": self.size[0], "width": self.size[1], "num_frames": self.length}
        self.call["num_inference_steps"] = STEPS
        self.needs_last = family in NEEDS_LAST

    def picture(self, seed: int = 0) -> PIL.Image.Image:
        return picture(seed, self.size)

    def anchors(self, seed: int = 0) -> list[Anchor]:
        """What the family takes at least: a first frame, and a last one where it needs one."""
        last = [Anchor(self.picture(seed + 10), -1)] if self.needs_last else []
        return [Anchor(self.picture(seed)), *last]

    def stock(self, seed: int = 0, pipeline: DiffusionPipeline | None = None, **changes) -> np.ndarray:
        """Frames `(F, H, W, 3)` of the stock pipeline's own call with the pictures of [`anchors`]."""
        pipeline = pipeline or stock(self.family)
        declared = inspect.signature(type(pipeline).__call__).parameters
        given = (
            self.call
            | {"frames": self.length, "prompt": PROMPTS[0], "output_type": "np"}
            | FIXED.get(self.family, {})
            | CALL_DEFAULTS.get(self.family, {})
        )
        pictures = {"image": self.picture(seed)}
        if self.family == "ltx2_condition":
            pictures = {"conditions": ltx2_condition(self.picture(seed))}
        if self.family == "wan_vace":
            pictures = vace_clip({0: self.picture(seed)})
        if self.family == "cosmos25_predict":
            pictures = {"video": [self.picture(seed)], "num_latent_conditional_frames": 1}
        if self.needs_last:
            pictures["last_image"] = self.picture(seed + 10)
        given |= {"generator": seeded(seed)} | (changes or {})
        if not given.keys() & {"conditions", "image", "video"}:
            given |= pictures
        return pipeline(**{name: value for name, value in given.items() if name in declared}).frames[0]

    def run(self, prompt: str | list[str] = PROMPTS[0], pipe: DiffusionPipeline | None = None, **arguments):
        arguments = self.call | {"generator": seeded(0)} | arguments
        if not arguments.keys() & {"image", "anchors", "storyboard", "mode"}:
            arguments["anchors"] = self.anchors()
        return (pipe or self.pipe)(prompt, **arguments)

    def is_refused(self, reason: str, **arguments) -> None:
        """Refused with a reason that names the family, and no model has run."""
        ran = []
        models = list(self.pipe.animator.models.values())
        hooks = [model.register_forward_pre_hook(lambda *args: ran.append(args)) for model in models]
        try:
            with pytest.raises(ValueError, match=reason) as error:
                self.run(**arguments)
        finally:
            for hook in hooks:
                hook.remove()
        assert self.pipe.animator.family.name in str(error.value) and not ran


# -- the rows of the matrix -------------------------------------------------------------------------------------------


def first_frame(column: Column) -> None:
    # The default number of frames fits the VAE.
    assert (column.pipe.call_defaults["num_frames"] - 1) % column.pipe._frame_step() == 0
    if column.needs_last:
        column.is_refused("needs a first and a last frame", image=column.picture())
        return
    output = column.run(image=column.picture())
    assert output.frames.shape == (1, column.length, *column.size, 3)
    np.testing.assert_array_equal(output.frames[0], column.stock())
    assert output.first_frame_prompts is None and output.seeds == [{"video": 0}]


def first_and_last_frame(column: Column) -> None:
    first, last = column.picture(), column.picture(10)
    anchors = [Anchor(first), Anchor(last, -1)]
    if column.family not in FIRST_AND_LAST:
        column.is_refused("takes a first frame, and no anchor at `frame_index=-1`", anchors=anchors)
        return
    given = FIRST_AND_LAST[column.family](first, last, column.length - 1)
    np.testing.assert_array_equal(column.run(anchors=anchors).frames[0], column.stock(**given))


def any_frame(column: Column) -> None:
    first, later = column.picture(), column.picture(10)
    anchors = [Anchor(first), Anchor(later, 2)]
    if column.family not in ANY_FRAME:
        column.is_refused("and no anchor at `frame_index=2`", anchors=anchors)
        column.is_refused("takes no `strength=0.5`", anchors=[Anchor(first, strength=0.5), *column.anchors()[1:]])
        return
    given = FIRST_AND_LAST[column.family](first, later, 2)
    np.testing.assert_array_equal(column.run(anchors=anchors).frames[0], column.stock(**given))


def batch_of_two(column: Column) -> None:
    frames = column.run(
        PROMPTS, anchors=[column.anchors(0), column.anchors(1)], generator=[seeded(0), seeded(1)]
    ).frames
    np.testing.assert_array_equal(frames[0], column.stock(0))
    np.testing.assert_array_equal(frames[1], column.stock(1, prompt=PROMPTS[1]))


def two_videos_per_prompt(column: Column) -> None:
    frames = column.run(num_videos_per_prompt=2).frames
    assert len(frames) == 2 and not np.array_equal(*frames)
    np.testing.assert_array_equal(frames[0], column.stock())


def generator_list(column: Column) -> None:
    frames = column.run(num_videos_per_prompt=2, generator=[seeded(7), seeded(0)]).frames
    np.testing.assert_array_equal(frames[1], column.stock())


def callback(column: Column) -> None:
    steps = []

    def note(pipeline, step, timestep, tensors):
        steps.append((type(pipeline), sorted(tensors)))
        return {}

    if column.family in NO_CALLBACK:
        column.is_refused("does not support it", callback_on_step_end=note)
        return
    frames = column.run(callback_on_step_end=note).frames
    assert steps == [(type(stock(column.family)), ["latents"])] * STEPS
    np.testing.assert_array_equal(frames[0], column.stock())


def interrupt(column: Column) -> None:
    seen = []

    def stop(pipe, stage, step, steps):
        seen.append((stage, step, steps))
        pipe._interrupt = True

    output = column.run(PROMPTS, anchors=column.anchors(), callback_on_stage_step=stop)
    assert seen == [("animate", 1, 2 * STEPS)]
    assert len(output.frames) == (0 if column.family in NO_INTERRUPT else 1)
    # The next call runs to its end.
    np.testing.assert_array_equal(column.run().frames[0], column.stock())


def bfloat16(column: Column, tmp_path) -> None:
    fresh(column).save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    models = pipe.animator.models
    assert models["unet" if "unet" in models else "transformer"].dtype == torch.bfloat16
    # The stock pipeline of the same models: what a class keeps in float32 is so in both.
    expected = column.stock(pipeline=pipe.animator.pipeline)
    np.testing.assert_array_equal(column.run(pipe=pipe).frames[0], expected)
    assert not np.array_equal(expected, column.stock())


def offload(column: Column, monkeypatch) -> None:
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.get_device", lambda: "cpu:0")
    pipe = fresh(column)
    pipe.enable_model_cpu_offload()
    hooked = {name for name, model in pipe.animator.models.items() if hasattr(model, "_hf_hook")}
    assert hooked == set(pipe.animator.models) - set(pipe.animator.pipeline._exclude_from_cpu_offload) and not hasattr(
        pipe.animator, "_hf_hook"
    )
    for _ in range(2):
        np.testing.assert_array_equal(column.run(pipe=pipe).frames[0], column.stock())


def fresh(column: Column) -> FactorizedImageToVideoPipeline:
    """One that has not run: some pipelines change their tokenizer, which is saved as it then is."""
    pipe = FactorizedImageToVideoPipeline(animator=animator(column.family))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def is_the_same(column: Column, loaded: DiffusionPipeline) -> None:
    """Weights bit for bit. Where they lie in memory changes the last bit of sums, and so of frames."""
    expected, found = column.pipe.animator.state_dict(), loaded.animator.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    np.testing.assert_allclose(column.run(pipe=loaded).frames[0], column.stock(), rtol=0, atol=1e-5)


def save_and_load_bundled(column: Column, tmp_path) -> None:
    fresh(column).save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is FactorizedImageToVideoPipeline
    is_the_same(column, loaded)


def save_and_load_light(column: Column, tmp_path, monkeypatch) -> None:
    pipe = fresh(column)
    pipe.animator.pipeline.save_pretrained(tmp_path / "hub")
    pipe.animator.reference = {"repository": "org/model", "revision": "0" * 40}
    pipe.save_pretrained(tmp_path / "light")
    assert not list((tmp_path / "light").rglob("*.safetensors"))
    asked = []

    def download(repository, revision=None, **arguments):
        asked.append((repository, revision))
        return str(tmp_path / "hub")

    # The Hub itself is in `tests/compose/test_composer.py`: both components load by the same code.
    monkeypatch.setattr(DiffusionPipeline, "download", download)
    monkeypatch.setattr("diffusers_fvg.loading.files.repository_files", lambda *args, **hub: ("0" * 40, {}))
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "light")
    loaded.set_progress_bar_config(disable=True)
    assert asked == [("org/model", "0" * 40)] and loaded.animator.reference == pipe.animator.reference
    is_the_same(column, loaded)


def storyboard(column: Column) -> None:
    board = [Moment("a red circle", 0.0), Moment("a blue circle", 1.0)]
    middle = [Moment("a red circle", 0.0), Moment("a blue circle", 0.5)]
    composer = AnchorComposer(flux(), {"num_inference_steps": 1, "height": 16, "width": 16})
    pipe = FactorizedImageToVideoPipeline(animator=column.pipe.animator, composer=composer)
    pipe.set_progress_bar_config(disable=True)
    column.pipe = pipe
    if column.family not in FIRST_AND_LAST:
        column.is_refused('does not support `mode="storyboard"`', mode="storyboard", storyboard=board)
        return
    output = column.run(pipe=pipe, mode="storyboard", storyboard=board)
    first, last = output.anchor_images[0]
    given = FIRST_AND_LAST[column.family](first, last, column.length - 1)
    np.testing.assert_array_equal(output.frames[0], column.stock(**given))
    if column.family in ANY_FRAME:
        assert column.run(pipe=pipe, mode="storyboard", storyboard=middle).frames.shape == output.frames.shape
    else:
        column.is_refused("takes moments at the times 0 and 1", mode="storyboard", storyboard=middle)


def direct(column: Column) -> None:
    if column.family not in DIRECT:
        column.is_refused("makes no video without a first frame", mode="direct")
        return
    output = column.run(mode="direct")
    assert output.frames.shape == (1, column.length, *column.size, 3)
    assert not np.array_equal(output.frames[0], column.stock())


ROWS: dict[str, Callable] = {
    row.__name__: row
    for row in (
        first_frame,
        first_and_last_frame,
        any_frame,
        batch_of_two,
        two_videos_per_prompt,
        generator_list,
        callback,
        interrupt,
        bfloat16,
        offload,
        save_and_load_bundled,
        save_and_load_light,
        storyboard,
        direct,
    )
}
# Cells that always run: what differs from family to family. The others are marked slow but for one family.
QUICK = {"first_frame", "first_and_last_frame", "any_frame"}
QUICK_FOR_ONE = {"batch_of_two", "callback", "interrupt", "bfloat16", "offload", "storyboard"}
# Texts of 1108 tokens and pictures of 729 are in its code.
SLOW = {"hunyuan_video15_i2v"}


def cells():
    for family in ANIMATORS:
        for row in ROWS:
            is_quick = (
                row in QUICK
                or (family == "wan22_i2v" and row in QUICK_FOR_ONE)
                or (row == "direct" and family not in DIRECT)
            )
            is_quick = is_quick and family not in SLOW
            yield pytest.param(family, row, marks=() if is_quick else pytest.mark.slow, id=f"{family}-{row}")


@pytest.mark.parametrize(("family", "row"), list(cells()))
def test_matrix(family, row, request):
    function = ROWS[row]
    more = function.__code__.co_varnames[1 : function.__code__.co_argcount]
    function(Column(family), **{name: request.getfixturevalue(name) for name in more})
