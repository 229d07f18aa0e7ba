import pytest
from quick import quick

from diffusers_fvg import load_embedded
from diffusers_fvg.shapes import ablation, anchors, appended, distillation, window
from diffusers_fvg.shapes.held_out import split_scenes
from diffusers_fvg.shapes.summary import MOTION_CATEGORIES


@pytest.fixture(scope="module")
def pipe():
    """The embedded model with few steps, and videos of 5 small frames, which are two latent frames."""
    return quick(load_embedded(), num_frames=5, height=32, width=32)


@pytest.fixture
def few_scenes(monkeypatch):
    """Reports on prompts of three of the seven categories, those of moving objects. Returns what chooses them."""

    def choose(per_category: int, tuning_per_category: int):
        chosen = split_scenes(per_category, tuning_per_category)
        return tuple([scene for scene in scenes if scene.category in MOTION_CATEGORIES] for scenes in chosen)

    for module in (ablation, anchors, appended, distillation, window):
        monkeypatch.setattr(module, "split_scenes", choose)
    return choose
