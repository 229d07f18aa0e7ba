"""`FactorizedImageToVideoPipeline` beside what `test_image_to_video_families.py` runs for each family."""

import copy
import json
import logging
from functools import cache

import av
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanPipeline
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from tiny import tiny_composer, tiny_rewriter, tiny_wan_components
from tiny_animators import tiny_animator

from diffusers_fvg import Anchor, AnchorAnimator, FactorizedImageToVideoPipeline, Moment, apply_memory_profile, replay
from diffusers_fvg.media import write_video
from diffusers_fvg.pipelines import pipeline_factorized_image_to_video, stages
from diffusers_fvg.pipelines.profiles import pipeline_stages
from diffusers_fvg.schedules.flow import shifted_sigmas
from diffusers_fvg.schedules.pinned import pinned_scheduler
from diffusers_fvg.schedules.presets import SchedulerPresets, timestep_preset, unipc_preset


PROMPT = "a red circle moves right"
CALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}

LTX2_UNGUIDED = {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
LTX2_UNGUIDED |= {f"audio_{name}": value for name, value in LTX2_UNGUIDED.items()}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(seed: int = 0, height: int = 32, width: int = 32) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pipeline(family: str = "wan22_i2v", **parts) -> FactorizedImageToVideoPipeline:
    pipe = FactorizedImageToVideoPipeline(animator=tiny_animator(family), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def wan():
    return pipeline()


@pytest.fixture(scope="module")
def stock():
    return tiny_animator("wan22_i2v")


# -- three stages -----------------------------------------------------------------------------------------------------


def test_three_stages_end_in_the_stock_pipelines_own_call(stock):
    pipe = pipeline(rewriter=tiny_rewriter(), composer=tiny_composer())
    calls = []
    output = pipe(
        PROMPT,
        generator=seeded(3),
        composer_num_inference_steps=1,
        callback_on_stage_step=lambda pipe, stage, step, steps: calls.append((stage, step, steps)),
        **CALL,
    )
    assert list(dict.fromkeys(stage for stage, *_ in calls)) == ["rewrite", "compose", "animate"]
    assert calls[-2:] == [("animate", 1, 2), ("animate", 2, 2)] and output.timings.keys() == {
        stage for stage, *_ in calls
    }
    assert len(output.first_frame_prompts) == 1 and output.seeds[0]["video"] == 3 and "anchor" in output.seeds[0]
    (image,) = output.anchor_images
    expected = stock(image=image, prompt=PROMPT, generator=seeded(3), **CALL).frames
    np.testing.assert_array_equal(output.frames, expected)
    assert output.audio is None
    # The stages by hand.
    frames = pipe.animate(PROMPT, Anchor(image), generator=seeded(3), **CALL)
    np.testing.assert_array_equal(frames, expected)


def test_animator_as_people_have_it(tmp_path):
    inner = tiny_animator("wan22_i2v")
    pipe = FactorizedImageToVideoPipeline.from_pipe(inner, composer=tiny_composer())
    assert pipe.animator.pipeline is inner and type(pipe.composer).__name__ == "AnchorComposer"
    again = FactorizedImageToVideoPipeline.from_pipe(pipe, rewriter=tiny_rewriter())
    assert again.animator is pipe.animator and again.composer is pipe.composer
    inner.save_pretrained(tmp_path)
    named = FactorizedImageToVideoPipeline(animator=str(tmp_path))
    assert type(named.animator.pipeline) is type(inner) and named.animator.reference is None
    # A stock repository by its name.
    composed = FactorizedImageToVideoPipeline.from_pretrained(tmp_path, composer=tiny_composer(), dtype=torch.bfloat16)
    assert composed.animator.dtype == torch.bfloat16 and composed.composer is not None
    with pytest.raises(ValueError, match="`animator` must be an AnchorAnimator, .* but is a int"):
        FactorizedImageToVideoPipeline(animator=1)
    with pytest.raises(
        ValueError, match="WanPipeline is not an image-to-video pipeline: .*Known families: .*Wan2.2-I2V"
    ):
        AnchorAnimator(WanPipeline(**tiny_wan_components()))


@pytest.mark.parametrize("family", ["wan22_ti2v", "ltx_i2v", "sana_video_i2v", "skyreels_v2_df"])
def test_a_text_to_video_pipeline_of_the_same_weights_becomes_the_one_of_pictures(family):
    animator = AnchorAnimator(tiny_animator(family))
    text_to_video = animator.text_to_video()
    assert type(text_to_video) is not type(animator.pipeline)
    again = AnchorAnimator(text_to_video)
    assert type(again.pipeline) is type(animator.pipeline) and again.family is animator.family
    assert all(again.models[name] is model for name, model in animator.models.items())


def test_a_family_of_tomorrow_is_taken_by_its_signature():
    made = []

    class TomorrowPipeline(DiffusionPipeline):
        vae_scale_factor_temporal, vae_scale_factor_spatial = 4, 8
        _callback_tensor_inputs = ["latents"]

        def __init__(self, scheduler):
            super().__init__()
            self.register_modules(scheduler=scheduler)

        def __call__(self, image, prompt=None, height=48, width=64, num_frames=9, num_inference_steps=3, frame_rate=12, generator=None, output_type="np"):  # fmt: skip
            made.append((image.size, prompt, height, width, num_frames, num_inference_steps, frame_rate))
            return type("Output", (), {"frames": np.zeros((1, num_frames, height, width, 3), dtype=np.float32)})

    pipe = FactorizedImageToVideoPipeline(animator=TomorrowPipeline(FlowMatchEulerDiscreteScheduler()))
    assert pipe.call_defaults == {"frame_rate": 12, "height": 48, "width": 64, "num_frames": 9}
    # The picture is cropped, not stretched.
    assert pipe(PROMPT, image=picture(0, 96, 96), fps=24, output_type="uint8").frames.shape == (1, 9, 48, 64, 3)
    assert made == [((64, 48), PROMPT, 48, 64, 9, 3, 24)]
    with pytest.raises(ValueError, match="TomorrowPipeline takes a first frame, and no anchor at `frame_index=4`"):
        pipe(PROMPT, anchors=[Anchor(picture()), Anchor(picture(), 4)])
    with pytest.raises(ValueError, match="`guidance_scale=3`: TomorrowPipeline has no guidance"):
        pipe(PROMPT, image=picture(), guidance_scale=3)


def test_pushed_bundled_and_light(hub, tmp_path):
    pipe = pipeline("ltx_condition", rewriter=None)
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    pipe.animator.pipeline.save_pretrained(tmp_path / "stock")
    api.create_repo("org/ltx")
    revision = api.upload_folder(repo_id="org/ltx", folder_path=tmp_path / "stock").oid
    light = FactorizedImageToVideoPipeline(animator=AnchorAnimator.from_pretrained("org/ltx", revision=revision))
    assert light.animator.reference == {"repository": "org/ltx", "revision": revision}
    light.push_to_hub("org/light", token=hub.token)
    files = api.list_repo_files("org/light")
    assert "animator/animator_config.json" in files and not [file for file in files if file.endswith(".safetensors")]
    card = ModelCard.load(hf_hub_download("org/light", "README.md")).content
    assert "`FactorizedImageToVideoPipeline`" in card and "org/ltx" in card and revision in card
    light.push_to_hub("org/bundled", token=hub.token, bundle=True)
    expected = light(PROMPT, image=picture(), generator=seeded(), **CALL | {"num_frames": 9}).frames
    for repository in ("org/light", "org/bundled"):
        loaded = DiffusionPipeline.from_pretrained(repository)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is FactorizedImageToVideoPipeline
        assert (loaded.animator.reference is None) == (repository == "org/bundled")
        frames = loaded(PROMPT, image=picture(), generator=seeded(), **CALL | {"num_frames": 9}).frames
        np.testing.assert_allclose(frames, expected, rtol=0, atol=1e-5)


def test_an_animator_s_file_names_repositories_and_no_files(tmp_path):
    picture().save(tmp_path / "private.png")
    for config, message in (
        (
            {"call_defaults": {"negative_prompt": str(tmp_path / "private.png")}},
            "a local file or a URL",
        ),
        ({"call_defaults": {"negative_prompt": "https://example.org/a.png"}}, "a local file or a URL"),
        ({"repository": str(tmp_path)}, "Repo id must"),
        ({"batch_size": 2}, "batch_size"),
        ({}, "holds no animator: it has no model_index.json, and no animator_config.json that names a repository"),
    ):
        (tmp_path / "animator_config.json").write_text(json.dumps(config))
        with pytest.raises((ValueError, OSError), match=message):
            AnchorAnimator.from_pretrained(tmp_path)


def test_memory_is_planned_for_the_animators_models_one_by_one():
    pipe = pipeline("wan22_i2v", composer=tiny_composer())
    stages = {stage.name: stage for stage in pipeline_stages(pipe)}
    assert list(stages) == ["composer", "text_encoder", "animator.transformer", "animator.transformer_2", "vae"]
    models = pipe.animator.models
    assert stages["vae"].weights == sum(tensor.nbytes for tensor in models["vae"].state_dict().values())
    plan = apply_memory_profile(pipe, "12GB", device="cpu")
    assert plan.offload == "none" and plan.peak == sum(stage.weights for stage in stages.values()) + 8 * 2**30


# -- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "ours", "theirs"),
    [
        ("wan22_i2v", {"guidance_scale": 2.0, "guidance_scale_2": 3.0}, {"guidance_scale": 2.0, "guidance_scale_2": 3.0}),
        ("wan22_i2v", {"negative_prompt": "a dog", "max_sequence_length": 16}, {"negative_prompt": "a dog", "max_sequence_length": 16}),
        ("stable_video_diffusion", {"guidance_scale": 2.0, "fps": 12}, {"max_guidance_scale": 2.0, "fps": 12}),
        ("stable_video_diffusion", {"animator_kwargs": {"motion_bucket_id": 20}}, {"motion_bucket_id": 20}),
        ("ltx_condition", {"fps": 30, "num_frames": 9}, {"frame_rate": 30, "num_frames": 9}),
    ],
)  # fmt: skip
def test_arguments_reach_the_stock_call(family, ours, theirs):
    stock, given = tiny_animator(family), {"prompt": PROMPT, "image": picture(), "generator": seeded(), **CALL}
    if family == "stable_video_diffusion":
        del given["prompt"]
    plain = stock(
        **given | {"output_type": "np", "num_frames": theirs.get("num_frames", 5), "generator": seeded()}
    ).frames
    expected = stock(**given | {"output_type": "np", "generator": seeded()} | theirs).frames
    frames = pipeline(family)(PROMPT, image=picture(), generator=seeded(), **CALL | ours).frames
    np.testing.assert_array_equal(frames, expected)
    assert not np.array_equal(expected, plain), "the argument changes nothing"


@cache
def unrunnable(family: str) -> FactorizedImageToVideoPipeline:
    pipe = pipeline(family, rewriter=tiny_rewriter(), composer=tiny_composer())
    for part in (pipe.rewriter.model, pipe.composer, pipe.animator):
        part.forward = None
    return pipe


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("wan21_i2v", {"guidance_scale_2": 3.0}, "`guidance_scale_2=3.0` is for a model with two experts"),
        ("wan22_i2v", {"fps": 24}, r"Wan2.2-I2V \(WanImageToVideoPipeline\) has no argument fps"),
        ("wan22_i2v", {"guidance_scale": -1.0}, "`guidance_scale=-1.0` must lie between 0 and 1000"),
        ("wan22_i2v", {"animator_kwargs": {"motion": 1}}, "has no argument motion"),
        ("wan22_i2v", {"animator_kwargs": {"latents": 1}}, r"`animator_kwargs` holds \['latents'\]"),
        ("wan22_i2v", {"animator_kwargs": {"guidance_scale": 1}, "guidance_scale": 2}, "which are also given as arguments of the call"),
        ("wan22_i2v", {"num_frames": 6}, r"`num_frames=6` must be 4k \+ 1; nearest: 5 and 9"),
        ("cogvideox15_i2v", {"num_frames": 5}, r"`num_frames=5` must be 8k \+ 1; nearest: 1 and 9"),
        ("ltx2_i2v", {"num_inference_steps": 1, "height": 64, "width": 64}, "`num_inference_steps=1`: the scheduler of LTX-2 .* needs at least 2 steps"),
        ("ltx_condition", {"num_frames": 5}, r"`num_frames=5` must be 8k \+ 1; nearest: 1 and 9"),
        ("wan22_i2v", {"height": 40}, "`height=40` must be a positive multiple of 16; nearest: 32 and 48"),
        ("ltx_condition", {"width": 48}, "`width=48` must be a positive multiple of 32; nearest: 32 and 64"),
        ("stable_video_diffusion", {"negative_prompt": "a dog"}, "has no argument negative_prompt"),
        ("stable_video_diffusion", {"preset": "anchored-15"}, "Unknown preset 'anchored-15'"),
        ("wan22_i2v", {"preset": "fast"}, "Unknown preset 'fast'; this pipeline has anchored-15, full-50, lightning-4"),
        ("wan22_i2v", {"callback_on_step_end_tensor_inputs": ["noise"]}, r"but has \['noise'\]"),
        ("wan22_i2v", {"animator_kwargs": [1]}, "`animator_kwargs` must be a dictionary"),
        ("wan22_i2v", {"mode": "storyboard", "num_moments": 3, "num_frames": 9}, "`num_moments=3`: .* takes a first and a last frame"),
        ("wan22_i2v", {"anchors": [Anchor([picture()] * 5)]}, "takes single pictures, .* is a run of 5"),
        ("ltx_condition", {"anchors": [Anchor([picture()] * 8, 1)], "num_frames": 9}, "takes runs only at frame 0"),
        ("wan22_i2v", {"anchors": [Anchor(picture(), -1)]}, r"anchors are at frames \[4\] of 5; add an `Anchor"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused_before_a_model_runs(family, arguments, message):
    pipe = unrunnable(family)
    call = CALL | ({"num_frames": 9} if family != "wan22_i2v" else {}) | arguments
    if not arguments.keys() & {"mode", "anchors"}:
        call["image"] = picture()
    with pytest.raises(ValueError, match=message):
        pipe(PROMPT, **call)


def test_call_defaults_of_the_animator_are_checked_saved_and_used(tmp_path):
    settings = {"motion_bucket_id": 20, "noise_aug_strength": 0.1}
    animator = AnchorAnimator(tiny_animator("stable_video_diffusion"), settings)
    pipe = FactorizedImageToVideoPipeline(animator=animator)
    pipe.set_progress_bar_config(disable=True)
    given = CALL | {"output_type": "np"}
    expected = tiny_animator("stable_video_diffusion")(picture(), generator=seeded(), **given, **settings).frames
    np.testing.assert_array_equal(pipe(PROMPT, image=picture(), generator=seeded(), **CALL).frames, expected)
    pipe.save_pretrained(tmp_path)
    assert DiffusionPipeline.from_pretrained(tmp_path).animator.call_defaults == settings
    with pytest.raises(ValueError, match="has no argument motion_speed; leave it out"):
        AnchorAnimator(animator.pipeline, {"motion_speed": 1})
    with pytest.raises(ValueError, match=r"`call_defaults` holds \['image'\], which each call sets itself"):
        AnchorAnimator(animator.pipeline, {"image": None})


@pytest.mark.parametrize("output_type", ["uint8", "pt", "pil", "latent"])
def test_output_types(wan, stock, output_type):
    given = {"prompt": [PROMPT] * 2, "anchors": Anchor(picture()), "generator": [seeded(0), seeded(1)], **CALL}
    frames = wan(output_type=output_type, **given).frames
    kind = "np" if output_type == "uint8" else output_type
    made = [stock(picture(), PROMPT, generator=seeded(seed), output_type=kind, **CALL).frames for seed in (0, 1)]
    if output_type == "pil":
        assert [[np.asarray(frame).tolist() for frame in video] for video in frames] == [
            [np.asarray(frame).tolist() for frame in video] for (video,) in made
        ]
    elif output_type == "uint8":
        np.testing.assert_array_equal(frames, (np.concatenate(made) * 255).round().astype(np.uint8))
    else:
        assert torch.equal(frames, torch.cat(made))


def test_a_run_of_frames_begins_a_video():
    clip = [picture(seed) for seed in range(9)]
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    call = CALL | {"num_frames": 17}
    frames = pipeline("ltx_condition")(PROMPT, anchors=Anchor(clip), generator=seeded(), **call).frames
    stock = tiny_animator("ltx_condition")
    expected = stock(
        [LTXVideoCondition(video=clip)], prompt=PROMPT, generator=seeded(), output_type="np", **call
    ).frames
    np.testing.assert_array_equal(frames, expected)


def test_strength_reaches_the_conditions():
    pipe = pipeline("ltx_condition")
    call = CALL | {"num_frames": 9}
    frames = pipe(PROMPT, anchors=Anchor(picture(), strength=0.5), generator=seeded(), **call).frames
    expected = tiny_animator("ltx_condition")(
        image=picture(), strength=0.5, prompt=PROMPT, generator=seeded(), output_type="np", **call
    ).frames
    np.testing.assert_array_equal(frames, expected)


def test_the_sound_track_is_kept(tmp_path):
    pipe, call = pipeline("ltx2_i2v"), CALL | {"height": 64, "width": 64, "num_frames": 9}
    image = picture(0, 64, 64)
    output = pipe([PROMPT] * 2, image=image, generator=[seeded(0), seeded(1)], **call)
    stock = tiny_animator("ltx2_i2v")
    expected = [stock(image, PROMPT, generator=seeded(seed), output_type="np", **call).audio[0] for seed in (0, 1)]
    assert torch.equal(torch.stack(output.audio), torch.stack(expected)) and output.audio_sampling_rate == 24000
    write_video(tmp_path / "a.mp4", output.frames[0], 24, audio=output.audio[0], audio_sampling_rate=24000)
    with av.open(tmp_path / "a.mp4") as container:
        assert container.streams.audio[0].rate == 24000 and container.streams.video[0].frames == 9
    # One channel, whose rate the VAE tells.
    given = {"prompt": PROMPT, "image": picture(), **CALL}
    output = pipeline("kandinsky6_ti2va")(generator=seeded(), **given)
    expected = tiny_animator("kandinsky6_ti2va")(generator=seeded(), output_type="np", **given).audio
    np.testing.assert_array_equal(output.audio[0].numpy(), expected)
    assert output.audio_sampling_rate == 8000 and output.audio[0].shape == (1, expected.shape[1])


def test_a_video_that_stands_still_is_made_again_with_its_sound(monkeypatch, caplog):
    amounts = iter([[0.01, 0.5], [0.3]])
    monkeypatch.setattr("diffusers_fvg.pipelines.motion.motion_amounts", lambda frames: next(amounts))
    pipe, call = pipeline("ltx2_i2v"), CALL | {"height": 64, "width": 64, "num_frames": 9}
    image, stock = picture(0, 64, 64), tiny_animator("ltx2_i2v")
    output = pipe([PROMPT] * 2, image=image, generator=[seeded(0), seeded(1)], motion_retries=2, **call)
    assert output.motion == [0.3, 0.5] and "hardly moves" not in caplog.text
    seeds = [seeds["video"] for seeds in output.seeds]
    assert seeds[0] != 0 and seeds[1] == 1 and [record["seeds"]["video"] for record in output.records] == seeds
    for number, seed in enumerate(seeds):
        expected = stock(image, PROMPT, generator=seeded(seed), output_type="np", **call)
        np.testing.assert_array_equal(output.frames[number], expected.frames[0])
        assert torch.equal(output.audio[number], expected.audio[0])


@pytest.mark.parametrize(
    ("options", "is_told"),
    [
        ({"guidance_scale": 1.0}, True),
        ({"guidance_scale": 1.0, "guidance_scale_2": 2.0}, False),
        ({}, False),
        ({"preset": "lightning-4"}, True),
    ],
)
def test_a_negative_prompt_without_guidance_is_told_of(wan, options, is_told, monkeypatch):
    told = []
    monkeypatch.setattr(stages.logger, "warning", told.append)
    call = {name: value for name, value in CALL.items() if name != "num_inference_steps" or "preset" not in options}
    request = wan._request({"prompt": PROMPT, "image": picture(), "mode": "factorized", **call, **options})
    assert request.negative_prompt is None and not told
    wan._request(
        {"prompt": PROMPT, "image": picture(), "mode": "factorized", "negative_prompt": "blue", **call, **options}
    )
    assert bool(told) is is_told and all(
        "`negative_prompt` has no effect with `guidance_scale=1`" in text for text in told
    )


def test_motion_is_looked_at_without_a_preset(wan, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("diffusers_fvg"), "propagate", True)
    monkeypatch.setattr("diffusers_fvg.pipelines.motion.motion_amounts", lambda frames: [0.0] * len(frames))
    assert wan(PROMPT, image=picture(), **CALL).motion == [0.0]
    assert "hardly moves: 0.0% of the picture changes, less than 2.0%" in caplog.text
    assert wan(PROMPT, image=picture(), output_type="latent", **CALL).motion is None


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("wan22_i2v", {"guidance_scale": 2.0, "guidance_scale_2": 3.0}),
        ("wan22_i2v", {"preset": "anchored-15", "num_inference_steps": 3}),
        ("stable_video_diffusion", {"fps": 12}),
    ],
)
def test_a_video_is_made_again_from_its_record(family, options):
    pipe = pipeline(family)
    output = pipe([PROMPT] * 2, image=picture(), generator=seeded(4), **CALL | options)
    again = replay(pipe, output.records[1], images=[picture()])
    np.testing.assert_array_equal(again.frames[0], output.frames[1])
    assert again.records[0]["seeds"] == output.records[1]["seeds"] and not np.array_equal(*output.frames)
    told = pipe(PROMPT, image=picture(), animator_kwargs={"latents": None}, **CALL).records[0]
    assert told["not_recorded"] == ["animator_kwargs"]
    with pytest.raises(ValueError, match="made with `animator_kwargs`, which a record does not hold"):
        replay(pipe, told, images=[picture()])


def test_a_judge_chooses_the_picture_that_is_animated(stock):
    def by_blue(images, caption, plan):
        return [float(np.asarray(image)[..., 2].mean()) for image in images]

    pipe = pipeline(composer=tiny_composer(), anchor_judge=by_blue)
    caption = {"first_frame_prompt": "a red circle", "composer_num_inference_steps": 1}
    output = pipe(PROMPT, generator=seeded(3), composer_num_candidates=4, **caption, **CALL)
    (candidates,) = output.candidates
    best = max(candidates, key=lambda each: each.score)
    assert len(candidates) == 4 and best is not candidates[0] and output.anchor_images[0] is best.image
    expected = stock(image=best.image, prompt=PROMPT, generator=seeded(3), **CALL).frames
    np.testing.assert_array_equal(output.frames, expected)
    pipe.anchor_judge = None
    np.testing.assert_array_equal(replay(pipe, output.records[0]).frames, expected)


# -- presets ----------------------------------------------------------------------------------------------------------


def test_presets_are_explicit_sigmas_at_the_shift_of_the_animators_scheduler(wan):
    assert list(wan.presets) == ["anchored-15", "full-50", "lightning-4"]
    assert wan.presets["anchored-15"].sigmas == shifted_sigmas(15, 5.0)
    assert wan.presets["anchored-15"].guidance_scale == 5.0
    scheduler, seen = wan.animator.pipeline.scheduler, []

    def note(inner, step, timestep, tensors):
        seen.append([float(sigma) for sigma in inner.scheduler.sigmas])
        return {}

    call = {name: value for name, value in CALL.items() if name != "num_inference_steps"}
    wan(PROMPT, image=picture(), preset="anchored-15", callback_on_step_end=note, **call)
    assert len(seen) == 15 and wan.animator.pipeline.scheduler is scheduler
    # UniPC writes 1 - 1e-6 for 1.
    assert seen[0] == pytest.approx([*shifted_sigmas(15, 5.0), 0.0], abs=2e-6)
    seen.clear()
    wan(PROMPT, image=picture(), preset="anchored-15", num_inference_steps=3, callback_on_step_end=note, **call)
    assert len(seen) == 3 and seen[0] == pytest.approx([*shifted_sigmas(3, 5.0), 0.0], abs=2e-6)


def test_a_preset_samples_as_the_stock_pipeline_with_its_scheduler():
    """CogVideoX's presets are its own scheduler at other numbers of steps; they are its own call."""
    pipe, call = pipeline("cogvideox15_i2v"), {"height": 32, "width": 32, "num_frames": 9}
    assert list(pipe.presets) == ["anchored-15", "full-50"]
    preset = pipe.presets["anchored-15"]
    assert (preset.num_inference_steps, preset.guidance_scale, preset.sigmas) == (15, 6.0, None)
    frames = pipe(PROMPT, image=picture(), generator=seeded(), preset="anchored-15", **call).frames
    stock = tiny_animator("cogvideox15_i2v")
    expected = stock(picture(), PROMPT, generator=seeded(), num_inference_steps=15, output_type="np", **call).frames
    np.testing.assert_array_equal(frames, expected)


@pytest.mark.parametrize(
    ("family", "name", "size", "told"),
    [
        ("wan22_i2v", "lightning-4", (32, 32, 5), {"guidance_scale": 1.0}),
        ("ltx_i2v", "distilled-7", (32, 32, 9), {"guidance_scale": 1.0}),
        pytest.param("ltx2_i2v", "distilled-8", (64, 64, 9), LTX2_UNGUIDED, marks=pytest.mark.slow),
        pytest.param("hunyuan_video15_i2v", "step-distilled-8", (32, 32, 5), {}, marks=pytest.mark.slow),
    ],
)
def test_presets_of_distilled_weights_are_the_stock_call_with_their_sigmas(family, name, size, told):
    pipe = pipeline(family)
    preset, image = pipe.presets[name], picture(0, *size[:2])
    call = dict(zip(("height", "width", "num_frames"), size)) | {"prompt": PROMPT, "image": image}
    frames = pipe(generator=seeded(), preset=name, **call).frames
    stock = tiny_animator(family)

    class Fixed(FlowMatchEulerDiscreteScheduler):
        """As the authors step: at their levels, whatever it is asked for."""

        def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, timesteps=None, mu=None):
            super().set_timesteps(sigmas=np.array(preset.sigmas), device=device)

    stock.scheduler = Fixed(shift=1.0)
    if family == "hunyuan_video15_i2v":
        stock.guider = stock.guider.new(guidance_scale=1.0)
        call = {key: value for key, value in call.items() if key not in ("height", "width")}
    steps = {"num_inference_steps": len(preset.sigmas)}
    expected = stock(generator=seeded(), output_type="np", **call, **steps, **told).frames
    np.testing.assert_array_equal(frames, expected)


def test_a_preset_guides_both_experts_whatever_the_animators_defaults_are():
    """The second of its two steps is of the low-noise expert."""
    presets = SchedulerPresets.of(unipc_preset("five", 2, 5.0, 5.0, "this test"))
    defaults = {"guidance_scale": 3.5, "guidance_scale_2": 3.5}
    frames = []
    for animator in (tiny_animator("wan22_i2v"), AnchorAnimator(tiny_animator("wan22_i2v"), defaults)):
        pipe = FactorizedImageToVideoPipeline(animator=animator, schedulers=presets)
        pipe.set_progress_bar_config(disable=True)
        frames.append(pipe(PROMPT, image=picture(), generator=seeded(), preset="five", **CALL).frames)
    np.testing.assert_array_equal(*frames)
    assert not np.array_equal(frames[1], pipe(PROMPT, image=picture(), generator=seeded(), **CALL).frames)


def test_presets_that_the_animator_cannot_sample_with():
    narrow = unipc_preset("narrow", 2, 5.0, 5.0, "this test", guidance_interval=(0.2, 0.9))
    with pytest.raises(ValueError, match="`preset='narrow'` has a guidance interval"):
        pipeline(schedulers=SchedulerPresets.of(narrow))(PROMPT, image=picture(), preset="narrow", **CALL)
    plain = unipc_preset("plain", 2, 5.0, 5.0, "this test")
    pipe = pipeline("stable_video_diffusion", schedulers=SchedulerPresets.of(plain))
    with pytest.raises(ValueError, match="`preset='plain'`: Stable Video Diffusion sets its own noise levels"):
        pipe(PROMPT, image=picture(), preset="plain", **CALL)


def test_a_pinned_scheduler_keeps_its_steps_whatever_is_asked_and_when_it_is_copied():
    scheduler = pinned_scheduler(unipc_preset("two", 2, 3.0, 5.0, "this test"))
    expected = [*shifted_sigmas(2, 3.0), 0.0]
    scheduler.set_timesteps(40, device="cpu")
    assert scheduler.sigmas.tolist() == pytest.approx(expected, abs=2e-6)
    copied = copy.deepcopy(scheduler)
    copied.set_timesteps(sigmas=np.linspace(1, 0, 30), mu=1.0)
    assert copied.sigmas.tolist() == pytest.approx(expected, abs=2e-6) and len(copied.timesteps) == 2
    assert type(scheduler).__name__ == "UniPCMultistepScheduler"
    few = pinned_scheduler(timestep_preset("ddim", "CogVideoXDDIMScheduler", {}, 10, 6.0), 4)
    few.set_timesteps(10)
    assert len(few.timesteps) == 4


# -- what happens in a run --------------------------------------------------------------------------------------------


def test_what_a_callback_changes_has_an_effect(wan, stock):
    def blank(inner, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])}

    frames = wan(PROMPT, image=picture(), generator=seeded(), callback_on_step_end=blank, **CALL).frames
    expected = stock(picture(), PROMPT, generator=seeded(), callback_on_step_end=blank, **CALL).frames
    np.testing.assert_array_equal(frames, expected)
    assert not np.array_equal(frames, wan(PROMPT, image=picture(), generator=seeded(), **CALL).frames)


def test_what_is_not_finite_stops_the_stage():
    pipe = pipeline()
    with torch.no_grad():
        pipe.animator.pipeline.transformer.proj_out.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="Stage `animate` made values that are not finite at step 1 of 2"):
        pipe(PROMPT, image=picture(), **CALL)
    assert not pipe.animator.pipeline.vae.decoder._forward_hooks


def test_the_prompt_of_a_family_that_takes_none_is_said_once(caplog, monkeypatch):
    pipeline_factorized_image_to_video.tell_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    pipe = pipeline("stable_video_diffusion")
    for _ in range(2):
        pipe(PROMPT, image=picture(), **CALL)
    assert [record.getMessage() for record in caplog.records if "prompt" in record.getMessage()] == [
        "Stable Video Diffusion takes no prompt: the prompt describes the first frame only, and the model chooses the motion."
    ]


def test_a_written_moment_that_the_family_cannot_anchor_is_left_out(caplog, monkeypatch):
    pipe = pipeline(rewriter=tiny_rewriter(), composer=tiny_composer())
    board = [Moment("a red circle", 0.0), Moment("a red square", 0.6), Moment("a blue square", 1.0)]
    monkeypatch.setattr(type(pipe.rewriter), "storyboard", lambda *args, **options: [list(board)])
    output = pipe(PROMPT, mode="storyboard", composer_num_inference_steps=1, generator=seeded(), **CALL)
    assert output.storyboards == [[board[0], board[2]]] and len(output.anchor_images[0]) == 2


def test_anchored_frames_are_replaced_by_their_pictures(wan):
    frames = wan(PROMPT, image=picture(), anchor_decode="replace", output_type="uint8", **CALL).frames
    np.testing.assert_array_equal(frames[0, 0], np.asarray(picture()))


def test_safety_checker_sees_the_anchor_first(wan):
    wan.safety_checker = lambda image: "too red"
    try:
        with pytest.raises(ValueError, match=r"refused the anchor of prompt 0 \(too red\)"):
            wan(PROMPT, image=picture(), **CALL)
    finally:
        wan.safety_checker = None
