"""The same seeds give the same video: across runs, sizes of batches, places in them and processes.

By record: `test_record.py`. With offload: `test_pipeline_factorized_video.py`. By engines: `tests/evaluation/test_engines.py`.
"""

import hashlib

import pytest
import torch
from contract_pipelines import PIPELINES, call_of, expected, fresh, shared


PROMPTS = ["a red circle", "a blue square moves", "a green star"]
each_pipeline = pytest.mark.parametrize("name", PIPELINES)


@each_pipeline
def test_a_seed_repeats_a_video_bit_for_bit_and_another_does_not(name):
    pipe = shared(name)
    given = torch.Generator().manual_seed(0)
    for generator in (0, given, [0]):
        assert torch.equal(pipe(**call_of(name, generator=generator)).frames, expected(name))
    assert not torch.equal(pipe(**call_of(name, generator=1)).frames, expected(name))
    assert torch.equal(fresh(name)(**call_of(name)).frames, expected(name))


@each_pipeline
def test_a_video_is_the_same_at_any_place_of_a_batch_of_any_size(name):
    pipe = shared(name)
    alone = [pipe(**call_of(name, prompt=text, generator=seed)).frames[0] for seed, text in enumerate(PROMPTS)]
    for order in ((0, 1, 2), (2, 0, 1), (1, 0)):
        prompts, generators = [PROMPTS[place] for place in order], list(order)
        made = pipe(**call_of(name, prompt=prompts, generator=generators)).frames
        for place, video in zip(order, made):
            # Sums of a batch are rounded in another order: 3e-6 of the range with the embedded model.
            torch.testing.assert_close(video, alone[place], rtol=0, atol=1e-4)
            others = [other for number, other in enumerate(alone) if number != place]
            assert all((video - other).abs().max() > 1e-3 for other in others)


@pytest.mark.slow
def test_a_fresh_process_makes_the_same_video(run_python):
    code = """
        import hashlib, sys
        sys.path += [folder + "/dreamer" for folder in sys.path if folder.endswith("tests")]
        sys.path += [folder + "/pipelines" for folder in sys.path if folder.endswith("tests")]
        from contract_pipelines import PIPELINES, expected
        for name in PIPELINES:
            print(name, hashlib.sha256(expected(name).contiguous().numpy().tobytes()).hexdigest())
    """
    lines = [line.split() for line in run_python(code).splitlines() if line.split()[0] in PIPELINES]
    assert dict(lines) == {
        name: hashlib.sha256(expected(name).contiguous().numpy().tobytes()).hexdigest() for name in PIPELINES
    }
