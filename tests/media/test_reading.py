import shutil
from fractions import Fraction

import av
import numpy as np
import PIL.Image
import pytest
from scipy.ndimage import gaussian_filter
from video_files import TURNS, corners, damage, write_file

from diffusers_fvg.media import Video, read_video


def noise(num_frames: int, height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("turn", TURNS)
def test_frames_are_upright(tmp_path, turn):
    video = Video(write_file(tmp_path / "a.mp4", np.stack([corners()] * 2), turn=turn))
    (frame,) = video.frames([0])
    expected = TURNS[turn][1](corners())
    assert np.array_equal(frame, expected) and (video.height, video.width) == expected.shape[:2]


def test_a_turn_by_no_quarter_is_refused(tmp_path):
    path = write_file(tmp_path / "a.mp4", np.stack([corners()] * 2))
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 44
    # Half of the root of 2, of 45 degrees, in 16.16.
    values = [46341, 46341, 0, -46341, 46341]
    content[start : start + 20] = b"".join(value.to_bytes(4, "big", signed=True) for value in values)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is rotated by -?4[45] degrees, which is not a multiple of 90"):
        Video(path)


@pytest.mark.parametrize(("aspect", "size"), [(Fraction(4, 1), (32, 192)), (Fraction(2, 3), (48, 48))])
@pytest.mark.parametrize("turn", ["none", "clockwise"])
def test_pixels_are_square(tmp_path, aspect, size, turn):
    video = Video(write_file(tmp_path / "a.mp4", np.stack([corners()] * 2), aspect=aspect, turn=turn))
    assert (video.height, video.width) == (size if turn == "none" else size[::-1])
    (frame,) = video.frames([1])
    assert frame.shape == (video.height, video.width, 3)
    # The bright block is a third of the width and a quarter of the height, whatever the pixels were.
    bright = frame[..., 0] > 200
    assert bright.mean() == pytest.approx(1 / 12, rel=0.1)


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_high_dynamic_range_is_refused(tmp_path, transfer, name):
    with pytest.raises(ValueError, match=f"a.mp4 has high dynamic range \\({name}\\).*zscale"):
        read_video(write_file(tmp_path / "a.mp4", noise(2), transfer=transfer))


@pytest.mark.parametrize("suffix", ["webp", "avif"])
@pytest.mark.parametrize("count", [1, 3])
def test_what_ffmpeg_cannot_go_through_is_refused_by_its_name(tmp_path, suffix, count):
    frames = [PIL.Image.new("RGB", (32, 16), (60 * number, 0, 0)) for number in range(count)]
    # By whatever name it comes.
    path = tmp_path / "a.mp4"
    options = {"save_all": True, "append_images": frames[1:], "duration": 100} if count > 1 else {}
    frames[0].save(path, suffix, **options)
    if count == 1:
        assert read_video(path)[0].shape == (1, 16, 32, 3)
        return
    kind = {"webp": "WebP", "avif": "AVIF"}[suffix]
    with pytest.raises(
        ValueError, match=f"a.mp4 is an animated {kind}, which is a picture file and not a video: save"
    ):
        read_video(path)


def test_times_are_those_of_the_file(tmp_path):
    times = [0, 1000, 2000, 6000, 6500]
    video = Video(write_file(tmp_path / "a.mp4", noise(5), times=times))
    assert video.times == pytest.approx(np.array(times) / 16000)
    frames = list(video.frames([1, 3, 3]))
    assert all(np.array_equal(frame, noise(5)[index]) for frame, index in zip(frames, (1, 3, 3), strict=True))


@pytest.fixture(scope="module")
def bidirectional(tmp_path_factory):
    """A film with frames that rest on later ones, its frames, and the order in which the file has them."""
    soft = gaussian_filter(noise(1, 64, 160)[0].astype(float), (2, 2, 0))
    soft = ((soft - soft.min()) / np.ptp(soft) * 255).astype(np.uint8)
    path = tmp_path_factory.mktemp("film") / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        # Without arithmetic coding a decoder notices nearly any damage.
        stream.options = {"bf": "3", "b_strategy": "0", "coder": "0", "crf": "10"}
        stream.thread_count = 1
        for shift in range(16):
            picture = np.ascontiguousarray(soft[:, 4 * shift : 4 * shift + 96])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        ticks = [packet.pts for packet in container.demux(video=0) if packet.size]
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    order = [sorted(ticks).index(tick) for tick in ticks]
    assert order != sorted(order)
    return path, frames, order


def test_frames_are_found_where_others_come_first_in_the_file(bidirectional):
    path, frames, _ = bidirectional
    shown = list(Video(path).frames([2, 5, 6, 15]))
    assert all(np.array_equal(frame, frames[index]) for frame, index in zip(shown, (2, 5, 6, 15), strict=True))


@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_damaged_frame_is_refused_by_number(tmp_path, bidirectional, place):
    path, _, order = bidirectional
    damaged = damage(shutil.copy(path, tmp_path / "a.mp4"), place)
    with pytest.raises(ValueError, match=rf"a\.mp4 is damaged: frame {order[place]} of 16|a\.mp4 is not a video"):
        read_video(damaged)


def test_a_frame_that_rests_on_a_later_damaged_one_is_refused(tmp_path, bidirectional):
    """The last frame that is asked for is whole in itself: what follows it in time came before it in the file."""
    path, _, order = bidirectional
    place = next(number for number in range(1, 15) if order[number + 1] < order[number])
    last = order[place + 1]
    assert len(list(Video(path).frames(range(last + 1)))) == last + 1
    damaged = damage(shutil.copy(path, tmp_path / "a.mp4"), place)
    with pytest.raises(ValueError, match=f"is damaged: frame {order[place]} of 16"):
        list(Video(damaged).frames(range(last + 1)))


def test_what_a_frame_does_not_rest_on_may_be_damaged(tmp_path):
    path = write_file(tmp_path / "a.mp4", noise(8), g="4", coder="0")
    damage(path, 5)
    assert len(list(Video(path).frames(range(5)))) == 5
    with pytest.raises(ValueError, match="is damaged|is not a video|up to frame"):
        list(Video(path).frames(range(6)))
