import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    UniPCMultistepScheduler,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny_cogvideox import CONFIG_1_0, tiny_cogvideox_pipeline, tiny_cogvideox_transformer

from diffusers_fvg.animate.anchor import Anchor, anchor_pixels, crop_and_resize
from diffusers_fvg.animate.anchor_cogvideox import encode_anchor
from diffusers_fvg.animate.transformer_anchor_cogvideox import AnchorConditionedCogVideoXTransformer3D
from diffusers_fvg.lora.anchor_lora import AnchorLora
from diffusers_fvg.pipelines.pipeline_factorized_cogvideox import FactorizedCogVideoXPipeline
from diffusers_fvg.schedules.cogvideox import COGVIDEOX_1_5_SCHEDULE


SIZE = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16, "output_type": "pt"}
SCHEDULERS = {
    "ddim": lambda: CogVideoXDDIMScheduler(**COGVIDEOX_1_5_SCHEDULE),
    "dpm": lambda: CogVideoXDPMScheduler(**COGVIDEOX_1_5_SCHEDULE),
}
each_scheduler = pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)


def make_pipeline(**changes):
    pipe = tiny_cogvideox_pipeline(**changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe():
    return make_pipeline()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(seed=0, height=32, width=32):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def clean_latent(pipe, seed):
    """What `picture(seed)` is to the video model: (C, h, w)."""
    return encode_anchor(pipe.vae, crop_and_resize(picture(seed), 32, 32)[None])[0, :, 0]


def stock_pipeline(pipe, scheduler):
    transformer = CogVideoXTransformer3DModel.from_config(pipe.transformer.config)
    transformer.load_state_dict(pipe.transformer.state_dict())
    stock = CogVideoXPipeline(pipe.tokenizer, pipe.text_encoder, pipe.vae, transformer.eval(), scheduler)
    stock.set_progress_bar_config(disable=True)
    return stock


# -- parity with the stock pipeline


@each_scheduler
@pytest.mark.parametrize(
    "options", [{}, {"use_dynamic_cfg": True}, {"guidance_scale": 1.0}], ids=["cfg", "dynamic", "off"]
)
def test_without_anchors_it_equals_the_stock_pipeline(pipe, scheduler, options):
    pipe.scheduler = scheduler()
    stock = stock_pipeline(pipe, scheduler())
    arguments = {**SIZE, "num_inference_steps": 4, "guidance_scale": 6.0, **options}
    for prompt in ("a red circle", ["a red circle", "a blue square moves to the left"]):
        negative = ["blurry"] * len(prompt) if isinstance(prompt, list) else "blurry"
        expected = stock(prompt, negative, generator=seeded(), **arguments).frames
        frames = pipe(prompt, "blurry", mode="direct", generator=seeded(), **arguments).frames
        assert frames.shape == expected.shape and (frames - expected).abs().max() < 1e-4
    other = pipe(prompt, "blurry", mode="direct", generator=seeded(1), **arguments).frames
    assert (other - expected).abs().max() > 1e-2


def test_parity_of_the_older_model():
    pipe = make_pipeline(transformer=tiny_cogvideox_transformer(anchored=True, **CONFIG_1_0))
    pipe.scheduler = SCHEDULERS["dpm"]()
    arguments = {**SIZE, "num_inference_steps": 3, "guidance_scale": 6.0}
    expected = stock_pipeline(pipe, SCHEDULERS["dpm"]())("a red circle", generator=seeded(), **arguments).frames
    frames = pipe("a red circle", mode="direct", generator=seeded(), **arguments).frames
    assert frames.shape == expected.shape and (frames - expected).abs().max() < 1e-4


def test_a_length_that_the_vae_would_change_is_refused(pipe):
    stock = stock_pipeline(pipe, SCHEDULERS["ddim"]())
    frames = stock("a red circle", num_inference_steps=1, **SIZE | {"num_frames": 13}).frames
    assert frames.shape[1] == 16
    with pytest.raises(ValueError, match="num_frames=13.*8k.*9 and 17"):
        pipe("a red circle", mode="direct", **SIZE | {"num_frames": 13})


# -- anchors


@each_scheduler
def test_an_anchored_frame_leaves_the_loop_as_it_went_in(pipe, scheduler):
    pipe.scheduler = scheduler()
    # 9 frames: padding 0 | 1-4 5-8. Video 0 is anchored in front, video 1 at the end, part way.
    anchors = [[Anchor(picture(1))], [Anchor(picture(2), 4, 0.6), Anchor(picture(3), -1, 0.6)]]
    arguments = {**SIZE, "num_inference_steps": 3, "output_type": "latent", "generator": seeded()}
    steps = []
    latents = pipe(
        ["a red circle", "a blue square"],
        anchors=anchors,
        callback_on_step_end=lambda _, i, t, tensors: steps.append(tensors["latents"]) or {},
        **arguments,
    ).frames
    first, second, third = (clean_latent(pipe, seed) for seed in (1, 2, 3))
    for state in (*steps, latents):
        assert torch.equal(state[0, 0], first) and torch.equal(state[0, 1], first)
    assert torch.equal(latents[1, 2], second) and torch.equal(latents[1, 3], third)
    assert (steps[0][1, 2] - second).abs().max() > 1e-2  # until then it has a share of the noise
    free = pipe(["a red circle", "a blue square"], mode="direct", **arguments | {"generator": seeded()}).frames
    assert (latents[0, 2:] - free[0, 2:]).abs().max() > 1e-3  # the others see it


@each_scheduler
def test_every_position_and_runs_leave_the_loop_as_they_went_in(pipe, scheduler):
    pipe.scheduler = scheduler()
    # 17 frames: padding 0 | 1-4 5-8 | 9-12 13-16. Latents of the padded video, the pictures there, frame of the first.
    first, middle, last = ((0, 1), [1], 0), ((2, 3), list(range(8)), 1), ((4, 5), list(range(8)), 9)
    prefix = ((1, 2, 3), list(range(9)), 0)
    for cases in ((first, middle), (middle, last), (last, prefix), (prefix, first)):
        anchors, expected = [], []
        for strength, (places, seeds, frame) in zip((1.0, 0.6), cases):
            images = [picture(seed) for seed in seeds]
            anchors.append([Anchor(images if len(images) > 1 else images[0], frame, strength)])
            pixels = anchor_pixels(anchors[-1][0], 32, 32)[None]
            expected.append((places, encode_anchor(pipe.vae, pixels, (frame + 3) // 4)[0].transpose(0, 1)))
        steps = []
        latents = pipe(
            ["a red circle", "a blue square"],
            anchors=anchors,
            generator=[seeded(1), seeded(2)],
            callback_on_step_end=lambda _, i, t, tensors, steps=steps: steps.append(tensors["latents"]) or {},
            **{**SIZE, "num_frames": 17, "num_inference_steps": 2, "output_type": "latent"},
        ).frames
        for video, (places, clean) in enumerate(expected):
            assert torch.equal(latents[video, list(places)], clean.expand(len(places), -1, -1, -1))
            assert torch.equal(steps[0][video, list(places)], latents[video, list(places)]) == (video == 0)
            if places[0] < 2:  # the padding is frame 0 again
                assert torch.equal(latents[video, 0], latents[video, 1])
            free = [index for index in range(6) if index not in (*places, 0)]
            assert (steps[0][video, free] - latents[video, free]).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_anchor_decode(pipe):
    call = {**SIZE, "image": picture(), "num_inference_steps": 2}
    raw, matched, replaced = (
        pipe("a red circle", generator=seeded(), anchor_decode=choice, **call).frames
        for choice in ("raw", "match", "replace")
    )
    wanted = torch.from_numpy(np.asarray(picture())).permute(2, 0, 1) / 255
    assert torch.equal(replaced[0, 0], wanted) and torch.equal(replaced[:, 1:], matched[:, 1:])
    off = [(video[0, 0] - wanted).mean((1, 2)).abs().max() for video in (raw, matched)]
    assert off[1] < 0.02 < 0.03 < off[0], off


def test_frame_times_of_an_anchored_run(pipe):
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    pipe("a red circle", image=picture(1), num_inference_steps=4, guidance_scale=1.0, **SIZE)
    assert [call["timestep"].tolist() for call in seen] == [[[0, 0, t, t]] for t in (999, 749, 499, 249)]
    for call in seen:
        assert torch.equal(call["hidden_states"][0, :2], clean_latent(pipe, 1).expand(2, -1, -1, -1))
    seen.clear()
    pipe("a red circle", mode="direct", num_inference_steps=2, guidance_scale=1.0, **SIZE)
    assert [call["timestep"].tolist() for call in seen] == [[999], [499]]


def test_all_stages_run_and_return_plain_data(pipe):
    output = pipe("a red circle moves to the right", generator=seeded(), **SIZE, num_inference_steps=2)
    assert output.frames.shape == (1, 9, 3, 32, 32)
    assert len(output.first_frame_prompts) == 1 and output.anchor_images[0].size == (32, 32)
    assert set(output.timings) == {"rewrite", "compose", "encode", "denoise", "decode"}
    assert set(output.seeds[0]) == {"anchor", "video"} and output.seeds[0]["video"] == 0

    by_hand = pipe.animate(
        "a red circle moves to the right",
        Anchor(output.anchor_images[0]),
        generator=seeded(),
        num_inference_steps=2,
        **SIZE,
    )
    assert torch.equal(by_hand, output.frames)


def test_default_is_the_preset_of_the_scheduler(pipe):
    steps = []
    count = {"callback_on_step_end": lambda _, i, t, tensors: steps.append(int(t)) or {}}
    before = dict(pipe.scheduler.config), pipe.scheduler.num_inference_steps
    pipe("a red circle", mode="direct", preset="full-50", num_inference_steps=10, **count, **SIZE)
    assert steps == list(range(999, 0, -100)) and pipe.guidance_scale == 6.0
    steps.clear()
    pipe("a red circle", mode="direct", **count, **SIZE)
    assert len(steps) == 15
    assert (dict(pipe.scheduler.config), pipe.scheduler.num_inference_steps) == before


def test_embeddings_instead_of_texts(pipe):
    arguments = {**SIZE, "num_inference_steps": 2, "num_videos_per_prompt": 2, "mode": "direct"}
    expected = pipe("a red circle", generator=[seeded(1), seeded(2)], **arguments).frames
    embeds, negative = pipe.encode_prompt("a red circle", "", max_sequence_length=16)
    for options in ({}, {"negative_prompt_embeds": negative}):
        frames = pipe(prompt_embeds=embeds, generator=[seeded(1), seeded(2)], **options, **arguments).frames
        assert len(frames) == 2 and (frames - expected).abs().max() < 1e-4


def test_anchors_are_placed_by_the_stride_of_the_vae(pipe, monkeypatch):
    """All published VAEs of CogVideoX have a stride of 4."""
    monkeypatch.setattr(pipe, "vae_scale_factor_temporal", 2)
    ((latents, _),) = pipe._anchor_resolver()([Anchor([picture()] * 4, 5)], 9)
    assert latents == range(3, 5)


def test_anchor_lora_acts_only_with_an_anchor():
    donor = tiny_cogvideox_transformer()
    torch.manual_seed(9)
    donor.add_adapter(LoraConfig(r=4, target_modules=["to_q", "ff.net.2"], init_lora_weights=False))
    state = {f"transformer.{key}": value for key, value in get_peft_model_state_dict(donor).items()}
    pipe, base = make_pipeline(anchor_lora=AnchorLora(state)), make_pipeline()
    for options, same in (({"mode": "direct"}, True), ({"image": picture()}, False)):
        arguments = {**SIZE, **options, "num_inference_steps": 2}
        frames = pipe("a red circle", generator=seeded(), **arguments).frames
        assert torch.equal(frames, base("a red circle", generator=seeded(), **arguments).frames) == same


def test_saves_and_loads(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is FactorizedCogVideoXPipeline
    again.set_progress_bar_config(disable=True)
    frames = [p("a red circle", generator=seeded(), num_inference_steps=2, **SIZE).frames for p in (pipe, again)]
    assert torch.equal(*frames)
    assert "FactorizedCogVideoXPipeline" in (tmp_path / "pipeline.py").read_text()
    CogVideoXTransformer3DModel.from_pretrained(tmp_path / "transformer")


def test_stock_transformer_is_taken_over_without_a_copy(pipe):
    stock = tiny_cogvideox_transformer()
    ours = FactorizedCogVideoXPipeline(**{**pipe.components, "transformer": stock})
    assert type(ours.transformer) is AnchorConditionedCogVideoXTransformer3D
    assert ours.transformer.proj_out.weight.data_ptr() == stock.proj_out.weight.data_ptr()


# -- bad input


class Untouched(torch.nn.Module):
    def forward(self, *args, **kwargs):
        raise AssertionError("a model ran before the input was checked")


BAD_INPUT = [
    ({"height": 40}, "height=40.*32 and 48"),
    ({"width": 80}, "4 x 10 are larger than the 8 x 8"),
    ({"num_frames": 80}, "num_frames=80.*73 and 81"),
    ({"anchors": [Anchor(picture(), -1)]}, "frame -1 shares a patch .* frames 1 to 4"),
    ({"anchors": [Anchor([picture()] * 5)]}, "at frame 0 shares a patch .* frames 5 to 8.*8k"),
    ({"anchor_decode": "blend"}, "'blend'.*'raw', 'match', 'replace'"),
    ({"anchor_decode": "match", "output_type": "latent"}, "'match'.*decodes none"),
    ({"anchor_decode": "match", "mode": "direct"}, "'match'.*no anchor"),
    ({"prompt": ""}, "empty"),
    ({"preset": "anchored-14"}, "'anchored-14'.*anchored-15, full-50"),
    ({"mode": "indirect"}, "'indirect'.*direct"),
    ({"latents": torch.zeros(1, 3, 4, 4, 4)}, r"\(1, 3, 4, 4, 4\).*\(1, 4, 4, 4, 4\)"),
    ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
]


@pytest.mark.parametrize(("change", "message"), BAD_INPUT, ids=[str(i) for i in range(len(BAD_INPUT))])
def test_bad_input_is_refused_before_any_model_runs(pipe, change, message, monkeypatch):
    for name in ("text_encoder", "transformer", "vae", "rewriter", "composer"):
        monkeypatch.setattr(type(getattr(pipe, name)), "forward", Untouched.forward)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        pipe(**{"prompt": "a red circle", **SIZE, **change})


def test_components_that_do_not_fit_are_refused(pipe):
    image_to_video = tiny_cogvideox_transformer(in_channels=8)
    with pytest.raises(ValueError, match="takes 8 channels, but latents have 4.*CogVideoX1.5-5B"):
        FactorizedCogVideoXPipeline(**{**pipe.components, "transformer": image_to_video})
    with pytest.raises(ValueError, match="`transformer` is None"):
        FactorizedCogVideoXPipeline(**{**pipe.components, "transformer": None})
    pipe.scheduler = UniPCMultistepScheduler()
    with pytest.raises(ValueError, match="UniPCMultistepScheduler; use CogVideoXDDIMScheduler"):
        pipe("a red circle", mode="direct", **SIZE)
