"""The examples run as they stand. `three_stages.py` and `long_video.py` have tests beside what they show."""

import json
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import PIL.Image
import pytest
from safetensors.torch import load_file

from diffusers_fvg.media import read_video, read_video_metadata


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, quick_embedded):
    """Runs an example in an empty folder; `run.names` has its variables afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(name: str) -> Path:
        monkeypatch.setattr(sys, "argv", [name, "made"])
        run.names = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        # Nothing is written beside it.
        assert [path.name for path in tmp_path.iterdir()] == ["made"]
        return tmp_path / "made"

    return run


def test_own_models_make_a_video(run, capsys):
    made = run("own_models.py")
    record = read_video_metadata(made / "video.mp4")
    assert record["prompt"] == "A blue square moves upwards" and "blue square" in record["first_frame_prompt"]
    assert "drew: " in capsys.readouterr().out and read_video(made / "video.mp4")[0].shape == (17, 384, 384, 3)


def test_a_video_goes_from_the_first_picture_to_the_last(run):
    made = run("first_and_last_frame.py")
    frames, _ = read_video(made / "video.mp4")
    with PIL.Image.open(made / "video.gif") as gif:
        assert gif.n_frames == 17
    pictures = [np.asarray(run.names[name].resize((384, 384), 0), float) for name in ("first", "last")]
    for frame, (its_own, other) in ((frames[0], pictures), (frames[-1], pictures[::-1])):
        assert 1.5 * np.abs(frame - its_own).mean() < np.abs(frame - other).mean()


def test_a_lora_is_trained_used_and_exported(run):
    made = run("train_lora.py")
    assert read_video(made / "video.mp4")[0].shape[0] == 17
    exported = load_file(made / "comfyui.safetensors")
    trained = load_file(next((made / "lora" / "weights").glob("*.safetensors")))
    assert len(exported) == len(trained) and all(key.startswith("diffusion_model.blocks.") for key in exported)
    assert any(np.abs(tensor.numpy()).max() > 0 for key, tensor in exported.items() if "lora_B" in key)


def test_a_table_becomes_videos(run, capsys):
    made = run("batch.py")
    videos = sorted((made / "out" / "videos").glob("*.mp4"))
    records = [read_video_metadata(path) for path in videos]
    assert [(record["prompt"], record["mode"]) for record in records] == [
        ("A red circle moves to the right", "factorized"),
        ("A blue square moves upwards", "direct"),
    ]
    assert records[0]["seeds"]["video"] == 3 and "red circle" in capsys.readouterr().out


def test_a_benchmark_ends_in_a_report(run):
    made = run("evaluate.py")
    scores = json.loads((made / "results" / "scores.json").read_text())
    report = (made / "report" / "report.md").read_text()
    assert scores and "direct" in report and "factorized" in report


def test_the_notebook_runs(tmp_path, monkeypatch, quick_embedded):
    """Runs the cells of a notebook in one namespace, without a kernel."""
    monkeypatch.chdir(tmp_path)
    shown = ModuleType("IPython.display")
    shown.Image = lambda path: SimpleNamespace(content=Path(path).read_bytes())
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    notebook = json.loads((EXAMPLES / "three_stages.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    names = {}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert "blue circle" in names["caption"] and len(names["pictures"]) == 4
    assert read_video_metadata(tmp_path / "again.mp4")["prompt"] == names["prompt"]
    assert {path.name for path in tmp_path.iterdir()} == {"video.gif", "video.mp4", "strip.png", "again.mp4"}


def test_the_workflow_s_links_lead_from_the_lora_to_the_video():
    """By the form that ComfyUI's /prompt takes: node -> class and inputs; a link is `[node, output]`."""
    nodes = json.loads((EXAMPLES / "comfyui" / "wan2.2-5b-anchor.json").read_text(encoding="utf-8"))
    links = {
        number: {value[0] for value in node["inputs"].values() if isinstance(value, list)}
        for number, node in nodes.items()
    }
    assert all(used <= nodes.keys() for used in links.values())
    (end,) = (number for number, node in nodes.items() if node["class_type"] == "SaveVideo")
    reached, todo = set(), {end}
    while todo:
        reached |= todo
        todo = set().union(*(links[number] for number in todo)) - reached
    assert reached == nodes.keys()
    page = (EXAMPLES / "comfyui" / "README.md").read_text(encoding="utf-8")
    assert {node["class_type"] for node in nodes.values()} >= {
        "LoraLoaderModelOnly",
        "Wan22ImageToVideoLatent",
        "KSampler",
    }
    (sampler,) = (node["inputs"] for node in nodes.values() if node["class_type"] == "KSampler")
    (shift,) = (node["inputs"]["shift"] for node in nodes.values() if node["class_type"] == "ModelSamplingSD3")
    assert f"{sampler['steps']} steps, `{sampler['sampler_name']}`, cfg {sampler['cfg']:g}" in page
    assert f"shift {shift:g}" in page
