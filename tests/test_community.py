"""Files under `examples/` that stand alone: the community pipeline and the three stages."""

import runpy
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from diffusers import DiffusionPipeline, WanPipeline, WanTransformer3DModel
from test_composer import tiny_stable_diffusion
from tiny import tiny_pipeline, tiny_rewriter, tiny_transformer, tiny_unipc, tiny_wan_components

from diffusers_fvg.animate.anchor import crop_and_resize
from diffusers_fvg.animate.conditioning import encode_anchor
from diffusers_fvg.media import read_video


EXAMPLES = Path(__file__).parents[1] / "examples"
COMMUNITY_FILE = EXAMPLES / "community" / "pipeline_factorized_video.py"
PROMPT = "a red circle moves to the right"
OPTIONS = {
    "height": 32,
    "width": 32,
    "num_frames": 9,
    "max_sequence_length": 16,
    "output_type": "pt",
    "num_inference_steps": 4,
    "guidance_scale": 4.0,
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(seed: int = 1) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def load(folder) -> WanPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(COMMUNITY_FILE), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def heed_time(pipe: WanPipeline) -> WanPipeline:
    """Scales the random weights, with which the model would hardly depend on the time, and the decoder on the latents."""
    with torch.no_grad():
        for expert in filter(None, (pipe.transformer, pipe.transformer_2)):
            expert.condition_embedder.time_proj.weight.mul_(30)
        pipe.vae.decoder.conv_out.weight.mul_(30)
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A stock Wan repository."""
    folder = tmp_path_factory.mktemp("community") / "tiny-wan"
    heed_time(WanPipeline(**tiny_wan_components())).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return load(folder)


@pytest.fixture
def ours():
    """The package's pipeline on the same weights, with the same scheduler."""
    pipe = heed_time(tiny_pipeline(scheduler=tiny_unipc()))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def difference(first, second) -> float:
    return float((first - second).abs().max())


# -- the community pipeline


def test_it_loads_on_a_stock_repository_and_needs_no_part_of_the_package(pipe):
    assert isinstance(pipe, WanPipeline) and type(pipe).__name__ == "WanFactorizedVideoPipeline"
    assert type(pipe.transformer) is WanTransformer3DModel
    assert "diffusers_fvg" not in COMMUNITY_FILE.read_text()


CALLS = {
    "one": {"prompt": PROMPT, "image": picture()},
    "two prompts and pictures": {
        "prompt": ["a red circle", "a blue square"],
        "image": [picture(1), picture(2)],
        "negative_prompt": "low quality",
        "generator": lambda: [seeded(3), seeded(4)],
    },
    "no guidance": {"prompt": PROMPT, "image": picture(), "guidance_scale": 1.0},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_anchored_video_equals_the_packages(pipe, ours, call):
    call = {"generator": seeded, **OPTIONS, **call}
    make_generator = call.pop("generator")
    for output_type in ("latent", "pt"):
        call["output_type"] = output_type
        frames = pipe(generator=make_generator(), **call).frames
        assert difference(frames, ours(generator=make_generator(), **call).frames) < 1e-5


def test_two_experts_equal_the_packages(tmp_path):
    experts = {"transformer_2": tiny_transformer(seed=5), "boundary_ratio": 0.9}
    heed_time(WanPipeline(**tiny_wan_components(), **experts)).save_pretrained(tmp_path)
    pipe = load(tmp_path)
    experts["transformer_2"] = tiny_transformer(anchored=True, seed=5)
    ours = heed_time(tiny_pipeline(scheduler=tiny_unipc(), **experts))
    ours.set_progress_bar_config(disable=True)
    call = {**OPTIONS, "prompt": PROMPT, "image": picture(), "guidance_scale_2": 3.0}
    frames = pipe(generator=seeded(), **call).frames
    assert difference(frames, ours(generator=seeded(), **call).frames) < 1e-5


def test_the_anchored_latent_stays_and_the_others_move(pipe):
    steps = []
    pipe(
        PROMPT,
        image=picture(),
        generator=seeded(),
        callback_on_step_end=lambda _, step, timestep, tensors: steps.append(tensors["latents"].clone()) or {},
        **OPTIONS,
    )
    expected = encode_anchor(pipe.vae, crop_and_resize(picture(), 32, 32)[None], 0)
    assert len(steps) == OPTIONS["num_inference_steps"]
    for latents, before in zip(steps[1:], steps):
        assert difference(latents[:, :, :1], expected) < 1e-5 and torch.equal(latents[:, :, :1], before[:, :, :1])
        assert difference(latents[:, :, 1:], before[:, :, 1:]) > 1e-2


def test_a_lora_loads_by_the_stock_method(folder, ours):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(9)
    donor = tiny_transformer()
    donor.add_adapter(LoraConfig(r=4, target_modules=["to_q", "ffn.net.2"], init_lora_weights=False))
    state = {f"transformer.{key}": value for key, value in get_peft_model_state_dict(donor).items()}
    pipe, call = load(folder), {**OPTIONS, "prompt": PROMPT, "image": picture()}
    base = pipe(generator=seeded(), **call).frames
    pipe.load_lora_weights(dict(state), adapter_name="anchor")
    ours.load_lora_weights(dict(state), adapter_name="anchor")
    frames = pipe(generator=seeded(), **call).frames
    assert difference(frames, base) > 1e-3
    assert difference(frames, ours(generator=seeded(), **call).frames) < 1e-5


def test_all_stages_in_one_call_are_the_stages_by_hand(pipe):
    def rewriter(prompt: str) -> str:
        return prompt.split(" moves")[0]

    text_to_image = tiny_stable_diffusion()
    text_to_image.set_progress_bar_config(disable=True)
    prompts, drawn = [PROMPT, "a blue square moves up"], {"num_inference_steps": 2, "height": 16, "width": 32}
    frames = pipe(
        prompts,
        rewriter=rewriter,
        text_to_image=text_to_image,
        text_to_image_kwargs={**drawn, "generator": seeded(5)},
        generator=seeded(),
        **OPTIONS,
    ).frames
    captions = pipe.rewrite(prompts, rewriter)
    assert captions == ["a red circle", "a blue square"]
    images = pipe.compose(captions, text_to_image, **drawn, generator=seeded(5))
    assert [image.size for image in images] == [(32, 16), (32, 16)]
    assert torch.equal(pipe(prompts, image=images, generator=seeded(), **OPTIONS).frames, frames)
    with_caption = pipe(
        prompts,
        first_frame_prompt=captions,
        text_to_image=text_to_image,
        text_to_image_kwargs={**drawn, "generator": seeded(5)},
        generator=seeded(),
        **OPTIONS,
    ).frames
    assert torch.equal(with_caption, frames)


def test_a_chat_model_rewrites(pipe):
    tiny = tiny_rewriter()
    chat = transformers.pipeline("text-generation", model=tiny.model, tokenizer=tiny.tokenizer)
    captions = pipe.rewrite([PROMPT, PROMPT, "two green squares"], chat, max_new_tokens=6)
    # A model with random weights: its answers mean nothing, but equal inputs give equal answers.
    assert all(isinstance(caption, str) for caption in captions) and captions[0] == captions[1]
    template = tiny.tokenizer.apply_chat_template(
        [
            {"role": "system", "content": sys.modules[type(pipe).__module__].REWRITE_INSTRUCTION},
            {"role": "user", "content": PROMPT},
        ],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    tokens = tiny.model.generate(**template, max_new_tokens=6, do_sample=False)[0, template["input_ids"].shape[1] :]
    assert captions[0] == tiny.tokenizer.decode(tokens, skip_special_tokens=True).strip()


BAD_INPUT = [
    ({}, "Pass `image`, or `text_to_image`"),
    ({"rewriter": str.upper}, "Pass `image`, or `text_to_image`"),
    ({"image": picture(), "num_frames": 10}, "num_frames=10.*4k"),
    ({"image": picture(), "height": 40, "width": 48}, "divisible by 16"),
    ({"image": [picture(), picture()]}, "2 first frames for 1 prompts"),
]


@pytest.mark.parametrize(("options", "message"), BAD_INPUT)
def test_bad_input_is_refused(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(PROMPT, **{**OPTIONS, **options})


# -- the first example


def test_three_stages_saves_every_result(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["three_stages.py", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "three_stages.py"), run_name="__main__")
    assert "red circle" in (tmp_path / "1_caption.txt").read_text()
    anchor = np.asarray(PIL.Image.open(tmp_path / "2_anchor.png"))
    assert anchor.shape == (64, 64, 3)
    frames, frame_rate = read_video(tmp_path / "3_video.mp4")
    assert frames.shape == (17, 384, 384, 3) and frame_rate == 8
    # The anchor is the video's first frame, as far as VAE and H.264 let it be, and not its last.
    errors = [np.abs(frame[3::6, 3::6].astype(int) - anchor).mean() for frame in (frames[0], frames[-1])]
    assert errors[0] < 4 < errors[1]
    assert (tmp_path / "strip.png").is_file()
