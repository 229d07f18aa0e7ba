import PIL.Image
import pytest
import torch
from tiny import tiny_pipeline
from tiny_cogvideox import tiny_cogvideox_pipeline

from diffusers_fvg import Anchor
from diffusers_fvg.rewrite.storyboard import Moment, check_moments, moment_frames, pair_storyboards


SIZE = {"height": 32, "width": 32, "max_sequence_length": 16, "output_type": "pt", "num_inference_steps": 2}
RED, BLUE = "a red circle at the left", "a blue circle at the left"
BOARD = [Moment(RED, 0.0), Moment(BLUE, 1.0)]
LONG_BOARD = [Moment("two cat", 0.0), Moment("a dog", 0.5), Moment("three dog", 1.0)]


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline()
    with torch.no_grad():
        # Unscaled, this random decoder would change by one grey level only with another prompt or seed.
        pipe.composer.pipeline.vae.decoder.conv_out.weight.mul_(30)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def bytes_of(images: list[PIL.Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


# -- moments --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "time"), [("", 0.0), (None, 0.0), (RED, -0.1), (RED, 1.01), (RED, "0"), (RED, True)]
)
def test_a_moment_is_a_caption_and_a_share_of_the_video(caption, time):
    with pytest.raises(ValueError, match="moment"):
        Moment(caption, time)


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        ([], "nothing"),
        ([RED], "str"),
        ([Moment(RED, 0.5)], r"\[0.5\]"),
        ([Moment(RED, 0.0), Moment(BLUE, 0.0)], r"\[0.0, 0.0\]"),
        ([Moment(RED, 0.0), Moment(BLUE, 1.0), Moment(BLUE, 0.5)], "increase"),
    ],
)
def test_moments_are_in_order(moments, message):
    with pytest.raises(ValueError, match=message):
        check_moments(moments)


def test_a_moment_is_the_nearest_frame():
    times = (0.0, 0.3, 0.6, 0.99)
    assert moment_frames(times, 17, 4) == [0, 5, 10, 16]
    assert moment_frames((*times, 1.0), 81, 1) == [0, 24, 48, 79, 80]


def test_moments_on_one_latent_frame_are_refused():
    # Frame 0 has a latent to itself, frames 1 to 4 and 5 to 8 share one each.
    assert moment_frames((0.0, 1 / 8, 5 / 8), 9, 4) == [0, 1, 5]
    for times in ((0.0, 1 / 8, 4 / 8), (0.0, 5 / 8, 1.0), (0.0, 0.01)):
        with pytest.raises(ValueError, match="same latent frame.*4 frames after frame 0"):
            moment_frames(times, 9, 4)


def test_storyboards_pair_with_prompts():
    assert pair_storyboards(BOARD, 2) == [BOARD, BOARD]
    assert pair_storyboards([BOARD, LONG_BOARD], 2) == [BOARD, LONG_BOARD]
    with pytest.raises(ValueError, match="2 lists of moments for 3 prompts"):
        pair_storyboards([BOARD, BOARD], 3)
    with pytest.raises(ValueError, match="list of `Moment`s"):
        pair_storyboards(BOARD[0], 1)


# -- the pipeline ---------------------------------------------------------------------------------------------------------


def test_stages_by_hand_equal_the_call(pipe):
    """Two prompts with two and three moments, two videos each."""
    prompts, boards = ["a red circle turns blue", "two cat"], [BOARD, LONG_BOARD]
    options = SIZE | {"num_frames": 17}
    output = pipe(
        prompts,
        mode="storyboard",
        storyboard=boards,
        num_videos_per_prompt=2,
        generator=seeded(1, 2, 3, 4),
        composer_guidance_scale=4.0,
        **options,
    )
    assert output.storyboards == boards and output.first_frame_prompts == [RED, "two cat"]
    assert [len(pictures) for pictures in output.anchor_images] == [2, 2, 3, 3]
    assert set(output.timings) == {"compose", "derive", "encode", "denoise", "decode"}

    # The composer is a video pipeline, so the scene is held together by shared noise.
    pictures = []
    for video, seed in enumerate(output.seeds):
        captions = [moment.caption for moment in boards[video // 2]]
        noise = seeded(*[seed["anchor"]] * len(captions))
        pictures.append(pipe.compose(captions, 32, 32, guidance_scale=4.0, generator=noise))
    assert [bytes_of(row) for row in output.anchor_images] == [bytes_of(row) for row in pictures]
    assert len({*map(tuple, (bytes_of(row) for row in pictures))}) == 4
    frames = [0, 16], [0, 8, 16]
    anchors = [
        [Anchor(image, frame) for image, frame in zip(row, frames[video // 2])] for video, row in enumerate(pictures)
    ]
    expected = pipe.animate(prompts, anchors, num_videos_per_prompt=2, generator=seeded(1, 2, 3, 4), **options)
    assert torch.equal(output.frames, expected)


def test_the_first_picture_and_the_noise_are_those_of_the_single_anchor(pipe):
    options = SIZE | {"num_frames": 9, "output_type": "latent"}
    single = pipe("a red circle turns blue", first_frame_prompt=RED, generator=seeded(5), **options)
    board = pipe("a red circle turns blue", mode="storyboard", storyboard=BOARD, generator=seeded(5), **options)
    alone = pipe("a red circle turns blue", mode="storyboard", storyboard=BOARD[:1], generator=seeded(5), **options)
    assert single.seeds == board.seeds == alone.seeds
    assert bytes_of(single.anchor_images) == bytes_of(board.anchor_images[0][:1]) == bytes_of(alone.anchor_images[0])
    assert torch.equal(single.frames, alone.frames)
    assert torch.equal(single.frames[:, :, 0], board.frames[:, :, 0])
    assert not torch.equal(single.frames[:, :, -1], board.frames[:, :, -1])
    assert single.storyboards is None and alone.storyboards == [BOARD[:1]]


def test_stage_1_writes_what_is_not_given(pipe):
    # The tiny rewriter knows nothing, so the prompt stands in as the only moment.
    output = pipe("a red circle", mode="storyboard", num_moments=3, generator=seeded(5), num_frames=9, **SIZE)
    assert output.storyboards == [[Moment("a red circle", 0.0)]] == pipe.storyboard("a red circle", 3)
    assert [len(pictures) for pictures in output.anchor_images] == [1]
    assert "rewrite" in output.timings and "derive" not in output.timings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": PIL.Image.new("RGB", (32, 32))}, "draws its own pictures of `storyboard`, but `image`"),
        ({"first_frame_prompt": RED}, "`first_frame_prompt` was given"),
        ({"mode": "factorized"}, "is for `mode=\"storyboard\"`, not for 'factorized'"),
        ({"mode": "direct"}, "not for 'direct'"),
        ({"storyboard": [BOARD, BOARD]}, "2 lists of moments for 1 prompts"),
        (
            {"storyboard": [Moment(RED, 0.0), Moment(BLUE, 0.2), Moment(RED, 0.5)]},
            r"times \[0.0, 0.2, 0.5\] .*9 frames",
        ),
        ({"storyboard": None, "num_frames": 1}, "`num_moments=2` must be at most 1"),
        ({"storyboard": None, "num_moments": 4}, "`num_moments=4` must be at most 3"),
        ({"storyboard": None, "num_moments": 1}, "num_moments=1"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_runs(pipe, arguments, message, monkeypatch):
    for model in (pipe.rewriter, pipe.composer, pipe.transformer):
        monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("a model ran"))
    call = {"mode": "storyboard", "storyboard": BOARD, "num_frames": 9} | SIZE | arguments
    with pytest.raises(ValueError, match=message):
        pipe("a red circle", **call)


@pytest.mark.parametrize("stage", ["compose", "derive"])
def test_an_interrupt_leaves_what_is_there(pipe, stage):
    def stop(pipe, running, step, steps):
        pipe._interrupt = running == stage

    output = pipe(
        "a red circle turns blue",
        mode="storyboard",
        storyboard=BOARD,
        callback_on_stage_step=stop,
        num_frames=9,
        **SIZE,
    )
    assert output.frames == []
    assert [len(row) for row in output.anchor_images] == ([] if stage == "compose" else [1])


def test_where_two_latents_are_a_patch_a_moment_fills_it():
    pipe = tiny_cogvideox_pipeline()
    pipe.set_progress_bar_config(disable=True)
    output = pipe(
        "a red circle turns blue",
        mode="storyboard",
        storyboard=BOARD,
        generator=seeded(1),
        num_frames=17,
        **SIZE | {"output_type": "latent"},
    )
    first, last = output.anchor_images[0]
    expected = pipe.animate(
        "a red circle turns blue",
        [Anchor(first), Anchor([last] * 8, 9)],
        generator=seeded(1),
        num_frames=17,
        **SIZE | {"output_type": "latent"},
    )
    assert torch.equal(output.frames, expected)
