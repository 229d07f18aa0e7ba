from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import WanPipeline
from training_runs import moving_square, save_cogvideox_model, save_config, save_model, save_videos, tiny_config

from diffusers_fvg import Anchor, AnchorLora
from diffusers_fvg.evaluation import validation
from diffusers_fvg.evaluation.validation import make_validate
from diffusers_fvg.media import read_video, read_video_metadata, write_video
from diffusers_fvg.pipelines.pipeline_factorized_video import FactorizedVideoPipeline
from diffusers_fvg.training.trainer import main_train


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def three_steps(monkeypatch):
    """The noise of the first two is that of the high-noise expert. The models' scheduler is that of no preset."""
    monkeypatch.setattr(FactorizedVideoPipeline, "own_num_inference_steps", 3)


@pytest.fixture
def config(tmp_path):
    PIL.Image.fromarray(moving_square(7)[0]).save(tmp_path / "start.png")
    data = save_videos(tmp_path / "data", 2)
    options = {"steps": 4, "validation_every": 2, "validation_prompts": ["a red circle", "a dog"]}
    options["validation_anchors"] = [str(tmp_path / "start.png"), str(data / "1.mp4")]
    return tiny_config(tmp_path / "model", data, tmp_path / "out", **options)


def run(config, validate) -> None:
    main_train(save_config(config, Path(config.output_dir) / "run.toml"), validate)


def sampled(monkeypatch) -> list[np.ndarray]:
    """Records the frames of each video before they are written."""
    frames = []

    def write(path, video, *rest):
        frames.append(np.asarray(video))
        write_video(path, video, *rest)

    monkeypatch.setattr(validation, "write_video", write)
    return frames


def test_a_run_leaves_videos_of_its_prompts(config, tmp_path, monkeypatch):
    save_model(tmp_path / "model")
    validate, told, logged, rendered = make_validate(config), [], [], sampled(monkeypatch)

    def watching(given):
        def log_video(name, path):
            told.append((given.step, name, path))

        validate(replace(given, log_video=log_video, log=logged.append))

    run(config, watching)
    paths = [
        tmp_path / "out" / "validation" / f"transformer_step_{step:08d}" / f"{number}.mp4"
        for step in (2, 4)
        for number in (0, 1)
    ]
    names = [(step, f"validation/{number}") for step in (2, 4) for number in (0, 1)]
    assert told == [(*name, path) for name, path in zip(names, paths)]
    assert [list(values) for values in logged] == [["validation_seconds"]] * 2
    for (step, name), path in zip(names, paths):
        frames, frame_rate = read_video(path)
        assert frames.shape == (9, 32, 32, 3) and frame_rate == 8
        prompt = config.validation_prompts[int(name[-1])]
        assert read_video_metadata(path) == {"prompt": prompt, "step": step}
    assert np.abs(rendered[0] - rendered[2]).max() > 1e-4

    # The finished LoRA in a pipeline of its own makes the last validation's video: the same weights, anchor and noise.
    absent = dict.fromkeys(("rewriter", "composer", "anchor_lora", "schedulers"))
    pipe = FactorizedVideoPipeline.from_pretrained(config.model, dtype=torch.float32, **absent)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path / "out" / "weights", adapter_name="anchor")
    size = {"num_frames": 9, "height": 32, "width": 32, "max_sequence_length": 16}
    generator = torch.Generator().manual_seed(config.seed)
    image = PIL.Image.open(tmp_path / "start.png")
    frames = pipe("a red circle", image=image, generator=generator, first_frame_prompt=None, **size).frames[0]
    np.testing.assert_allclose(rendered[2], frames, atol=1e-3)


def test_samples_have_anchors_in_the_form_that_is_trained(config, tmp_path, monkeypatch):
    """The finished LoRA, which says its form itself, makes them in a pipeline of its own."""
    save_model(tmp_path / "model")
    frames = sampled(monkeypatch)
    options = {"anchor_form": "appended", "anchor_position": "start-middle-last", "validation_frame_indices": [-1, 0]}
    run(config := replace(config, steps=2, warmup_steps=0, **options), make_validate(config))
    expected = []
    for metadata in (None, {}):
        anchor_lora = AnchorLora.from_pretrained(tmp_path / "out")
        anchor_lora.metadata = anchor_lora.metadata if metadata is None else metadata
        absent = dict.fromkeys(("rewriter", "composer", "schedulers"))
        pipe = FactorizedVideoPipeline.from_pretrained(config.model, anchor_lora=anchor_lora, **absent)
        pipe.set_progress_bar_config(disable=True)
        size = {"num_frames": 9, "height": 32, "width": 32, "max_sequence_length": 16}
        generator = torch.Generator().manual_seed(config.seed)
        anchor = Anchor(PIL.Image.open(tmp_path / "start.png"), -1)
        expected.append(pipe.animate("a red circle", anchor, generator=generator, **size)[0])
    np.testing.assert_allclose(frames[0], expected[0], atol=1e-3)
    assert np.abs(frames[0] - expected[1]).max() > 1e-2


def test_cogvideox_has_a_pipeline_of_its_own(config, tmp_path):
    save_cogvideox_model(tmp_path / "model")
    targets = ["to_q", "to_k", "to_v"]
    config = replace(config, steps=3, targets=targets, timestep_density="uniform", flow_shift=1.0)
    # A patch spans two latent frames, in which the anchor stands still.
    config = replace(config, validation_frame_indices=(-1, 0))
    run(config, make_validate(config))
    frames, _ = read_video(tmp_path / "out" / "validation" / "transformer_step_00000002" / "0.mp4")
    assert frames.shape == (9, 32, 32, 3)


def test_both_experts_of_a_model_make_the_video(config, tmp_path, monkeypatch):
    """Each with the LoRA that the run has of it by then, as the finished one in a pipeline of its own; without an anchor."""
    save_model(tmp_path / "model", experts=2)
    frames = sampled(monkeypatch)
    options = {"experts": ["transformer", "transformer_2"], "validation_anchors": [], "validation_prompts": ["a dog"]}
    run(config := replace(config, steps=3, warmup_steps=0, validation_every=3, **options), make_validate(config))
    assert len(frames) == 2

    def expected(experts):
        pipe = WanPipeline.from_pretrained(config.model)
        pipe.set_progress_bar_config(disable=True)
        folder = tmp_path / "out" / "weights"
        pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
        if experts == 2:
            name = "transformer_2.safetensors"
            pipe.load_lora_weights(folder, weight_name=name, adapter_name="second", load_into_transformer_2=True)
        ours = FactorizedVideoPipeline.from_pipe(pipe)
        size = {"num_frames": 9, "height": 32, "width": 32, "max_sequence_length": 16}
        return ours.animate("a dog", generator=torch.Generator().manual_seed(config.seed), **size)[0]

    np.testing.assert_allclose(frames[0], expected(1), atol=1e-4)
    np.testing.assert_allclose(frames[1], expected(2), atol=1e-4)
    assert np.abs(frames[1] - frames[0]).max() > 1e-3


@pytest.mark.slow
def test_samples_of_a_base_that_is_quantized_and_off_the_device(config, tmp_path, monkeypatch):
    save_model(tmp_path / "model")
    frames = sampled(monkeypatch)
    config = replace(config, steps=2, warmup_steps=0, validation_anchors=("", config.validation_anchors[1]))
    for number, options in enumerate(({}, {"block_offload": True}, {"quantize": "fp8", "block_offload": True})):
        config = replace(config, output_dir=str(tmp_path / str(number)), **options)
        run(config, make_validate(config))
    plain, offloaded, quantized = frames[:2], frames[2:4], frames[4:]
    assert all(np.array_equal(*pair) for pair in zip(plain, offloaded))
    assert all(0 < np.abs(a - b).max() < 0.2 for a, b in zip(plain, quantized))


def test_what_cannot_be_validated_is_said_before_training(config, tmp_path):
    save_model(tmp_path / "model")
    with pytest.raises(ValueError, match="`validation_every=2` needs `validation_prompts`"):
        make_validate(replace(config, validation_prompts=(), validation_anchors=()))
    frames = [PIL.Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    anchors = (str(tmp_path / "moving.gif"), config.validation_anchors[1])
    with pytest.raises(ValueError, match="is animated"):
        make_validate(replace(config, validation_anchors=anchors))
    with pytest.raises(ValueError, match="`frame_index=9` lies outside the video of 9 frames"):
        make_validate(replace(config, validation_frame_indices=(0, 9)))
    (tmp_path / "notes.txt").write_text("no picture")
    anchors = (str(tmp_path / "notes.txt"), config.validation_anchors[1])
    with pytest.raises(ValueError, match=r"notes\.txt is not a video"):
        make_validate(replace(config, validation_anchors=anchors))
