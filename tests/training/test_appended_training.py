"""Training with appended anchors: the cache, the LoRA's metadata, and refused options."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_transformer, tiny_vae
from training_runs import (
    distilled_config,
    losses,
    save_cogvideox_model,
    save_config,
    save_lora,
    save_model,
    save_videos,
    tiny_config,
)

from diffusers_fvg import AnchorLora
from diffusers_fvg.animate.anchor import crop_and_resize
from diffusers_fvg.animate.conditioning import encode_anchor
from diffusers_fvg.animate.transformer_anchor import AnchorConditionedTransformer3D
from diffusers_fvg.media import read_video
from diffusers_fvg.training.data import build_cache
from diffusers_fvg.training.families import family_of
from diffusers_fvg.training.metadata import read_examples
from diffusers_fvg.training.trainer import main_train


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("appended")
    return save_model(root / "model"), save_videos(root / "data", 2)


def run(config) -> None:
    main_train(save_config(config, Path(config.output_dir) / "run.toml"))


def appended_config(places, output, **options):
    options = {
        "anchor_form": "appended",
        "anchor_position": "start-middle-last",
        "steps": 3,
        "batch_size": 2,
    } | options
    return tiny_config(*places, output, **options, cache_dir=str(output.parent / "cache"))


def test_a_run(places, tmp_path, monkeypatch):
    """Counts of appended frames differ among clips and steps."""
    calls, forward = [], AnchorConditionedTransformer3D.forward

    def recorded(self, *args, **kwargs):
        calls.append(kwargs.get("anchor_positions"))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(AnchorConditionedTransformer3D, "forward", recorded)
    config = appended_config(places, tmp_path / "out", steps=8, gradient_checkpointing=True)
    run(config)
    positions = {position for call in calls if call is not None for position in call.flatten().tolist()}
    # Frames 4 and 8 of 9, and none for a clip whose first frame is drawn.
    assert positions == {-1.0, 1.375, 2.375}
    assert all(0 < loss < 10 for _, loss in losses(tmp_path / "out"))
    assert AnchorLora.from_pretrained(tmp_path / "out").form == "appended"


@pytest.mark.parametrize(
    ("position", "per_clip"), [("start-middle-last", {4, 8}), ("uniform", None), ("first", set())]
)
def test_the_cache_holds_pictures_as_the_pipeline_encodes_them(places, tmp_path, position, per_clip):
    config = appended_config(places, tmp_path / "out", anchor_position=position)
    folder = Path(config.model)
    clips = build_cache(config, read_examples(config), folder, family_of(config, folder))
    latents, _, pictures = clips.load([0, 1])
    assert latents.shape == (2, 16, 3, 4, 4) and (pictures is None) == (position == "first")
    for clip, frames in enumerate([] if pictures is None else pictures.frames.tolist()):
        assert set(frames) == per_clip if per_clip else [1 <= frames[0] <= 4, 5 <= frames[1] <= 8] == [True, True]
        video, _ = read_video(places[1] / f"{clip}.mp4")
        for place, frame in enumerate(frames):
            with torch.no_grad():
                expected = encode_anchor(tiny_vae(), crop_and_resize(video[frame], 32, 32)[None], 0)
            torch.testing.assert_close(pictures.latents[clip, :, place : place + 1], expected[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="was made with another pictures"):
        build_cache(replace(config, anchor_form="slot"), read_examples(config), folder, family_of(config, folder))


def test_what_is_refused(places, tmp_path):
    lora = save_lora(tmp_path / "lora", {"transformer": tiny_transformer()})
    with pytest.raises(ValueError, match="`anchor_form='appended'`, and `teacher_lora=.*was trained with 'slot'"):
        run(distilled_config(places, tmp_path / "student", lora, anchor_form="appended"))
    others = save_cogvideox_model(tmp_path / "model"), places[1]
    with pytest.raises(
        ValueError,
        match='`anchor_form="appended"`, but AnchorConditionedCogVideoX.* anchors in latent frames of the clip',
    ):
        run(tiny_config(*others, tmp_path / "out", anchor_form="appended", targets=["to_q"]))
