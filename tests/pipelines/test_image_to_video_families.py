"""Every family of image-to-video pipelines in stage 3, cell by cell: it works as its stock pipeline does, or is refused.

Expected frames are those of the stock pipeline's own call, on weights of its own made alike.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from tiny_animators import ANIMATORS, tiny_animator
from tiny_composers import flux

from diffusers_fvg import Anchor, FactorizedImageToVideoPipeline, Moment
from diffusers_fvg.compose.composer import AnchorComposer


PROMPTS = ["a red circle moves right", "a blue square stays still"]
STEPS = 2
# Frames of the videos, where 5 are too many or too few for the family.
LENGTHS = dict.fromkeys(("cogvideox15_i2v", "ltx_i2v", "ltx_condition"), 9)
SIZES: dict[str, tuple[int, int]] = {}
# What the stock call is given for a first picture and one at another frame.
FIRST_AND_LAST = {
    "wan21_flf2v": lambda first, last, frame: {"image": first, "last_image": last},
    "wan22_i2v": lambda first, last, frame: {"image": first, "last_image": last},
    "ltx_condition": lambda first, last, frame: {
        "conditions": [LTXVideoCondition(image=first), LTXVideoCondition(image=last, frame_index=frame)]
    },
}
ANY_FRAME = {"ltx_condition"}
NEEDS_LAST = {"wan21_flf2v"}
NO_CALLBACK: set[str] = set()
# Their pipelines cannot be interrupted: the video under way is left out.
NO_INTERRUPT = {"stable_video_diffusion"}
NO_PROMPT = {"stable_video_diffusion"}
DIRECT = {"wan22_ti2v", "ltx_i2v", "ltx_condition"}
FIXED: dict[str, dict] = {}


def picture(seed: int, size: tuple[int, int]) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def ours(family: str) -> FactorizedImageToVideoPipeline:
    pipe = FactorizedImageToVideoPipeline(animator=tiny_animator(family))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def stock(family: str) -> DiffusionPipeline:
    return tiny_animator(family)


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
        declared = DECLARED(pipeline)
        given = (
            self.call | {"frames": self.length, "prompt": PROMPTS[0], "output_type": "np"} | FIXED.get(self.family, {})
        )
        pictures = {"image": self.picture(seed)}
        if self.needs_last:
            pictures["last_image"] = self.picture(seed + 10)
        given |= {"generator": seeded(seed)} | (changes or {})
        if "conditions" not in given and "image" not in given:
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


def DECLARED(pipeline: DiffusionPipeline) -> set[str]:
    import inspect

    return set(inspect.signature(type(pipeline).__call__).parameters)


# -- the rows of the matrix -------------------------------------------------------------------------------------------


def first_frame(column: Column) -> None:
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
        column.is_refused("calls none", callback_on_step_end=note)
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


def bfloat16(column: Column) -> None:
    pipe = FactorizedImageToVideoPipeline(animator=tiny_animator(column.family)).to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.animator.dtype == torch.bfloat16
    expected = column.stock(pipeline=tiny_animator(column.family).to(torch.bfloat16))
    np.testing.assert_array_equal(column.run(pipe=pipe).frames[0], expected)


def offload(column: Column, monkeypatch) -> None:
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.get_device", lambda: "cpu:0")
    pipe = FactorizedImageToVideoPipeline(animator=tiny_animator(column.family))
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_model_cpu_offload()
    hooked = {name for name, model in pipe.animator.models.items() if hasattr(model, "_hf_hook")}
    assert hooked == set(pipe.animator.models) and not hasattr(pipe.animator, "_hf_hook")
    for _ in range(2):
        np.testing.assert_array_equal(column.run(pipe=pipe).frames[0], column.stock())


def is_the_same(column: Column, loaded: DiffusionPipeline) -> None:
    """Weights bit for bit. Where they lie in memory changes the last bit of sums, and so of frames."""
    expected, found = column.pipe.animator.state_dict(), loaded.animator.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    np.testing.assert_allclose(column.run(pipe=loaded).frames[0], column.stock(), rtol=0, atol=1e-5)


def save_and_load_bundled(column: Column, tmp_path) -> None:
    column.pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is FactorizedImageToVideoPipeline
    is_the_same(column, loaded)


def save_and_load_light(column: Column, tmp_path, monkeypatch) -> None:
    stock(column.family).save_pretrained(tmp_path / "hub")
    pipe = FactorizedImageToVideoPipeline(animator=tiny_animator(column.family))
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
        column.is_refused('`mode="storyboard"` is not for it', mode="storyboard", storyboard=board)
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
QUICK = {"first_frame", "first_and_last_frame", "any_frame", "direct"}


def cells():
    for family in ANIMATORS:
        for row in ROWS:
            is_quick = row in QUICK or family == "wan22_i2v"
            yield pytest.param(family, row, marks=() if is_quick else pytest.mark.slow, id=f"{family}-{row}")


@pytest.mark.parametrize(("family", "row"), list(cells()))
def test_matrix(family, row, request):
    function = ROWS[row]
    more = function.__code__.co_varnames[1 : function.__code__.co_argcount]
    function(Column(family), **{name: request.getfixturevalue(name) for name in more})
