"""What `rewriter_motion` does to the shapes model, whose video model learnt on whole prompts. Counts: `examples/results/stage1`."""

import numpy as np
import pytest

from diffusers_fvg import Anchor, load_embedded
from diffusers_fvg.shapes.held_out import split_scenes
from diffusers_fvg.shapes.scorer import score_video
from diffusers_fvg.shapes.study import FirstFrames, noise


@pytest.mark.slow
def test_the_shapes_model_needs_more_than_the_motion():
    pipe = load_embedded()
    pipe.set_progress_bar_config(disable=True)
    scenes, _ = split_scenes(9, 4)
    frames, prompts = FirstFrames(pipe, scenes), [scene.prompt for scene in scenes]
    anchors = [[Anchor(frames.composed("written", index, 0))] for index in range(len(scenes))]
    scores = {}
    for name, texts in (("prompt", prompts), ("motion", pipe.describe_motion(prompts, None, frames.captions))):
        scores[name] = []
        for begin in range(0, len(scenes), 16):
            batch = range(len(scenes))[begin : begin + 16]
            given = [texts[index] for index in batch], [anchors[index] for index in batch]
            videos = pipe.animate(*given, generator=[noise(index, 0) for index in batch], output_type="uint8")
            of_scenes = [(scenes[index].category, scenes[index].meta) for index in batch]
            scores[name] += [score_video(*pair, *scene) for pair, scene in zip(zip(videos), of_scenes)]
    difference = np.subtract(scores["motion"], scores["prompt"])
    print({name: np.mean(values) for name, values in scores.items()}, difference.std(ddof=1) / len(scenes) ** 0.5)
    assert len(scenes) == 60 and difference.mean() < -0.2
