import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from tiny import tiny_wan_components
from training_runs import CAPTIONS, moving_square, save_model, save_videos, tiny_config

from diffusers_fvg.anchor import crop_and_resize, encode_anchor
from diffusers_fvg.media import read_video, write_video
from diffusers_fvg.training import data, files
from diffusers_fvg.training.data import BatchOrder, build_cache, choose_bucket, frames_available, read_examples
from diffusers_fvg.training.files import read_whole, write_whole


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(model, tmp_path):
    return tiny_config(model, save_videos(tmp_path / "data"), tmp_path / "out")


def cache(config):
    return build_cache(config, read_examples(config), Path(config.model))


# -- rows -------------------------------------------------------------------------------------------------------------


def test_read_examples_reads_jsonl_and_csv_alike(config, tmp_path):
    from_jsonl = read_examples(config)
    assert [example.caption for example in from_jsonl] == CAPTIONS
    folder = tmp_path / "data"
    (folder / "metadata.jsonl").unlink()
    rows = [f'{index}.mp4,"{caption}"' for index, caption in enumerate(CAPTIONS)]
    (folder / "metadata.csv").write_text("file_name,text\n" + "\n".join(rows) + "\n")
    assert read_examples(config) == from_jsonl


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has 0 of metadata.jsonl and metadata.csv"),
        ("", "has no rows"),
        ('{"file_name": "0.mp4"', "line 1 is no JSON"),
        (
            '{"file_name": "0.mp4", "caption": "a"}',
            r"row 1 has no \['text'\]; its columns are \['caption', 'file_name'\]",
        ),
        ('{"file_name": "0.mp4", "text": "  "}', "row 1` is empty"),
    ],
)
def test_read_examples_refuses(config, tmp_path, text, message):
    (tmp_path / "data" / "metadata.jsonl").unlink()
    if text is not None:
        (tmp_path / "data" / "metadata.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_examples(config)


def test_a_data_set_on_the_hub_needs_its_package(model, tmp_path, monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    config = tiny_config(model, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ValueError, match="is no folder; .* `pip install datasets`"):
        read_examples(config)


# -- buckets ----------------------------------------------------------------------------------------------------------

BUCKETS = [(81, 480, 832), (49, 480, 832), (49, 832, 480), (49, 704, 1280)]


@pytest.mark.parametrize(
    ("video", "bucket"),
    [
        ((200, 480, 832), (81, 480, 832)),
        ((80, 480, 832), (49, 480, 832)),
        ((49, 1280, 720), (49, 832, 480)),
        ((200, 704, 1280), (49, 704, 1280)),
        ((49, 480, 480), (49, 480, 832)),
    ],
    ids=["longest", "frames first", "upright", "aspect before length", "square"],
)
def test_choose_bucket(video, bucket):
    assert choose_bucket(*video, BUCKETS) == bucket


def test_choose_bucket_enlarges_only_where_it_must():
    buckets = [(9, 32, 32), (9, 64, 64), (9, 96, 96)]
    assert choose_bucket(9, 70, 70, buckets) == (9, 64, 64)
    assert choose_bucket(9, 16, 16, buckets) == (9, 32, 32)


def test_choose_bucket_refuses_a_short_video():
    with pytest.raises(ValueError, match="has 48 frames at the training frame rate; the shortest bucket needs 49"):
        choose_bucket(48, 480, 832, BUCKETS)


def test_frames_available_is_the_last_frame_still_inside():
    # Frames 0, 3, 6, 9 of ten at 24 per second are the frames at 8 per second.
    assert frames_available(10, 24, 8) == 4
    assert frames_available(9, 24, 8) == 3
    assert frames_available(10, 8, 8) == 10


def test_faster_videos_are_thinned_out(config, tmp_path):
    write_video(tmp_path / "fast.mp4", moving_square(0, num_frames=25), 24)
    clip = data.read_clip(tmp_path / "fast.mp4", config)
    frames, _ = read_video(tmp_path / "fast.mp4")
    expected = torch.stack([crop_and_resize(frame, 32, 32) for frame in frames[::3]], dim=1)
    assert torch.equal(clip, expected)
    write_video(tmp_path / "slow.mp4", moving_square(0), 6)
    with pytest.raises(ValueError, match="has 6 frames per second; training is at 8"):
        data.read_clip(tmp_path / "slow.mp4", config)


# -- cache ------------------------------------------------------------------------------------------------------------


def test_cache_holds_what_the_pipeline_would_compute(config, tmp_path):
    clips = cache(config)
    latents, embeds = clips.load([1])
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


def test_cache_is_found_again_without_encoders(config, monkeypatch):
    first = cache(config)
    monkeypatch.setattr(data, "encode_video", None)
    monkeypatch.setattr(data, "UMT5EncoderModel", None)
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
    encoded, encode_video = [], data.encode_video

    def counting(vae, pixels):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(1)
        return encode_video(vae, pixels)

    monkeypatch.setattr(data, "encode_video", counting)
    with pytest.raises(KeyboardInterrupt):
        cache(config)
    encoded.clear()
    clips = cache(config)
    assert len(encoded) == 1 and len(clips) == 3

    # Cut off, as by a full disk or a copy that was broken off: made again.
    os.truncate(clips.latents[0], 200)
    encoded.clear()
    assert cache(config).load([0])[0].shape == (1, 16, 3, 4, 4) and len(encoded) == 1


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


def test_buckets_must_fit_the_model(config, model):
    data.check_buckets(config, model)
    with pytest.raises(ValueError, match="`num_frames=10` must be 4k"):
        data.check_buckets(replace(config, buckets=[[10, 32, 32]]), model)
    with pytest.raises(ValueError, match="`width=40` must be a positive multiple of 16; nearest: 32 and 48"):
        data.check_buckets(replace(config, buckets=[[9, 32, 40]]), model)


# -- order ------------------------------------------------------------------------------------------------------------


def test_batch_order_goes_through_every_clip_in_batches_of_one_shape():
    shapes = [(16, 3, 4, 4)] * 5 + [(16, 5, 4, 4)] * 2 + [(16, 2, 4, 4)]
    order = BatchOrder(shapes, batch_size=2, seed=0)
    # 5 clips need three batches, 2 and 1 one each.
    assert order.batches_per_epoch == 5
    epochs = [[order[epoch * 5 + index] for index in range(5)] for epoch in range(2)]
    for batches in epochs:
        assert {len({shapes[index] for index in batch}) for batch in batches} == {1}
        counts = Counter(index for batch in batches for index in batch)
        assert set(counts) == set(range(8)) and sum(counts.values()) == 10
    assert epochs[0] != epochs[1]
    # Any batch, asked for alone, is the same.
    assert BatchOrder(shapes, 2, 0)[7] == epochs[1][2] and BatchOrder(shapes, 2, 1)[7] != epochs[1][2]
