import io
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from diffusers_fvg.pipelines.progress import StageProgress


@pytest.fixture
def pipeline():
    return SimpleNamespace(progress_bar=lambda total: tqdm(total=total, file=io.StringIO()), interrupt=False)


def test_the_bar_counts_the_steps_of_all_stages(pipeline):
    seen = []
    progress = StageProgress(pipeline, lambda *step: seen.append(step[1:]))
    with progress.stage("encode"):
        assert (progress.bar.n, progress.bar.total) == (0, 1)
    with progress.stage("denoise", 4) as report:
        assert (progress.bar.n, progress.bar.total) == (1, 5)
        # A stage learns on its way that it has three steps, or five.
        report(1, 3)
        assert (progress.bar.n, progress.bar.total) == (2, 4)
        report(3, 5)
        assert (progress.bar.n, progress.bar.total) == (4, 6)
    assert (progress.bar.n, progress.bar.total) == (6, 6)
    assert seen == [("encode", 1, 1), ("denoise", 1, 3), ("denoise", 3, 5), ("denoise", 5, 5)]


def test_a_stage_that_was_interrupted_is_not_filled_up(pipeline):
    progress = StageProgress(pipeline)
    with progress.stage("denoise", 4) as report:
        report(1, 4)
        pipeline.interrupt = True
    assert (progress.bar.n, progress.bar.total) == (1, 4)
