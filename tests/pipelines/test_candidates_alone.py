"""Candidates of the embedded model, whose composer draws several images at once."""

import numpy as np
import torch

from diffusers_fvg import load_embedded
from diffusers_fvg.pipelines.candidates import compose_candidates


CAPTION = "A still picture of a blue square"


def test_each_candidate_of_a_single_caption_is_the_image_that_its_seed_draws_alone(monkeypatch, quick_embedded):
    pipe = load_embedded()
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(type(pipe.anchor_judge), "threshold", None)
    assert pipe.composer.batch_size > 1
    (candidates,) = compose_candidates(pipe, [CAPTION], None, [0], 2, None, None, None, None, None)
    assert len(candidates) == 2
    for candidate in candidates:
        generator = torch.Generator().manual_seed(candidate.seed)
        (alone,) = pipe.compose(CAPTION, generator=generator, num_candidates=1)
        assert np.array_equal(np.asarray(candidate.image), np.asarray(alone))
