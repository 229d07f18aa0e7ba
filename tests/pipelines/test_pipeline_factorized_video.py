import dataclasses
import inspect

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tiny import tiny_pipeline, tiny_transformer

from diffusers_fvg import Anchor, AnchorConditionedTransformer3D, FactorizedVideoPipeline
from diffusers_fvg.animate.anchor import anchor_pixels, crop_and_resize
from diffusers_fvg.animate.conditioning import encode_anchor
from diffusers_fvg.lora.anchor_lora import AnchorLora
from diffusers_fvg.pipelines import pipeline_factorized_video as module
from diffusers_fvg.schedules.distilled import DISTILLED_PRESETS
from diffusers_fvg.schedules.presets import WAN_PRESETS, SchedulerPresets


SIZE = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16, "output_type": "pt"}
SCHEDULERS = {
    "unipc": lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
# Every class of the presets, and others that users bring.
ALL_SCHEDULERS = SCHEDULERS | {
    "unipc-3": lambda: UniPCMultistepScheduler(solver_order=3, **FLOW),
    "dpm": lambda: DPMSolverMultistepScheduler(**FLOW),
    "sde-dpm": lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **FLOW),
    "flow-lcm": lambda: FlowMatchLCMScheduler(shift=3.0),
    "lcm": LCMScheduler,
}


@pytest.fixture
def pipe():
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(seed=0, height=32, width=32):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def stock_parts(pipe):
    transformer = WanTransformer3DModel.from_config(pipe.transformer.config)
    transformer.load_state_dict(pipe.transformer.state_dict())
    return {
        "tokenizer": pipe.tokenizer,
        "text_encoder": pipe.text_encoder,
        "vae": pipe.vae,
        "transformer": transformer.eval(),
    }


# -- parity with the stock pipelines


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_without_anchors_it_equals_wan_pipeline(pipe, scheduler, guidance_scale):
    pipe.scheduler = scheduler()
    stock = WanPipeline(scheduler=scheduler(), **stock_parts(pipe))
    arguments = {**SIZE, "num_inference_steps": 4, "guidance_scale": guidance_scale, "negative_prompt": "blurry"}
    for prompt in ("a red circle", ["a red circle", "a blue square moves to the left"]):
        negative = {"negative_prompt": ["blurry"] * len(prompt) if isinstance(prompt, list) else "blurry"}
        expected = stock(prompt, generator=seeded(), **{**arguments, **negative}).frames
        assert (pipe(prompt, mode="direct", generator=seeded(), **arguments).frames - expected).abs().max() < 1e-4


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_with_a_first_frame_it_equals_wan_image_to_video_pipeline(pipe, scheduler):
    pipe.scheduler = scheduler()
    stock = WanImageToVideoPipeline(scheduler=scheduler(), expand_timesteps=True, **stock_parts(pipe))
    arguments = {**SIZE, "num_inference_steps": 4, "guidance_scale": 4.0}
    expected = stock(picture(), "a red circle", generator=seeded(), **arguments).frames
    frames = pipe("a red circle", image=picture(), generator=seeded(), **arguments).frames
    assert (frames - expected).abs().max() < 1e-4
    # Sensitive to what it tests: another picture is another video.
    assert (
        pipe("a red circle", image=picture(1), generator=seeded(), **arguments).frames - expected
    ).abs().max() > 1e-2


def test_two_experts_switch_at_the_boundary_as_wan_pipeline_does(pipe):
    second = tiny_transformer(seed=5)
    parts = stock_parts(pipe)
    stock_second = WanTransformer3DModel.from_config(second.config)
    stock_second.load_state_dict(second.state_dict())
    ours = tiny_pipeline(transformer_2=second, boundary_ratio=0.9, scheduler=SCHEDULERS["unipc"]())
    ours.set_progress_bar_config(disable=True)
    stock = WanPipeline(scheduler=SCHEDULERS["unipc"](), transformer_2=stock_second, boundary_ratio=0.9, **parts)
    arguments = {**SIZE, "num_inference_steps": 6, "guidance_scale": 4.0, "guidance_scale_2": 3.0}
    expected = stock("a red circle", generator=seeded(), **arguments).frames
    frames = ours("a red circle", mode="direct", generator=seeded(), **arguments).frames
    assert (frames - expected).abs().max() < 1e-4


# -- stages


def test_all_stages_run_and_return_plain_data(pipe):
    output = pipe("a red circle moves to the right", generator=seeded(), **SIZE, num_inference_steps=2)
    assert output.frames.shape == (1, 9, 3, 32, 32)
    assert len(output.first_frame_prompts) == 1 and output.anchor_images[0].size == (32, 32)
    assert set(output.timings) == {"rewrite", "compose", "encode", "denoise", "decode"}
    assert set(output.seeds[0]) == {"anchor", "video"} and output.seeds[0]["video"] == 0


def test_stages_by_hand_equal_the_call(pipe):
    prompts = ["a red circle moves to the right", "a blue square"]
    generators = [seeded(3), seeded(4)]
    output = pipe(prompts, generator=generators, num_inference_steps=2, **SIZE)
    captions = pipe.rewrite(prompts)
    assert captions == output.first_frame_prompts
    images = pipe.compose(captions, 32, 32, generator=[seeded(seed["anchor"]) for seed in output.seeds])
    assert [image.tobytes() for image in images] == [image.tobytes() for image in output.anchor_images]
    frames = pipe.animate(
        prompts,
        [[Anchor(image)] for image in images],
        generator=[seeded(seed["video"]) for seed in output.seeds],
        num_inference_steps=2,
        **SIZE,
    )
    assert torch.equal(frames, output.frames)


def test_the_anchor_is_the_first_latent_frame(pipe):
    arguments = {**SIZE, "num_inference_steps": 3, "output_type": "latent"}
    latents = pipe("a red circle", image=picture(), generator=seeded(), **arguments).frames
    expected = encode_anchor(pipe.vae, crop_and_resize(picture(), 32, 32)[None], 0)
    torch.testing.assert_close(latents[:, :, :1], expected)


def test_every_class_of_the_presets_is_among_those_tested():
    presets = [*WAN_PRESETS.values(), *(preset for group in DISTILLED_PRESETS.values() for preset in group)]
    tested = {type(scheduler()).__name__ for scheduler in ALL_SCHEDULERS.values()}
    assert {preset.scheduler_class for preset in presets} <= tested


def frames_of(anchor):
    """Latents that an anchor of a clip of 9 frames stands for, and what the VAE makes of its pictures."""
    count = anchor.frame_index % 9, len(anchor.image) if isinstance(anchor.image, list) else 1
    index, length = {(0, 1): (0, 1), (3, 1): (1, 1), (8, 1): (2, 1), (0, 5): (0, 2), (5, 4): (2, 1), (1, 8): (1, 2)}[
        count
    ]
    return slice(index, index + length), lambda vae: encode_anchor(vae, anchor_pixels(anchor, 32, 32)[None], index)[0]


# Two videos each, anchored at different places.
ANCHORED = [
    [[Anchor(picture(1))], [Anchor(picture(2), 3, 0.6)]],
    [[Anchor(picture(1), 3)], [Anchor(picture(2), -1, 0.6)]],
    [[Anchor(picture(1), 8)], [Anchor(picture(2), 0, 0.6)]],
    [[Anchor(picture(1)), Anchor(picture(2), -1)], [Anchor(picture(3), 3, 0.3), Anchor(picture(4), -1, 0.9)]],
    [[Anchor([picture(k) for k in range(5)])], [Anchor([picture(k) for k in range(4)], -4, 0.6)]],
    [[Anchor([picture(k) for k in range(8)], 1)], [Anchor(picture(9)), Anchor([picture(k) for k in range(4)], 5)]],
]


@pytest.mark.parametrize("scheduler", ALL_SCHEDULERS.values(), ids=ALL_SCHEDULERS)
def test_an_anchored_frame_leaves_the_loop_as_it_went_in(pipe, scheduler):
    pipe.scheduler = scheduler()
    for anchors in ANCHORED:
        steps = []
        latents = pipe(
            ["a red circle", "a blue square"],
            anchors=anchors,
            generator=[seeded(1), seeded(2)],
            callback_on_step_end=lambda _, i, t, tensors, steps=steps: steps.append(tensors["latents"]) or {},
            **{**SIZE, "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"},
        ).frames
        assert torch.isfinite(latents).all()
        for video, video_anchors in enumerate(anchors):
            free = torch.ones(3, dtype=torch.bool)
            for anchor in video_anchors:
                place, encode = frames_of(anchor)
                expected = encode(pipe.vae)
                free[place] = False
                assert torch.equal(latents[video, :, place], expected)
                for state in steps[:-1]:
                    # Until the end an anchor of a lower strength has a share of the noise.
                    assert torch.equal(state[video, :, place], expected) == (anchor.strength == 1)
            moved = (steps[0][video] - latents[video]).abs().amax(dim=(0, 2, 3))
            assert (moved[free] > 1e-3).all()


def test_an_anchored_frame_is_as_exact_in_half_precision(pipe):
    for name in ("euler", "flow-lcm", "unipc"):
        pipe.to(torch.bfloat16)
        pipe.scheduler = ALL_SCHEDULERS[name]()
        latents = pipe(
            "a red circle", image=picture(), **{**SIZE, "num_inference_steps": 2, "output_type": "latent"}
        ).frames
        expected = encode_anchor(pipe.vae, crop_and_resize(picture(), 32, 32)[None], 0)
        assert latents.dtype == torch.float32 and torch.equal(latents[:, :, :1], expected)


@pytest.mark.parametrize("scheduler", ["flow-lcm", "lcm", "sde-dpm"])
def test_a_seed_repeats_a_run_of_a_scheduler_that_draws_noise(pipe, scheduler):
    pipe.scheduler = ALL_SCHEDULERS[scheduler]()
    arguments = {**SIZE, "mode": "direct", "num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent"}
    prompts = ["a red circle", "a blue square"]
    both = pipe(prompts, generator=[seeded(1), seeded(2)], **arguments).frames
    assert torch.equal(pipe(prompts, generator=[seeded(1), seeded(2)], **arguments).frames, both)
    alone = pipe(prompts[1], generator=seeded(2), **arguments).frames
    torch.testing.assert_close(alone[0], both[1], atol=1e-3, rtol=0)


def test_the_safety_checker_sees_every_frame_of_a_run(pipe):
    run, shown = [picture(k) for k in range(5)], []
    pipe.safety_checker = lambda image: shown.append(image.tobytes()) or len(shown) == 4
    with pytest.raises(ValueError, match="refused the anchor of prompt 0"):
        pipe("a red circle", anchors=Anchor(run), **SIZE)
    assert shown == [image.tobytes() for image in run[:4]]


@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_anchor_decode_of_every_output_type(pipe, output_type):
    call = {**SIZE, "image": picture(), "num_inference_steps": 2, "output_type": output_type}
    raw, matched, replaced = (
        pipe("a red circle", generator=seeded(), anchor_decode=choice, **call).frames
        for choice in ("raw", "match", "replace")
    )
    by_default = pipe("a red circle", generator=seeded(), **call).frames

    def pixels(frames):
        frames = frames.permute(0, 1, 3, 4, 2) if output_type == "pt" else frames
        return np.array([[np.asarray(frame) for frame in video] for video in frames], dtype=np.float32)

    scale = 255 if output_type == "pil" else 1
    raw, matched, replaced, by_default = (pixels(frames) / scale for frames in (raw, matched, replaced, by_default))
    wanted = np.asarray(picture(), dtype=np.float32) / 255
    np.testing.assert_array_equal(by_default, raw)
    np.testing.assert_array_equal(replaced[0, 0], wanted)
    np.testing.assert_array_equal(replaced[:, 1:], matched[:, 1:])
    # The VAE's weights are random: its frames have nothing of the picture, until the mean of its colours.
    off = [np.abs(video[0, 0].mean((0, 1)) - wanted.mean((0, 1))).max() for video in (raw, matched)]
    assert off[1] < 0.02 < 0.03 < off[0], off


def test_batch_equals_single_runs(pipe):
    prompts = ["a red circle moves to the right", "a blue square"]
    both = pipe(prompts, generator=[seeded(3), seeded(4)], num_inference_steps=2, **SIZE)
    for index, prompt in enumerate(prompts):
        alone = pipe(prompt, generator=[seeded(3 + index)], num_inference_steps=2, **SIZE)
        assert alone.first_frame_prompts == both.first_frame_prompts[index : index + 1]
        assert alone.anchor_images[0].tobytes() == both.anchor_images[index].tobytes()
        assert (alone.frames[0] - both.frames[index]).abs().max() < 1e-4


def test_images_pair_with_prompts(pipe):
    prompts, images = ["a red circle", "a blue square"], [picture(1), picture(2)]
    both = pipe(prompts, image=images, generator=[seeded(3), seeded(4)], num_inference_steps=2, **SIZE).frames
    for index in range(2):
        alone = pipe(
            prompts[index], image=images[index], generator=[seeded(3 + index)], num_inference_steps=2, **SIZE
        ).frames
        assert (alone[0] - both[index]).abs().max() < 1e-4


def test_num_videos_per_prompt_gives_each_video_an_anchor(pipe):
    output = pipe(["a red circle", "a blue square"], num_videos_per_prompt=2, num_inference_steps=1, **SIZE)
    assert output.frames.shape[0] == len(output.anchor_images) == len(output.seeds) == 4
    assert len(output.first_frame_prompts) == 2
    assert len({seed["anchor"] for seed in output.seeds}) == len({seed["video"] for seed in output.seeds}) == 4


def test_a_seed_draws_the_same_noise_in_every_mode(pipe):
    class NoSteps(Exception):
        pass

    starts = []

    def stop(_, step, timestep, tensors):
        starts.append(tensors["latents"])
        raise NoSteps

    for options in ({"mode": "direct"}, {}):
        with pytest.raises(NoSteps):
            pipe(
                "a red circle",
                generator=seeded(),
                callback_on_step_end=stop,
                num_inference_steps=1000,
                **SIZE,
                **options,
            )
    # After one of a thousand steps the free frames are still almost the noise.
    assert (starts[0][:, :, 1:] - starts[1][:, :, 1:]).abs().max() < 0.05


def test_seeds_of_the_output_repeat_the_run(pipe):
    first = pipe("a red circle", num_inference_steps=2, **SIZE)
    again = pipe("a red circle", generator=[seeded(first.seeds[0]["video"])], num_inference_steps=2, **SIZE)
    assert again.seeds == first.seeds and torch.equal(again.frames, first.frames)


def test_return_dict_false_is_the_output_in_order(pipe):
    result = pipe("a red circle", mode="direct", return_dict=False, num_inference_steps=1, generator=seeded(), **SIZE)
    assert isinstance(result, tuple) and result[0].shape == (1, 9, 3, 32, 32) and result[1] is None
    assert result[3] == [{"video": 0}]


# -- schedulers


def test_default_is_the_preset_of_the_scheduler(pipe):
    steps = []
    count = {"callback_on_step_end": lambda _, step, timestep, tensors: steps.append(float(timestep)) or {}}
    pipe("a red circle", mode="direct", **count, **SIZE)
    assert len(steps) == 15
    np.testing.assert_allclose(steps, np.floor(np.array(pipe.presets["anchored-15"].sigmas) * 1000), atol=1)
    steps.clear()
    pipe("a red circle", mode="direct", preset="full-50", **count, **SIZE)
    assert len(steps) == 50
    steps.clear()
    pipe("a red circle", mode="direct", preset="full-50", num_inference_steps=7, **count, **SIZE)
    np.testing.assert_allclose(steps, [min(999, int(5000 * u / (1 + 4 * u))) for u in np.arange(7, 0, -1) / 7], atol=1)


def test_a_scheduler_without_sigmas_runs(pipe):
    pipe.scheduler = LCMScheduler()
    assert not hasattr(pipe.scheduler, "sigmas")
    frames = pipe("a red circle", image=picture(), num_inference_steps=2, guidance_scale=1.0, **SIZE).frames
    assert torch.isfinite(frames).all()


def test_no_call_changes_the_shared_scheduler(pipe):
    before = dict(pipe.scheduler.config), pipe.scheduler.num_inference_steps
    pipe("a red circle", mode="direct", num_inference_steps=3, **SIZE)
    assert (dict(pipe.scheduler.config), pipe.scheduler.num_inference_steps) == before


# -- the anchor LoRA


def lora_pipeline():
    donor = tiny_transformer()
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(9)
    donor.add_adapter(LoraConfig(r=4, target_modules=["to_q", "ffn.net.2"], init_lora_weights=False))
    state = {f"transformer.{key}": value for key, value in get_peft_model_state_dict(donor).items()}
    pipe = tiny_pipeline(anchor_lora=AnchorLora(state))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_anchor_lora_acts_only_with_an_anchor():
    pipe, base = lora_pipeline(), tiny_pipeline()
    base.set_progress_bar_config(disable=True)
    for options, same in (({"mode": "direct"}, True), ({"image": picture()}, False)):
        arguments = {**SIZE, **options, "num_inference_steps": 2}
        frames = pipe("a red circle", generator=seeded(), **arguments).frames
        expected = base("a red circle", generator=seeded(), **arguments).frames
        assert torch.equal(frames, expected) == same
    assert pipe.get_active_adapters() == ["anchor"]


def test_anchor_lora_round_trips_beside_clean_base_weights(tmp_path):
    pipe = lora_pipeline()
    pipe.save_pretrained(tmp_path)
    # The base's folder is the stock model, without a trace of the adapter.
    stock = WanTransformer3DModel.from_pretrained(tmp_path / "transformer")
    for name, tensor in tiny_transformer().state_dict().items():
        assert torch.equal(stock.state_dict()[name], tensor)
    again = FactorizedVideoPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    arguments = {**SIZE, "image": picture(), "num_inference_steps": 2}
    frames = [p("a red circle", generator=seeded(), **arguments).frames for p in (pipe, again)]
    assert torch.equal(*frames)


def test_a_lora_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="no weights for `transformer`.*'unet'"):
        tiny_pipeline(anchor_lora=AnchorLora({"unet.lora_A.weight": torch.zeros(1)}))


# -- callbacks, interruption, progress


def test_every_stage_reports_its_steps(pipe):
    reports = []
    pipe(
        "a red circle", callback_on_stage_step=lambda _, *report: reports.append(report), num_inference_steps=3, **SIZE
    )
    stages = list(dict.fromkeys(stage for stage, _, _ in reports))
    assert stages == ["rewrite", "compose", "encode", "denoise", "decode"]
    for stage in stages:
        steps = [step for name, step, _ in reports if name == stage]
        assert steps == sorted(steps) and steps[-1] == reports[[r[0] for r in reports].index(stage)][2]
    assert ("denoise", 3, 3) in reports


@pytest.mark.parametrize("stage", ["rewrite", "compose", "denoise"])
def test_interrupt_works_in_every_stage(pipe, stage):
    seen = []

    def stop(pipe, name, step, steps):
        seen.append(name)
        if name == stage:
            pipe._interrupt = True

    output = pipe("a red circle", callback_on_stage_step=stop, num_inference_steps=20, generator=seeded(), **SIZE)
    assert seen.count("denoise") == (1 if stage == "denoise" else 0)
    assert (len(output.frames) > 0) == (stage == "denoise")
    assert (output.anchor_images is not None) == (stage != "rewrite")
    # The next run is not affected.
    assert len(pipe("a red circle", num_inference_steps=1, **SIZE).frames) == 1


def test_step_callback_may_change_the_latents(pipe):
    def zero(_, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])}

    arguments = {**SIZE, "num_inference_steps": 2, "output_type": "latent", "mode": "direct"}
    assert pipe("a red circle", callback_on_step_end=zero, **arguments).frames.abs().max() == 0


def test_disabled_progress_bar_silences_every_stage(pipe, capfd):
    pipe("a red circle", num_inference_steps=2, **SIZE)
    assert "it/s" not in capfd.readouterr().err
    pipe.set_progress_bar_config(disable=False)
    pipe("a red circle", num_inference_steps=2, **SIZE)
    err = capfd.readouterr().err
    # One display: a single bar, whose last state is complete.
    assert "decode: 100%" in err and err.count("\n") <= 2


# -- dtype, device, offload


def test_dtype_reaches_every_stage(tmp_path, pipe):
    pipe.save_pretrained(tmp_path)
    loaded = FactorizedVideoPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name in ("rewriter", "composer", "text_encoder", "vae", "transformer"):
        dtypes = {p.dtype for p in getattr(loaded, name).parameters()}
        assert torch.bfloat16 in dtypes, name
        kept = {"transformer", "composer", "text_encoder"}
        assert dtypes <= {torch.bfloat16, torch.float32} if name in kept else dtypes == {torch.bfloat16}, name


def test_move_reaches_every_stage(pipe):
    pipe.to(torch.float64)
    assert {p.dtype for name in ("rewriter", "composer") for p in getattr(pipe, name).parameters()} == {torch.float64}
    pipe.to("meta")
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            assert {p.device.type for p in component.parameters()} == {"meta"}, name


def test_model_offload_changes_nothing(pipe):
    expected = pipe("a red circle", generator=seeded(), num_inference_steps=2, **SIZE)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        output = pipe("a red circle", generator=seeded(), num_inference_steps=2, **SIZE)
        assert output.first_frame_prompts == expected.first_frame_prompts
        assert (output.frames - expected.frames).abs().max() < 1e-5


# On a CPU accelerate cannot offload layer by layer, not even a stock WanPipeline: it loses the type of a parameter that
# stays where it is.
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offload_to_a_gpu_changes_nothing(pipe, method):
    expected = pipe("a red circle", generator=seeded(), num_inference_steps=2, **SIZE)
    getattr(pipe, method)()
    for _ in range(2):
        output = pipe("a red circle", generator=seeded(), num_inference_steps=2, **SIZE)
        assert output.first_frame_prompts == expected.first_frame_prompts
        assert (output.frames.cpu() - expected.frames).abs().max() < 1e-3


def test_tiles_are_used_when_the_decode_would_not_fit_and_only_then(pipe, monkeypatch):
    used = []
    decode = module.decode_video
    monkeypatch.setattr(module, "decode_video", lambda *args: used.append(args[-1]) or decode(*args))
    arguments = {**SIZE, "mode": "direct", "num_inference_steps": 1}
    whole = pipe("a red circle", generator=seeded(), **arguments).frames
    monkeypatch.setattr(module, "free_bytes", lambda device: 0)
    tiled = pipe("a red circle", generator=seeded(), **arguments).frames
    assert used == [False, True] and not pipe.vae.use_tiling and tiled.shape == whole.shape


def test_stock_transformer_is_taken_over_without_a_copy(pipe):
    parts = stock_parts(pipe)
    ours = FactorizedVideoPipeline(
        scheduler=pipe.scheduler,
        transformer_2=None,
        rewriter=None,
        composer=None,
        anchor_lora=None,
        schedulers=None,
        **parts,
    )
    assert type(ours.transformer) is AnchorConditionedTransformer3D
    weight = parts["transformer"].blocks[0].attn1.to_q.weight
    assert ours.transformer.blocks[0].attn1.to_q.weight.data_ptr() == weight.data_ptr()


# -- bad input: a ValueError naming value and fix, before any model runs


class Untouched(torch.nn.Module):
    def forward(self, *args, **kwargs):
        raise AssertionError("a model ran before the input was checked")


BAD_INPUT = [
    ({"height": 40}, "height=40.*32 and 48"),
    ({"width": 0}, "width=0.*multiple of 16"),
    ({"width": -16}, "width=-16"),
    ({"num_frames": 80}, "num_frames=80.*77 and 81"),
    ({"num_frames": 0}, "num_frames=0.*1 and 5"),
    ({"prompt": ""}, "empty"),
    ({"prompt": " \n"}, "empty"),
    ({"prompt": []}, "non-empty"),
    ({"prompt": ["a", 3]}, "int"),
    ({"prompt": "x" * 100_000}, "100000 characters"),
    ({"prompt": None}, "`prompt` or `prompt_embeds`"),
    ({"preset": "anchored-14"}, "'anchored-14'.*anchored-15, full-50"),
    ({"mode": "indirect"}, "'indirect'.*direct"),
    ({"output_type": "mp4"}, "`output_type` 'mp4'.*'np', 'uint8'"),
    ({"mode": "direct", "image": picture()}, "direct.*`image`"),
    ({"image": picture(), "first_frame_prompt": "a"}, "Only one"),
    ({"image": [picture(), picture()]}, "2 pictures for 1"),
    ({"first_frame_prompt": ["a", "b"]}, "2 texts for 1"),
    ({"first_frame_prompt": " "}, "empty"),
    ({"anchors": [Anchor(picture(), 9)]}, "frame_index=9.*-9 to 8"),
    ({"anchors": [Anchor(picture(), 1), Anchor(picture(), 4)]}, "same latent frame 1"),
    ({"anchors": [Anchor(picture(), 0, 2.0)]}, "strength=2.0"),
    ({"anchors": [Anchor([picture()] * 3)]}, r"run of 3 frames .* nearest: 1 and 5"),
    ({"anchors": [Anchor([picture()] * 4, 4)]}, r"`frame_index=4` .* nearest `frame_index`: 1 and 5"),
    ({"anchors": [Anchor([picture(), np.zeros((8, 8))] * 2, 1)]}, r"\(8, 8\)"),
    ({"anchor_decode": "blend"}, "'blend'.*'raw', 'match', 'replace'"),
    ({"anchor_decode": "match", "output_type": "latent"}, "'match'.*decodes none"),
    ({"anchor_decode": "match", "mode": "direct"}, "'match'.*no anchor"),
    ({"anchors": []}, r"`anchors=\[\]` holds no anchor"),
    ({"prompt": ["a", "b"], "anchors": [[], []]}, r"`anchors=\[\[\], \[\]\]` holds no anchor"),
    ({"image": []}, "`image` has 0 pictures for 1 prompts"),
    ({"image": picture(), "composer_guidance_scale": 3.0}, "`composer_guidance_scale=3.0` has no effect: `image`"),
    ({"anchors": Anchor(picture()), "composer_negative_prompt": "x"}, "'x'` has no effect: `anchors` skips its stage"),
    ({"mode": "direct", "composer_num_inference_steps": 3}, "`composer_num_inference_steps=3`.*`mode='direct'` skips"),
    ({"mode": "direct", "rewriter_max_new_tokens": 3}, "`rewriter_max_new_tokens=3`.*`mode='direct'` skips"),
    ({"first_frame_prompt": "a", "rewriter_max_new_tokens": 3}, "`rewriter_max_new_tokens=3`.*`first_frame_prompt`"),
    ({"anchors": [picture()]}, "Image"),
    ({"anchors": [[Anchor(picture())]] * 3}, "3 lists for 1"),
    ({"image": np.zeros((8, 8))}, r"\(8, 8\)"),
    ({"generator": [torch.Generator()] * 2}, "list of 2 generators for 1"),
    ({"negative_prompt": ["a", "b"]}, "2 texts for 1"),
    ({"num_inference_steps": 0}, "num_inference_steps=0"),
    ({"num_videos_per_prompt": 0}, "num_videos_per_prompt=0"),
    ({"latents": torch.zeros(1, 16, 2, 4, 4)}, r"\(1, 16, 2, 4, 4\).*\(1, 16, 3, 4, 4\)"),
    ({"guidance_scale_2": 3.0}, "guidance_scale_2"),
    ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
]


@pytest.mark.parametrize(("change", "message"), BAD_INPUT, ids=[str(i) for i in range(len(BAD_INPUT))])
def test_bad_input_is_refused_before_any_model_runs(pipe, change, message, monkeypatch):
    for name in ("text_encoder", "transformer", "vae", "rewriter", "composer"):
        monkeypatch.setattr(type(getattr(pipe, name)), "forward", Untouched.forward)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        pipe(**{"prompt": "a red circle", **SIZE, **change})


def test_a_corrupt_picture_is_refused(pipe, tmp_path):
    picture(0, 64, 64).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:4000])
    with pytest.raises(ValueError, match="cannot be decoded"):
        pipe("a red circle", image=PIL.Image.open(tmp_path / "cut.png"), **SIZE)


def test_a_missing_stage_is_named_and_may_be_skipped():
    pipe = tiny_pipeline(rewriter=None, composer=None)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="no `rewriter`.*first_frame_prompt"):
        pipe("a red circle", **SIZE)
    with pytest.raises(ValueError, match="no `composer`.*image"):
        pipe("a red circle", first_frame_prompt="a red circle on the left", **SIZE)
    with pytest.raises(ValueError, match="no `rewriter`"):
        pipe.rewrite("a red circle")
    with pytest.raises(ValueError, match="no `composer`"):
        pipe.compose("a red circle", 32, 32)
    assert len(pipe("a red circle", image=picture(), num_inference_steps=1, **SIZE).frames) == 1


def test_a_pipeline_without_video_model_is_refused(pipe):
    with pytest.raises(ValueError, match="`transformer` is None"):
        FactorizedVideoPipeline(**{**pipe.components, "transformer": None})
    with pytest.raises(ValueError, match="WanTransformer3DModel"):
        FactorizedVideoPipeline(**{**pipe.components, "transformer": torch.nn.Linear(1, 1)})


def test_stock_arguments_keep_their_names_and_order():
    stock = list(inspect.signature(WanPipeline.__call__).parameters)
    ours = list(inspect.signature(FactorizedVideoPipeline.__call__).parameters)
    assert ours[: len(stock)] == stock


def test_given_embeddings_make_as_many_videos_as_the_text(pipe):
    prompts, call = ["a red ball", "a blue cube"], {**SIZE, "num_inference_steps": 2, "guidance_scale": 3.0}
    by_text = pipe(prompts, mode="direct", num_videos_per_prompt=2, generator=[seeded(k) for k in range(4)], **call)
    embeds, negative = pipe.encode_prompt(prompts, negative_prompt=["", ""], max_sequence_length=16)
    for given in ({"prompt_embeds": embeds}, {"prompt_embeds": embeds, "negative_prompt_embeds": negative}):
        output = pipe(mode="direct", num_videos_per_prompt=2, generator=[seeded(k) for k in range(4)], **given, **call)
        assert len(output.seeds) == len(output.frames) == 4
        # Another number of texts in one forward of the text encoder rounds differently.
        torch.testing.assert_close(output.frames, by_text.frames, atol=1e-5, rtol=0)


def test_a_preset_brings_its_window_of_attention(pipe):
    """5 latent frames and a window of 1: not all see each other. Own windows stay where a preset has none, and come back."""
    size = SIZE | {"num_frames": 17, "num_inference_steps": 2}

    def animate(preset: str) -> torch.Tensor:
        return pipe.animate("a red circle", anchors=Anchor(picture()), generator=seeded(), preset=preset, **size)

    default = WAN_PRESETS["anchored-15"]
    windowed = dataclasses.replace(default, name="windowed", anchor_window=1)
    pipe.schedulers = SchedulerPresets.of(default, windowed)
    dense = animate("anchored-15")
    found = animate("windowed")
    assert not torch.allclose(found, dense, atol=1e-4)
    assert pipe.transformer.anchor_window is None
    pipe.transformer.set_anchor_window(1)
    torch.testing.assert_close(animate("anchored-15"), found)
    pipe.transformer.set_anchor_window(4)
    torch.testing.assert_close(animate("windowed"), found)
    assert pipe.transformer.anchor_window == 4


def test_a_fused_anchor_lora_is_for_anchored_runs_alone():
    from test_placement import LORA

    own = {key: value for key, value in LORA.items() if key.startswith("transformer.")}
    pipe = tiny_pipeline(anchor_lora=AnchorLora(own))
    pipe.set_progress_bar_config(disable=True)

    def animate(anchors: Anchor | None) -> torch.Tensor:
        return pipe.animate("a red circle", anchors=anchors, generator=seeded(), num_inference_steps=2, **SIZE)

    anchored, direct = animate(Anchor(picture())), animate(None)
    pipe.fuse_lora()
    torch.testing.assert_close(animate(Anchor(picture())), anchored, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="anchor LoRA is fused.*unfuse_lora"):
        animate(None)
    pipe.unfuse_lora()
    torch.testing.assert_close(animate(None), direct, rtol=0, atol=1e-5)
