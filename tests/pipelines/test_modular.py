"""The modular pipeline makes what the plain one makes, bit by bit, from the same repository."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import ModularPipeline, WanTransformer3DModel
from diffusers.modular_pipelines import InputParam, ModularPipelineBlocks, SequentialPipelineBlocks
from tiny import tiny_pipeline, tiny_transformer
from tiny_judges import tiny_clip_judge

from diffusers_fvg import Anchor, FactorizedVideoPipeline, LightDecoder, Plan, RewriteOutcome, Subject, load_embedded
from diffusers_fvg.embedded import EMBEDDED_FOLDER
from diffusers_fvg.lora.anchor_lora import AnchorLora
from diffusers_fvg.pipelines.modular import (
    ComposeStep,
    FactorizedVideoBlocks,
    FactorizedVideoModularPipeline,
    RewriteStep,
)


PROMPT = "a red circle moves to the right"
TWO = {"prompt": ["a red circle", "a blue square"]}
SIZE = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16, "output_type": "pt"}
STEPS = {"num_inference_steps": 2}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(seed: int = 1) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def lora() -> AnchorLora:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(9)
    donor = tiny_transformer()
    donor.add_adapter(LoraConfig(r=2, target_modules=["to_q", "ffn.net.2"], init_lora_weights=False))
    return AnchorLora({f"transformer.{key}": value for key, value in get_peft_model_state_dict(donor).items()})


def load_modular(folder, **options) -> FactorizedVideoModularPipeline:
    pipe = ModularPipeline.from_pretrained(str(folder), **options)
    # Without a dtype transformers' models come as they are stored.
    pipe.load_components(dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modular") / "tiny-fvg"
    tiny_pipeline(anchor_lora=lora()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(folder):
    pipe = FactorizedVideoPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def modular(folder):
    return load_modular(folder)


# -- loading


def test_the_stock_class_finds_our_blocks(folder):
    pipe = ModularPipeline.from_pretrained(str(folder))
    assert type(pipe) is FactorizedVideoModularPipeline and type(pipe.blocks) is FactorizedVideoBlocks
    assert pipe.null_component_names == pipe.component_names
    pipe.load_components(["rewriter", "vae"], dtype=torch.bfloat16)
    assert sorted(set(pipe.component_names) - set(pipe.null_component_names)) == ["rewriter", "vae"]
    assert {p.dtype for name in ("rewriter", "vae") for p in getattr(pipe, name).parameters()} == {torch.bfloat16}
    pipe.load_components(dtype=torch.bfloat16)
    assert sorted(pipe.null_component_names) == ["anchor_judge", "transformer_2"]
    assert pipe.composer.dtype == pipe.transformer.dtype == torch.bfloat16


def test_the_stock_class_finds_our_blocks_in_a_fresh_process(run_python):
    code = f"""
    import diffusers_fvg
    from diffusers import ModularPipeline
    print(type(ModularPipeline.from_pretrained({str(EMBEDDED_FOLDER)!r})).__name__)
    """
    assert "FactorizedVideoModularPipeline" in run_python(code)


def test_load_components_names_what_it_does_not_know(folder):
    pipe = ModularPipeline.from_pretrained(str(folder), workflow="image2video")
    with pytest.raises(ValueError, match="'rewriter'.*not among the components"):
        pipe.load_components("rewriter")
    with pytest.raises(ValueError, match="not both"):
        pipe.load_components("vae", workflow="image2video")


def test_only_what_a_workflow_uses_is_fetched(hub, folder):
    from huggingface_hub import HfApi

    api = HfApi(token=hub.token)
    api.create_repo("org/fvg")
    api.upload_folder(folder_path=folder, repo_id="org/fvg")
    pipe = load_modular("org/fvg", workflow="image2video")
    fetched = {name.split("/")[0] for name in hub.downloaded("org/fvg")}
    assert {"transformer", "vae", "anchor_lora"} <= fetched and not fetched & {"rewriter", "composer"}
    assert pipe(prompt=PROMPT, image=picture(), output="videos", **SIZE, **STEPS).shape == (1, 9, 3, 32, 32)


def test_saved_it_is_the_repository_of_both(modular, plain, tmp_path):
    modular.save_pretrained(tmp_path)
    again = FactorizedVideoPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    frames = [pipe(PROMPT, generator=seeded(), **SIZE, **STEPS).frames for pipe in (plain, again)]
    assert torch.equal(*frames)


# -- the same numbers


CALLS = {
    "all stages, default preset": {},
    "another preset": {"preset": "full-50", "num_inference_steps": 3},
    "two prompts": {**TWO, "generator": lambda: [seeded(3), seeded(4)], **STEPS},
    "two videos each": {**TWO, "num_videos_per_prompt": 2, "negative_prompt": "low quality", **STEPS},
    "settings of stages 1 and 2": {
        "rewriter_max_new_tokens": 4,
        "composer_num_inference_steps": 3,
        "composer_guidance_scale": 2.0,
        "composer_negative_prompt": "low quality",
        **STEPS,
    },
    "caption": {"first_frame_prompt": "a red circle at the left", **STEPS},
    "picture": {"image": picture(), **STEPS},
    "two pictures": {**TWO, "image": [picture(1), picture(2)], "guidance_scale": 1.0, **STEPS},
    "first and last frame": {"anchors": [Anchor(picture(1)), Anchor(picture(2), -1, strength=0.6)], **STEPS},
    "direct": {"mode": "direct", **STEPS},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_equals_the_plain_pipeline(plain, modular, call):
    call = {"prompt": PROMPT, "generator": seeded, **SIZE, **call}
    make_generator = call.pop("generator")
    expected = plain(generator=make_generator(), **call)
    state = modular(generator=make_generator(), **call)
    assert torch.equal(state.videos, expected.frames)
    if "mode" not in call and "image" not in call and "anchors" not in call:
        assert [image.tobytes() for image in state.image] == [image.tobytes() for image in expected.anchor_images]
        given = call.get("first_frame_prompt")
        assert state.first_frame_prompt == (given or expected.first_frame_prompts)


def test_equals_the_plain_pipeline_on_the_embedded_model(quick_embedded):
    plain, modular = load_embedded(), load_modular(quick_embedded)
    plain.set_progress_bar_config(disable=True)
    # 64 x 64 pixels and 17 frames are the repository's call defaults.
    expected = plain(PROMPT, generator=seeded(), output_type="pt")
    state = modular(prompt=PROMPT, generator=seeded(), output_type="pt")
    assert state.videos.shape == (1, 17, 3, 64, 64) and torch.equal(state.videos, expected.frames)
    assert state.first_frame_prompt == expected.first_frame_prompts


def test_a_judge_chooses_as_in_the_plain_pipeline(tmp_path, monkeypatch):
    defaults = {"composer_num_candidates": 3}
    tiny_pipeline(anchor_judge=tiny_clip_judge(), call_defaults=defaults).save_pretrained(tmp_path)
    plain, modular = FactorizedVideoPipeline.from_pretrained(tmp_path), load_modular(tmp_path)
    captions = {"first_frame_prompt": TWO["prompt"]}
    call = {**TWO, **captions, "composer_negative_prompt": ["low", "quality"], "num_inference_steps": 1, **SIZE}
    expected, state = plain(generator=seeded(), **call), modular(generator=seeded(), **call)
    assert torch.equal(state.videos, expected.frames)
    told = [[[(each.seed, each.score) for each in video] for video in made.candidates] for made in (state, expected)]
    assert told[0] == told[1] and [len(video) for video in told[0]] == [3] * 2
    assert modular(generator=seeded(), composer_num_candidates=1, **call).candidates is None
    with pytest.raises(ValueError, match="`composer_num_candidates=0` must be at least 1"):
        modular(composer_num_candidates=0, **call)
    # It sees what stage 1 planned.
    plan, seen = Plan((Subject("circle"),)), []
    outcome = RewriteOutcome("accepted", "a circle", plan=plan)
    monkeypatch.setattr(modular.rewriter, "rewrite_outcomes", lambda prompts, **options: [outcome])
    with monkeypatch.context() as patch:
        patch.setattr(modular.anchor_judge, "judge", lambda images, captions, plans: seen.extend(plans) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            modular(prompt=PROMPT, generator=seeded(), **SIZE)
    assert seen == [plan] * 3
    modular.save_pretrained(tmp_path / "again")
    again = FactorizedVideoPipeline.from_pretrained(tmp_path / "again")
    assert again.anchor_judge is not None and again.call_defaults["composer_num_candidates"] == 3


def test_drawn_seeds_repeat_the_run(plain, modular):
    state = modular(prompt=PROMPT, **SIZE, **STEPS)
    (generator,) = state.generator
    again = plain(PROMPT, generator=[seeded(generator.initial_seed())], **SIZE, **STEPS)
    assert torch.equal(again.frames, state.videos)


def test_a_stock_video_model_is_taken_over_with_the_anchor_lora(folder, plain):
    pipe = load_modular(folder)
    pipe.update_components(transformer=WanTransformer3DModel.from_pretrained(folder / "transformer"))
    expected = plain(PROMPT, image=picture(), generator=seeded(), **SIZE, **STEPS).frames
    for _ in range(2):
        videos = pipe(prompt=PROMPT, image=picture(), generator=seeded(), output="videos", **SIZE, **STEPS)
        assert torch.equal(videos, expected)


# -- blocks put together otherwise


def tint(image: PIL.Image.Image) -> PIL.Image.Image:
    return PIL.Image.blend(image, PIL.Image.new("RGB", image.size, "red"), 0.5)


class TintStep(ModularPipelineBlocks):
    """A user's own block."""

    description = "Tints the anchor."

    @property
    def inputs(self):
        return [InputParam("image", required=True)]

    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        block_state.image = [tint(image) for image in block_state.image]
        self.set_block_state(state, block_state)
        return components, state


def test_a_block_of_ones_own_between_compose_and_anchor(plain, modular):
    blocks = modular.blocks
    blocks.sub_blocks.insert("tint", TintStep(), list(blocks.sub_blocks).index("compose") + 1)
    pipe = blocks.init_pipeline()
    pipe.update_components(**modular.components)
    pipe.set_progress_bar_config(disable=True)
    state = pipe(prompt=PROMPT, generator=seeded(), **SIZE, **STEPS)

    first = plain(PROMPT, generator=seeded(), **SIZE, **STEPS)
    (image,) = map(tint, first.anchor_images)
    assert state.image[0].tobytes() == image.tobytes()
    expected = plain(PROMPT, image=image, generator=seeded(), **SIZE, **STEPS).frames
    assert torch.equal(state.videos, expected) and not torch.equal(expected, first.frames)


def test_stages_1_and_2_run_without_the_video_model(folder, plain):
    blocks = SequentialPipelineBlocks.from_blocks_dict({"rewrite": RewriteStep(), "compose": ComposeStep()})
    pipe = blocks.init_pipeline(str(folder))
    assert sorted(pipe.component_names) == ["anchor_judge", "composer", "rewriter"]
    pipe.load_components()
    state = pipe(prompt=PROMPT, height=32, width=32, generator=seeded())
    expected = plain(PROMPT, generator=seeded(), **SIZE, num_inference_steps=1)
    assert state.first_frame_prompt == expected.first_frame_prompts
    assert state.image[0].tobytes() == expected.anchor_images[0].tobytes()


WORKFLOWS = {
    "text2video": {"rewriter", "composer"},
    "caption2video": {"composer"},
    "image2video": set(),
    "direct": set(),
}


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_a_workflow_leaves_out_stages_and_their_models(modular, workflow):
    blocks = FactorizedVideoBlocks().get_workflow(workflow)
    models = {spec.name for spec in blocks.expected_components}
    assert models & {"rewriter", "composer"} == WORKFLOWS[workflow] and "transformer" in models
    assert ("anchor" in blocks.sub_blocks) == (workflow != "direct")


def test_a_workflow_gives_the_same_video(plain, modular):
    for workflow, given in (("image2video", {"image": picture()}), ("direct", {})):
        pipe = modular.blocks.get_workflow(workflow).init_pipeline()
        pipe.update_components(
            **{name: part for name, part in modular.components.items() if name in pipe.component_names}
        )
        pipe.set_progress_bar_config(disable=True)
        options = {**SIZE, **STEPS, **given}
        mode = "direct" if workflow == "direct" else "factorized"
        expected = plain(PROMPT, mode=mode, generator=seeded(), **options).frames
        assert torch.equal(pipe(prompt=PROMPT, generator=seeded(), output="videos", **options), expected)


# -- what is refused, and when


BAD_INPUT = [
    ({"image": picture(), "first_frame_prompt": "a cat"}, "Only one of.*first_frame_prompt.*image"),
    ({"image": picture(), "mode": "direct"}, "uses no first frame, but `image`"),
    ({"mode": "storyboards"}, "Unknown mode 'storyboards'"),
    ({"first_frame_prompt": ["a cat", "a dog"]}, "2 texts for 1 prompts"),
    ({"num_frames": 10}, "num_frames=10.*9 and 13"),
    ({"height": 40}, "height=40"),
    ({"preset": "none-such"}, "Unknown preset 'none-such'"),
    ({"prompt": None}, "Pass `prompt` or `prompt_embeds`"),
    ({"composer_negative_prompt": ["low", "quality"]}, "2 texts for 1 prompts"),
    ({"composer_guidance_scale": float("nan")}, "composer_guidance_scale=nan"),
    ({"image": picture(), "composer_guidance_scale": 2.0}, "`composer_guidance_scale=2.0` has no effect: `image`"),
    ({"mode": "direct", "rewriter_max_new_tokens": 3}, "`rewriter_max_new_tokens=3` has no effect"),
    ({"anchors": []}, "holds no anchor"),
]


@pytest.mark.parametrize(("options", "message"), BAD_INPUT)
def test_bad_input_is_refused_before_a_model_runs(modular, options, message, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a model ran before the input was checked")

    for name in ("rewriter", "composer", "text_encoder", "transformer"):
        monkeypatch.setattr(getattr(modular, name), "forward", never)
    with pytest.raises(ValueError, match=message):
        modular(**{"prompt": PROMPT, **SIZE, **options})


@pytest.mark.parametrize("name", ["rewriter", "composer"])
def test_a_missing_stage_says_what_to_do(modular, name, monkeypatch):
    monkeypatch.setattr(modular, name, None)
    with pytest.raises(ValueError, match=f"no `{name}`.*pass `"):
        modular(prompt=PROMPT, **SIZE)


def test_a_workflow_without_its_picture_is_refused(modular):
    pipe = modular.blocks.get_workflow("image2video").init_pipeline()
    pipe.update_components(**{name: part for name, part in modular.components.items() if name in pipe.component_names})
    with pytest.raises(ValueError, match="pass `image` or `anchors`"):
        pipe(prompt=PROMPT, **SIZE)


def test_the_safety_checker_sees_the_anchor(modular, monkeypatch):
    seen = []
    monkeypatch.setattr(modular, "safety_checker", lambda image: seen.append(image.size) or "no")
    with pytest.raises(ValueError, match="safety_checker"):
        modular(prompt=PROMPT, image=picture(), generator=seeded(), **SIZE, **STEPS)
    assert seen == [(32, 32)]


def test_it_decodes_with_a_light_decoder(modular, plain, monkeypatch):
    torch.manual_seed(0)
    call = {"prompt": PROMPT, "image": picture(), **SIZE, **STEPS}
    before = modular(generator=seeded(), output="videos", **call)
    for pipe in (modular, plain):
        monkeypatch.setattr(pipe, "light_decoder", LightDecoder("taew2_1"))
    plain.light_decoder.load_state_dict(modular.light_decoder.state_dict())
    videos = modular(generator=seeded(), output="videos", **call)
    assert torch.equal(videos, plain(generator=seeded(), **call).frames) and not torch.equal(videos, before)


def test_disabled_progress_bar_silences_every_stage(modular, capfd):
    modular(prompt=PROMPT, **SIZE, **STEPS)
    assert "it/s" not in capfd.readouterr().err
