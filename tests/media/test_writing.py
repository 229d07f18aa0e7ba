import resource

import av
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_fvg.media import frames_to_uint8, read_video, read_video_metadata, write_strip, write_video


GREY, RED = (128, 128, 128), (220, 40, 40)


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    """Nine frames of a red square that moves from left to right over grey."""
    frames = np.full((9, 48, 64, 3), GREY, dtype=np.uint8)
    for index, frame in enumerate(frames):
        frame[16:32, 4 + 4 * index : 20 + 4 * index] = RED
    return frames


@pytest.mark.parametrize("form", ["uint8", "float", "tensor", "bfloat16", "pil"])
def test_frames_in_every_form_are_the_same_array(clip, form):
    forms = {
        "uint8": clip,
        "float": clip / 255,
        "tensor": torch.from_numpy(clip).permute(0, 3, 1, 2) / 255,
        "bfloat16": (torch.from_numpy(clip).permute(0, 3, 1, 2) / 255).bfloat16(),
        "pil": [Image.fromarray(frame) for frame in clip],
    }
    result = frames_to_uint8(forms[form])
    assert result.dtype == np.uint8
    # bfloat16 keeps 8 bits: half a level of 256 in the upper half of the range.
    assert np.abs(result.astype(int) - clip).max() <= (1 if form == "bfloat16" else 0)


@pytest.mark.parametrize(
    "frames, message",
    [
        pytest.param(np.zeros((2, 8, 8, 4), np.uint8), r"\(F, H, W, 3\)", id="alpha"),
        pytest.param(np.zeros((8, 8, 3), np.uint8), r"\(F, H, W, 3\)", id="one picture"),
        pytest.param(np.zeros((0, 8, 8, 3), np.uint8), r"\(F, H, W, 3\)", id="no frame"),
        pytest.param([], "at least one", id="empty list"),
        pytest.param(np.zeros((2, 8, 8, 3), np.int64), "int64", id="integers"),
        pytest.param(np.full((2, 8, 8, 3), 200.0), "rescale or clamp", id="0 to 255"),
        pytest.param(np.full((2, 8, 8, 3), np.nan), "rescale or clamp", id="not a number"),
        pytest.param(torch.full((2, 3, 8, 8), -0.5), "rescale or clamp", id="-1 to 1"),
        pytest.param(torch.zeros(2, 8, 8, 3), r"\(2, 8, 3, 8\)", id="channels last tensor"),
        pytest.param(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "torch.uint8", id="uint8 tensor"),
        pytest.param([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 10))], "resize", id="two sizes"),
    ],
)
def test_bad_frames_are_refused(frames, message):
    with pytest.raises(ValueError, match=message):
        frames_to_uint8(frames)


@pytest.mark.parametrize("scale", [1, 4])
def test_video_round_trip(tmp_path, clip, scale):
    path = tmp_path / "new folder" / "clip.mp4"
    write_video(path, clip, frame_rate=7.5, scale=scale)
    frames, frame_rate = read_video(path)
    expected = np.kron(clip, np.ones((1, scale, scale, 1), np.uint8))
    assert frames.shape == expected.shape
    assert frame_rate == 7.5
    error = np.abs(frames.astype(int) - expected)
    assert error.mean() < 1.0
    # Enlarged, a pixel is at least one chroma sample, so that edges keep their colour.
    assert error.max() < (30 if scale == 4 else 150)
    assert [entry.name for entry in path.parent.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (160, 32, 240)])
def test_colours_survive(tmp_path, colour):
    write_video(tmp_path / "flat.mp4", np.full((3, 16, 16, 3), colour, np.uint8), 24)
    frames, _ = read_video(tmp_path / "flat.mp4")
    assert np.abs(frames.astype(int) - colour).max() <= 3


def test_video_is_what_players_expect(tmp_path, clip):
    path = tmp_path / "clip.mp4"
    write_video(path, clip, frame_rate=24000 / 1001)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec.canonical_name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.frames, stream.average_rate, stream.guessed_rate) == (9, stream.base_rate, stream.average_rate)
        assert (stream.average_rate.numerator, stream.average_rate.denominator) == (24000, 1001)
        # BT.709 is 1 in the tables of ISO 23091-2, limited range is 1 in libavutil.
        context = stream.codec_context
        assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (1, 1, 1, 1)
        times = [frame.pts * stream.time_base for frame in container.decode(stream)]
    assert np.diff(times) == pytest.approx(1001 / 24000)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    # Nothing of the programs that wrote it, nor of the machine's number of threads.
    assert b"x264" not in data and b"Lavf" not in data and b"threads" not in data


def test_metadata_round_trip(tmp_path, clip):
    path = tmp_path / "clip.mp4"
    metadata = {"prompt": 'A "red" square\nmoves \u2192 \U0001f680', "seeds": [3, 4], "versions": {"torch": "2.13.0"}}
    write_video(path, clip, 8, metadata=metadata)
    assert read_video_metadata(path) == metadata
    with av.open(str(path)) as container:
        assert container.metadata["title"] == metadata["prompt"]
        assert "moves" in container.metadata["comment"] and "\U0001f680" in container.metadata["comment"]


def test_metadata_of_other_programs_is_refused(tmp_path, clip):
    with av.open(str(tmp_path / "other.mp4"), "w") as container:
        container.metadata["comment"] = "holiday"
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(clip[0], format="rgb24")))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="holiday"):
        read_video_metadata(tmp_path / "other.mp4")


@pytest.mark.parametrize(
    "name, size, options, message",
    [
        pytest.param("clip.gif", (8, 8), {}, "clip.mp4", id="file type"),
        pytest.param("clip.mp4", (9, 8), {}, "crop to 8x8 or pass scale=2", id="odd height"),
        pytest.param("clip.mp4", (8, 9), {"scale": 3}, "24x27.*crop to 24x26 or pass scale=6", id="odd width"),
        pytest.param("clip.mp4", (8, 8), {"frame_rate": 0}, "frame_rate=0", id="frame rate"),
        pytest.param("clip.mp4", (8, 8), {"scale": 0}, "scale=0", id="scale"),
    ],
)
def test_bad_videos_are_refused_and_leave_nothing(tmp_path, name, size, options, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / name, np.zeros((2, *size, 3), np.uint8), **({"frame_rate": 8} | options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, write",
    [
        ("clip.mp4", lambda path, frames: write_video(path, frames, 8, scale=8)),
        ("strip.png", lambda path, frames: write_strip(path, "A red square", None, None, frames)),
    ],
)
def test_a_failed_write_keeps_the_old_file(tmp_path, clip, name, write):
    path = tmp_path / name
    write(path, clip)
    before = path.read_bytes()
    # A file may not grow beyond 500 bytes: what a full disk does.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(OSError):
            write(path, clip)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("part", [0.1, 0.5, 0.95])
def test_a_truncated_video_is_refused(tmp_path, part):
    path = tmp_path / "clip.mp4"
    write_video(path, np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3)).astype(np.uint8), 8)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(ValueError, match="damaged"):
        read_video(path)


@pytest.mark.parametrize("read", [read_video, read_video_metadata])
def test_a_file_that_is_no_video_is_refused(tmp_path, read):
    (tmp_path / "clip.mp4").write_text("not a video")
    with pytest.raises(ValueError, match="clip.mp4"):
        read(tmp_path / "clip.mp4")


def columns_of(strip: np.ndarray, colour: tuple[int, int, int]) -> list[tuple[int, int]]:
    """First and last column of every run of columns that hold many pixels of a colour."""
    found = np.flatnonzero(np.all(strip == colour, axis=2).sum(axis=0) > 40)
    runs = np.split(found, np.flatnonzero(np.diff(found) > 1) + 1)
    return [(int(run[0]), int(run[-1])) for run in runs if len(run) > 10]


def test_strip_shows_anchor_and_frames_in_order(tmp_path, clip):
    anchor = Image.new("RGB", (64, 48), (0, 0, 255))
    path = tmp_path / "new folder" / "strip.png"
    write_strip(path, "A red square moves to the right", "A red square at the left.", anchor, clip, num_frames_shown=5)
    with Image.open(path) as image:
        strip = np.asarray(image.convert("RGB"))
    # 64x48 becomes 192x144; anchor and five frames side by side, six would need another 192 columns.
    assert 6 * 192 < strip.shape[1] < 7 * 192
    assert (strip[[0, -1]] == 255).all() and (strip[:, [0, -1]] == 255).all()

    (blue,) = columns_of(strip, (0, 0, 255))
    assert blue[1] - blue[0] + 1 == 192
    assert np.all(strip == (0, 0, 255), axis=2).sum() == 192 * 144
    squares = columns_of(strip, RED)
    assert len(squares) == 5 and blue[1] < squares[0][0]
    assert all(last - first + 1 == 48 for first, last in squares)


def test_strip_picks_evenly_spaced_frames(tmp_path):
    colours = [(25 * index, 200 - 25 * index, 77) for index in range(9)]
    frames = np.stack([np.full((32, 32, 3), colour, np.uint8) for colour in colours])
    write_strip(tmp_path / "strip.png", "A colour changes", None, None, frames)
    with Image.open(tmp_path / "strip.png") as image:
        strip = np.asarray(image.convert("RGB"))
    places = [columns_of(strip, colour) for colour in colours]
    # 0, 1.6, 3.2, 4.8, 6.4 and 8, rounded.
    shown = [index for index, place in enumerate(places) if place]
    assert shown == [0, 2, 3, 5, 6, 8]
    assert [places[index][0] for index in shown] == sorted(places[index][0] for index in shown)


def test_strip_shows_all_moments_of_a_storyboard(tmp_path, clip):
    colours = [(0, 0, 255), (0, 128, 128)]
    anchors = [Image.new("RGB", (64, 48), colour) for colour in colours]
    captions = ["A red square at the left.", "A red square at the right."]
    paths = [tmp_path / "single.png", tmp_path / "storyboard.png"]
    write_strip(paths[0], "A red square moves", captions[0], anchors[0], clip)
    write_strip(paths[1], "A red square moves", captions, anchors, clip)
    single, strip = (np.asarray(Image.open(path).convert("RGB")) for path in paths)
    # Another column for its picture, another line for its caption.
    assert strip.shape[1] > single.shape[1] + 190 and strip.shape[0] > single.shape[0]
    (first,), (second,) = (columns_of(strip, colour) for colour in colours)
    assert first[1] < second[0] < columns_of(strip, RED)[0][0]


def test_strip_without_anchor_or_caption(tmp_path, clip):
    write_strip(tmp_path / "strip.png", "A red square", None, None, clip[:2])
    with Image.open(tmp_path / "strip.png") as image:
        strip = np.asarray(image.convert("RGB"))
    assert len(columns_of(strip, RED)) == 2


def test_strip_wraps_every_word(tmp_path, clip):
    """A text of many lines makes the strip taller by those lines; one endless word does not leave the picture."""
    heights = []
    for prompt in ["red", "red square " * 40, "r" * 600]:
        write_strip(tmp_path / "strip.png", prompt, None, None, clip)
        with Image.open(tmp_path / "strip.png") as image:
            strip = np.asarray(image.convert("RGB"))
        assert (strip[:, -20:] == 255).all()
        heights.append(strip.shape[0])
    assert heights[0] + 60 < heights[1]
    assert heights[0] + 60 < heights[2]


def test_large_frames_are_reduced(tmp_path):
    frames = np.full((3, 704, 1280, 3), RED, np.uint8)
    write_strip(tmp_path / "strip.png", "A red square", None, None, frames)
    with Image.open(tmp_path / "strip.png") as image:
        strip = np.asarray(image.convert("RGB"))
    # 1280x704 at a longer side of 192 is 192 x 105.6.
    assert np.all(strip == RED, axis=2).sum() == 3 * 192 * 106


@pytest.mark.parametrize(
    "name, shown, message", [("strip.jpg", 6, "strip.png"), ("strip.png", 0, "num_frames_shown=0")]
)
def test_bad_strips_are_refused(tmp_path, clip, name, shown, message):
    with pytest.raises(ValueError, match=message):
        write_strip(tmp_path / name, "A red square", None, None, clip, num_frames_shown=shown)


def test_an_iterator_of_frames_gives_the_same_file(tmp_path, clip):
    write_video(tmp_path / "whole.mp4", clip, 12, scale=2)
    write_video(tmp_path / "streamed.mp4", iter(clip), 12, scale=2)
    streamed, whole = (read_video(tmp_path / f"{name}.mp4")[0] for name in ("streamed", "whole"))
    # x264's threads do not always choose alike.
    assert streamed.shape == whole.shape and np.abs(streamed.astype(float) - whole).mean() < 0.5


@pytest.mark.parametrize(
    "make, message",
    [
        pytest.param(lambda clip: iter([]), "at least one", id="none"),
        pytest.param(
            lambda clip: iter([clip[0], clip[1][:, :32]]), r"\(48, 32, 3\) comes after \(48, 64, 3\)", id="two sizes"
        ),
        pytest.param(lambda clip: iter([clip[0], clip[1] * 2.0]), "rescale or clamp", id="a later one out of range"),
    ],
)
def test_bad_iterators_are_refused_and_leave_nothing(tmp_path, clip, make, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "video.mp4", make(clip), 12)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("channels", [1, 2])
def test_sound_is_read_back(tmp_path, channels):
    """A tone of 440 Hz a channel, an octave higher in the second: the loudest frequencies of what is decoded."""
    rate, tones = 24000, [440, 880][:channels]
    time = np.arange(rate) / rate
    sound = np.stack([0.5 * np.sin(2 * np.pi * tone * time) for tone in tones])
    frames = np.zeros((8, 16, 16, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", frames, 8, audio=torch.tensor(sound), audio_sampling_rate=rate)
    with av.open(str(tmp_path / "a.mp4")) as container:
        (stream,) = container.streams.audio
        read = np.concatenate([frame.to_ndarray() for frame in container.decode(stream)], axis=1)
        assert stream.rate == rate and len(read) == channels
    assert abs(read.shape[1] / rate - 1) < 0.1
    loudest = np.abs(np.fft.rfft(read[:, :rate])).argmax(axis=1) * rate / min(rate, read.shape[1])
    assert np.abs(loudest - tones).max() < 3
    assert read_video(tmp_path / "a.mp4")[0].shape == frames.shape


@pytest.mark.parametrize(
    ("sound", "rate", "message"),
    [
        (np.zeros(8), 8000, r"shape \(1 or 2, samples\) .* has \(8,\)"),
        (np.zeros((3, 8)), 8000, r"has \(3, 8\)"),
        (np.full((1, 8), np.nan), 8000, "finite"),
        (np.zeros((1, 8)), None, "`audio_sampling_rate=None` must be a number of samples"),
    ],
)
def test_bad_sound_is_refused(tmp_path, sound, rate, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "a.mp4", np.zeros((2, 16, 16, 3), np.uint8), 8, audio=sound, audio_sampling_rate=rate)
    assert not list(tmp_path.iterdir())
