import contextlib
import gc
import io
import json
import math
import os
import random
import resource
import shutil
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from killing import kills
from tiny import tiny_wan_components
from training_runs import CAPTIONS, moving_square, save_model, save_videos, tiny_config
from transformers import UMT5EncoderModel

from diffusers_fvg.animate.anchor import crop_and_resize
from diffusers_fvg.animate.conditioning import encode_anchor
from diffusers_fvg.media import read_video
from diffusers_fvg.shapes.dataset import lossless_video
from diffusers_fvg.training import data, files, metadata
from diffusers_fvg.training.data import build_cache
from diffusers_fvg.training.families import Wan, family_of
from diffusers_fvg.training.files import read_whole, write_whole
from diffusers_fvg.training.metadata import read_examples


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(model, tmp_path):
    return tiny_config(model, save_videos(tmp_path / "data"), tmp_path / "out")


def cache(config):
    folder = Path(config.model)
    return build_cache(config, read_examples(config), folder, family_of(config, folder))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["folder", "parquet"])
def test_a_data_set_of_hugging_face(config, tmp_path, form):
    """Videos beside the table, or inside it: the same latents and texts as from a folder read by hand. Needs `datasets`."""
    datasets = pytest.importorskip("datasets")

    columns = {"video_column": "video", "cache_dir": str(tmp_path / "second")}
    folder = tmp_path / "data"
    if form == "parquet":
        rows = [
            {"video": {"bytes": (folder / f"{i}.mp4").read_bytes(), "path": None}, "text": t}
            for i, t in enumerate(CAPTIONS)
        ]
        features = datasets.Features({"video": datasets.Video(decode=False), "text": datasets.Value("string")})
        folder = tmp_path / "parquet"
        folder.mkdir()
        datasets.Dataset.from_list(rows, features).to_parquet(folder / "train.parquet")
    rows = metadata._hub_rows(str(folder), replace(config, **columns))
    examples = [metadata.Example(*row) for row in rows]
    assert [example.caption for example in examples] == CAPTIONS
    place = Path(config.model)
    clips = build_cache(replace(config, **columns), examples, place, family_of(config, place))
    latents, embeds, _ = clips.load([0, 1, 2])
    expected = cache(config).load([0, 1, 2])
    torch.testing.assert_close(latents, expected[0])
    torch.testing.assert_close(embeds, expected[1])
    with pytest.raises(ValueError, match=r"has no columns \['movie'\]; it has \['video', 'text'\]"):
        metadata._hub_rows(str(folder), replace(config, video_column="movie"))


# -- cache ------------------------------------------------------------------------------------------------------------


def test_cache_holds_what_the_pipeline_would_compute(config, tmp_path, monkeypatch):
    # Of clips encoded together the last bit can differ.
    monkeypatch.setattr(data, "PIXELS_AT_ONCE", 0)
    clips = cache(config)
    latents, embeds, _ = clips.load([1])
    pipe = WanPipeline(**tiny_wan_components())
    for row, prompt in zip(embeds, [CAPTIONS[1], ""]):
        with torch.no_grad():
            expected, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=16)
        assert torch.equal(row, expected[0]), (row - expected[0]).abs().max()
    # The VAE is causal: the first latent of the clip is that of its first frame alone.
    frames, _ = read_video(tmp_path / "data" / "1.mp4")
    with torch.no_grad():
        expected = encode_anchor(pipe.vae, crop_and_resize(frames[0], 32, 32)[None], 0)
    assert torch.equal(latents[:, :, :1], expected)
    assert clips.shapes == [(16, 3, 4, 4)] * 3


def test_the_encoders_leave_memory(config, monkeypatch):
    loaded = []
    for cls in (AutoencoderKLWan, UMT5EncoderModel):
        load = cls.from_pretrained

        def recording(*args, load=load, **kwargs):
            model = load(*args, **kwargs)
            loaded.append(weakref.ref(model))
            return model

        monkeypatch.setattr(cls, "from_pretrained", recording)
    cache(config)
    gc.collect()
    assert len(loaded) == 2 and all(reference() is None for reference in loaded)


def test_cache_is_found_again_without_encoders(config, monkeypatch):
    first = cache(config)
    monkeypatch.setattr(Wan, "encode", None)
    monkeypatch.setattr(data, "text_pipeline", None)
    assert cache(config).latents == first.latents


def test_cache_is_keyed_by_content_not_by_name(config, tmp_path):
    first, folder = cache(config), tmp_path / "data"
    shutil.copy(folder / "1.mp4", folder / "0.mp4")
    second = cache(config)
    assert second.latents == [first.latents[1], first.latents[1], first.latents[2]] and len(set(first.latents)) == 3


@pytest.mark.parametrize(
    ("options", "differing"),
    [({"buckets": [[5, 32, 32]]}, "buckets"), ({"max_sequence_length": 8}, "max_sequence_length")],
)
def test_cache_of_other_settings_is_an_error(config, options, differing):
    cache(config)
    with pytest.raises(ValueError, match=f"was made with another {differing}; choose another `cache_dir`"):
        cache(replace(config, **options))


def test_cache_of_another_vae_is_an_error(config, model, tmp_path):
    cache(config)
    other = shutil.copytree(model, tmp_path / "other")
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="was made with another vae"):
        cache(replace(config, model=str(other)))


def test_interrupted_cache_continues(config, monkeypatch):
    encoded, encode = [], Wan.encode

    def counting(vae, pixels):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(len(pixels))
        return encode(vae, pixels)

    monkeypatch.setattr(Wan, "encode", staticmethod(counting))
    monkeypatch.setattr(data, "PIXELS_AT_ONCE", 0)
    with pytest.raises(KeyboardInterrupt):
        cache(config)
    encoded.clear()
    clips = cache(config)
    assert encoded == [1] and len(clips) == 3

    # An incomplete file, as after a full disk or an interrupted copy, is made again.
    os.truncate(clips.latents[0], 200)
    encoded.clear()
    assert cache(config).load([0])[0].shape == (1, 16, 3, 4, 4) and encoded == [1]


def contents(folder: Path) -> dict[str, tuple]:
    """Of each whole file in a cache, by its name, values and metadata. Their order in a file is not told."""
    tensors = {path: read_whole(path) for path in folder.rglob("*.safetensors") if not path.name.startswith(".fvg-")}
    assert None not in tensors.values()
    found = {
        path: ({name: value.tolist() for name, value in values.items()}, metadata)
        for path, (values, metadata) in tensors.items()
    }
    found |= {path: json.loads(path.read_text()) for path in folder.glob("settings.json")}
    return {path.relative_to(folder).as_posix(): content for path, content in found.items()}


@pytest.fixture
def built(config, monkeypatch):
    """What a cache holds in the end. Of clips encoded together the last bit can differ."""
    torch.set_num_threads(1)
    monkeypatch.setattr(data, "PIXELS_AT_ONCE", 0)
    cache(config)
    files = contents(Path(config.cache_dir))
    assert len(files) == 1 + 4 + 3
    return files


@pytest.mark.slow
def test_20_kills_of_a_cache(config, built, tmp_path, capsys):
    """Each begins where the one before it was killed, until all is there."""
    place, numbers = tmp_path / "killed", Counter()
    config = replace(config, cache_dir=str(place))
    for _ in kills(lambda: cache(config), 20, undo=lambda: shutil.rmtree(place)):
        there = contents(place)
        assert there.items() <= built.items()
        numbers[len(there)] += 1
    cache(config)
    assert contents(place) == built
    with capsys.disabled():
        print(f"\ncache of {len(built)} files: 20 kills, of these there after them {dict(numbers)}, half 0")


@pytest.mark.slow
def test_10_full_disks_of_a_cache(config, built, tmp_path, capsys):
    place, told, draw = tmp_path / "filled", Counter(), random.Random(0)
    config = replace(config, cache_dir=str(place))
    largest = max(path.stat().st_size for path in (tmp_path / "data" / "cache").rglob("*") if path.is_file())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for _ in range(10):
        limit = int(math.exp(draw.uniform(0, math.log(largest))))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            # What it shows goes to a file too, in a test.
            with contextlib.redirect_stderr(io.StringIO()), pytest.raises(OSError, match="cannot be written") as error:
                cache(config)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(error.value) and contents(place).items() <= built.items()
        assert not list(place.rglob(".fvg-*"))
        told[Path(str(error.value).split(" cannot")[0]).parent.name] += 1
        if draw.random() < 0.5:
            # From the beginning again.
            shutil.rmtree(place)
    cache(config)
    assert contents(place) == built
    with capsys.disabled():
        print(f"\ncache: 10 full disks, each one line, of a file in {dict(told)}")


def test_small_clips_are_encoded_together(config, tmp_path, monkeypatch):
    encoded, encode = [], Wan.encode

    def counting(vae, pixels):
        encoded.append(len(pixels))
        return encode(vae, pixels)

    monkeypatch.setattr(Wan, "encode", staticmethod(counting))
    monkeypatch.setattr(data, "PIXELS_AT_ONCE", 2 * 9 * 32 * 32)
    together = cache(config)
    monkeypatch.setattr(data, "PIXELS_AT_ONCE", 0)
    alone = cache(replace(config, cache_dir=str(tmp_path / "alone")))
    assert encoded == [2, 1, 1, 1, 1]
    # Each clip got its own latents: the three squares have colours of their own.
    torch.testing.assert_close(together.load([0, 1, 2])[0], alone.load([0, 1, 2])[0], rtol=1e-4, atol=1e-5)
    first, second, third = alone.load([0, 1, 2])[0]
    assert min((first - second).abs().max(), (second - third).abs().max()) > 1e-2


def test_a_long_video_gives_several_clips(config, tmp_path):
    """Of 30 frames the clips are 0 to 8, 10 to 18 and 21 to 29; each is cached as if it were a video of its own."""
    frames = moving_square(0, num_frames=30, width=96)
    long = tmp_path / "long"
    long.mkdir()
    (long / "0.mp4").write_bytes(lossless_video(frames, 8))
    (long / "metadata.jsonl").write_text('{"file_name": "0.mp4", "text": "a dog"}\n')
    config = replace(config, data=str(long), clips_per_video=3, cache_dir=str(tmp_path / "three"))
    clips = cache(config)
    assert len(clips) == 3 and len(set(clips.texts)) == 1
    vae = tiny_wan_components()["vae"]
    for index, start in enumerate((0, 10, 21)):
        pixels = torch.stack([crop_and_resize(frame, 32, 32) for frame in frames[start : start + 9]], dim=1)
        expected = Wan.encode(vae, pixels[None])
        torch.testing.assert_close(clips.load([index])[0], expected, rtol=1e-4, atol=1e-5)

    # A lost file is noticed without decoding the video, and made again.
    clips.latents[1].unlink()
    assert cache(config).latents == clips.latents and clips.latents[1].exists()
    with pytest.raises(ValueError, match="was made with another clips_per_video"):
        cache(replace(config, clips_per_video=1))


def test_a_kill_while_writing_leaves_no_file(tmp_path, monkeypatch):
    def killed(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        files.write_whole(tmp_path / "x.safetensors", {"a": torch.ones(2)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", [0.5, -1], ids=["header", "values"])
def test_read_whole_refuses_a_changed_file(tmp_path, at):
    path = tmp_path / "x.safetensors"
    write_whole(path, {"a": torch.ones(2), "b": torch.zeros((), dtype=torch.bfloat16)}, {"step": "3"})
    tensors, metadata = read_whole(path)
    assert torch.equal(tensors["a"], torch.ones(2)) and metadata["step"] == "3"
    content = bytearray(path.read_bytes())
    content[int(at * len(content)) if at > 0 else at] ^= 1
    path.write_bytes(content)
    assert read_whole(path) is None


def test_corrupt_and_missing_videos_are_named_and_counted(config, tmp_path):
    (tmp_path / "data" / "1.mp4").write_bytes(b"no video")
    (tmp_path / "data" / "2.mp4").unlink()
    with pytest.raises(ValueError, match=r"2 of 3 videos cannot be used: .*1\.mp4: .*; .*2\.mp4: .*No such file"):
        cache(config)
    clips = cache(replace(config, max_rejected_share=0.7))
    assert len(clips) == 1 and sorted(path[-5:] for path in clips.rejected) == ["1.mp4", "2.mp4"]


def test_a_caption_of_more_tokens_than_are_read_is_told_of(config, tmp_path, caplog):
    """The warning comes at every start, even if everything is cached."""
    rows = [
        '{"file_name": "0.mp4", "text": "a red circle"}',
        json.dumps({"file_name": "1.mp4", "text": "a dog " * 20}),
    ]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(rows))
    for _ in range(2):
        caplog.clear()
        with caplog.at_level("WARNING"):
            cache(config)
        (message,) = [record.message for record in caplog.records if "tokens that are read" in record.message]
        assert message.startswith("1 of 3 captions have more than the 16 tokens") and "begins 'a dog a dog" in message


def test_text_embeddings_that_are_not_finite_are_not_cached(config, monkeypatch):
    encode = WanPipeline.encode_prompt

    def broken(self, *args, **options):
        embeds, negative = encode(self, *args, **options)
        return embeds * float("nan"), negative

    monkeypatch.setattr(WanPipeline, "encode_prompt", broken)
    with pytest.raises(ValueError, match="not finite"):
        cache(config)
    assert not list(Path(config.cache_dir).glob("texts/*"))
