import numpy as np
import pytest

from diffusers_fvg.evaluation.check import check_folder
from diffusers_fvg.evaluation.manifest import Manifest
from diffusers_fvg.evaluation.plan import PlannedVideo, write_plan
from diffusers_fvg.media import write_video


def moving(num_frames=9, size=32):
    """A white square that crosses the picture."""
    frames = np.full((num_frames, size, size, 3), 90, np.uint8)
    for index in range(num_frames):
        frames[index, 8:16, 2 * index : 2 * index + 8] = 250
    return frames


FAULTS = {
    "good": None,
    "missing": "missing",
    "gone": "missing",
    "cut": "truncated",
    "zeroed": "unreadable",
    "text": "unreadable",
    "short": "too short",
    "other": "stray",
    "black": "black",
    "still": "frozen",
    "again": "duplicate seed",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A video for each fault, and strays."""
    out = tmp_path_factory.mktemp("checked")
    rows = {
        name: PlannedVideo(f"videos/a/{name}.mp4", "a", number, {"num_frames": 9})
        for number, name in enumerate(FAULTS)
    }
    rows["again"] = PlannedVideo("videos/a/again.mp4", "a", rows["good"].seed, {"num_frames": 9})
    write_plan(out, rows.values())
    manifest = Manifest(out)
    for name, row in rows.items():
        path = out / row.path
        if name == "missing":
            continue
        frames = {"short": moving()[:5], "black": moving() * 0, "still": moving()[[0] * 9]}.get(name, moving())
        write_video(path, frames, 8, {"prompt": "b" if name == "other" else "a", "num_frames": 9})
        manifest.add({"path": row.path, "status": "made", "bytes": path.stat().st_size})
        data = path.read_bytes()
        if name == "gone":
            path.unlink()
        elif name == "cut":
            path.write_bytes(data[: len(data) // 2])
        elif name == "zeroed":
            start = data.index(b"mdat") + 8
            path.write_bytes(data[:start] + bytes(200) + data[start + 200 :])
        elif name == "text":
            path.write_bytes(b"no video".ljust(len(data)))
    manifest.close()
    (out / "videos" / "a" / ".DS_Store").touch()
    (out / "videos" / "a" / "extra.mp4").touch()
    return out


def test_each_fault_is_found_and_named(folder):
    found = [(finding.kind, finding.path) for finding in check_folder(folder)]
    expected = [(kind, f"videos/a/{name}.mp4") for name, kind in FAULTS.items() if kind]
    assert found == [*expected, ("stray", "videos/a/.DS_Store"), ("stray", "videos/a/extra.mp4")]
    faults = {finding.kind: finding.is_fault for finding in check_folder(folder)}
    assert [kind for kind, is_fault in faults.items() if not is_fault] == ["frozen"]


def test_an_evaluator_may_need_more_frames(folder):
    short = [finding.path for finding in check_folder(folder, min_frames=16) if finding.kind == "too short"]
    assert "videos/a/good.mp4" in short and len(short) == 6
