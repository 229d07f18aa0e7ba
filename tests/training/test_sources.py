"""Several folders in one run, with options of their own, and pictures among the videos."""

import json
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from training_runs import CAPTIONS, moving_square, save_config, save_model, save_videos, tiny_config

from diffusers_fvg.animate.anchor import crop_and_resize
from diffusers_fvg.lora.anchor_lora import WEIGHT_NAME
from diffusers_fvg.training.config import DataSource, TrainConfig
from diffusers_fvg.training.data import build_cache
from diffusers_fvg.training.draws import draw
from diffusers_fvg.training.families import family_of
from diffusers_fvg.training.metadata import read_examples
from diffusers_fvg.training.trainer import main_train
from diffusers_fvg.training.videos import read_clips


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model, a folder of videos with a table and one of pictures with text files."""
    root = tmp_path_factory.mktemp("sources")
    (root / "pictures").mkdir()
    for number in range(2):
        PIL.Image.fromarray(moving_square(number)[0]).save(root / "pictures" / f"{number}.png")
        (root / "pictures" / f"{number}.txt").write_text(f"picture {number}")
    return save_model(root / "model"), save_videos(root / "videos"), root / "pictures"


def several(places, output: Path, **options) -> TrainConfig:
    model, videos, pictures = places
    sources = [
        {"path": str(videos), "caption_prefix": "film of ", "buckets": [[5, 32, 32]]},
        {"path": str(pictures), "repeats": 2, "caption_suffix": ", still"},
    ]
    options = {"buckets": [[9, 32, 32], [1, 32, 32]], "cache_dir": str(output / "cache")} | options
    return replace(tiny_config(model, videos, output), data=sources, **options)


def test_a_config_of_several_sources_is_written_and_read(places, tmp_path):
    config = several(places, tmp_path)
    assert TrainConfig.load(save_config(config, tmp_path / "c.toml")) == config
    assert config.sources[1] == DataSource(str(places[2]), repeats=2.0, caption_suffix=", still")
    text = config.to_toml()
    table = text.replace(text[text.index("data = ") : text.index("\n", text.index("data = "))], "")
    tables = f'[[data]]\npath = "{places[1]}"\ncaption_prefix = "film of "\nbuckets = [[5, 32, 32]]\n'
    tables += f'[[data]]\npath = "{places[2]}"\nrepeats = 2\ncaption_suffix = ", still"\n'
    (tmp_path / "c.toml").write_text(table + tables)
    assert TrainConfig.load(tmp_path / "c.toml") == config


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"repeats": 2}, r"it must be a table with `path` and, if wanted, path, repeats"),
        ({"path": "a", "weight": 2}, "it must be a table with `path`"),
        ({"path": "a", "repeats": "2"}, r"`data.repeats='2'` must be of type float"),
        ({"path": "a", "repeats": 0}, "has repeats=0.0, and it must be above 0"),
        ({"path": " "}, "must name a folder or a dataset"),
        ({"path": "a", "buckets": [[9, 0, 32]]}, r"holds \[9, 0, 32\]: each number must be at least 1"),
    ],
)
def test_sources_that_are_refused(places, tmp_path, source, message):
    with pytest.raises(ValueError, match=message):
        replace(tiny_config(*places[:2], tmp_path), data=[source])


def test_a_run_on_videos_and_pictures(places, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = several(places, tmp_path / "out", steps=7)
    examples = read_examples(config)
    assert [example.caption for example in examples] == [f"film of {caption}" for caption in CAPTIONS] + [
        "picture 0, still",
        "picture 1, still",
    ]
    folder = Path(config.model)
    clips = build_cache(config, examples, folder, family_of(config, folder))
    assert clips.shapes == [(16, 2, 4, 4)] * 3 + [(16, 1, 4, 4)] * 2
    assert clips.repeats == [1.0] * 3 + [2.0] * 2

    main_train(save_config(config, tmp_path / "c.toml"))
    lora = load_file(tmp_path / "out" / WEIGHT_NAME)
    assert all(torch.isfinite(tensor).all() for tensor in lora.values())
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "out" / "log_transformer.jsonl").read_text().splitlines()
    ]
    # An epoch of three videos and four pictures: all of it was trained on.
    assert len(losses) == 7 and min(losses) > 0


def test_a_picture_has_no_anchor(places, tmp_path):
    config = several(places, tmp_path, anchor_position="first")
    generators = [torch.Generator().manual_seed(number) for number in range(8)]
    drawn = draw(torch.zeros(8, 16, 1, 4, 4), generators, config)
    assert (drawn.anchors.strength == 0).all() and (drawn.counted == 1).all()
    drawn = draw(torch.zeros(8, 16, 2, 4, 4), generators, config)
    assert (drawn.anchors.strength[:, 0] == 1).all()


def test_pictures_and_videos_have_buckets_of_their_own(places, tmp_path):
    config = several(places, tmp_path)
    ((count, clip),) = read_clips(places[2] / "1.png", config)
    expected = crop_and_resize(moving_square(1)[0], 32, 32)
    assert count == 1 and clip.shape == (3, 1, 32, 32) and torch.equal(clip[:, 0], expected)
    with pytest.raises(
        ValueError, match=r"is a single picture, and no bucket has one frame: add one, \[1, height, width\]"
    ):
        list(read_clips(places[2] / "1.png", config, [(5, 32, 32)]))
    # A video that is too short for its bucket does not become a picture.
    with pytest.raises(ValueError, match="has 9 frames at the training frame rate; the shortest bucket needs 17"):
        list(read_clips(places[1] / "1.mp4", config, [(17, 32, 32), (1, 32, 32)]))
