import json

import accelerate
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    WanPipeline,
)
from huggingface_hub import HfApi
from tiny import tiny_composer, tiny_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers_fvg.compose.composer import AnchorComposer


CAPTIONS = ["a red circle at the top", "two green leaf and a white ball"]
WAN_DEFAULTS = {"num_frames": 1, "num_inference_steps": 2, "max_sequence_length": 16}


def tiny_stable_diffusion() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 16
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        sample_size=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        eos_token_id=1,
        bos_token_id=0,
    )
    return StableDiffusionPipeline(
        unet=unet.eval(),
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text_config).eval(),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )


def tiny_wan() -> WanPipeline:
    pipeline = tiny_composer().pipeline
    with torch.no_grad():
        # As it comes, this decoder of random weights shows another prompt or seed as one grey level.
        pipeline.vae.decoder.conv_out.weight.mul_(30)
    return pipeline


@pytest.fixture(scope="module")
def wan() -> AnchorComposer:
    return AnchorComposer(tiny_wan(), WAN_DEFAULTS)


@pytest.fixture(scope="module")
def classical() -> AnchorComposer:
    return AnchorComposer(tiny_stable_diffusion(), {"num_inference_steps": 2})


@pytest.fixture(params=["wan", "classical"])
def composer(request) -> AnchorComposer:
    return request.getfixturevalue(request.param)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def pixels(pictures: list[PIL.Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(picture, dtype=np.int16) for picture in pictures])


# -- the stage ------------------------------------------------------------------------------------------------------------


def test_compose_equals_the_pipeline_itself(wan, classical):
    ours = wan.compose(CAPTIONS[:1], 32, 48, generator=seeded(3))
    frames = tiny_wan()(
        CAPTIONS[:1],
        height=32,
        width=48,
        num_frames=1,
        num_inference_steps=2,
        max_sequence_length=16,
        generator=seeded(3),
        output_type="pil",
    ).frames
    assert ours[0].size == (48, 32)
    assert np.array_equal(pixels(ours), pixels(frames[0]))

    ours = classical.compose(CAPTIONS[:1], 32, 48, generator=seeded(3), guidance_scale=4.0, negative_prompt="low")
    images = tiny_stable_diffusion()(
        CAPTIONS[:1],
        height=32,
        width=48,
        num_inference_steps=2,
        generator=seeded(3),
        guidance_scale=4.0,
        negative_prompt=["low"],
    ).images
    assert np.array_equal(pixels(ours), pixels(images))


def test_batch_equals_singles(composer):
    singles = [composer.compose([text], 32, 32, generator=seeded(seed))[0] for seed, text in enumerate(CAPTIONS)]
    assert np.abs(pixels(singles[:1]) - pixels(singles[1:])).max() > 10
    for batch_size in (1, 2):
        batched = AnchorComposer(composer.pipeline, composer.call_defaults, batch_size=batch_size)
        both = batched.compose(CAPTIONS, 32, 32, generator=seeded(0, 1))
        # Rounding of a batched matrix product may carry a pixel over to the next of 256 levels.
        assert np.abs(pixels(both) - pixels(singles)).max() <= 1


@pytest.mark.parametrize("strength", [0.5, 0.75])
def test_derive_equals_the_image_to_image_pipeline_of_the_family(classical, strength):
    firsts = classical.compose(CAPTIONS, 32, 32, generator=seeded(0, 1))
    composer = AnchorComposer(classical.pipeline, {"num_inference_steps": 4}, derive_strength=strength)
    assert composer.image_to_image_class is StableDiffusionImg2ImgPipeline
    stock = StableDiffusionImg2ImgPipeline(**tiny_stable_diffusion().components, requires_safety_checker=False)
    arguments = {"strength": strength, "num_inference_steps": 4, "guidance_scale": 4.0, "negative_prompt": "low"}
    expected = [
        stock(caption, image=image, generator=generator, **arguments).images[0]
        for caption, image, generator in zip(CAPTIONS, firsts, seeded(2, 3))
    ]
    steps = []
    ours = composer.derive(
        firsts,
        CAPTIONS,
        32,
        32,
        guidance_scale=4.0,
        negative_prompt="low",
        generator=seeded(2, 3),
        on_progress=lambda *step: steps.append(step),
    )
    assert np.array_equal(pixels(ours), pixels(expected))
    count = 2 * int(4 * strength)
    assert steps == [(step, count) for step in range(1, count + 1)]


def test_noise_of_the_steps_comes_from_the_generators(wan):
    """A scheduler that draws new noise at each step repeats with the seed too, whatever else is in the batch."""
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    composer = AnchorComposer(
        WanPipeline(**wan.pipeline.components | {"scheduler": scheduler}),
        WAN_DEFAULTS | {"num_inference_steps": 3},
        batch_size=2,
    )

    def compose(captions: list[str], seeds: list[int]) -> list[np.ndarray]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return [np.asarray(image) for image in composer.compose(captions, 32, 32, generator=generators)]

    first, second = compose(CAPTIONS, [1, 2])
    torch.manual_seed(7)
    again, other = compose(CAPTIONS, [1, 3])
    assert np.abs(first.astype(int) - again).max() <= 1 and np.abs(second.astype(int) - other).max() > 1
    np.testing.assert_allclose(compose(CAPTIONS[1:], [2])[0].astype(int), second, atol=1)
    assert "step" not in vars(scheduler)


def test_derive_scales_pictures_as_compose_does(classical):
    composer = AnchorComposer(classical.pipeline, {"num_inference_steps": 4, "height": 16, "width": 16})
    (first,) = composer.compose(CAPTIONS[:1], 32, 48, generator=seeded(0))
    (later,) = composer.derive([first], CAPTIONS[1:], 32, 48, generator=seeded(0))
    assert later.size == first.size == (48, 32)


def test_other_families_derive_by_shared_noise(composer):
    """The same seed and another caption: `compose` itself. A family that could do more does so where it is told to."""
    shared = AnchorComposer(composer.pipeline, composer.call_defaults, derive_strength=None)
    assert shared.image_to_image_class is None
    firsts = shared.compose(CAPTIONS, 32, 32, generator=seeded(0, 1))
    later = shared.derive(firsts, CAPTIONS[::-1], 32, 32, generator=seeded(0, 1))
    expected = shared.compose(CAPTIONS[::-1], 32, 32, generator=seeded(0, 1))
    assert np.array_equal(pixels(later), pixels(expected))
    if isinstance(composer.pipeline, WanPipeline):
        assert composer.derive_strength is not None and composer.image_to_image_class is None


def test_derive_sees_pictures_upright(classical):
    (first,) = classical.compose(CAPTIONS[:1], 32, 48, generator=seeded(0))
    sideways = first.transpose(PIL.Image.Transpose.ROTATE_90)
    sideways.getexif()[0x0112] = 6
    # Tag 6: to be turned clockwise by a quarter.
    later = [classical.derive([image], CAPTIONS[1:], 32, 48, generator=seeded(0)) for image in (first, sideways)]
    assert np.array_equal(*map(pixels, later))


def test_derive_refuses_bad_input(classical):
    with pytest.raises(ValueError, match="1 images for 2 prompts"):
        classical.derive([PIL.Image.new("RGB", (32, 32))], CAPTIONS, 32, 32)
    with pytest.raises(ValueError, match="derive_strength=0"):
        AnchorComposer(classical.pipeline, derive_strength=0)


def test_negative_prompts_stay_with_their_prompts(classical):
    texts = ["low quality", "a cat"]
    singles = [
        classical.compose([text], 32, 32, generator=seeded(0), negative_prompt=negative, guidance_scale=20.0)[0]
        for text, negative in zip(CAPTIONS, texts)
    ]
    both = classical.compose(CAPTIONS, 32, 32, generator=seeded(0, 0), negative_prompt=texts, guidance_scale=20.0)
    swapped = classical.compose(
        CAPTIONS, 32, 32, generator=seeded(0, 0), negative_prompt=texts[::-1], guidance_scale=20.0
    )
    assert np.abs(pixels(both) - pixels(singles)).max() <= 1
    assert not np.array_equal(pixels(both), pixels(swapped))


def test_steps_are_the_call_s_or_the_defaults(composer):
    steps = []
    composer.compose(CAPTIONS, 32, 32, on_progress=lambda step, total: steps.append((step, total)))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    steps.clear()
    composer.compose(CAPTIONS[:1], 32, 32, num_inference_steps=3, on_progress=lambda *step: steps.append(step))
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_pipelines_without_a_step_callback_report_pictures(classical):
    class CallbackFree(StableDiffusionPipeline):
        """A pipeline of the older kind, which takes no `callback_on_step_end`."""

        def __call__(self, prompt, height, width, generator=None, output_type="pil"):
            return super().__call__(prompt, height, width, 2, generator=generator, output_type=output_type)

    composer = AnchorComposer(CallbackFree(**classical.pipeline.components, requires_safety_checker=False))
    steps = []
    arguments = {"generator": seeded(0, 1), "on_progress": lambda *step: steps.append(step)}
    pictures = composer.compose(CAPTIONS, 32, 32, **arguments)
    assert steps == [(1, 2), (2, 2)]
    assert np.array_equal(pixels(pictures), pixels(classical.compose(CAPTIONS, 32, 32, generator=seeded(0, 1))))
    assert len(composer.compose(CAPTIONS, 32, 32, **arguments, should_stop=lambda: len(steps) == 3)) == 1


def test_stop_leaves_out_unfinished_pictures(composer):
    steps = []

    def stop_at(count: int):
        steps.clear()
        return composer.compose(
            CAPTIONS,
            32,
            32,
            num_inference_steps=4,
            generator=seeded(0, 1),
            on_progress=lambda *step: steps.append(step),
            should_stop=lambda: len(steps) >= count,
        )

    first = composer.compose(CAPTIONS[:1], 32, 32, num_inference_steps=4, generator=seeded(0))
    assert stop_at(2) == []
    assert steps == [(1, 8), (2, 8)]
    for count in (4, 6):
        assert np.array_equal(pixels(stop_at(count)), pixels(first))
        assert len(steps) == count
    assert len(stop_at(9)) == 2


@pytest.mark.parametrize(
    ("inner", "asked"), [((64, 32), (16, 32)), ((32, 64), (48, 24)), ((16, 16), (40, 40)), ((64, 32), (45, 30))]
)
def test_pictures_of_another_size_are_cropped_not_stretched(wan, inner, asked):
    sized = AnchorComposer(wan.pipeline, WAN_DEFAULTS | {"height": inner[0], "width": inner[1]})
    (picture,) = sized.compose(CAPTIONS[:1], *asked, generator=seeded(0))
    (whole,) = sized.compose(CAPTIONS[:1], *inner, generator=seeded(0))
    assert picture.size == asked[::-1]
    # The independent way: PIL's resize of the largest centred box with the asked ratio of sides.
    scale = min(inner[0] / asked[0], inner[1] / asked[1])
    box_height, box_width = asked[0] * scale, asked[1] * scale
    top, left = (inner[0] - box_height) / 2, (inner[1] - box_width) / 2
    box = (left, top, left + box_width, top + box_height)
    expected = whole.resize(asked[::-1], PIL.Image.Resampling.BICUBIC, box=box)
    stretched = whole.resize(asked[::-1], PIL.Image.Resampling.BICUBIC)
    error = np.abs(pixels([picture]) - pixels([expected])).mean()
    assert error < 0.01
    if inner[0] * asked[1] != inner[1] * asked[0]:
        assert np.abs(pixels([picture]) - pixels([stretched])).mean() > 1


def test_compose_refuses_what_the_pipeline_lacks_or_refuses(wan, classical):
    with pytest.raises(ValueError, match="divisible by 16"):
        wan.compose(CAPTIONS, 32, 40)
    with pytest.raises(ValueError, match="generator.*2"):
        wan.compose(CAPTIONS, 32, 32, generator=seeded(0))
    with pytest.raises(ValueError, match="negative_prompt.*2"):
        wan.compose(CAPTIONS, 32, 32, negative_prompt=["one"])
    with pytest.raises(ValueError, match="num_inference_steps=0"):
        wan.compose(CAPTIONS, 32, 32, num_inference_steps=0)
    with pytest.raises(ValueError, match="empty"):
        wan.compose([""], 32, 32)
    with pytest.raises(ValueError, match="StableDiffusionPipeline has no argument num_frames"):
        AnchorComposer(classical.pipeline, {"num_frames": 1})
    with pytest.raises(ValueError, match="generator"):
        AnchorComposer(classical.pipeline, {"generator": 1})
    with pytest.raises(ValueError, match="Module"):
        AnchorComposer(torch.nn.Module())

    class Unguided(StableDiffusionPipeline):
        def __call__(self, prompt, height, width, generator=None, output_type="pil"):
            pytest.fail("the pipeline ran")

    unguided = AnchorComposer(Unguided(**classical.pipeline.components, requires_safety_checker=False))
    with pytest.raises(ValueError, match="Unguided has no argument guidance_scale, num_inference_steps"):
        unguided.compose(CAPTIONS, 32, 32, num_inference_steps=2, guidance_scale=3.0)


def test_the_inner_progress_bar_is_silent(composer, capfd):
    composer.compose(CAPTIONS[:1], 32, 32)
    assert capfd.readouterr().err == ""


# -- placement ------------------------------------------------------------------------------------------------------------


class RecordingHook(ModelHook):
    """Counts the calls that accelerate's offloading would move the models for."""

    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def test_drawing_passes_through_forward(composer):
    hook = RecordingHook()
    add_hook_to_module(composer, hook)
    try:
        composer.compose(CAPTIONS, 32, 32)
    finally:
        remove_hook_from_module(composer)
    assert hook.calls == 2


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offload(composer, tmp_path, offload):
    composer.save_pretrained(tmp_path)
    expected = composer.compose(CAPTIONS, 32, 32, generator=seeded(0, 1))
    offloaded = AnchorComposer.from_pretrained(tmp_path)
    if offload == "model":
        accelerate.cpu_offload_with_hook(offloaded, torch.device("cpu"))
    else:
        accelerate.cpu_offload(offloaded, torch.device("cpu"))
        assert {parameter.device.type for parameter in offloaded.parameters()} == {"meta"}
    pictures = offloaded.compose(CAPTIONS, 32, 32, generator=seeded(0, 1))
    assert np.array_equal(pixels(pictures), pixels(expected))
    # What the composer adds to the hooks goes with them.
    remove_hook_from_module(offloaded, recurse=True)
    assert not any(hasattr(module, "_hf_hook") for module in offloaded.modules())


def test_to_reaches_every_nested_model(composer, tmp_path):
    composer.save_pretrained(tmp_path)
    moved = AnchorComposer.from_pretrained(tmp_path).to(torch.float64)
    for model in moved.pipeline.components.values():
        if isinstance(model, torch.nn.Module):
            assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert moved.dtype == torch.float64
    moved.to("meta")
    assert moved.device == torch.device("meta")
    assert moved.pipeline.vae.device == torch.device("meta")


# -- folders --------------------------------------------------------------------------------------------------------------


def load_as_component(folder, dtype: torch.dtype) -> AnchorComposer:
    """Loads a component as `DiffusionPipeline.from_pretrained` does: `torch_dtype` for a class of ours, nothing else."""
    return AnchorComposer.from_pretrained(folder, torch_dtype=dtype)


def test_folder_with_a_pipeline_round_trips(composer, tmp_path):
    composer.save_pretrained(tmp_path / "a", safe_serialization=True)
    load_as_component(tmp_path / "a", torch.float32).save_pretrained(tmp_path / "b")
    loaded = load_as_component(tmp_path / "b", torch.float32)
    assert type(loaded.pipeline) is type(composer.pipeline)
    assert loaded.call_defaults == composer.call_defaults
    expected = composer.compose(CAPTIONS[:1], 32, 32, generator=seeded(0))
    assert np.array_equal(pixels(loaded.compose(CAPTIONS[:1], 32, 32, generator=seeded(0))), pixels(expected))


def test_asked_dtype_reaches_every_nested_model(composer, tmp_path):
    composer.save_pretrained(tmp_path)
    loaded = load_as_component(tmp_path, torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    stock = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, model in stock.components.items():
        if isinstance(model, torch.nn.Module):
            # Wan keeps some layers in float32: which ones is diffusers' business.
            expected = {key: parameter.dtype for key, parameter in model.named_parameters()}
            nested = loaded.pipeline.components[name]
            assert {key: parameter.dtype for key, parameter in nested.named_parameters()} == expected
            assert torch.bfloat16 in expected.values()
    (picture,) = loaded.compose(CAPTIONS[:1], 32, 32, generator=seeded(0))
    assert picture.size == (32, 32)


def test_folder_that_names_a_hub_repository(classical, hub, tmp_path):
    classical.pipeline.save_pretrained(tmp_path / "t2i")
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo("org/t2i")
    revision = api.upload_folder(repo_id="org/t2i", folder_path=tmp_path / "t2i").oid
    light = {"repository": "org/t2i", "revision": revision}
    light |= {"call_defaults": {"num_inference_steps": 2}, "batch_size": 2, "derive_strength": 0.7}
    (tmp_path / "light").mkdir()
    (tmp_path / "light" / "composer_config.json").write_text(json.dumps(light))

    cache = tmp_path / "cache"
    loaded = AnchorComposer.from_pretrained(tmp_path / "light", torch_dtype=torch.float64, cache_dir=cache)
    assert loaded.dtype == torch.float64
    loaded.save_pretrained(tmp_path / "again")
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["composer_config.json"]
    assert json.loads((tmp_path / "again" / "composer_config.json").read_text()) == light
    # Found in that cache only, without asking the server.
    again = AnchorComposer.from_pretrained(tmp_path / "again", cache_dir=cache, local_files_only=True)
    expected = classical.compose(CAPTIONS[:1], 32, 32, generator=seeded(0))
    assert np.array_equal(pixels(again.compose(CAPTIONS[:1], 32, 32, generator=seeded(0))), pixels(expected))
    # The repository itself, and bundling what was fetched.
    direct = AnchorComposer.from_pretrained("org/t2i", revision=revision, cache_dir=cache)
    assert direct.reference == {"repository": "org/t2i", "revision": revision}
    direct.reference = None
    direct.save_pretrained(tmp_path / "bundled")
    assert (tmp_path / "bundled" / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "holds no composer"),
        ("{}", "holds no composer"),
        ("{", "not valid JSON"),
        ("[]", "list"),
        ('{"repo": "org/name"}', "repo"),
        ('{"revision": "abc"}', "names no `repository`"),
    ],
)
def test_from_pretrained_refuses_a_broken_folder(tmp_path, config, message):
    if config is not None:
        (tmp_path / "composer_config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        AnchorComposer.from_pretrained(tmp_path)
