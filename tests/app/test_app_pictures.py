import gc
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest

from diffusers_fvg.app.limits import Limits
from diffusers_fvg.app.pictures import PictureFile, Upload
from diffusers_fvg.app.session import Session, Sessions


def noise(height, width, seed=0):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture
def worker(tmp_path):
    folder = tmp_path / "server"
    folder.mkdir()
    sizes = {"height": 64, "width": 64, "num_frames": 17}
    return SimpleNamespace(
        folder=folder, limits=Limits(anchors=2, people=2), pipe=SimpleNamespace(call_defaults=sizes)
    )


def test_a_picture_is_on_disk_as_long_as_somebody_needs_it(tmp_path):
    image = noise(48, 80)
    file = PictureFile.of(tmp_path, image)
    other, fitted = file, file.fitted(64, 64)
    assert np.array_equal(np.asarray(file.open()), np.asarray(image))
    # The size is the same: nothing is resampled, and nothing lost.
    assert np.array_equal(np.asarray(file.fitted(48, 80).open()), np.asarray(image))
    assert fitted.open().size == (64, 64) and len(list(tmp_path.iterdir())) == 3
    del file, fitted
    assert len(list(tmp_path.iterdir())) == 2
    del other
    assert list(tmp_path.iterdir()) == []


def test_uploads_are_not_kept_in_memory_and_go_with_their_session(worker, tmp_path):
    noise(900, 1100).save(tmp_path / "photo.png")
    sessions = Sessions(worker)
    ann = sessions.of("ann")
    ann.upload(tmp_path / "photo.png", 0, 0.5)
    ann.upload(tmp_path / "photo.png", -1)
    (tmp_path / "photo.png").unlink()
    # By their type: `isinstance` asks a proxy for the object it stands for, which may be gone.
    images = [each for each in gc.get_objects() if issubclass(type(each), PIL.Image.Image)]
    large = [each for each in images if each.size == (1100, 900)]
    assert large == []
    anchors = [upload.anchor() for upload in ann.anchors]
    assert [(each.frame_index, each.strength) for each in anchors] == [(0, 0.5), (-1, 1.0)]
    assert all(np.array_equal(np.asarray(each.image), np.asarray(noise(900, 1100))) for each in anchors)
    # Two pictures, and what the model will see of them.
    assert len(list(worker.folder.iterdir())) == 4
    del ann
    sessions.of("bob"), sessions.of("cleo")
    assert list(worker.folder.iterdir()) == []


def test_no_more_anchors_are_taken_than_the_limit_but_others_in_their_place(worker, tmp_path):
    path = tmp_path / "picture.png"
    noise(64, 64).save(path)
    session = Session(worker, "ann")
    for frame_index in (0, -1):
        session.upload(path, frame_index)
    with pytest.raises(ValueError, match="`anchors` has 3 pictures; this server allows at most 2 for a video"):
        session.upload(path, 8)
    for frame_index in (17, -18):
        with pytest.raises(ValueError, match=f"17 frames, from 0 to 16, and no frame {frame_index}"):
            session.upload(path, frame_index)
    noise(64, 64, seed=1).save(path)
    # The last frame of 17, counted from the first.
    session.upload(path, 16)
    assert [anchor.frame_index for anchor in session.anchors] == [0, 16]
    assert np.array_equal(np.asarray(session.anchors[1].anchor().image), np.asarray(noise(64, 64, seed=1)))


@pytest.mark.parametrize("strength", [0, 1.5, float("nan")])
def test_a_strength_that_is_none_is_refused(strength):
    with pytest.raises(ValueError, match="`strength="):
        Upload(None, 0, strength)
