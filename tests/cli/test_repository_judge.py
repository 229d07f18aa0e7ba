"""A repository's judge of pictures, from what is looked at before weights are read to the picture that is kept."""

import json

import pytest
import torch
from tiny import tiny_pipeline
from tiny_judges import tiny_chat_judge, tiny_clip_judge

from diffusers_fvg.cli import main
from diffusers_fvg.pipelines.profiles import pipeline_stages
from diffusers_fvg.recipes.outline import outline
from diffusers_fvg.recipes.sources import find_source


PROMPT = "a red circle moves right"
OPTIONS = ["--quiet", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def repository(hub, tmp_path):
    """A pipeline on the Hub whose judge is in a repository of its own."""
    judge, pipe = tiny_chat_judge(), tiny_pipeline()
    judge.model.save_pretrained(tmp_path / "judge")
    judge.processor.save_pretrained(tmp_path / "judge")
    judge.reference = {"model": "org/judge", "revision": hub.add("org/judge", tmp_path / "judge")}
    pipe.anchor_judge = judge
    pipe.save_pretrained(tmp_path / "pipe")
    hub.add("org/pipe", tmp_path / "pipe")
    return "org/pipe"


def test_a_judge_is_planned_for_and_asked_for_by_name(repository, hub, tmp_path, capsys):
    size = ["--height", "16", "--width", "16"]
    assert main(["plan", "--model", repository, "--memory", "12GB", *size, *OPTIONS]) == 0
    told = capsys.readouterr().out
    assert "  anchor_judge " in told and "  org/judge" in told
    assert not [name for name in hub.downloaded("org/judge") if name.endswith(".safetensors")]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": PROMPT, "composer_num_candidates": 2}))
    plan = ["batch", str(rows), str(tmp_path / "out"), "--model", repository, "--plan-only", *size, *OPTIONS]
    assert main(plan) == 0
    picture = ["--num-candidates", "2", "--steps", "1", "--output", str(tmp_path / "anchor.png")]
    assert main(["compose", PROMPT, "--model", repository, *picture, *size, *OPTIONS]) == 0
    assert [name for name in hub.downloaded("org/judge") if name.endswith(".safetensors")]


@pytest.mark.parametrize("make", [tiny_clip_judge, tiny_chat_judge])
def test_a_judge_without_weights_is_as_large_as_the_judge(make, tmp_path):
    pipe = tiny_pipeline()
    pipe.anchor_judge = make()
    pipe.save_pretrained(tmp_path)
    made = outline(find_source(tmp_path, None, {}), torch.float32)
    stages = {stage.name: stage for stage in pipeline_stages(made)}
    assert stages["anchor_judge"] == next(each for each in pipeline_stages(pipe) if each.name == "anchor_judge")
    assert made.anchor_judge.device.type == "meta"
    without = outline(find_source(tmp_path, None, {}), torch.float32, composer=False)
    assert without.composer is None and without.anchor_judge is None
