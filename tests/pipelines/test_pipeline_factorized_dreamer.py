import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny_dreamer import (
    PLAIN,
    tiny_clip_text,
    tiny_clip_vision,
    tiny_dreamer_pipeline,
    tiny_image_vae,
    tiny_motion_encoder,
    tiny_unet,
    tiny_unet2d,
)
from transformers import CLIPImageProcessor

from diffusers_fvg.animate.anchor import Anchor, crop_and_resize
from diffusers_fvg.dreamer.conditions import embed_images, embed_motion, encode_pixels
from diffusers_fvg.dreamer.schedule import dreamer_schedule
from diffusers_fvg.dreamer.unet import FactorizedDreamerUNet
from diffusers_fvg.pipelines import pipeline_factorized_dreamer as module
from diffusers_fvg.pipelines.pipeline_factorized_dreamer import FactorizedDreamerPipeline
from diffusers_fvg.rewrite.rewriter import FirstFrameRewriter


SIZE = {"height": 32, "width": 32, "num_frames": 4, "max_sequence_length": 8, "num_inference_steps": 2}
LATENTS = SIZE | {"output_type": "latent"}
PROMPT = "a red circle moves to the right"


@pytest.fixture(scope="module")
def pipe():
    return tiny_dreamer_pipeline()


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The names that `import diffusers_fvg` gives diffusers."""
    for cls in (FactorizedDreamerPipeline, FactorizedDreamerUNet):
        monkeypatch.setattr(diffusers, cls.__name__, cls, raising=False)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(seed=0, height=32, width=32):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# -- parity


@pytest.mark.parametrize(
    "options",
    [{"guidance_scale": 1.0}, {"guidance_scale": 6.0, "guidance_rescale": 0.0}, {"guidance_scale": 6.0}],
    ids=["off", "guidance", "rescaled"],
)
def test_an_untrained_plain_unet_makes_the_frames_of_stable_diffusion(options):
    pipe = tiny_dreamer_pipeline(unet=tiny_unet(**PLAIN), text_encoder_2=None, tokenizer_2=None, image_encoder=None)
    stock = StableDiffusionPipeline(
        pipe.vae,
        pipe.text_encoder,
        pipe.tokenizer,
        tiny_unet2d(),
        CogVideoXDDIMScheduler(**dreamer_schedule(), steps_offset=1),
        None,
        None,
        requires_safety_checker=False,
    )
    stock.set_progress_bar_config(disable=True)
    # The spread that guidance is rescaled by is one number for a video, so it is one frame long there.
    frames = 3 if options.get("guidance_rescale") == 0.0 else 1
    latents = torch.randn(1, 4, frames, 8, 8, generator=seeded())
    shared = {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "pt"}
    video = pipe(PROMPT, "low quality", mode="direct", num_frames=frames, latents=latents, **shared, **options).frames
    for frame in range(frames):
        arguments = {"negative_prompt": "low quality", "latents": latents[:, :, frame]}
        image = stock(PROMPT, **arguments, **shared, **{"guidance_rescale": 0.7} | options).images
        assert (video[0, frame] - image[0]).abs().max() < 1e-4


# -- stages


def test_three_stages(pipe):
    stages = []
    out = pipe(
        [PROMPT, "a blue star"],
        generator=seeded(),
        num_videos_per_prompt=2,
        callback_on_stage_step=lambda _, stage, step, steps: stages.append(stage),
        **SIZE,
    )
    assert out.frames.shape == (4, 4, 32, 32, 3)
    assert list(dict.fromkeys(stages)) == ["rewrite", "describe_motion", "compose", "encode", "denoise", "decode"]
    assert out.timings.keys() == set(stages)
    assert len(out.first_frame_prompts) == len(out.motion_prompts) == 2 and len(out.anchor_images) == 4
    # Each stage's output, fed back by hand, gives the same video.
    again = pipe(
        [PROMPT, "a blue star"],
        generator=seeded(),
        num_videos_per_prompt=2,
        motion_prompt=out.motion_prompts,
        anchors=[[Anchor(image)] for image in out.anchor_images],
        **SIZE,
    )
    assert np.abs(again.frames - out.frames).max() < 1e-5


def test_stage_one_writes_two_captions(pipe, monkeypatch):
    asked = []

    def write(self, prompts, max_new_tokens=None, on_progress=None, should_stop=None, captions=None):
        asked.append((prompts, max_new_tokens, captions))
        return ["the circle moves right"]

    monkeypatch.setattr(FirstFrameRewriter, "describe_motion", write)
    given = {"generator": seeded(), **LATENTS}
    out = pipe(PROMPT, rewriter_max_new_tokens=7, **given)
    assert out.motion_prompts == ["the circle moves right"] and asked == [([PROMPT], 7, out.first_frame_prompts)]
    # The video follows it, and nothing but it.
    anchors = [[Anchor(out.anchor_images[0])]]
    assert torch.equal(pipe.animate(out.motion_prompts, anchors, **given | {"generator": seeded()}), out.frames)
    assert not torch.equal(pipe.animate(PROMPT, anchors, **given | {"generator": seeded()}), out.frames)
    # Any stage that is skipped leaves the prompt itself.
    for skip in ({"image": picture()}, {"first_frame_prompt": "a red circle"}, {"mode": "direct"}):
        assert pipe(PROMPT, generator=seeded(), **skip, **LATENTS).motion_prompts == [PROMPT]
    out = pipe(PROMPT, motion_prompt="it stays still", generator=seeded(), **LATENTS)
    assert out.motion_prompts == ["it stays still"] and len(out.first_frame_prompts) == 1
    assert len(asked) == 1


def test_stages_that_are_skipped_may_be_absent():
    pipe = tiny_dreamer_pipeline(rewriter=None, composer=None)
    assert pipe(PROMPT, image=picture(), **LATENTS).frames.shape == (1, 4, 4, 8, 8)
    with pytest.raises(ValueError, match="no `rewriter`"):
        pipe(PROMPT, **SIZE)
    with pytest.raises(ValueError, match="no `rewriter`"):
        pipe.describe_motion(PROMPT)
    with pytest.raises(ValueError, match="no `composer`"):
        pipe(PROMPT, first_frame_prompt="a red circle", **SIZE)


def test_the_video_follows_its_image(pipe):
    def run(**inputs):
        return pipe(PROMPT, generator=seeded(), **inputs, **LATENTS).frames

    first, other, none = run(image=picture(1)), run(image=picture(2)), run(mode="direct")
    assert (first - other).abs().amax((0, 1, 3, 4)).min() > 1e-3 and (first - none).abs().max() > 1e-3
    assert torch.equal(run(anchors=Anchor(picture(1))), first)
    # An image for one of two videos.
    pair = pipe([PROMPT] * 2, anchors=[[Anchor(picture(1))], []], generator=[seeded(), seeded()], **LATENTS).frames
    assert (pair[0] - first[0]).abs().max() < 1e-4 and (pair[1] - none[0]).abs().max() < 1e-4


@pytest.mark.parametrize(
    "switches", [{"paca": None}, {"t2i_adapter": None}, {"motion_embed_dim": None}, {"paca": "up"}]
)
def test_each_design_can_be_off(switches):
    unet = tiny_unet(trained=True, **switches)
    missing = {"t2i_adapter": ["image_encoder"], "motion_embed_dim": ["text_encoder_2", "tokenizer_2"]}
    absent = [name for switch, value in switches.items() if value is None for name in missing.get(switch, [])]
    pipe = tiny_dreamer_pipeline(unet=unet, **dict.fromkeys(absent))
    made = [pipe(PROMPT, image=picture(seed), generator=seeded(), **LATENTS).frames for seed in (1, 2)]
    assert (made[0] - made[1]).abs().max() > 1e-3


def test_frames_per_second():
    pipe = tiny_dreamer_pipeline(unet=tiny_unet(trained=True, fps_conditioning=True))

    def run(**inputs):
        return pipe(PROMPT, image=picture(), generator=seeded(), **inputs, **LATENTS).frames

    assert torch.equal(run(), run(fps=8)) and (run() - run(fps=24)).abs().max() > 1e-4


# -- once per video


def test_image_and_motion_are_read_once(pipe):
    counts = {"pyramid": 0, "projection": 0, "clip": 0, "t5": 0, "unet": 0}
    hooks = [
        module.register_forward_hook(lambda *_, name=name: counts.__setitem__(name, counts[name] + 1))
        for name, module in {
            "pyramid": pipe.unet.image_pyramid,
            "projection": pipe.unet.image_projection,
            "clip": pipe.image_encoder,
            "t5": pipe.text_encoder_2,
            "unet": pipe.unet,
        }.items()
    ]
    pipe(PROMPT, image=picture(), **LATENTS | {"num_inference_steps": 3})
    for hook in hooks:
        hook.remove()
    # Text and no text in one T5 call each, the image once for both branches of all steps.
    assert counts == {"pyramid": 1, "projection": 1, "clip": 1, "t5": 2, "unet": 6}


# -- longer clips


def test_windows_begin_where_the_last_one_ended(pipe, monkeypatch):
    # 4 frames are trained: 0-3, 3-6, 6-9, of which the last two are not asked for.
    latents = torch.randn(1, 4, 12, 8, 8, generator=seeded())
    steps = []
    options = LATENTS | {"num_frames": 8}
    made = pipe(
        PROMPT,
        image=picture(),
        latents=latents,
        callback_on_step_end=lambda _, i, t, tensors: steps.append((i, int(t))) or {},
        **options,
    ).frames
    assert made.shape == (1, 4, 8, 8, 8)
    assert steps == [(0, 999), (1, 499), (2, 999), (3, 499), (4, 999), (5, 499)]
    # By hand: a window is a clip of its own, whose first frame is the last one before it.
    first = pipe(PROMPT, image=picture(), latents=latents[:, :, :4], **LATENTS).frames
    assert torch.equal(made[:, :, :4], first)
    pixels = pipe.decode(first[:, :, 3:], "pt")[0, 0]
    image_latents, find = first[:, :, 3], module.image_conditions
    monkeypatch.setattr(module, "image_conditions", lambda *parts: find(*parts, image_latents))
    second = pipe(PROMPT, anchors=Anchor(pixels), latents=latents[:, :, 4:8], **LATENTS).frames
    monkeypatch.undo()
    assert (made[:, :, 4:7] - second[:, :, 1:]).abs().max() < 1e-5
    with pytest.raises(
        ValueError, match=r"`latents` has shape \(1, 4, 4, 8, 8\), but this call needs \(1, 4, 12, 8, 8\)"
    ):
        pipe(PROMPT, image=picture(), latents=latents[:, :, :4], **options)


def test_windows_without_an_image(pipe):
    assert pipe(PROMPT, mode="direct", **LATENTS | {"num_frames": 5}).frames.shape == (1, 4, 5, 8, 8)


# -- schedulers, callbacks, seeds


def test_other_schedulers_run_as_they_are():
    pipe = tiny_dreamer_pipeline()
    options = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "beta_schedule": "scaled_linear"}
    made = []
    for scheduler in (
        pipe.scheduler,
        DDIMScheduler(rescale_betas_zero_snr=True, **options),
        EulerDiscreteScheduler(**options),
    ):
        pipe.scheduler = scheduler
        made.append(pipe(PROMPT, image=picture(), generator=seeded(), **LATENTS).frames)
        assert made[-1].isfinite().all()
    assert (made[0] - made[1]).abs().max() > 1e-2 and (made[1] - made[2]).abs().max() > 1e-3
    pipe.scheduler = CogVideoXDPMScheduler()
    with pytest.raises(ValueError, match="CogVideoXDPMScheduler has a different `step`"):
        pipe(PROMPT, image=picture(), **SIZE)


def test_a_callback_may_change_latents_and_stop(pipe):
    def after_step(pipe, i, t, tensors):
        pipe._interrupt = i == 0
        return {"latents": torch.zeros_like(tensors["latents"])}

    made = pipe(PROMPT, image=picture(), callback_on_step_end=after_step, **LATENTS).frames
    assert not made.any()
    out = pipe(PROMPT, callback_on_stage_step=lambda pipe, *_: setattr(pipe, "_interrupt", True), **SIZE)
    assert len(out.frames) == 0 and out.motion_prompts is None


def test_seeds(pipe):
    out = pipe(PROMPT, **LATENTS)
    again = pipe(PROMPT, generator=seeded(out.seeds[0]["video"]), **LATENTS)
    assert torch.equal(out.frames, again.frames) and again.seeds == out.seeds
    assert (pipe(PROMPT, generator=seeded(1), **LATENTS).frames - out.frames).abs().max() > 1e-2


def test_embeddings_stand_in_for_texts(pipe):
    expected = pipe(PROMPT, image=picture(), generator=seeded(), **LATENTS).frames
    embeds, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    motion = [embed_motion(pipe.text_encoder_2, pipe.tokenizer_2, [text], 8, "cpu") for text in (PROMPT, "")]
    given = dict(zip(("prompt_embeds_2", "negative_prompt_embeds_2"), motion))
    made = pipe(
        image=picture(), prompt_embeds=embeds, negative_prompt_embeds=negative, generator=seeded(), **given, **LATENTS
    )
    assert (made.frames - expected).abs().max() < 1e-5 and made.motion_prompts is None


# -- conditions


def test_clip_sees_what_its_own_processor_shows_it(pipe):
    image = picture(3, 64, 32)
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    expected = pipe.image_encoder(**processor(image, return_tensors="pt")).image_embeds
    made = embed_images(pipe.image_encoder, crop_and_resize(image, 64, 32)[None])
    assert (made - expected).abs().max() < 0.02 * expected.abs().max()


def test_image_latents_are_those_of_stable_diffusion(pipe):
    pixels = torch.rand(5, 3, 32, 32, generator=seeded()) * 2 - 1
    made = encode_pixels(pipe.vae, pixels)
    assert made.shape == (5, 4, 8, 8)
    expected = pipe.vae.encode(pixels[4:]).latent_dist.mean * 0.18215
    assert (made[4:] - expected).abs().max() < 1e-5


def test_padding_of_the_motion_text_is_zero(pipe, caplog):
    tokens = embed_motion(pipe.text_encoder_2, pipe.tokenizer_2, ["a red circle", ""], 8, "cpu")
    # Three words and the end of the text; the end alone.
    assert [video.abs().amax(-1).gt(0).tolist() for video in tokens] == [
        [True] * 4 + [False] * 4,
        [True] + [False] * 7,
    ]
    longer = embed_motion(pipe.text_encoder_2, pipe.tokenizer_2, ["a red circle"], 12, "cpu")
    assert (longer[0, :4] - tokens[0, :4]).abs().max() < 1e-5
    diffusers.utils.logging.enable_propagation()
    embed_motion(pipe.text_encoder_2, pipe.tokenizer_2, ["a red circle moves to the right"], 4, "cpu")
    diffusers.utils.logging.disable_propagation()
    assert "has 8 tokens and is cut to `max_sequence_length=4`" in caplog.text


# -- refusals


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ({"height": 30}, "`height=30` must be a positive multiple of 4; nearest: 28 and 32"),
        ({"num_frames": 0}, "`num_frames=0` must be"),
        ({"mode": "storyboard"}, "first frame only"),
        ({"mode": "other"}, "Unknown mode 'other'"),
        ({"preset": "other"}, "Unknown preset 'other'; this pipeline has full-50"),
        ({"motion_prompt": ["a", "b"]}, "`motion_prompt` has 2 texts for 1 prompts"),
        ({"motion_prompt": " "}, "`motion_prompt` is empty"),
        ({"fps": 8}, "`fps=8` was given.*no `fps_conditioning`"),
        ({"anchors": Anchor(picture(), 1)}, "`frame_index=1`, but this model takes a first frame only"),
        ({"anchors": Anchor(picture(), 0, 0.5)}, "`strength=0.5`.*fixed first frame"),
        ({"anchors": [Anchor(picture())] * 2}, "takes one anchor.*got 2"),
        ({"anchors": Anchor([picture()] * 2)}, "one image as its first frame"),
        ({"image": picture(), "first_frame_prompt": "a"}, "Only one of"),
        ({"image": [picture()] * 2}, "`image` has 2 pictures for 1 prompts"),
        ({"latents": torch.zeros(1, 4, 4, 8, 9)}, "`latents` has shape"),
        ({"prompt_embeds_2": torch.zeros(1, 8, 24)}, "give both or none"),
        ({"num_inference_steps": 0}, "`num_inference_steps=0` must be at least 1"),
        ({"negative_prompt": ["a", "b"]}, "`negative_prompt` has 2 texts for 1 prompts"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "but has \\['noise'\\]"),
    ],
)
def test_bad_input_is_refused_before_any_model_runs(pipe, inputs, match):
    ran = []
    hooks = [
        model.register_forward_pre_hook(lambda *_: ran.append(1))
        for model in pipe.components.values()
        if isinstance(model, torch.nn.Module)
    ]
    with pytest.raises(ValueError, match=match):
        pipe(PROMPT, **SIZE | inputs)
    for hook in hooks:
        hook.remove()
    assert ran == []


def test_embeddings_of_another_width_are_refused(pipe):
    embeds = {"prompt_embeds": torch.zeros(1, 16, 32), "prompt_embeds_2": torch.zeros(1, 8, 23)}
    with pytest.raises(
        ValueError, match=r"`prompt_embeds_2` has shape \(1, 8, 23\), but this call needs \(1, tokens, 24\)"
    ):
        pipe(image=picture(), **embeds, **SIZE)
    with pytest.raises(ValueError, match="Only one of `motion_prompt` and `prompt_embeds`"):
        pipe(image=picture(), motion_prompt="a", **embeds, **SIZE)


def test_a_unet_without_image_takes_none():
    pipe = tiny_dreamer_pipeline(unet=tiny_unet(**PLAIN), text_encoder_2=None, tokenizer_2=None, image_encoder=None)
    with pytest.raises(ValueError, match='neither `paca` nor `t2i_adapter`.*mode="direct"'):
        pipe(PROMPT, image=picture(), **SIZE)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"vae": tiny_image_vae(8)}, "`vae` makes latents of 8 channels.*the UNet takes 4"),
        ({"text_encoder": tiny_clip_text(16)}, "`text_encoder` makes tokens of width 16.*the UNet takes 32"),
        ({"text_encoder_2": tiny_motion_encoder(12)}, "`text_encoder_2` makes tokens of width 12.*the UNet takes 24"),
        ({"image_encoder": tiny_clip_vision(8)}, "`image_encoder` makes embeddings of width 8.*the UNet takes 12"),
        ({"image_encoder": None}, "`image_encoder` is None.*image_embed_dim=12"),
        ({"text_encoder_2": None, "tokenizer_2": None}, "`text_encoder_2` is None.*motion_embed_dim=24"),
        ({"tokenizer_2": None}, "belong together"),
        ({"unet": tiny_unet2d()}, "UNet2DConditionModel.*from_unet2d"),
        ({"unet": tiny_unet(**PLAIN)}, "`text_encoder_2` was given, but the UNet has no `motion_embed_dim`"),
    ],
)
def test_components_that_do_not_fit_are_named(changes, match):
    with pytest.raises(ValueError, match=match):
        tiny_dreamer_pipeline(**changes)


# -- repositories and LoRAs


def test_it_saves_and_loads(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is FactorizedDreamerPipeline and type(loaded.unet) is FactorizedDreamerUNet
    loaded.set_progress_bar_config(disable=True)
    expected = pipe(PROMPT, generator=seeded(), **LATENTS).frames
    assert torch.equal(loaded(PROMPT, generator=seeded(), **LATENTS).frames, expected)
    assert (tmp_path / "pipeline.py").read_text().startswith("from diffusers_fvg import FactorizedDreamerPipeline")


def test_a_lora_of_stable_diffusion_loads(tmp_path):
    pipe = tiny_dreamer_pipeline()
    unet2d = tiny_unet2d()
    torch.manual_seed(3)
    unet2d.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(unet2d))
    before = pipe(PROMPT, image=picture(), generator=seeded(), **LATENTS).frames
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    after = pipe(PROMPT, image=picture(), generator=seeded(), **LATENTS).frames
    off = pipe(PROMPT, image=picture(), generator=seeded(), attention_kwargs={"scale": 0.0}, **LATENTS).frames
    assert (after - before).abs().max() > 1e-3 and (off - before).abs().max() < 1e-4
